"""One unit of a plan: read, apply, compare, write at the offset.

Needs nothing of the process that planned it but what is handed to it, so that another process or machine can do it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import xxhash

from tensorsurgeon.checkpoint.sink import Sink
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.errors import NumericError, PlanViolationError
from tensorsurgeon.formats.coding import written_by
from tensorsurgeon.planning.resolving import Pieces, Task
from tensorsurgeon.planning.rewriting import Array, Rewrite, Transform
from tensorsurgeon.planning.streams import Stream, streams_of
from tensorsurgeon.planning.work import Copy, Unit
from tensorsurgeon.quant.scheme import Quantized
from tensorsurgeon.tensors.arrays import Workspace, empty
from tensorsurgeon.tensors.spec import Region

# Small enough for a core's own cache: bytes are read, digested and written while they are warm. The kernel's own
# ``copy_file_range`` moves 64 KB at a time under the file's lock, and leaves the digest to read them again.
_COPY_BUFFER = 1 << 20


class CodesProvider(Protocol):
    """Hands over codes that calibration chose; None for a module that is to be rounded to nearest instead."""

    def quantized(self, module: str, start: int, stop: int) -> Quantized | None:
        """The codes of rows ``start`` to ``stop`` of a module, by the name it has when it is quantized."""
        ...


def run_unit(
    unit: Unit,
    steps: Sequence[Transform],
    source: Source,
    sink: Sink,
    workspace: Workspace,
    codes: CodesProvider | None = None,
    keep_bytes: int = 0,
) -> list[str]:
    """Read, apply, compare, write at the offset; the digest of each range written, in the unit's order.

    ``codes`` hands over what calibration chose for the rewrites whose method asks for it. ``keep_bytes``: what the workspace
    may hold although this unit needs less.
    """
    workspace.reset(max(unit.peak_bytes, keep_bytes))
    made: dict[int, Array] = {}
    chosen = {} if codes is None else _chosen(unit.tasks, codes)
    # A weight whose codes were chosen is not asked for, so nothing streams into it.
    streams = {number: stream for number, stream in streams_of(unit.tasks, steps).items() if number not in chosen}
    streamed = {number for stream in streams.values() for givers in stream.givers for number in givers}
    for number in _needed(unit, chosen):
        task = unit.tasks[number]
        if number in streamed:
            continue
        if number in chosen:
            arrays = chosen.pop(number)
        elif number in streams:
            arrays = _apply_rows(unit.tasks, streams[number], steps, source, workspace)
        else:
            inputs = [
                gather(region, pieces, source, made) for region, pieces in zip(task.rewrite.inputs, task.inputs, strict=True)
            ]
            arrays = steps[task.step].apply(task.rewrite, inputs)
        check_produced(task.rewrite, arrays)
        made.update(zip(task.outputs, arrays, strict=True))
    digests = []
    for write in unit.writes:
        data = _bytes_of(made[write.origin])[write.start : write.start + write.nbytes]
        sink.write(write.shard, write.offset, data)
        digests.append(xxhash.xxh3_64_hexdigest(data))
    if unit.copies:
        # One buffer for all: a unit may hold thousands of short copies.
        buffer = empty((min(_COPY_BUFFER, max(copy.nbytes for copy in unit.copies)),), np.uint8).data
        digests += [_copy(copy, source, sink, buffer) for copy in unit.copies]
    return digests


def _bytes_of(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _chosen(tasks: Sequence[Task], codes: CodesProvider) -> dict[int, Sequence[Array]]:
    """What tasks make whose codes calibration chose, by number."""
    found = ((number, _from_codes(task.rewrite, codes)) for number, task in enumerate(tasks))
    return {number: arrays for number, arrays in found if arrays is not None}


def _needed(unit: Unit, chosen: Mapping[int, Sequence[Array]]) -> list[int]:
    """The tasks to run, in order: not those that only make what codes were chosen from already."""
    if not chosen:
        return list(range(len(unit.tasks)))
    wanted = {write.origin for write in unit.writes}
    needed = []
    for number in reversed(range(len(unit.tasks))):
        task = unit.tasks[number]
        if task.outputs and wanted.isdisjoint(task.outputs):
            continue
        needed.append(number)
        if number not in chosen:
            wanted |= {piece.origin for pieces in task.inputs for piece in pieces}
    return needed[::-1]


def _apply_rows(
    tasks: Sequence[Task], stream: Stream, steps: Sequence[Transform], source: Source, workspace: Workspace
) -> Sequence[Array]:
    """A weight that is given and taken row block by row block; what gives it reads the source alone."""
    task = tasks[stream.taker]

    def blocks(givers: Sequence[int]) -> Iterator[Array]:
        for number in givers:
            mark = workspace.mark()
            giver = tasks[number]
            inputs = [gather(r, pieces, source, {}) for r, pieces in zip(giver.rewrite.inputs, giver.inputs, strict=True)]
            yield from steps[giver.step].rows(giver.rewrite, inputs)  # type: ignore[attr-defined]  # as streams_of found
            workspace.release(mark)

    taker = steps[task.step]
    arrays: Sequence[Array] = taker.apply_rows(task.rewrite, [partial(blocks, g) for g in stream.givers])  # type: ignore[attr-defined]
    return arrays


def _from_codes(rewrite: Rewrite, codes: CodesProvider) -> Sequence[Array] | None:
    """The outputs of a rewrite whose codes calibration chose; None if they are to be rounded to nearest."""
    written = written_by(rewrite.detail)
    if written is None or not written.is_calibrated:
        return None
    chosen = [codes.quantized(region.spec.module, *_rows(region)) for region in rewrite.inputs]
    arrays: list[Array] = []
    for region, found in zip(rewrite.inputs, chosen, strict=True):
        if found is None:
            if any(other is not None for other in chosen):
                raise PlanViolationError(f"{region}: has no codes, but what is written together with it has")
            return None
        try:
            arrays += written.format.pack(found, written.scheme)
        except NumericError as error:
            raise NumericError(f"{region}: {error.message}") from error
    return arrays


def _rows(region: Region) -> tuple[int, int]:
    return (0, region.spec.rows) if region.start is None or region.stop is None else (region.start, region.stop)


def check_produced(rewrite: Rewrite, arrays: Sequence[np.ndarray]) -> None:
    """Raise PlanViolationError unless the arrays have exactly the planned dtypes and shapes."""
    if len(arrays) != len(rewrite.outputs):
        raise PlanViolationError(f"{rewrite.inputs[0]}: the plan has {len(rewrite.outputs)} outputs, the step made {len(arrays)}")
    for region, array in zip(rewrite.outputs, arrays, strict=True):
        if array.dtype != region.spec.dtype.numpy or array.shape != region.shape:
            raise PlanViolationError(
                f"{region}: planned {region.spec.dtype.name}{list(region.shape)}, made {array.dtype}{list(array.shape)}"
            )


def gather(region: Region, pieces: Pieces, source: Source, made: dict[int, Array]) -> Array:
    """The array of an input region: read from the source, taken from an earlier task, or put together from both."""
    dtype = region.spec.dtype.numpy
    assert dtype is not None  # ops refuse elements narrower than a byte when they plan
    shape = region.shape
    if len(pieces) == 1 and pieces[0].origin < 0:
        _, start, nbytes = pieces[0]
        flat = made[pieces[0].origin].reshape(-1).view(np.uint8)[start : start + nbytes]
        array = flat.view(dtype).reshape(shape)
        array.flags.writeable = False
        return array
    array = empty(shape, dtype)
    if array.size:
        view = array.reshape(-1).view(np.uint8).data
        position = 0
        for origin, start, nbytes in pieces:
            part = view[position : position + nbytes]
            if origin < 0:
                part[:] = _bytes_of(made[origin])[start : start + nbytes]
            else:
                source.read_tensor_into(origin, start, part)
            position += nbytes
    # An op that wrote into its input would change what the next task reads.
    array.flags.writeable = False
    return array


def _copy(copy: Copy, source: Source, sink: Sink, buffer: memoryview) -> str:
    """Move bytes through a buffer, never as a tensor; returns their digest."""
    digest = xxhash.xxh3_64()
    for start in range(0, copy.nbytes, len(buffer)):
        part = buffer[: copy.nbytes - start]
        source.read_into(copy.source_shard, copy.source_offset + start, part)
        digest.update(part)
        sink.write(copy.shard, copy.offset + start, part)
    return digest.hexdigest()
