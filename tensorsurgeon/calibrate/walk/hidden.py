"""Hidden states between two layers, in a file: what a killed run goes on from.

They have to be durable before a layer counts as done, so the file is the working store as well: the page cache keeps it
in memory while there is room, and nothing of it counts against the process when there is none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
import xxhash
from torch import Tensor

from tensorsurgeon.errors import JournalError, PlanError
from tensorsurgeon.machine.files import make_durable


class HiddenStates:
    """``[samples, ...]`` in one dtype; rows of samples are read and written from any thread.

    ``shape`` and ``dtype`` are what is expected: new states have those of what is written first, for a layer's states may
    be wider than the model's dtype (Mamba 2 keeps them in F32), or have an axis more (Gemma 3n). ``is_scratch``: nobody will
    go on from them, so no digest is taken. ``joins``: another process made the file, and this one writes some of it.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        create: bool,
        is_scratch: bool = False,
        joins: bool = False,
    ) -> None:
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self._digests: dict[int, str] | None = None if is_scratch else {}
        self._is_empty = create or joins
        self._lock = threading.Lock()
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if create else 0)
        self._fd = os.open(path, flags, 0o644)
        if create:
            os.ftruncate(self._fd, self._nbytes)

    @property
    def _sample_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def _nbytes(self) -> int:
        return self.shape[0] * self._sample_bytes

    def adopt(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Take the shape of one sample and the dtype of what is written first; later ones have to be alike."""
        with self._lock:
            if self._is_empty and (self.shape[1:], self.dtype) != (shape, dtype):
                self.shape, self.dtype = (self.shape[0], *shape), dtype
                os.ftruncate(self._fd, self._nbytes)
            self._is_empty = False
        if (self.shape[1:], self.dtype) != (shape, dtype):
            raise PlanError(
                f"hidden states of one layer are {list(self.shape[1:])} in {self.dtype} for one batch and {list(shape)} in "
                f"{dtype} for another; this model cannot be walked"
            )

    def read(self, start: int, stop: int) -> Tensor:
        """Samples ``start`` to ``stop``; a new tensor."""
        return self.read_file(start, stop)

    def read_file(self, start: int, stop: int) -> Tensor:
        """What lies in the file of samples ``start`` to ``stop``."""
        nbytes = (stop - start) * self._sample_bytes
        buffer = np.empty(nbytes, np.uint8)
        view = buffer.data
        done = 0
        while done < nbytes:
            count = os.preadv(self._fd, [view[done:]], start * self._sample_bytes + done)
            if not count:
                raise JournalError(
                    "ends early; another program changed it", where=str(self.path), remedy="; start over with {overwrite}"
                )
            done += count
        return torch.from_numpy(buffer).view(self.dtype).view(stop - start, *self.shape[1:])

    def write(self, start: int, states: Tensor) -> None:
        """Samples from ``start`` on."""
        self.adopt(tuple(states.shape[1:]), states.dtype)
        data = states.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        if self._digests is not None:
            for number in range(len(states)):
                sample = data[number * self._sample_bytes : (number + 1) * self._sample_bytes]
                self._digests[start + number] = xxhash.xxh3_128_hexdigest(sample)
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], start * self._sample_bytes + done)

    @property
    def written(self) -> dict[int, str]:
        """The digest of each sample that was written here."""
        return dict(self._digests or {})

    def note(self, shape: tuple[int, ...], dtype: torch.dtype, written: Mapping[int, str]) -> None:
        """Another process has written these samples, of this shape and dtype."""
        self.adopt(shape, dtype)
        if self._digests is not None:
            self._digests.update(written)

    @property
    def digest(self) -> str:
        """Of all that was written, however it was cut into batches, behind its dtype and the shape of a sample."""
        known = self._digests or {}
        head = ".".join([str(self.dtype).removeprefix("torch."), *map(str, self.shape[1:])])
        return f"{head}:" + xxhash.xxh3_128_hexdigest("".join(known[number] for number in sorted(known)).encode())

    def check(self, digest: str) -> None:
        """Read what is on disk and raise JournalError unless it has this digest, which says what states they are."""
        name, *shape = digest.partition(":")[0].split(".")
        self.dtype, self.shape = getattr(torch, name), (self.shape[0], *map(int, shape))
        self._is_empty = False
        found = os.fstat(self._fd).st_size
        if found != self._nbytes:
            raise JournalError(
                f"holds {found} bytes of hidden states, {self._nbytes} are needed",
                where=str(self.path),
                remedy="; start over with {overwrite}",
            )
        self._digests = {}
        for number in range(self.shape[0]):
            sample = self.read_file(number, number + 1).view(-1).view(torch.uint8).numpy().data
            self._digests[number] = xxhash.xxh3_128_hexdigest(sample)
        if self.digest != digest:
            raise JournalError("are not the hidden states that were written there", where=str(self.path))

    def sync(self) -> None:
        """Make everything written so far durable."""
        make_durable(self._fd)

    def close(self) -> None:
        """The file stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
