"""Run a conversion and kill it, in a process of its own that has one thread when it forks.

    python -m tests.contract.killing SOURCE FOLDER RECIPE SEED POINTS

``RECIPE`` is a module and the name of a function in it that makes the transform. Each point is a fresh target: a
child process runs the conversion and is killed (SIGKILL) at that point, again while it resumes, and then resumed to
the end. Prints one line of JSON per point.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.planning import work
from tensorsurgeon.planning.plan import Plan, make_plan
from tensorsurgeon.running import executor
from tensorsurgeon.running.run import run_plan

SHARD_BYTES = 3_000_000


def small_and_slow_units() -> None:
    """Many small units, frequent commits, and time between them: minutes of a large model in a fraction of a second."""
    work.COPY_BYTES = 64 << 10
    executor.COMMIT_BYTES = 256 << 10
    run_unit = executor.run_unit

    def slowly(*arguments):
        time.sleep(0.002)
        return run_unit(*arguments)

    executor.run_unit = slowly


def make(source: Path, recipe: str) -> Plan:
    module, _, name = recipe.partition(":")
    return make_plan(getattr(import_module(module), name)(), open_checkpoint(source), max_shard_bytes=SHARD_BYTES)


def digest_of(folder: Path) -> str:
    """One digest over every file and its name."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def run_and_kill(plan: Plan, target: Path, *, resume: bool, reached, delay: float) -> bool:
    """Whether the run was killed before it ended by itself."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run_plan(plan, target, workers=2, resume=resume)
            status = 0
        finally:
            # Whatever happened, the child may not go on with its parent's work.
            os._exit(status)
    while not reached(target):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            assert status == 0, "the run failed by itself"
            return False
        time.sleep(0.0001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def journalled(lines: int):
    def reached(target: Path) -> bool:
        try:
            return (target / ".surgeon" / "journal.jsonl").read_bytes().count(b"\n") >= lines
        except FileNotFoundError:
            return False

    return reached


def exists(pattern: str):
    return lambda target: any(target.glob(pattern))


def points(units: int, count: int, rng: random.Random):
    """Where to kill: as soon as the folder is there, after any number of units, and between the files it publishes."""
    found = [exists(".surgeon"), exists(".surgeon/run.json"), exists("*.partial"), exists("model-00001-of-*.safetensors")]
    found += [exists("surgeon.json"), exists("model.safetensors.index.json")]
    found += [journalled(rng.randrange(1, units)) for _ in range(count - len(found))]
    return found[:count]


def main(source: Path, folder: Path, recipe: str, seed: int, count: int) -> None:
    small_and_slow_units()
    rng = random.Random(seed)
    plan = make(source, recipe)
    run_plan(plan, folder / "whole", workers=2)
    whole = digest_of(folder / "whole")
    for number, reached in enumerate(points(len(plan.units), count, rng)):
        target = folder / f"killed-{number}"
        killed = run_and_kill(plan, target, resume=False, reached=reached, delay=rng.random() * 0.002)
        looked_complete = killed and (target / "model.safetensors.index.json").exists() and digest_of(target) != whole
        shards_then = len(list(target.glob("*.safetensors")))
        started = (target / ".surgeon" / "run.json").exists()
        again = started and run_and_kill(
            plan, target, resume=True, reached=journalled(rng.randrange(1, len(plan.units))), delay=0.0
        )
        # A run that died before it had a name left nothing to resume, and must not stand in the way.
        can_resume = (target / ".surgeon" / "run.json").exists() or (target / "surgeon.json").exists()
        result = run_plan(plan, target, workers=1, resume=can_resume)
        line = {
            "point": number,
            "killed": killed,
            "killed_again": again,
            "resumed_units": result.resumed_units,
            "units": result.units,
            "index_over_unfinished_state": bool(looked_complete and shards_then < len(plan.layout.shards)),
            "same": digest_of(target) == whole,
        }
        print(json.dumps(line), flush=True)
        shutil.rmtree(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
