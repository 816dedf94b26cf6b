"""Is every float a number? One NaN or infinity in a norm or an embedding makes every answer NaN.

Scales and codes of quantized modules are judged in ``values``, which knows what they mean.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Collection, Iterable
from typing import Final, NamedTuple

import numpy as np

from tensorsurgeon.checkpoint.tensor_reader import CHUNK_BYTES, TensorReader
from tensorsurgeon.machine.threads import in_threads
from tensorsurgeon.tensors.spec import TensorSpec
from tensorsurgeon.verifying.findings import Findings

_JOB_BYTES: Final = 32 << 20


class _Bits(NamedTuple):
    """Element type as unsigned integers: all bits but the sign, and from where on they stand for no finite number."""

    view: type[np.unsignedinteger]
    magnitude: int
    first_bad: int
    nan_from: int


# first_bad is infinity where the type has one; nan_from the first NaN.
_BITS: Final[dict[str, _Bits]] = {
    "BF16": _Bits(np.uint16, 0x7FFF, 0x7F80, 0x7F81),
    "F16": _Bits(np.uint16, 0x7FFF, 0x7C00, 0x7C01),
    "F32": _Bits(np.uint32, 0x7FFFFFFF, 0x7F800000, 0x7F800001),
    "F64": _Bits(np.uint64, (1 << 63) - 1, 0x7FF << 52, (0x7FF << 52) + 1),
    "F8_E4M3": _Bits(np.uint8, 0x7F, 0x7F, 0x7F),
    "F8_E5M2": _Bits(np.uint8, 0x7F, 0x7C, 0x7D),
}


class _Bad(NamedTuple):
    """What was found in one tensor: its first element that is no number, what that is, and how many there are."""

    first: int
    is_nan: bool
    total: int


class FiniteCheck:
    """Looks at bytes of shards as others read them, from any thread; ``rest`` reads what nobody looked at."""

    def __init__(self, reader: TensorReader, quantized: Collection[str]) -> None:
        """``quantized``: modules whose tensors are left out."""
        self._reader = reader
        self._lock = threading.Lock()
        self._bad: dict[str, _Bad] = {}
        self._quantized = quantized

    def look(self, shard: int, offset: int, data: np.ndarray) -> None:
        """``data``: uint8, the bytes from ``offset`` of a shard on."""
        stop = offset + len(data)
        header = self._reader.checkpoint.shards[shard]
        for number in range(max(0, bisect_right(header.offsets, offset) - 1), len(header.specs)):
            start, spec = header.offsets[number], header.specs[number]
            if start >= stop:
                break
            bits = self._bits(spec)
            if bits is None:
                continue
            size = np.dtype(bits.view).itemsize
            # Elements that begin in these bytes; one that ends behind them is read once more.
            first = -(-max(offset - start, 0) // size)
            last = -(-(min(stop, start + spec.nbytes) - start) // size)
            if first >= last:
                continue
            begin, end = start + first * size, start + last * size
            whole = data[begin - offset : end - offset]
            if end > stop:
                whole = np.concatenate([whole, self._reader.shard_bytes(shard, stop, end - stop)])
            self._check(spec, bits, first, whole)

    def rest(self, shards: Iterable[int], workers: int) -> None:
        """Read and check the floats of these shards."""
        jobs = [
            (shard, start, min(start + _JOB_BYTES, stop))
            for shard in shards
            for begin, stop in self._runs(shard)
            for start in range(begin, stop, _JOB_BYTES)
        ]

        def read(job: tuple[int, int, int]) -> None:
            shard, begin, end = job
            for start in range(begin, end, CHUNK_BYTES):
                self.look(shard, start, self._reader.shard_bytes(shard, start, min(CHUNK_BYTES, end - start)))

        for _ in in_threads(read, jobs, workers):
            pass

    def _bits(self, spec: TensorSpec) -> _Bits | None:
        bits = _BITS.get(spec.dtype.name)
        return bits if bits is not None and spec.nbytes and spec.module not in self._quantized else None

    def _runs(self, shard: int) -> list[tuple[int, int]]:
        """Bytes of a shard that hold what is looked at: of tensors that lie behind each other one run."""
        runs: list[tuple[int, int]] = []
        for spec, start in self._reader.checkpoint.shards[shard].entries:
            if self._bits(spec) is None:
                continue
            if runs and runs[-1][1] == start:
                runs[-1] = runs[-1][0], start + spec.nbytes
            else:
                runs.append((start, start + spec.nbytes))
        return runs

    def report(self, findings: Findings) -> None:
        """One fault for each tensor that holds something else than numbers."""
        for name, bad in self._bad.items():
            spec = self._reader.specs[name]
            position = [int(i) for i in np.unravel_index(bad.first, spec.shape)] if spec.shape else []
            more = f"; {bad.total} elements are no finite numbers" if bad.total > 1 else ""
            what = "NaN" if bad.is_nan else "infinite"
            findings.fault("nan" if bad.is_nan else "infinite", name, f"element {position} is {what}{more}")

    def _check(self, spec: TensorSpec, bits: _Bits, first: int, data: np.ndarray) -> None:
        view, magnitude, first_bad, nan_from = bits
        values = np.ascontiguousarray(data).view(view) & view(magnitude)
        if values.max() < first_bad:
            return
        wrong = np.flatnonzero(values >= view(first_bad))
        at = first + int(wrong[0])
        with self._lock:
            known = self._bad.get(spec.name)
            total = len(wrong) + (known.total if known else 0)
            if known is None or at < known.first:
                self._bad[spec.name] = _Bad(at, bool(values[wrong[0]] >= nan_from), total)
            else:
                self._bad[spec.name] = known._replace(total=total)
