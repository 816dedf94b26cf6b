"""The plan: everything a run will do, known before the first weight byte is read.

Output shapes never depend on data, so that the plan holds every output header, offset and byte count, and the run
writes each tensor straight to its place, in any order.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.checkpoint.layout import DEFAULT_MAX_SHARD_BYTES, Layout, lay_out
from tensorsurgeon.errors import BudgetError, CheckpointError
from tensorsurgeon.formats.coding import Written, each_object_once
from tensorsurgeon.planning.identity import step_identity
from tensorsurgeon.planning.output_files import OutputFiles, output_files, written_modules
from tensorsurgeon.planning.resolving import Resolved, resolve, units_of
from tensorsurgeon.planning.rewriting import AnyTransform, Rewrite, Transform, steps_of
from tensorsurgeon.planning.work import Peaks, Unit, plan_units
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.names import canonical_order
from tensorsurgeon.tensors.spec import SpecMap
from tensorsurgeon.version import __version__


@dataclass(frozen=True)
class Plan:
    """Every rewrite, unit, output shard, header and side file of one conversion; immutable."""

    source: Checkpoint
    steps: tuple[Transform, ...]
    resolved: Resolved
    layout: Layout
    files: OutputFiles
    # The quantized modules that steps made, by their final names.
    written: dict[str, Written]
    max_shard_bytes: int
    # Data and options of a calibrated run: they decide bytes as much as the recipe does.
    calibration: Mapping[str, Any] = field(default_factory=dict)
    # Files that a run writes beside those of the plan: the log of a calibration.
    extra_files: tuple[str, ...] = ()

    @property
    def specs(self) -> SpecMap:
        """Every tensor of the output, in file order."""
        return self.resolved.specs

    @property
    def rewrites(self) -> Sequence[tuple[Rewrite, ...]]:
        """What each step does."""
        return self.resolved.rewrites

    @cached_property
    def quantized(self) -> dict[str, Scheme]:
        """The scheme of every quantized module that the plan makes, by its final name, in file order."""
        return {module: written.scheme for module, written in self.written.items()}

    @cached_property
    def ways(self) -> tuple[Written, ...]:
        """The ways in which modules are written, each once: few, where modules are many."""
        return tuple(each_object_once(self.written.values()))

    @cached_property
    def needs_codes(self) -> bool:
        """Whether a step asks for codes that calibration chooses."""
        return any(written.is_calibrated for written in self.ways)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All the work, in the order of the source; made when it is first asked for, since looking at a plan does not."""
        with _no_collector():
            return plan_units(self.resolved, self.source, self.layout, self.steps)

    @property
    def output_bytes(self) -> int:
        """Bytes of tensors in the output, as the index counts them."""
        return self.layout.total_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes that all files of the output take, without side files."""
        index = len(self.layout.index_json or b"")
        return sum(s.file_bytes for s in self.layout.shards) + index + sum(map(len, self.files.contents.values()))

    @cached_property
    def copied_bytes(self) -> int:
        """Bytes that come from the source unchanged."""
        return sum(piece.nbytes for pieces in self.resolved.contents.values() for piece in pieces if piece.origin >= 0)

    @cached_property
    def peak_unit_bytes(self) -> int:
        """What the largest unit holds; a memory cap below this cannot work."""
        tasks = self.resolved.tasks
        peaks = Peaks(self.steps)
        groups = units_of(tasks, self.resolved.made)
        return max((peaks.of([tasks[number] for number in group]) for group in groups), default=0)

    @cached_property
    def fingerprint(self) -> str:
        """Names this exact run: recipe, source, package version and layout, but no worker count and no memory cap."""
        digest = hashlib.sha256()
        digest.update(f"tensorsurgeon {__version__}\n{self.source.fingerprint()}\n{self.max_shard_bytes}\n".encode())
        for step in self.steps:
            digest.update(f"{step_identity(step)}\n".encode())
        if self.calibration:
            digest.update(json.dumps(self.calibration, sort_keys=True).encode())
        for shard in self.layout.shards:
            digest.update(shard.header)
        for name, content in sorted(self.files.contents.items()):
            digest.update(f"{name}\n".encode() + content)
        return digest.hexdigest()

    def step_names(self) -> list[tuple[set[str], set[str]]]:
        """For each step: the names of the tensors that it reads and of those that it makes."""
        return [
            (
                {region[0][0] for rewrite in rewrites for region in rewrite[0]},
                {region[0][0] for rewrite in rewrites for region in rewrite[1]},
            )
            for rewrites in self.rewrites
        ]

    def check_budget(self, max_ram_bytes: int) -> None:
        """Raise BudgetError if one unit alone does not fit the memory cap."""
        if self.peak_unit_bytes > max_ram_bytes:
            unit = max(self.units, key=lambda u: u.peak_bytes)
            name = str(unit.tasks[0].rewrite.inputs[0]) if unit.tasks else "a copy"
            raise BudgetError(
                f"{name}: needs {self.peak_unit_bytes} bytes at once",
                remedy=f", more than {{max_ram}} {max_ram_bytes}; give at least {-(-self.peak_unit_bytes // 1_000_000)}MB",
            )


def make_plan(transform: AnyTransform, source: Checkpoint, *, max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES) -> Plan:
    """Plan a transform (an op, a chain, or a list of either) over a checkpoint, from headers alone.

    Raises PlanError and its kin for whatever does not fit; nothing has been read but headers by then.
    """
    with _no_collector():
        steps = steps_of(transform)
        for step in steps:
            step_identity(step)  # a setting by which no stopped run could be known again is told now
        resolved = resolve(steps, source.specs)
        if not resolved.specs:
            raise CheckpointError("no tensor would be left in the output", where=str(source))
        in_order = [resolved.specs[name] for name in canonical_order(resolved.specs)]
        resolved = resolved._replace(specs=SpecMap(in_order, resolved.specs.config))
        layout = lay_out(in_order, source.metadata, max_shard_bytes, source.stem)
        written = written_modules(resolved)
        files = output_files(source, resolved, written)
    return Plan(
        source=source,
        steps=steps,
        resolved=resolved,
        layout=layout,
        files=files,
        written=written,
        max_shard_bytes=max_shard_bytes,
    )


@contextmanager
def _no_collector() -> Iterator[None]:
    """A plan is hundreds of thousands of small tuples and no cycles; collecting while it grows doubles the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
