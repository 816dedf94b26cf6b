"""Sizes on which a kernel and the caller who hands it room to write in must agree; no numba here, for callers."""

from __future__ import annotations

from typing import Final

TILE_ROWS: Final = 64
"""Rows of a weight that go together: 128 columns of them are 32 KB and stay in the L1 cache."""

PANEL_COLUMNS: Final = 4
"""Columns whose effects are handed on together: a third of the memory traffic of one at a time. Written out in the loops."""

PACKED_TILE: Final = (16, 64)
"""Words (a cache line) and columns of one pass of ``bitpack.pack4_down``."""
