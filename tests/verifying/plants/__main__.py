"""Plant every kind in every format, and print what ``verify`` finds in which mode as the table of docs/verify.md."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.verifying.plants.ground import KINDS
from tests.verifying.plants.suite import MODES, PLANTED_IN, Outcome, plant_all


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of checkpoints (tests/verifying/subjects.py)")
    parser.add_argument("--kinds", action="store_true", help="also a line for each kind")
    parser.add_argument("--missed", action="store_true", help="also list every plant that was missed")
    given = parser.parse_args()
    names = given.only or list(PLANTED_IN)
    work = Path(tempfile.mkdtemp(prefix="surgeon-plants-"))
    try:
        with ProcessPoolExecutor(2) as pool:
            outcomes = [o for found in pool.map(plant_all, names, [work / name for name in names]) for o in found]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    show(outcomes, by="group")
    if given.kinds:
        print()
        show(outcomes, by="kind")
    if given.missed:
        list_missed(outcomes)
    kinds = {outcome.kind for outcome in outcomes}
    print(f"\n{len(outcomes)} plants of {len(kinds)} kinds ({len(KINDS)} known) in {len(names)} checkpoints")
    shares = {mode: share(outcomes, mode) for mode in MODES}
    for mode, (least, _, _) in MODES.items():
        print(f"{mode}: {shares[mode]:.1%} found, at least {least:.0%} wanted")
    return int(any(shares[mode] < least for mode, (least, _, _) in MODES.items()))


def share(outcomes: list[Outcome], mode: str) -> float:
    return sum(outcome.found[mode] for outcome in outcomes) / max(len(outcomes), 1)


def show(outcomes: list[Outcome], *, by: str) -> None:
    total = Counter(getattr(o, by) for o in outcomes)
    print(f"| {by} | planted | " + " | ".join(MODES) + " |")
    print("|---|---" + "|---" * len(MODES) + "|")
    for name in total:
        hits = [sum(o.found[mode] for o in outcomes if getattr(o, by) == name) for mode in MODES]
        print(f"| {name.replace('_', ' ')} | {total[name]} | " + " | ".join(map(str, hits)) + " |")


def list_missed(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        missed = [mode for mode in MODES if not outcome.found[mode]]
        if missed:
            print(f"missed: {outcome.subject}, {outcome.kind}: {', '.join(missed)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
