"""Random kills, and damage before a resume, over four kinds of run; prints what is wrong and ends with 1 if anything is.

    python -m tests.kills [--kills 100] [--seed 0] [--kinds N] [--only RUN]

A kill is SIGKILL at a random moment of a run, then again at a random moment of the resumed one with even chances, then
`surgeon resume`, which has to give every byte of an undisturbed run. Damage is each kind of ``damage.py`` done to each kind of
run that was killed half way: then it ends with the same bytes, or with one clear refusal. Wrong is: another byte, a
traceback, an exit code that says a fault of ours, or a source, a link's other end or a person's file that changed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.checkpoints import FIXTURE, folder_bytes
from tests.kills.conversions import RUNS, Ended, command_of, import_what_runs_need, outcome, surgeon
from tests.kills.damage import FOREIGN, KINDS, CannotBe


class Campaign:
    """Runs in ``folder``: an undisturbed one of each kind to compare with, and how long it took."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._whole: dict[str, tuple[dict[str, bytes], float]] = {}

    def whole(self, name: str) -> tuple[dict[str, bytes], float]:
        """What an undisturbed run writes, and its seconds."""
        if name not in self._whole:
            target = self.folder / f"whole-{name}"
            words = command_of(name, self.folder, target)
            # The second run is as long as those to come: the first reads files and compiles what nobody needed before.
            for _ in range(2):
                shutil.rmtree(target, ignore_errors=True)
                began = time.monotonic()
                ended = surgeon(words)
                assert ended.code == 0, ended.said
            self._whole[name] = outcome(target), time.monotonic() - began
        return self._whole[name]

    def kill(self, name: str) -> None:
        """One run, killed once or twice and resumed."""
        wanted, seconds = self.whole(name)
        target = self._fresh()
        words = command_of(name, self.folder, target)
        for _ in range(self.rng.choice((1, 2))):
            moment = self.rng.uniform(0, seconds)
            ended = surgeon(self._again(words, target), lambda now, moment=moment: now >= moment)
            if ended.code is not None:
                break
            self.counts["killed"] += 1
        if (target / ".surgeon").exists() or not (target / "surgeon.json").exists():
            ended = surgeon(self._again(words, target))
        elif ended.code is None:
            # Killed between its last step and its end.
            ended = surgeon(["resume", str(target)])
        self._judge(f"{name}, killed", ended, target, wanted, may_refuse=False)

    def damage(self, name: str, kind: str) -> None:
        """One run, killed about half way, damaged and resumed."""
        wanted, _ = self.whole(name)
        target = self._fresh()
        words = command_of(name, self.folder, target)
        journal = target / ".surgeon" / "journal.jsonl"
        for enough in (self.rng.choice((200, 1000, 4000)), 1, 1, 1):
            ended = surgeon(words, lambda _, enough=enough: journal.exists() and journal.stat().st_size >= enough)
            if ended.code is None and (target / ".surgeon" / "run.json").exists():
                break
            shutil.rmtree(target, ignore_errors=True)
        else:
            self.counts["never stopped"] += 1
            return
        try:
            KINDS[kind](target, self.rng)
        except CannotBe:
            self.counts["cannot be"] += 1
            return
        elsewhere = {path.name: path.read_bytes() for path in self.folder.glob("run/*.bin")}
        ended = surgeon(["resume", str(target)])
        self.counts["damaged"] += 1
        if elsewhere != {path.name: path.read_bytes() for path in self.folder.glob("run/*.bin")}:
            self.wrong.append(f"{name}, {kind}: written through a link")
        if kind == "a_note_of_a_person":
            if (target / FOREIGN).read_text() != "do not lose me":
                self.wrong.append(f"{name}, {kind}: lost")
            (target / FOREIGN).unlink()
        self._judge(f"{name}, {kind}", ended, target, wanted, may_refuse=True)

    def _judge(self, what: str, ended: Ended, target: Path, wanted: dict[str, bytes], may_refuse: bool) -> None:
        if ended.code == 0:
            found = outcome(target) if target.is_dir() else {}
            different = sorted(file for file in wanted.keys() | found.keys() if wanted.get(file) != found.get(file))
            self.counts["same bytes"] += not different
            if different:
                self.wrong.append(f"{what}: exit 0, and {', '.join(different[:3])} differ")
        elif may_refuse and ended.code not in (None, 1, 70) and "Traceback" not in ended.said:
            self.counts["refused"] += 1
        else:
            self.wrong.append(f"{what}: exit {ended.code}: {ended.said[-300:]!r}")

    def _fresh(self) -> Path:
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        (self.folder / "run").mkdir()
        return self.folder / "run" / "out"

    @staticmethod
    def _again(words: list[str], target: Path) -> list[str]:
        """What a person types: the command, or resume where a run has left its name; over a run that left nothing, anew."""
        if (target / ".surgeon" / "run.json").exists():
            return ["resume", str(target)]
        return [*words, "--overwrite"] if target.exists() and any(target.iterdir()) else words


def main() -> int:
    """The whole campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(RUNS), help="one kind of run")
    parser.add_argument("--plain", action="store_true", help="no calibrated run, which takes longest")
    parser.add_argument("--kinds", type=int, default=len(KINDS), help="kinds of damage, drawn; all by default")
    given = parser.parse_args()
    import_what_runs_need()

    names = [given.only] if given.only else [name for name in RUNS if not (given.plain and name == "calibrated")]
    before = folder_bytes(FIXTURE)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        campaign = Campaign(Path(folder), given.seed)
        runs = 0
        # A run that was through before its moment came was not killed.
        while campaign.counts["killed"] < given.kills:
            campaign.kill(names[runs % len(names)])
            runs += 1
        print(f"{runs} runs: {dict(campaign.counts)}, {time.monotonic() - began:.0f} s", flush=True)
        kinds = campaign.rng.sample(sorted(KINDS), given.kinds)
        for kind in kinds:
            for name in names:
                campaign.damage(name, kind)
    if folder_bytes(FIXTURE) != before:
        campaign.wrong.append("the source changed")
    for line in campaign.wrong:
        print(line)
    counts = ", ".join(f"{count} {what}" for what, count in campaign.counts.items())
    print(f"{len(kinds)} kinds of damage; {counts}, {len(campaign.wrong)} wrong, in {time.monotonic() - began:.0f} s")
    return bool(campaign.wrong)


if __name__ == "__main__":
    sys.exit(main())
