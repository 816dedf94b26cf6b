"""How long a conversion takes beside copying the source, beside an older checkout of this project, and beside its peers.

    python benchmarks/bench_apply.py [--pairs 5] [--layers 4] [--shards 6 1] [--before CHECKOUT] [--peers] [--place FOLDER]

Each round times, in turn, ``cp -r MODEL COPY && sync`` and the whole process ``surgeon apply``, which is durable when it
returns. Prints the median ratio of the rounds, the spread, processor seconds (which other work on the machine disturbs
least), and the peak resident memory of the process. The model is
``make_bench_model.py``'s: 2.8 GB with 4 layers, 11 GB with 22. ``--before`` times the sources of another checkout in every
round too, with this interpreter and in alternating order, and prints how much longer ours takes. ``--peers`` adds
llm-compressor's ``model_free_ptq`` and AutoRound's model-free mode where their environments exist (``make bench`` makes
them): one run each.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
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


class Side:
    """One checkout's conversions of one case."""

    def __init__(self, name: str, checkout: Path) -> None:
        self.name = name
        self.checkout = checkout
        self.first = 0.0
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.memory: list[int] = []

    def convert(self, arguments: list[str], model: Path, place: Path) -> None:
        """Time a whole ``surgeon apply`` with this checkout's sources."""
        shutil.rmtree(place / "out", ignore_errors=True)
        os.sync()
        command = [SURGEON, "apply", arguments[0], str(model), str(place / "out"), *arguments[1:], "--workers", "2"]
        seconds, usage, status = timed(command, self.checkout)
        if status:
            raise SystemExit(f"{' '.join(command)} with the sources of {self.checkout} ended with {status}")
        shutil.rmtree(place / "out")
        self.seconds.append(seconds)
        self.processor.append(usage.ru_utime + usage.ru_stime)
        self.memory.append(usage.ru_maxrss * 1024)


def timed(command: list[str], checkout: Path = ROOT) -> tuple[float, resource.struct_rusage, int]:
    """Wall seconds, what was used, and exit status of a whole process that imports a checkout's sources."""
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": str(checkout)}
    start = time.monotonic()
    pid = os.posix_spawn(command[0], command, environment, file_actions=_quiet())
    _, status, usage = os.wait4(pid, 0)
    return time.monotonic() - start, usage, os.waitstatus_to_exitcode(status)


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


def bench_case(name: str, arguments: list[str], model: Path, place: Path, pairs: int, before: Path | None) -> None:
    shards = len(list(model.glob("*.safetensors")))
    now, *others = sides = [Side("now", ROOT), *([] if before is None else [Side("before", before)])]
    for side in sides:
        side.convert(arguments, model, place)
        side.first = side.seconds.pop()
        side.processor.clear()
        side.memory.clear()
    copy_and_sync(model, place)
    copies = []
    for number in range(pairs):
        copies.append(copy_and_sync(model, place))
        for side in sides if number % 2 else reversed(sides):
            side.convert(arguments, model, place)
    for side in sides:
        ratio, spread = _median_of_ratios(side.seconds, copies)
        print(
            f"{name:16} {side.name:6} {shards} shards  {statistics.median(side.seconds):6.2f} s  cp+sync "
            f"{statistics.median(copies):6.2f} s  ratio {ratio:.2f} ({spread}, {pairs} pairs)  "
            f"processor {statistics.median(side.processor):.2f} s  {max(side.memory) / 1e6:.0f} MB  first run {side.first:.2f} s",
            flush=True,
        )
    for side in others:
        ratio, spread = _median_of_ratios(now.seconds, side.seconds)
        least = min(now.seconds) / min(side.seconds)
        work = statistics.median(now.processor) / statistics.median(side.processor)
        print(
            f"{name:16} now takes {ratio:.3f} of {side.name} ({spread}); fastest runs {least:.3f}, processor {work:.3f}",
            flush=True,
        )


def _median_of_ratios(ours: list[float], theirs: list[float]) -> tuple[float, str]:
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"


def bench_peer(name: str, model: Path, place: Path) -> None:
    environment, call = PEERS[name]
    python = ROOT / ".venvs" / environment / "bin" / "python"
    if not python.exists():
        print(f"{name:24} not installed")
        return
    shutil.rmtree(place / "out", ignore_errors=True)
    code = f"{IMPORTS[environment]}; {call.format(model=model, out=place / 'out', ignore=IGNORE)}"
    seconds, usage, status = timed([str(python), "-c", code])
    shutil.rmtree(place / "out", ignore_errors=True)
    print(
        f"{name:24} {seconds:6.1f} s  {usage.ru_maxrss * 1024 / 1e6:.0f} MB" if not status else f"{name:24} failed with {status}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="+", default=[4], help="of the model: 4 are 2.8 GB, 22 are 11 GB")
    parser.add_argument("--shards", type=int, nargs="+", default=[6, 1])
    parser.add_argument("--before", type=Path, help="another checkout of this project, to be timed in turn")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--place", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    before = None if options.before is None else options.before.resolve(strict=True)
    place = Path(tempfile.mkdtemp(prefix="surgeon-bench-", dir=options.place))
    try:
        for layers, shards in itertools.product(options.layers, options.shards):
            model = place / f"model-{layers}-{shards}"
            size = write_bench_model(model, layers=layers, shards=shards)
            print(f"model: {size / 1e9:.2f} GB BF16 in {shards} shards, {len(os.sched_getaffinity(0))} cores", flush=True)
            for name, arguments in CASES.items():
                bench_case(name, arguments, model, place, options.pairs, before)
            if options.peers and shards == options.shards[0]:
                for name in PEERS:
                    bench_peer(name, model, place)
            shutil.rmtree(model)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
