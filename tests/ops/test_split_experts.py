"""Experts in every way in which families stack them come out one by one, each weight where the model computes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import NoMatchError, SpecError
from tensorsurgeon.ops.split_experts import SplitExperts
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.run import run_plan
from tests.checkpoints import assert_same, random_array, read_all, write_checkpoint

E, H, INNER = 3, 16, 8
CONFIG = {"hidden_size": H, "moe_intermediate_size": INNER, "num_experts": E, "num_hidden_layers": 1}
AT = "model.layers.0"

# model_type, stacked tensors from the experts' own matrices (gate, up [I, H], down [H, I]), the path and names of the result.
Matrices = list[np.ndarray]


def interleaved(gates: Matrices, ups: Matrices) -> np.ndarray:
    """Rows of gate and up in turn: gate 0, up 0, gate 1, up 1."""
    return np.stack([np.stack([g, u], 1).reshape(2 * len(g), *g.shape[1:]) for g, u in zip(gates, ups, strict=True)])


def halves(gates: Matrices, ups: Matrices) -> np.ndarray:
    return np.stack([np.concatenate([g, u]) for g, u in zip(gates, ups, strict=True)])


def swapped(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.swapaxes(1, 2))


LAYOUTS: dict[str, Any] = {
    "unheard_of": lambda g, u, d: (
        {"mlp.experts.gate_up_proj": halves(g, u), "mlp.experts.down_proj": np.stack(d)},
        "mlp.experts",
        None,
    ),
    "qwen3_vl_moe": lambda g, u, d: (
        {"mlp.experts.gate_up_proj": swapped(halves(g, u)), "mlp.experts.down_proj": swapped(np.stack(d))},
        "mlp.experts",
        None,
    ),
    "llama4": lambda g, u, d: (
        {"feed_forward.experts.gate_up_proj": swapped(halves(g, u)), "feed_forward.experts.down_proj": swapped(np.stack(d))},
        "feed_forward.experts",
        None,
    ),
    "gpt_oss": lambda g, u, d: (
        {"mlp.experts.gate_up_proj": swapped(interleaved(g, u)), "mlp.experts.down_proj": swapped(np.stack(d))},
        "mlp.experts",
        None,
    ),
    "granitemoe": lambda g, u, d: (
        {"block_sparse_moe.input_linear.weight": halves(g, u), "block_sparse_moe.output_linear.weight": np.stack(d)},
        "block_sparse_moe.experts",
        None,
    ),
    "step3p5": lambda g, u, d: (
        {"moe.gate_proj.weight": np.stack(g), "moe.up_proj.weight": np.stack(u), "moe.down_proj.weight": np.stack(d)},
        "moe.experts",
        None,
    ),
    "dbrx": lambda g, u, d: (
        {
            "ffn.experts.mlp.w1": np.concatenate(g),
            "ffn.experts.mlp.v1": np.concatenate(u),
            "ffn.experts.mlp.w2": np.concatenate([m.T for m in d]),
        },
        "ffn.experts",
        ("w1", "v1", "w2"),
    ),
}


def matrices(rng: np.random.Generator, *shape: int) -> Matrices:
    return [random_array(rng, shape, ml_dtypes.bfloat16) for _ in range(E)]


def source_of(folder: Path, model_type: str, more: dict[str, np.ndarray] | None = None) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint of this family, and the weights that its experts compute with, under the names they shall have."""
    rng = np.random.default_rng(5)
    g, u, d = matrices(rng, INNER, H), matrices(rng, INNER, H), matrices(rng, H, INNER)
    stacks, into, names = LAYOUTS[model_type](g, u, d)
    gate, up, down = names or ("gate_proj", "up_proj", "down_proj")
    wanted = {f"{AT}.{into}.{e}.{name}.weight": part[e] for e in range(E) for name, part in ((gate, g), (up, u), (down, d))}
    tensors = {f"{AT}.{name}": np.ascontiguousarray(array) for name, array in stacks.items()} | (more or {})
    return write_checkpoint(folder, tensors, config={"model_type": model_type, **CONFIG}), wanted


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_each_expert_s_linears_come_out_as_the_model_computes_with_them(model_type, tmp_path):
    source, wanted = source_of(tmp_path / "source", model_type)
    plan = make_plan(load_transform("split-experts"), open_checkpoint(source))
    run_plan(plan, tmp_path / "out", workers=2)
    assert_same(read_all(tmp_path / "out"), wanted)


