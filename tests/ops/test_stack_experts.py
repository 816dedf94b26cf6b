"""Experts go back into the stacks that their family publishes, and are left alone where the class gathers them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import MissingTensorError, NoMatchError, SpecError
from tensorsurgeon.ops.stack_experts import StackExperts
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.run import run_plan
from tensorsurgeon.verifying.judging import verify
from tests.checkpoints import Tensors, assert_same, read_all, write_checkpoint
from tests.contract.ops import Case, OpContract, Refusal
from tests.ops.arrays import bits
from tests.ops.test_split_experts import CONFIG, LAYOUTS, E, source_of

INNER, H = 4, 6
GPT_OSS = {"model_type": "gpt_oss", "hidden_size": H, "intermediate_size": INNER, "num_local_experts": 2}
GEMMA = {"model_type": "gemma4_text", "hidden_size": H, "moe_intermediate_size": INNER, "num_experts": 2}
QWEN = {"model_type": "qwen3_moe", "hidden_size": H, "moe_intermediate_size": INNER, "num_experts": 2}
AT = "model.layers.0.mlp.experts"


def one_by_one(at: str = AT, bias: bool = False) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"gate_proj": (INNER, H), "up_proj": (INNER, H), "down_proj": (H, INNER)}
    found = {}
    for e in range(2):
        for n, (leaf, shape) in enumerate(shapes.items()):
            found[f"{at}.{e}.{leaf}.weight"] = bits(shape, seed=10 * e + n)
            if bias:
                found[f"{at}.{e}.{leaf}.bias"] = bits(shape[:1], seed=100 + 10 * e + n)
    return found


def stacked(tensors: Tensors, at: str, leaf: str = "weight") -> tuple[list[Any], list[Any], list[Any]]:
    return tuple([tensors[f"{at}.{e}.{part}.{leaf}"] for e in range(2)] for part in ("gate_proj", "up_proj", "down_proj"))  # type: ignore[return-value]


def alternating(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.stack([row for pair in zip(gate, up, strict=True) for row in pair])


def as_gpt_oss() -> Tensors:
    tensors = one_by_one(bias=True)
    gates, ups, downs = stacked(tensors, AT)
    vectors = stacked(tensors, AT, "bias")
    return {
        f"{AT}.gate_up_proj": np.stack([alternating(g, u).T for g, u in zip(gates, ups, strict=True)]),
        f"{AT}.gate_up_proj_bias": np.stack([alternating(g, u) for g, u in zip(vectors[0], vectors[1], strict=True)]),
        f"{AT}.down_proj": np.stack([down.T for down in downs]),
        f"{AT}.down_proj_bias": np.stack(vectors[2]),
    }


def usual(at: str) -> Tensors:
    gates, ups, downs = stacked(one_by_one(at), at)
    halves = np.stack([np.concatenate(pair) for pair in zip(gates, ups, strict=True)])
    return {f"{at}.gate_up_proj": halves, f"{at}.down_proj": np.stack(downs)}


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: array for name, array in tensors.items() if name not in names}


BESIDE = "model.layers.0.experts"


class TestStackExperts(OpContract):
    CASES = (
        Case("transposed_and_in_turn_with_biases", StackExperts(), one_by_one(bias=True), as_gpt_oss(), config=GPT_OSS),
        Case("usual_where_the_class_gathers_nothing", StackExperts(), one_by_one(BESIDE), usual(BESIDE), config=GEMMA),
        Case("left_where_it_gathers", StackExperts(), one_by_one(), one_by_one(), config=QWEN),
        Case("always", StackExperts(always=True), one_by_one(), usual(AT), config=QWEN),
    )
    REFUSALS = (
        Refusal(
            "an_expert_without_a_part", StackExperts(), without(one_by_one(), f"{AT}.0.up_proj.weight"), MissingTensorError,
            "experts.0: has no up_proj to stack as mlp.experts.gate_up_proj", config=GPT_OSS,
        ),
        Refusal(
            "other_shapes", StackExperts(), {**one_by_one(), f"{AT}.1.up_proj.weight": bits((INNER + 1, H))}, SpecError,
            "must agree", config=GPT_OSS,
        ),
        Refusal("none", StackExperts(always=True), {"norm.weight": bits((H,))}, NoMatchError, "nothing to stack", config=QWEN),
    )  # fmt: skip


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_what_was_split_is_put_back_in_the_form_of_its_family(model_type: str, tmp_path: Path) -> None:
    source, _ = source_of(tmp_path / "source", model_type)
    run_plan(make_plan(load_transform("split-experts"), open_checkpoint(source)), tmp_path / "split")
    always = model_type == "unheard_of"
    run_plan(make_plan(StackExperts(always=always), open_checkpoint(tmp_path / "split")), tmp_path / "back")
    assert_same(read_all(tmp_path / "back"), read_all(source))
    # Within one plan it vanishes where it moves bytes, and goes expert by expert where it computes.
    at_once = make_plan([*load_transform("split-experts").steps, StackExperts(always=always)], open_checkpoint(source))
    tasks = [unit.tasks for unit in at_once.units if unit.tasks]
    assert len(tasks) == (0 if model_type in ("unheard_of", "granitemoe", "step3p5") else E if model_type == "dbrx" else 2 * E)


@pytest.mark.parametrize("model_type", [name for name in LAYOUTS if name != "unheard_of"])
def test_dequantizing_gives_the_published_form_and_the_judge_takes_it(model_type: str, tmp_path: Path) -> None:
    source, _ = source_of(tmp_path / "source", model_type)
    run_plan(make_plan(load_transform("ct-w8a8-int8"), open_checkpoint(source)), tmp_path / "int8")
    run_plan(make_plan(load_transform("dequantize"), open_checkpoint(tmp_path / "int8")), tmp_path / "float")
    before, after = read_all(source), read_all(tmp_path / "float")
    assert {name: array.shape for name, array in before.items()} == {name: array.shape for name, array in after.items()}
    for name, array in before.items():
        was = array.astype(np.float32)
        assert np.abs(after[name].astype(np.float32) - was).max() <= 0.01 * np.abs(was).max(), name
    found = verify(tmp_path / "float", tmp_path / "int8")
    assert found.is_sound
    assert not [note for note in found.notes if note.kind == "not-judged"]
    assert found.compared


def test_codes_are_not_stacked(tmp_path: Path) -> None:
    source, _ = source_of(tmp_path / "source", "gpt_oss")
    run_plan(make_plan(load_transform("ct-w8a8-int8"), open_checkpoint(source)), tmp_path / "int8")
    plan = make_plan(StackExperts(), open_checkpoint(tmp_path / "int8"))
    assert plan.specs == plan.source.specs


def test_a_list_of_experts_in_an_mtp_head_is_one_of_its_own(tmp_path: Path) -> None:
    tensors = {**one_by_one(), **one_by_one("mtp.layers.0.mlp.experts")}
    source = write_checkpoint(tmp_path / "source", tensors, config={**CONFIG, **GPT_OSS})
    plan = make_plan(StackExperts(), open_checkpoint(source))
    assert sorted(plan.specs) == sorted(
        f"{at}.{part}" for at in (AT, "mtp.layers.0.mlp.experts") for part in ("gate_up_proj", "down_proj")
    )
