"""Plant the kinds in one checkpoint and verify each in all four modes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

import tests.verifying.plants  # noqa: F401  # registers the kinds
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.verifying import verify
from tests.checkpoints import apply
from tests.verifying.plants.ground import KINDS, Ground, Kind, NotHereError, described_in
from tests.verifying.subjects import MOE, RECIPES, source_of, subject

# What is wanted of each mode, whether it keeps the record, and whether it has the source.
MODES: Final = {
    "source and record": (0.97, True, True),
    "source": (0.90, False, True),
    "record": (0.97, True, False),
    "alone": (0.0, False, False),
}
# One checkpoint of several shards, and one with every file that a published model has: their sources are larger.
SHARDED, WITH_ALL_FILES = "ct-int in shards", "awq-hybrid"
# Every format that this program writes, on a model that is verified in a blink.
PLANTED_IN: Final = (*(name for name, (_, _, source) in RECIPES.items() if source == MOE), SHARDED, WITH_ALL_FILES)


class Outcome(NamedTuple):
    """One plant: in which modes it was found."""

    subject: str
    group: str
    kind: str
    found: dict[str, bool]


def plant_all(name: str, work: Path, kinds: Iterable[Kind] = KINDS) -> list[Outcome]:
    """Every kind that this checkpoint has a place for."""
    origin, source = _origin(name, work)
    described = described_in(origin)
    outcomes = []
    if name == WITH_ALL_FILES:
        # It is large, and differs from the others in its files.
        kinds = [kind for kind in kinds if kind.group in ("configs", "files")]
    for kind in kinds:
        folder = work / kind.name
        ground = Ground(origin, folder, described)
        try:
            kind.plant(ground)
        except NotHereError:
            continue
        else:
            outcomes.append(Outcome(name, kind.group, kind.name, found_in(folder, source)))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def _origin(name: str, work: Path) -> tuple[Path, Path]:
    """A good checkpoint and its source."""
    if name != SHARDED:
        return subject(name), source_of(name)
    apply(load_transform(*RECIPES["ct-int"][:2]), MOE, work / "origin", workers=1, max_shard_bytes=100_000)
    return work / "origin", MOE


def found_in(folder: Path, source: Path) -> dict[str, bool]:
    """In which modes a spoilt checkpoint has faults; that it can no longer be opened counts."""
    found = {}
    record = folder / "surgeon.json"
    for mode, (_, has_record, has_source) in sorted(MODES.items(), key=lambda item: not item[1][1]):
        if not has_record:
            record.unlink(missing_ok=True)
        try:
            found[mode] = bool(verify(folder, source if has_source else None, workers=1).faults)
        except SurgeonError:
            found[mode] = True
    return found
