"""The weights of the next layer read from disk into pinned memory, or unpacked from codes, while the card computes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self

import numpy as np
import torch
from torch import Tensor

from tensorsurgeon.calibrate.card.states import host_buffer
from tensorsurgeon.calibrate.walk.model import check_weight
from tensorsurgeon.calibrate.walk.weights import UnpackingReader
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.quant.rtn.plain_torch import TORCH_DTYPES, tensor_of

_READERS: Final = 4
_PIECE_BYTES: Final = 64 << 20
_ALIGNMENT: Final = 256


class WeightsAhead:
    """Whole tensors by name, on the card; those that ``start`` was told are read by threads meanwhile."""

    def __init__(self, reader: TensorReader | UnpackingReader, device: torch.device) -> None:
        self._reader = reader
        self._device = device
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._coming: dict[str, tuple[Tensor, list[Future[int]]]] = {}
        self._unpacked = reader.unpacked if isinstance(reader, UnpackingReader) else frozenset()
        self._unpacking: dict[str, Future[np.ndarray]] = {}
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="weights")
        self._stop = threading.Event()

    def start(self, names: Sequence[str]) -> None:
        """Begin to read; call when what was read before has been copied (``settle``)."""
        specs = self._reader.specs
        self._unpacking = {name: self._pool.submit(self._reader.array, name) for name in names if name in self._unpacked}
        names = [name for name in names if name not in self._unpacked]
        ends = []
        total = 0
        for name in names:
            ends.append(total)
            total += -(-specs[name].nbytes // _ALIGNMENT) * _ALIGNMENT
        if total > len(self._arena):
            self._arena = torch.empty(0, dtype=torch.uint8)
            self._arena = host_buffer((total,), torch.uint8, self._device)
        self._coming = {}
        for name, offset in zip(names, ends, strict=True):
            spec = specs[name]
            bytes_of = self._arena[offset : offset + spec.nbytes]
            view = bytes_of.numpy().data
            rows = max(1, _PIECE_BYTES // max(1, spec.row_bytes))
            pieces = [
                self._pool.submit(self._read, name, row, min(row + rows, spec.rows), view[row * spec.row_bytes :])
                for row in range(0, spec.rows, rows)
            ]
            self._coming[name] = (bytes_of, pieces)

    def _read(self, name: str, start: int, stop: int, view: memoryview) -> int:
        return 0 if self._stop.is_set() else self._reader.rows_into(name, start, stop, view)

    def tensor(self, name: str) -> Tensor:
        """The tensor on the card; CheckpointError for one that is no plain float."""
        spec = check_weight(self._reader, name)
        if name in self._unpacking:
            return tensor_of(self._unpacking.pop(name).result()).to(self._device)
        if name not in self._coming:
            return tensor_of(self._reader.array(name)).to(self._device)
        bytes_of, pieces = self._coming[name]
        for piece in pieces:
            piece.result()
        return bytes_of.view(TORCH_DTYPES[spec.dtype]).view(spec.shape).to(self._device, non_blocking=True, copy=True)

    def settle(self) -> None:
        """Wait until everything that was handed out has arrived; nothing is kept."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._coming, self._unpacking = {}, {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._pool.shutdown()
