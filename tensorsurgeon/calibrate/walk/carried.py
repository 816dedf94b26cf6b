"""Values of one batch on their way from where they are made to the layers that are called with them.

They are as large as hidden states, so they lie in files. Nobody goes on from them: a resumed run makes them again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorsurgeon.calibrate.walk.calls import changed


class Carried:
    """By key and batch; any thread, one at a time for a batch. Without a folder they stay in memory."""

    def __init__(self, folder: Path | None, device: torch.device) -> None:
        self._folder = folder
        self._device = device
        self._held: dict[tuple[str, int], Any] = {}

    def put(self, key: str, batch: int, value: Any) -> None:
        """Keep tensors, or tuples and dictionaries of tensors, in place of what was kept before."""
        value = changed(value, _own)
        if self._folder is None:
            self._held[key, batch] = value
        else:
            torch.save(value, self._path(key, batch))

    def get(self, key: str, batch: int) -> Any:
        """What was kept, a new object; KeyError for what never was."""
        if self._folder is None:
            return changed(self._held[key, batch], _own)
        path = self._path(key, batch)
        if not path.exists():
            raise KeyError(key)
        return torch.load(path, map_location=self._device, weights_only=True)

    def has(self, key: str, batch: int) -> bool:
        """Whether something was kept."""
        return (key, batch) in self._held if self._folder is None else self._path(key, batch).exists()

    def holds(self, key: str) -> bool:
        """Whether something was kept for any batch."""
        if self._folder is None:
            return any(known == key for known, _ in self._held)
        return next(self._folder.glob(f"carried-{key}-*.pt"), None) is not None

    def clear(self) -> None:
        """Forget everything, also what a stopped run left."""
        self._held.clear()
        for path in () if self._folder is None else self._folder.glob("carried-*.pt"):
            path.unlink()

    def _path(self, key: str, batch: int) -> Path:
        assert self._folder is not None
        return self._folder / f"carried-{key}-{batch}.pt"


def _own(place: str, value: Any) -> Any:
    # A slice of a tensor would be kept with all of it.
    return value.detach().clone(memory_format=torch.preserve_format) if isinstance(value, Tensor) else value
