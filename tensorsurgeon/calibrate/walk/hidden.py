"""Hidden states between two layers, in a file: what a killed run goes on from.

They have to be durable before a layer counts as done, so the file is the working store as well: the page cache keeps it
in memory while there is room, and nothing of it counts against the process when there is none.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
import xxhash
from torch import Tensor

from tensorsurgeon.errors import JournalError
from tensorsurgeon.machine.files import make_durable


class HiddenStates:
    """``[samples, sequence, hidden]`` in one dtype; rows of samples are read and written from any thread.

    ``is_scratch``: nobody will go on from them, so no digest is taken.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, *, create: bool, is_scratch: bool = False
    ) -> None:
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self._digests: dict[int, str] | None = None if is_scratch else {}
        self._sample_bytes = shape[1] * shape[2] * dtype.itemsize
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if create else 0)
        self._fd = os.open(path, flags, 0o644)
        nbytes = shape[0] * self._sample_bytes
        if create:
            os.ftruncate(self._fd, nbytes)
        elif os.fstat(self._fd).st_size != nbytes:
            os.close(self._fd)
            raise JournalError(
                f"holds {path.stat().st_size} bytes of hidden states, {nbytes} are needed; start over with --overwrite",
                where=str(path),
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
                raise JournalError("ends early; another program changed it, start over with --overwrite", where=str(self.path))
            done += count
        return torch.from_numpy(buffer).view(self.dtype).view(stop - start, *self.shape[1:])

    def write(self, start: int, states: Tensor) -> None:
        """Samples from ``start`` on."""
        data = states.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        if self._digests is not None:
            for number in range(len(states)):
                sample = data[number * self._sample_bytes : (number + 1) * self._sample_bytes]
                self._digests[start + number] = xxhash.xxh3_128_hexdigest(sample)
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], start * self._sample_bytes + done)

    @property
    def digest(self) -> str:
        """Of all that was written, however it was cut into batches."""
        known = self._digests or {}
        return xxhash.xxh3_128_hexdigest("".join(known[number] for number in sorted(known)).encode())

    def check(self, digest: str) -> None:
        """Read what is on disk and raise JournalError unless it has this digest."""
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
