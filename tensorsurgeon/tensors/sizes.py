"""Sizes as people write and read them: ``8GB``, ``512MB``, 36.7 GB."""

from __future__ import annotations

import re
from decimal import Decimal

from tensorsurgeon.errors import RecipeError

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str, what: str) -> int:
    """Bytes of ``5GB`` (decimal, as the Hub counts), ``4GiB`` or a plain number; RecipeError otherwise."""
    found = _SIZE.fullmatch(text)
    if found is None or found.group(2).upper() not in _UNITS:
        raise RecipeError(f"{what} must be a size such as 5GB or 512MiB, found {text!r}")
    # Decimal, for a float loses bytes above 2**53 and does not know numbers of 400 digits.
    size = int(Decimal(found.group(1)) * _UNITS[found.group(2).upper()])
    if not 1 <= size < 1 << 63:
        raise RecipeError(f"{what} must be at least one byte and less than 8 EiB, found {text!r}")
    return size


def show_size(nbytes: int) -> str:
    """Bytes for a reader, in decimal units: 36.70 GB."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} B"