@pytest.mark.parametrize("model_type", ["llama4", "gpt_oss", "dbrx"])
def test_a_transposed_expert_is_a_piece_of_work_of_its_own(model_type, tmp_path):
    source, _ = source_of(tmp_path / "source", model_type)
    plan = make_plan(load_transform("split-experts"), open_checkpoint(source))
    # One expert's matrix, read and turned: never a whole stack.
    assert plan.peak_unit_bytes <= 2 * (2 * INNER * H * 2) + 4096
    quantized = make_plan(load_transform("ct-w8a8-int8"), open_checkpoint(source))
    assert len(quantized.units) >= E


@pytest.mark.parametrize("model_type", ["llama4", "gpt_oss", "granitemoe", "dbrx"])
def test_quantizing_a_stack_is_splitting_it_and_then_quantizing(model_type, tmp_path):
    source, _ = source_of(tmp_path / "source", model_type)
    run_plan(make_plan(load_transform("ct-w8a8-int8"), open_checkpoint(source)), tmp_path / "at_once")
    run_plan(make_plan(load_transform("split-experts"), open_checkpoint(source)), tmp_path / "split")
    run_plan(make_plan(load_transform("ct-w8a8-int8"), open_checkpoint(tmp_path / "split")), tmp_path / "in_two")
    assert_same(read_all(tmp_path / "at_once"), read_all(tmp_path / "in_two"))
    assert any(array.dtype == np.int8 for array in read_all(tmp_path / "at_once").values())


def test_interleaved_biases_go_with_their_experts(tmp_path):
    rng = np.random.default_rng(8)
    gates, ups, downs = matrices(rng, INNER), matrices(rng, INNER), matrices(rng, H)
    biases = {f"{AT}.mlp.experts.gate_up_proj_bias": interleaved(gates, ups), f"{AT}.mlp.experts.down_proj_bias": np.stack(downs)}
    source, wanted = source_of(tmp_path / "source", "gpt_oss", biases)
    run_plan(make_plan(load_transform("split-experts"), open_checkpoint(source)), tmp_path / "out")
    for e in range(E):
        for name, part in (("gate_proj", gates), ("up_proj", ups), ("down_proj", downs)):
            wanted[f"{AT}.mlp.experts.{e}.{name}.bias"] = part[e]
    assert_same(read_all(tmp_path / "out"), wanted)


def test_fuse_experts_puts_back_what_was_split(tmp_path):
    source, _ = source_of(tmp_path / "source", "unheard_of")
    run_plan(make_plan(load_transform("split-experts"), open_checkpoint(source)), tmp_path / "split")
    run_plan(make_plan(load_transform("fuse-experts"), open_checkpoint(tmp_path / "split")), tmp_path / "fused")
    assert_same(read_all(tmp_path / "fused"), read_all(source))


def test_a_stack_that_its_shape_contradicts_is_refused(tmp_path):
    source, _ = source_of(tmp_path / "source", "llama4")
    tensors = read_all(source)
    for name in tensors:
        tensors[name] = swapped(tensors[name])
    write_checkpoint(tmp_path / "turned", tensors, config={"model_type": "llama4", **CONFIG})
    with pytest.raises(SpecError, match=r"the table of llama4 says .*\['in', 'out'\], but then hidden_size \(16\) would be"):
        make_plan(load_transform("split-experts"), open_checkpoint(tmp_path / "turned"))
    tensors = {
        f"{AT}.mlp.experts.{part}": tensors[f"{AT}.feed_forward.experts.{part}"].swapaxes(1, 2).copy()
        for part in ("gate_up_proj", "down_proj")
    }
    write_checkpoint(tmp_path / "unknown", tensors, config={"model_type": "unheard_of", **CONFIG, "hidden_size": 2 * H})
    with pytest.raises(SpecError, match="expected num_experts"):
        make_plan(load_transform("split-experts"), open_checkpoint(tmp_path / "unknown"))


def test_experts_that_lie_one_by_one_are_said_to(tmp_path):
    source, _ = source_of(tmp_path / "source", "unheard_of")
    run_plan(make_plan(load_transform("split-experts"), open_checkpoint(source)), tmp_path / "split")
    with pytest.raises(NoMatchError, match="no stacked experts"):
        make_plan(SplitExperts(), open_checkpoint(tmp_path / "split"))
    make_plan([SplitExperts(where=("maybe:role:expert",))], open_checkpoint(tmp_path / "split"))
