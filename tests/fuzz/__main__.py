"""Thousands of damaged checkpoints through the command, seeded; prints what is wrong and ends with 1 if anything is.

    python -m tests.fuzz [--count 12000] [--apply 1000] [--seed 0] [--workers 2]

Each input is looked at (inspect, verify, plan) or converted (apply, then verify). Wrong is: an exit code that says a fault
of ours, an exception, more than 2 s of CPU, more than 1 GB, a byte that acts on a terminal, and an output at exit code 0
that ``verify`` faults though its source had no fault. ``--only SEED`` shows one input and keeps it.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from tensorsurgeon.cli import main
from tensorsurgeon.cli.terminal import printable
from tests.fuzz.mutations import bases, mutate

CPU_SECONDS = 2.0
MEMORY_BYTES = 1 << 30
HANG_SECONDS = 120
LOOKS = (("inspect",), ("verify",), ("plan",))
# What fits no quantized source is refused, which is a way through the code as well.
TRANSFORMS = (
    ("dequantize",),
    ("dequantize",),
    ("split-experts",),
    ("quark-w8a8-int8",),
    ("ct-w4a16-g32",),
    ("repack", "--set", "to=ct-packed"),
    ("repack", "--set", "to=awq"),
    ("fuse-experts",),
    ("gptq-int4-g128", "--set", "method=rtn"),
    ("nvfp4a16",),
    ("quark-export-rename",),
)


def faults_of(arguments: list[str]) -> tuple[int, list[str]]:
    """The exit code of a command and what is wrong with how it ended."""
    began = time.process_time()
    result = CliRunner().invoke(main, arguments)
    spent = time.process_time() - began
    wrong = []
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        wrong.append(f"exception {result.exception!r}")
    if result.exit_code in (1, 70) or "Traceback" in result.output:
        wrong.append(f"traceback {result.output[-400:]!r}")
    if spent > CPU_SECONDS:
        wrong.append(f"slow {spent:.1f} s")
    if printable(result.output) != result.output:
        wrong.append("escape")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if peak > MEMORY_BYTES:
        wrong.append(f"memory {peak / 1e9:.1f} GB")
    return result.exit_code, wrong


def look(source: Path, rng: random.Random) -> Iterator[str]:
    """Faults of the commands that only read."""
    for words in LOOKS:
        arguments = [*words, str(source)]
        if words == ("plan",):
            name, *options = rng.choice(TRANSFORMS)
            arguments = ["plan", name, str(source), *options]
        _, wrong = faults_of(arguments)
        yield from (f"{' '.join(arguments[:2])}: {fault}" for fault in wrong)


def convert(source: Path, target: Path, rng: random.Random) -> Iterator[str]:
    """Faults of a conversion, and of what it wrote."""
    name, *options = rng.choice(TRANSFORMS)
    code, wrong = faults_of(["apply", name, str(source), str(target), "-q", "--workers", "2", *options])
    yield from (f"apply {name}: {fault}" for fault in wrong)
    if code == 0:
        judged, wrong = faults_of(["verify", str(target)])
        yield from (f"verify of what {name} made: {fault}" for fault in wrong)
        if judged and faults_of(["verify", str(source)])[0] == 0:
            said = CliRunner().invoke(main, ["verify", str(target)]).output
            yield f"apply {name}: unsound at exit 0: {said[-300:]!r}"


def try_seed(seed: int, sound: list[Path], work: Path, applies: bool) -> tuple[str, list[str]]:
    """One input: what was mutated and what is wrong."""
    rng = random.Random(seed)  # to be the same everywhere, not to be secret
    source, target = work / "source", work / "target"
    for folder in (source, target):
        shutil.rmtree(folder, ignore_errors=True)
    base = rng.choice(sound)
    what = f"{base.name}: {mutate(base, source, rng)}"
    return what, list(convert(source, target, rng) if applies else look(source, rng))


def serve(start: int, stop: int, step: int, applies: bool) -> None:
    """A worker: a line of JSON for each seed."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        work = Path(folder)
        sound = bases(work)
        for base in sound:
            # Once, so that what is loaded and compiled counts for no input.
            list(convert(base, work / "first", random.Random(0)))
            shutil.rmtree(work / "first", ignore_errors=True)
        for transform in TRANSFORMS:
            for base in sound[:3]:
                shutil.rmtree(work / "first", ignore_errors=True)
                faults_of(["apply", transform[0], str(base), str(work / "first"), "-q", *transform[1:]])
        for seed in range(start, stop, step):
            what, wrong = try_seed(seed, sound, work, applies)
            print(json.dumps([seed, what, wrong]), flush=True)


def run(start: int, stop: int, workers: int, applies: bool) -> Counter[str]:
    """All seeds of a range in worker processes; the kinds of fault, each printed as it is found."""
    found: Counter[str] = Counter()
    lock = threading.Lock()

    def watch(first: int) -> None:
        at = first
        while at < stop:
            command = [
                sys.executable,
                "-m",
                "tests.fuzz",
                "--serve",
                f"{at}:{stop}:{workers}",
                *(["--applies"] if applies else []),
            ]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            lines: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=_read, args=(process, lines), daemon=True).start()
            while True:
                try:
                    line = lines.get(timeout=HANG_SECONDS)
                except queue.Empty:
                    process.kill()
                    line = None
                    found["hang"] += 1
                    print(f"seed {at}: no answer in {HANG_SECONDS} s", flush=True)
                if line is None:
                    break
                seed, what, wrong = json.loads(line)
                at = seed + workers
                with lock:
                    for fault in wrong:
                        found[fault.partition(": ")[2].split(" ")[0]] += 1
                        print(f"seed {seed}: {what!a}: {fault!a}", flush=True)
            if process.wait() and at < stop:
                found["died"] += 1
                print(f"seed {at}: the process ended with {process.returncode}", flush=True)
                at += workers

    threads = [threading.Thread(target=watch, args=(start + number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _read(process: Any, lines: queue.Queue[str | None]) -> None:
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def command_line() -> int:
    """Read the arguments, do it, say how many of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=12_000, help="inputs that are looked at")
    parser.add_argument("--apply", type=int, default=1_000, help="inputs that are converted")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, help="one seed: say what it is and keep it in ./fuzz-SEED")
    parser.add_argument("--applies", action="store_true", help="with --only: convert it")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        start, stop, step = map(int, given.serve.split(":"))
        serve(start, stop, step, given.applies)
        return 0
    if given.only is not None:
        work = Path(f"fuzz-{given.only}")
        what, wrong = try_seed(given.only, bases(work), work, given.applies)
        print(ascii(what), *map(ascii, wrong), sep="\n")
        return bool(wrong)
    began = time.monotonic()
    found = run(given.seed, given.seed + given.count, given.workers, applies=False)
    found += run(given.seed, given.seed + given.apply, given.workers, applies=True)
    listed = ", ".join(f"{count} {kind}" for kind, count in found.most_common()) or "nothing wrong"
    print(f"{given.count} inputs looked at, {given.apply} converted, in {time.monotonic() - began:.0f} s: {listed}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(command_line())
