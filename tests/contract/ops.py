"""What every op owes: the suite that each ``tests/ops/test_<op>.py`` inherits and feeds with its ``CASES``.

A case gives an op, the tensors it meets, and what must come out, said in NumPy. The suite holds that the plan tells
the truth, that applying is pure, and that the whole engine writes the same. ``tests/ops/test_there_and_back.py`` undoes
what can be undone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.planning.rewriting import advance, is_reversible
from tensorsurgeon.running.run import run_plan
from tensorsurgeon.tensors.dtypes import dtype_of
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec
from tests.checkpoints import Tensors, assert_same, read_all, write_checkpoint


@dataclass(frozen=True)
class Case:
    """``op`` turns ``tensors`` into ``expected``; every tensor that it does not name must come through untouched."""

    label: str
    op: Any
    tensors: Tensors
    expected: Tensors
    reversible: bool = True
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """``op`` refuses ``tensors`` while planning, with ``error``, and says ``message``."""

    label: str
    op: Any
    tensors: Tensors
    error: type[SurgeonError]
    message: str
    config: dict[str, Any] = field(default_factory=dict)


def spec_map(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None) -> SpecMap:
    return SpecMap((TensorSpec(name, dtype_of(array), array.shape) for name, array in tensors.items()), config)


def array_of(region: Region, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The array that stands for a region, as an op may never change it."""
    array = np.ascontiguousarray(tensors[region.spec.name]).reshape(region.spec.shape)
    if region.start is not None:
        row = () if array.ndim == 1 else array.shape[-1:]
        array = array.reshape(region.spec.rows, *row)[region.start : region.stop]
    array = array.copy()
    array.flags.writeable = False
    return array


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, attribute in (("case", "CASES"), ("refusal", "REFUSALS")):
        if argument in metafunc.fixturenames:
            cases = getattr(metafunc.cls, attribute)
            metafunc.parametrize(argument, cases, ids=[case.label for case in cases])


class OpContract:
    """Inherit, and give ``CASES`` (at least one) and ``REFUSALS``."""

    CASES: tuple[Case, ...] = ()
    REFUSALS: tuple[Refusal, ...] = ()

    def test_there_are_cases(self) -> None:
        assert self.CASES
        assert len({case.label for case in self.CASES}) == len(self.CASES)

    def test_planned_specs_are_the_specs_of_what_should_come_out(self, case: Case) -> None:
        specs = spec_map(case.tensors, case.config)
        after = advance(specs, case.op.plan(specs))
        assert dict(after) == dict(spec_map(case.expected))

    def test_planning_twice_says_the_same(self, case: Case) -> None:
        specs = spec_map(case.tensors, case.config)
        assert case.op.plan(specs) == case.op.plan(specs)

    def test_apply_makes_the_planned_specs_and_leaves_its_inputs_alone(self, case: Case) -> None:
        specs = spec_map(case.tensors, case.config)
        for rewrite in case.op.plan(specs):
            if rewrite.moves_bytes:
                continue  # the engine moves bytes in files; the test of it below sees that they arrive
            inputs = [array_of(region, case.tensors) for region in rewrite.inputs]
            before = [array.tobytes() for array in inputs]
            first = [array.copy() for array in case.op.apply(rewrite, inputs)]
            second = case.op.apply(rewrite, inputs)
            assert [array.tobytes() for array in inputs] == before
            assert [a.tobytes() for a in first] == [np.ascontiguousarray(a).tobytes() for a in second]
            for region, array in zip(rewrite.outputs, first, strict=True):
                assert (array.dtype, array.shape) == (region.spec.dtype.numpy, region.shape)

    def test_the_engine_writes_what_should_come_out(self, case: Case, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "source", case.tensors, shards=3, config=case.config or None)
        run_plan(make_plan(case.op, open_checkpoint(source)), tmp_path / "out", workers=2)
        assert_same(read_all(tmp_path / "out"), case.expected)

    def test_an_op_says_whether_its_work_can_be_undone(self, case: Case) -> None:
        assert is_reversible(case.op) is case.reversible

    def test_what_does_not_fit_is_refused_while_planning(self, refusal: Refusal) -> None:
        specs = spec_map(refusal.tensors, refusal.config)
        with pytest.raises(refusal.error) as caught:
            advance(specs, refusal.op.plan(specs))
        assert refusal.message in str(caught.value)
