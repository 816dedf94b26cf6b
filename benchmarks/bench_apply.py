"""How long a conversion takes beside copying the source, and beside its peers, in one run on one machine.

    python benchmarks/bench_apply.py [--pairs 5] [--peers] [--model FOLDER]

Each pair times, in turn, ``cp -r MODEL COPY && sync`` and the whole process ``surgeon apply``, which is durable when it
returns. Prints the median ratio of the pairs, the spread, and the peak resident memory of the process. The model is
``make_bench_model.py``'s (2.8 GB), in six shards and in one. ``--peers`` adds llm-compressor's ``model_free_ptq`` and
AutoRound's model-free mode where their environments exist (``make bench`` makes them): one run each.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from make_bench_model import write_bench_model

ROOT = Path(__file__).parents[1]
SURGEON = str(Path(sys.executable).with_name("surgeon"))
CASES = {
    "quark-w8a8-int8": ["quark-w8a8-int8"],
    "ct-w4a16 g128": ["ct-w4a16-g32", "--set", "group_size=128"],
}
PEERS = {
    "llm-compressor W8A8": ("llmcompressor", "model_free_ptq('{model}', '{out}', scheme='W8A8', {ignore}, device='cpu')"),
    "llm-compressor W4A16": ("llmcompressor", "model_free_ptq('{model}', '{out}', scheme='W4A16', {ignore}, device='cpu')"),
    "AutoRound W4A16": (
        "transformers",
        "AutoRound('{model}', scheme='W4A16', iters=0, disable_opt_rtn=True, model_free=True, device_map='cpu')"
        ".quantize_and_save('{out}', format='auto_round:auto_gptq')",
    ),
}
IMPORTS = {"llmcompressor": "from llmcompressor import model_free_ptq", "transformers": "from auto_round import AutoRound"}
IGNORE = (
    "ignore=['lm_head', 're:.*embed_tokens$', 're:.*mlp.gate$', 're:.*shared_expert_gate$', 're:^mtp.*', 're:.*conv1d$',"
    " 're:.*in_proj_[ab]$']"
)


def timed(command: list[str]) -> tuple[float, int, int]:
    """Wall seconds, peak resident bytes and exit status of a whole process."""
    start = time.monotonic()
    pid = os.posix_spawn(command[0], command, dict(os.environ, TQDM_DISABLE="1"), file_actions=_quiet())
    _, status, usage = os.wait4(pid, 0)
    return time.monotonic() - start, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status)


def _quiet() -> list[tuple[int, int, str, int, int]]:
    return [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_WRONLY, 0) for fd in (1, 2)]


def copy_and_sync(model: Path, place: Path) -> float:
    """Seconds of ``cp -r`` and ``sync``."""
    shutil.rmtree(place / "copy", ignore_errors=True)
    os.sync()
    seconds, _, status = timed(["/bin/sh", "-c", f"cp -r '{model}' '{place / 'copy'}' && sync"])
    if status:
        raise SystemExit("cp failed")
    shutil.rmtree(place / "copy")
    return seconds


def convert(arguments: list[str], model: Path, place: Path) -> tuple[float, int]:
    """Seconds and peak memory of a whole ``surgeon apply``."""
    shutil.rmtree(place / "out", ignore_errors=True)
    os.sync()
    command = [SURGEON, "apply", arguments[0], str(model), str(place / "out"), *arguments[1:], "--workers", "2"]
    seconds, memory, status = timed(command)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    shutil.rmtree(place / "out")
    return seconds, memory


def bench_case(name: str, arguments: list[str], model: Path, place: Path, pairs: int) -> None:
    shards = len(list(model.glob("*.safetensors")))
    first, _ = convert(arguments, model, place)
    copy_and_sync(model, place)
    ratios, copies, runs, peaks = [], [], [], []
    for _ in range(pairs):
        copied = copy_and_sync(model, place)
        seconds, memory = convert(arguments, model, place)
        copies.append(copied)
        runs.append(seconds)
        ratios.append(seconds / copied)
        peaks.append(memory)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(
        f"{name:18} {shards} shards  {statistics.median(runs):6.2f} s  cp+sync {statistics.median(copies):6.2f} s  "
        f"ratio {statistics.median(ratios):.2f} ({spread}, {pairs} pairs)  {max(peaks) / 1e6:.0f} MB  first run {first:.2f} s",
        flush=True,
    )


def bench_peer(name: str, model: Path, place: Path) -> None:
    environment, call = PEERS[name]
    python = ROOT / ".venvs" / environment / "bin" / "python"
    if not python.exists():
        print(f"{name:24} not installed")
        return
    shutil.rmtree(place / "out", ignore_errors=True)
    code = f"{IMPORTS[environment]}; {call.format(model=model, out=place / 'out', ignore=IGNORE)}"
    seconds, memory, status = timed([str(python), "-c", code])
    shutil.rmtree(place / "out", ignore_errors=True)
    print(f"{name:24} {seconds:6.1f} s  {memory / 1e6:.0f} MB" if not status else f"{name:24} failed with {status}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--place", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="surgeon-bench-", dir=options.place))
    try:
        for shards in (6, 1):
            model = place / f"model-{shards}"
            size = write_bench_model(model, shards=shards)
            print(f"model: {size / 1e9:.2f} GB BF16 in {shards} shards, {len(os.sched_getaffinity(0))} cores", flush=True)
            for name, arguments in CASES.items():
                bench_case(name, arguments, model, place, options.pairs)
            if options.peers and shards == 6:
                for name in PEERS:
                    bench_peer(name, model, place)
            shutil.rmtree(model)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
