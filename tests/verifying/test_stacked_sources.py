"""A checkpoint without a record, made of a source whose experts are stacked in any form: paired with it expert by expert."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.models.stacks import Stacked
from tensorsurgeon.ops import split_experts
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.planning.rewriting import Rewrite
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.run import run_plan
from tensorsurgeon.verifying.judging import verify
from tests.checkpoints import read_all, write_checkpoint
from tests.ops.test_mxfp4_stacks import written
from tests.ops.test_split_experts import LAYOUTS, E, source_of
from tests.verifying.planting import Spoilt


def made(source: Path, target: Path, transform: str = "ct-w8a8-int8") -> Path:
    run_plan(make_plan(load_transform(transform), open_checkpoint(source)), target)
    (target / "surgeon.json").unlink()
    return target


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_every_form_is_compared_expert_by_expert(model_type: str, tmp_path: Path) -> None:
    source, _ = source_of(tmp_path / "source", model_type)
    found = verify(made(source, tmp_path / "out"), source)
    assert not found.faults
    assert len(found.compared) == 3 * E
    assert min(fidelity.snr_db for fidelity in found.compared) > 30
    # Another expert's codes are found.
    name = next(name for name in read_all(tmp_path / "out") if ".1." in name and name.endswith(".weight"))
    spoilt = Spoilt(tmp_path / "out", tmp_path / "spoilt")
    spoilt.tensors[name] = spoilt.tensors[name.replace(".1.", ".2.")].copy()
    faults = verify(spoilt.save(), source).faults
    assert [fault.where for fault in faults] == [name.removesuffix(".weight")]


@pytest.mark.parametrize("transform", ["ct-w8a8-int8", "split-experts"])
def test_mxfp4_and_its_biases_too(transform: str, tmp_path: Path) -> None:
    source, _, _ = written(tmp_path / "source")
    if transform == "split-experts":
        run_plan(make_plan(load_transform("dequantize"), open_checkpoint(source)), tmp_path / "float")
        source = tmp_path / "float"
    found = verify(made(source, tmp_path / "out", transform), source)
    assert not found.faults
    assert len(found.compared) == (10 if transform == "ct-w8a8-int8" else 0)
    spoilt = Spoilt(tmp_path / "out", tmp_path / "spoilt")
    bias = "model.layers.0.mlp.experts.1.up_proj.bias"
    spoilt.tensors[bias] = np.ascontiguousarray(spoilt.tensors[bias][::-1])
    assert [fault.where for fault in verify(spoilt.save(), source).faults] == [bias]


def test_stacks_that_were_only_decoded(tmp_path: Path) -> None:
    source, _, _ = written(tmp_path / "source")
    found = verify(made(source, tmp_path / "out", "dequantize"), source)
    assert not found.faults
    assert len(found.compared) == 2


def test_an_expert_that_is_gone_is_missed(tmp_path: Path) -> None:
    source, wanted = source_of(tmp_path / "source", "llama4")
    name = "model.layers.0.feed_forward.experts.1.up_proj.weight"
    assert name in wanted
    left = {key: array for key, array in wanted.items() if key != name}
    target = write_checkpoint(tmp_path / "out", left, config=open_checkpoint(source).config)
    assert ("lost", name) in {(fault.kind, fault.where) for fault in verify(target, source).faults}


@pytest.mark.parametrize("transform", ["ct-w8a8-int8", "split-experts"])
@pytest.mark.parametrize("model_type", ["unheard_of", "qwen3_vl_moe", "gpt_oss", "dbrx"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_wrong_split_is_not_shared(
    model_type: str, transform: str, recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op takes the last expert first, and so when the judge plans the recorded recipe: he says himself which lies where."""
    source, _ = source_of(tmp_path / "source", model_type)
    right = split_experts._rewrites

    def wrong(stacked: Stacked) -> Iterator[Rewrite]:
        made = list(right(stacked))
        return (one._replace(inputs=other.inputs) for one, other in zip(made, reversed(made), strict=True) if one.outputs)

    monkeypatch.setattr(split_experts, "_rewrites", wrong)
    run_plan(make_plan(load_transform(transform), open_checkpoint(source)), tmp_path / "out")
    if not recorded:
        (tmp_path / "out" / "surgeon.json").unlink()
    kinds = {fault.kind for fault in verify(tmp_path / "out", source).faults}
    assert kinds
    assert kinds <= {"bytes", "fidelity"}


def test_tensors_without_a_module_are_compared_as_others_are(tmp_path: Path) -> None:
    """DeepSeek V4 has such names at its top; those of a stack's experts have four parts and more."""
    extra = {"scope": np.ones(3, np.float32), "hc.base": np.ones((2, 3), np.float32)}
    source, _ = source_of(tmp_path / "source", next(iter(LAYOUTS)), extra)
    assert extra.keys() <= read_all(source).keys()
    assert not verify(made(source, tmp_path / "out"), source).faults
