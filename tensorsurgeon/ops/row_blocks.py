"""Large weights go row block by row block, so that what a step holds does not grow with the weight.

Blocks have fixed sizes, so that no machine changes a unit; the arithmetic of one element knows no other row, so that they
change no bit either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from tensorsurgeon.formats.scales import WEIGHT_SHAPE
from tensorsurgeon.ops.stored_modules import StoredModule
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec

# Weights larger than this are planned in pieces where their layout allows it.
CHUNK_BYTES: Final = 16 << 20
# A multiple of every block height and word that a layout has.
CHUNK_ROWS: Final = 128
# What is computed at once inside a piece: F32 values and their likes, a few of them.
_BLOCK_ELEMENTS: Final = 1 << 19
_BLOCK_BYTES_PER_ELEMENT: Final = 24
# Scales in F32 beside zero points, once as they were made and once as they are stored.
_BYTES_PER_SCALE: Final = 16


def is_large(weight: TensorSpec) -> bool:
    """Whether a weight goes in pieces where its layout allows it."""
    return weight.nbytes > CHUNK_BYTES


def chunk_rows(weight: TensorSpec) -> int:
    """How many rows of a weight [N, K] make a piece."""
    return max(CHUNK_ROWS, CHUNK_BYTES // max(1, weight.row_bytes) // CHUNK_ROWS * CHUNK_ROWS)


def stored_pieces(module: StoredModule, weight: TensorSpec, specs: SpecMap) -> Iterator[tuple[tuple[Region, ...], int, int]]:
    """For each piece of a stored weight: the regions of its tensors, in their order, and its first and last row but one.

    One piece with whole tensors where the weight is small, or where its rows are no rows of what is stored.
    """
    tensors = {local: specs[f"{module.name}.{local}"] for local in module.tensors}
    rows = weight.shape[0]
    together = module.stored.format.rows_together(module.scheme)
    if not is_large(weight) or not together or not _are_rows(tensors, rows, together):
        yield tuple(map(Region, tensors.values())), 0, rows
        return
    step = chunk_rows(weight)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield tuple(_part(spec, start, stop, rows, together) for spec in tensors.values()), start, stop


def _are_rows(tensors: Mapping[str, TensorSpec], rows: int, together: int) -> bool:
    return all(_is_whole(spec) or spec.rows in (rows, -(-rows // together)) for spec in tensors.values())


def _is_whole(spec: TensorSpec) -> bool:
    """Whether every piece reads all of a tensor: a single scale, or the shape of the weight."""
    return spec.numel == 1 or spec.name.endswith("." + WEIGHT_SHAPE)


def _part(spec: TensorSpec, start: int, stop: int, rows: int, together: int) -> Region:
    if _is_whole(spec):
        return Region(spec)
    return Region(spec, start, stop) if spec.rows == rows else Region(spec, start // together, -(-stop // together))


def written_rows(tensors: Sequence[TensorSpec], start: int, stop: int, rows: int) -> tuple[Region, ...]:
    """The regions of what is written for some rows of a weight of ``rows``, where its rows are rows of every tensor."""
    if stop - start == rows:
        return tuple(map(Region, tensors))
    return tuple(Region(spec, start * spec.rows // rows, stop * spec.rows // rows) for spec in tensors)


def row_blocks(quantized: Quantized, scheme: Scheme) -> Iterator[tuple[int, int, Quantized]]:
    """Codes and scales of a few rows at a time, as views, with the first and last row but one."""
    rows, columns = quantized.codes.shape
    step = max(CHUNK_ROWS, _BLOCK_ELEMENTS // max(1, columns) // CHUNK_ROWS * CHUNK_ROWS)
    height = scheme.block[0] if scheme.block is not None else 1
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        scales = slice(start // height, -(-stop // height))
        zero_point = None if quantized.zero_point is None else quantized.zero_point[scales]
        yield (
            start,
            stop,
            quantized._replace(codes=quantized.codes[start:stop], scale=quantized.scale[scales], zero_point=zero_point),
        )


def codes_scratch(elements: int, coded: Iterable[TensorSpec], bytes_per_code: int) -> int:
    """Bytes that packing or unpacking ``elements`` codes takes beside the tensors ``coded`` that hold them and their scales.

    Codes of a byte each are used as they lie; narrower ones are spread out to bytes, and moved once more by most layouts.
    """
    stored = list(coded)
    largest = max((spec.nbytes for spec in stored), default=0)
    scales = sum(spec.numel for spec in stored) - max((spec.numel for spec in stored), default=0)
    return (bytes_per_code * elements if largest < elements else 0) + _BYTES_PER_SCALE * scales


def block_scratch(elements: int) -> int:
    """Bytes of the values that are computed at once, of a matrix of ``elements``; one block has at least ``CHUNK_ROWS`` rows."""
    return _BLOCK_BYTES_PER_ELEMENT * min(elements, _BLOCK_ELEMENTS)


def stored_specs(regions: Iterable[Region]) -> list[TensorSpec]:
    """The regions as tensors of their own size."""
    return [region.spec._replace(shape=region.shape) for region in regions]
