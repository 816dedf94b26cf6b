"""How far an evaluation came: which layer is next, a digest of every model's states before it, the errors so far.

A run that is started again with the same models and the same text goes on there; with anything else it begins anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import xxhash

from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.checkpoint.sink import publish_bytes
from tensorsurgeon.errors import JournalError
from tensorsurgeon.machine.files import make_folder_durable

_STATE: Final = "reached.json"


class Reached(NamedTuple):
    """``layer`` comes next; ``states``: digests of what goes into it, one per model; ``errors`` per target, one per state."""

    layer: int
    states: tuple[str, ...]
    errors: tuple[tuple[float, ...], ...]


class Work:
    """The folder in which states lie between layers; ``identity`` names models, text and versions."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self._identity = xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())
        folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> Reached | None:
        """How far an earlier run of the same came; None if there is none, or if what it says is damaged."""
        try:
            known = json.loads((self.folder / _STATE).read_bytes())
            if known["identity"] != self._identity:
                return None
            return Reached(known["layer"], tuple(known["states"]), tuple(tuple(row) for row in known["errors"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def advance(self, reached: Reached) -> None:
        """Say that everything before ``reached.layer`` is done and durable."""
        content = {"identity": self._identity, **reached._asdict()}
        publish_bytes(self.folder / _STATE, json.dumps(content).encode())
        make_folder_durable(self.folder)
        for path in self.folder.glob("states-*-*.bin"):
            if int(path.stem.split("-")[1]) != reached.layer:
                path.unlink()

    def new_states(self, layer: int, model: int, shape: tuple[int, int, int], dtype: torch.dtype) -> HiddenStates:
        """Empty states that go into a layer of a model, by its number."""
        return HiddenStates(self._path(layer, model), shape, dtype, create=True)

    def kept_states(self, layer: int, digests: Sequence[str], shapes: Sequence[Any]) -> list[HiddenStates] | None:
        """What an earlier run left, for each model by (shape, dtype); None if a piece of it is not whole."""
        opened: list[HiddenStates] = []
        try:
            for model, (digest, (shape, dtype)) in enumerate(zip(digests, shapes, strict=True)):
                opened.append(HiddenStates(self._path(layer, model), shape, dtype, create=False))
                opened[-1].check(digest)
        except (OSError, JournalError):
            for states in opened:
                states.close()
            return None
        return opened

    def folder_of(self, model: int) -> Path:
        """A folder for what a model's layers hand to each other."""
        folder = self.folder / f"model-{model}"
        folder.mkdir(exist_ok=True)
        return folder

    def _path(self, layer: int, model: int) -> Path:
        return self.folder / f"states-{layer:05d}-{model}.bin"

    def remove(self) -> None:
        """Nothing is left to go on from."""
        shutil.rmtree(self.folder, ignore_errors=True)
