"""Codes of a weight put together from those of its rows."""

from __future__ import annotations

import numpy as np

from tensorsurgeon.quant.scheme import Quantized


class Assembled:
    """Takes codes and scales of runs of rows in order. What it holds is its own: the parts may lie in memory that is used again.

    Scales that count rows (one for each, or for each block of rows) are put together; a global scale is that of every part.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._parts: list[np.ndarray | None] = [None, None, None]
        self._filled = [0, 0, 0]
        self._global_scale: np.ndarray | None = None

    def add(self, rows: int, part: Quantized) -> None:
        """The next ``rows`` rows; all runs but the last are whole blocks."""
        if part.global_scale is not None and self._global_scale is None:
            self._global_scale = part.global_scale.copy()
        for place, array in enumerate((part.codes, part.scale, part.zero_point)):
            if array is None:
                continue
            whole = self._parts[place]
            if whole is None:
                whole = self._parts[place] = np.empty((-(-self._rows * len(array) // rows), *array.shape[1:]), array.dtype)
            start = self._filled[place]
            whole[start : start + len(array)] = array
            self._filled[place] = start + len(array)

    def whole(self) -> Quantized:
        """All of it, once every row was added."""
        codes, scale, zero_point = (None if p is None else p[:n] for p, n in zip(self._parts, self._filled, strict=True))
        assert codes is not None
        assert scale is not None
        assert len(codes) == self._rows
        return Quantized(codes, scale, zero_point, self._global_scale)
