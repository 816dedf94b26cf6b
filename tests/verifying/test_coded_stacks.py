"""gpt-oss's MXFP4 by itself: sound as published, and each planted fault found by the tensor's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorsurgeon.verifying.judging import verify
from tensorsurgeon.verifying.layouts.mxfp4_blocks import expert_of_blocks, largest_of_blocks
from tests.checkpoints import Tensors, read_all, write_checkpoint
from tests.ops.test_mxfp4_stacks import AT, CONFIG, written

UP, UP_SCALES, DOWN = f"{AT}.gate_up_proj_blocks", f"{AT}.gate_up_proj_scales", f"{AT}.down_proj_blocks"


def test_a_published_layout_is_sound_and_was_checked(tmp_path: Path) -> None:
    found = verify(written(tmp_path / "source")[0])
    assert [str(fault) for fault in found.faults] == []
    assert not any(note.kind == "unknown-method" for note in found.notes)


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, at: tuple[Any, ...], value: int) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors[name].__setitem__(at, value)


def change(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: function(tensors[name])})


@pytest.mark.parametrize(
    ("plant", "kind", "where"),
    [
        (drop(UP_SCALES), "missing-tensor", UP_SCALES),
        (drop(DOWN), "missing-tensor", DOWN),
        (change(UP, lambda codes: codes[:, :, :, :8].copy()), "shape", UP),
        (change(UP, lambda codes: codes.view(np.int8)), "shape", UP),
        (change(UP_SCALES, lambda scales: scales[:, :-1].copy()), "shape", UP_SCALES),
        (lambda tensors: [tensors.update({n: tensors[n][:2]}) for n in (UP, UP_SCALES)], "shape", UP),
        (put(UP_SCALES, (2, 5, 1), 255), "scale", f"{UP_SCALES}[2, 5, 1]"),
        (put(UP_SCALES, (1, 5, 1), 254), "scale", f"{UP_SCALES}[1]"),
        (put(DOWN, (1,), 0x80), "zero-weight", f"{DOWN}[1]"),
        (
            lambda tensors: tensors.update({f"{AT}.down_proj": np.ones((3, 64, 128), np.float16)}),
            "stored-twice",
            f"{AT}.down_proj",
        ),
    ],
)
def test_a_planted_fault_is_found(plant: Callable[[Tensors], Any], kind: str, where: str, tmp_path: Path) -> None:
    tensors = {name: tensor.copy() for name, tensor in read_all(written(tmp_path / "source")[0]).items()}
    plant(tensors)
    if kind == "scale" and where.endswith("[1]"):
        tensors[UP][1, 5, 1] = 0x77  # 6 times 2 ** 127
    found = verify(write_checkpoint(tmp_path / "spoilt", tensors, config=CONFIG))
    assert (kind, where) in {(fault.kind, fault.where) for fault in found.faults}, found.faults


def test_a_config_that_says_mxfp4_of_nothing_is_a_fault(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in read_all(written(tmp_path / "source")[0]).items() if tensor.dtype != np.uint8}
    found = verify(write_checkpoint(tmp_path / "spoilt", tensors, config=CONFIG))
    assert any(fault.kind == "config" and "_blocks" in fault.message for fault in found.faults)


def test_the_largest_code_of_a_group_is_that_of_its_values() -> None:
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (7, 3, 16), np.uint8)
    values = expert_of_blocks(blocks, np.full((7, 3), 127, np.uint8)).reshape(7, 3, 32)
    assert np.array_equal(largest_of_blocks(blocks), np.abs(values).max(-1))
