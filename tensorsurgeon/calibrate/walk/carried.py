"""Values of one batch on their way from where they are made to the layers that are called with them.

They are as large as hidden states, so they lie in files, each named by the first layer that may read it: what a layer fills
further is written anew, and a run that was stopped in that layer goes on from what lay there before.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, Final

import torch
import xxhash
from torch import Tensor

from tensorsurgeon.calibrate.walk.calls import changed

_NAME: Final = re.compile(r"carried-(?P<key>.*)-(?P<batch>\d+)-(?P<layer>\d+)\.pt")
# Of a value that layers fill: what is being written, what the last layer that ended left, and what the one before did, for its
# end may be noted while the next layer runs.
_VERSIONS: Final = 3


class Carried:
    """By key and batch; any thread, one at a time for a batch. Without a folder they stay in memory."""

    def __init__(self, folder: Path | None, device: torch.device) -> None:
        self._folder = folder
        self._device = device
        self._held: dict[tuple[str, int], Any] = {}
        # Digest of each version in files, by the layer that it goes into, in that order.
        self._digests: dict[tuple[str, int], dict[int, str]] = {}

    def put(self, key: str, batch: int, value: Any, layer: int) -> None:
        """Keep tensors, or tuples and dictionaries of tensors, for ``layer`` and those behind it."""
        value = changed(value, _own)
        if self._folder is None:
            self._held[key, batch] = value
            return
        content = io.BytesIO()
        torch.save(value, content)
        self._path(key, batch, layer).write_bytes(content.getbuffer())
        versions = self._digests.setdefault((key, batch), {})
        versions[layer] = xxhash.xxh3_128_hexdigest(content.getbuffer())
        for old in sorted(versions)[:-_VERSIONS]:
            self._path(key, batch, old).unlink(missing_ok=True)
            del versions[old]

    def get(self, key: str, batch: int) -> Any:
        """What was kept last, a new object; KeyError for what never was."""
        if self._folder is None:
            return changed(self._held[key, batch], _own)
        path = self._path(key, batch, max(self._digests[key, batch]))
        return torch.load(path, map_location=self._device, weights_only=True)

    def has(self, key: str, batch: int) -> bool:
        """Whether something was kept."""
        return (key, batch) in (self._held if self._folder is None else self._digests)

    def holds(self, key: str) -> bool:
        """Whether something was kept for any batch."""
        return any(known == key for known, _ in (self._held if self._folder is None else self._digests))

    def digest(self, layer: int) -> str:
        """Of everything that goes into ``layer``; from memory nothing can be gone on from."""
        digest = xxhash.xxh3_128()
        for (key, batch), versions in sorted(self._digests.items()):
            if found := [number for number in versions if number <= layer]:
                digest.update(f"{key} {batch} {max(found)} {versions[max(found)]}\n".encode())
        return str(digest.hexdigest())

    def restore(self, layer: int) -> None:
        """Take up what a stopped run left for ``layer``, and forget what it had begun to write for those behind it."""
        self._held.clear()
        self._digests.clear()
        for path in () if self._folder is None else sorted(self._folder.glob("carried-*.pt")):
            named = _NAME.fullmatch(path.name)
            if named is None or int(named["layer"]) > layer:
                path.unlink()
            else:
                versions = self._digests.setdefault((named["key"], int(named["batch"])), {})
                versions[int(named["layer"])] = xxhash.xxh3_128_hexdigest(path.read_bytes())

    def clear(self) -> None:
        """Forget everything, also what a stopped run left."""
        self._held.clear()
        self._digests.clear()
        for path in () if self._folder is None else self._folder.glob("carried-*.pt"):
            path.unlink()

    def _path(self, key: str, batch: int, layer: int) -> Path:
        assert self._folder is not None
        return self._folder / f"carried-{key}-{batch}-{layer}.pt"


def _own(place: str, value: Any) -> Any:
    # A slice of a tensor would be kept with all of it.
    return value.detach().clone(memory_format=torch.preserve_format) if isinstance(value, Tensor) else value
