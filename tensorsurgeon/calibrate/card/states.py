"""Hidden states on the card or in pinned memory, and in a file that another process could go on from."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

from tensorsurgeon.calibrate.walk.hidden import HiddenStates

Place = Literal["card", "pinned", "disk"]

_END: Final = None


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that the card copies to and from at full speed; ordinary memory where there is no card."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


class CardStates(HiddenStates):
    """States that are read from memory; what is written goes to the file as well, behind the computation.

    ``place``: ``card`` or ``pinned`` memory. One thread reads and writes.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, *, create: bool, device: torch.device, place: Place
    ) -> None:
        super().__init__(path, shape, dtype, create=create)
        self._device = device
        self._place = place
        self._memory: Tensor | None = self._room()
        self._error: BaseException | None = None
        self._queue: queue.Queue[tuple[int, Tensor, torch.cuda.Event | None] | None] = queue.Queue()
        self._writer = threading.Thread(target=self._write_behind, name="states", daemon=True)
        self._writer.start()

    @property
    def memory(self) -> Tensor:
        """All states; gone once closed."""
        if self._memory is None:
            raise RuntimeError(f"{self.path}: is closed")
        return self._memory

    def _room(self) -> Tensor:
        if self._place == "card":
            return torch.empty(self.shape, dtype=self.dtype, device=self._device)
        return host_buffer(self.shape, self.dtype, self._device)

    def _fit(self) -> None:
        """Other memory where states are not what was expected; one thread writes, and nothing is held yet."""
        if (self.memory.shape, self.memory.dtype) != (self.shape, self.dtype):
            self._memory = None
            self._memory = self._room()

    def check(self, digest: str) -> None:
        super().check(digest)
        self._fit()
        for number in range(self.shape[0]):
            self.memory[number] = self.read_file(number, number + 1)[0]

    def read(self, start: int, stop: int) -> Tensor:
        if self._memory is None:
            return super().read(start, stop)
        return self._memory[start:stop].to(self._device, non_blocking=True)

    def write(self, start: int, states: Tensor) -> None:
        self.adopt(tuple(states.shape[1:]), states.dtype)
        self._fit()
        part = self.memory[start : start + len(states)]
        part.copy_(states, non_blocking=True)
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._queue.put((start, part, event))

    def _write_behind(self) -> None:
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        bounce: Tensor | None = None
        while (item := self._queue.get()) is not _END:
            try:
                start, part, event = item
                if event is not None and stream is not None:
                    event.synchronize()
                    if part.is_cuda:
                        if bounce is None or bounce.shape != part.shape:
                            bounce = host_buffer(tuple(part.shape), part.dtype, self._device)
                        with torch.cuda.stream(stream):
                            bounce.copy_(part, non_blocking=True)
                        stream.synchronize()
                        part = bounce
                super().write(start, part)
            except BaseException as error:  # noqa: BLE001  # raised again by sync, in the thread that waits
                self._error = error
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def sync(self) -> None:
        self._queue.join()
        if self._error is not None:
            raise self._error
        super().sync()

    def close(self) -> None:
        if self._writer.is_alive():
            self._queue.put(_END)
            self._writer.join()
        super().close()
        self._memory = None
