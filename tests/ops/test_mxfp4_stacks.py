"""gpt-oss's MXFP4 as a source: stacks of codes whose gate and up alternate, with a bias for each expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import ConfigError, PlanError, SpecError
from tensorsurgeon.ops.dequantize import Dequantize
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.run import run_plan
from tensorsurgeon.verifying.judging import verify
from tests.checkpoints import Tensors, assert_same, read_all, write_checkpoint

E, H, INNER = 3, 128, 64
AT = "model.layers.0.mlp.experts"
LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
CONFIG: dict[str, Any] = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "dtype": "bfloat16", "num_hidden_layers": 1,
    "hidden_size": H, "intermediate_size": INNER, "num_local_experts": E,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
}  # fmt: skip
BF16 = ml_dtypes.bfloat16


def stack(rows: int, columns: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes, exponents, and the weights that they mean: element 2 i is the low half of byte i."""
    blocks = rng.integers(0, 256, (E, rows, columns // 32, 16), np.uint8)
    exponents = rng.integers(115, 124, (E, rows, columns // 32), np.uint8)
    weight = np.empty((E, rows, columns // 32, 32), np.float32)
    weight[..., 0::2], weight[..., 1::2] = LEVELS[blocks & 15], LEVELS[blocks >> 4]
    weight *= np.exp2(exponents.astype(np.float32) - 127)[..., None]
    return blocks, exponents, weight.reshape(E, rows, columns)


def written(folder: Path, **config: Any) -> tuple[Path, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    gate_up, down = stack(2 * INNER, H, rng), stack(H, INNER, rng)
    tensors: Tensors = {
        f"{AT}.gate_up_proj_blocks": gate_up[0], f"{AT}.gate_up_proj_scales": gate_up[1],
        f"{AT}.gate_up_proj_bias": rng.normal(size=(E, 2 * INNER)).astype(BF16),
        f"{AT}.down_proj_blocks": down[0], f"{AT}.down_proj_scales": down[1],
        f"{AT}.down_proj_bias": rng.normal(size=(E, H)).astype(BF16),
        "model.layers.0.mlp.router.weight": rng.normal(size=(E, H)).astype(BF16),
        "model.layers.0.mlp.router.bias": rng.normal(size=(E,)).astype(BF16),
        "model.layers.0.self_attn.o_proj.weight": rng.normal(size=(H, H)).astype(BF16),
    }  # fmt: skip
    return write_checkpoint(folder, tensors, config={**CONFIG, **config}), gate_up[2], down[2]


def run(transform: Any, source: Path, target: Path) -> Tensors:
    run_plan(make_plan(transform, open_checkpoint(source)), target, workers=1)
    found: Tensors = read_all(target)
    return found


def test_dequantize_gives_the_stacks_of_the_class(tmp_path: Path) -> None:
    source, gate_up, down = written(tmp_path / "source")
    found = run(load_transform("dequantize", {"dtype": "F32"}), source, tmp_path / "float")
    kept = {name: array for name, array in read_all(source).items() if not name.endswith(("_blocks", "_scales"))}
    wanted = {f"{AT}.gate_up_proj": gate_up.swapaxes(1, 2), f"{AT}.down_proj": down.swapaxes(1, 2)}
    assert_same(found, kept | {name: np.ascontiguousarray(array) for name, array in wanted.items()})
    judged = verify(tmp_path / "float", source)
    assert judged.is_sound
    assert not [note for note in judged.notes if note.kind == "not-judged"]


@pytest.mark.parametrize("transform", ["ct-w4a16-g32", "fp8-block", "nvfp4a16"])
def test_one_command_is_dequantizing_in_f32_and_quantizing(transform: str, tmp_path: Path) -> None:
    source, gate_up, _ = written(tmp_path / "source")
    at_once = run(load_transform(transform), source, tmp_path / "at_once")
    run(load_transform("dequantize", {"dtype": "F32"}), source, tmp_path / "float")
    in_two = run(load_transform(transform), tmp_path / "float", tmp_path / "in_two")
    assert_same(at_once, in_two)
    assert f"{AT}.2.up_proj.bias" in at_once
    judged = verify(tmp_path / "at_once", source)
    assert judged.is_sound
    assert len(judged.compared) == 3 * E + 1
    assert not [note for note in judged.notes if note.kind == "not-judged"]
    run(load_transform("dequantize"), tmp_path / "at_once", tmp_path / "back")
    up = read_all(tmp_path / "back")[f"{AT}.gate_up_proj"][..., 1::2].astype(np.float32)
    assert np.linalg.norm(up - gate_up.swapaxes(1, 2)[..., 1::2]) < 0.2 * np.linalg.norm(gate_up[:, 1::2])


@pytest.mark.parametrize(
    "transform",
    ["ct-w4a16-g32", "ct-w8a16", "ct-w8a8-int8", "fp8-block", "nvfp4a16", "quark-w8a8-int8", "gptq-int4-g128", "awq-int4-g128",
     "autoround-int4-g128", "mixed"],
)  # fmt: skip
def test_every_conversion_takes_it_expert_by_expert(transform: str, tmp_path: Path) -> None:
    source, _, _ = written(tmp_path / "source")
    values = {"group_size": "32"} if transform.endswith("g128") else {}
    plan = make_plan(load_transform(transform, values), open_checkpoint(source))
    # An expert in F32, its codes and what is made of it: never a stack of them.
    assert plan.peak_unit_bytes < 12 * 2 * INNER * H * 4 + (1 << 20)
    assert any(name.startswith(f"{AT}.0.gate_proj.") for name in plan.specs)


def test_experts_that_are_kept_out_are_rounded_once(tmp_path: Path) -> None:
    source, gate_up, _ = written(tmp_path / "source")
    for number, values in enumerate(
        ({"also_exclude": "maybe:role:expert"}, {"where": "role:attention", "split_experts": "false"})
    ):
        step = load_transform("quantize-linears" if number else "ct-w8a8-int8", values)
        found = run(step, source, tmp_path / f"out{number}")
        assert not [name for name, array in found.items() if array.dtype == np.float32 and name.startswith(AT)]
        if number:
            assert np.array_equal(found[f"{AT}.gate_up_proj"], gate_up.swapaxes(1, 2).astype(BF16))
        else:
            assert np.array_equal(found[f"{AT}.1.gate_proj.weight"], gate_up[1, 0::2].astype(BF16))


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    source, _, _ = written(tmp_path / "source")
    tensors = read_all(source)
    short = {name: array for name, array in tensors.items() if name != f"{AT}.down_proj_scales"}
    with pytest.raises(ConfigError, match=r"down_proj_blocks: codes of MXFP4, but the checkpoint has no .*down_proj_scales"):
        make_plan(Dequantize(), open_checkpoint(write_checkpoint(tmp_path / "short", short, config=CONFIG)))
    other = {**tensors, f"{AT}.down_proj_scales": tensors[f"{AT}.down_proj_scales"][:, :-1].copy()}
    with pytest.raises(ConfigError, match=r"down_proj_blocks U8\[3, 128, 2, 16\]: MXFP4 is"):
        make_plan(Dequantize(), open_checkpoint(write_checkpoint(tmp_path / "other", other, config=CONFIG)))
    strange = write_checkpoint(tmp_path / "strange", tensors, config={**CONFIG, "model_type": "unheard_of", "architectures": []})
    with pytest.raises(SpecError, match="no table of a family and no class"):
        make_plan(Dequantize(), open_checkpoint(strange))
    none = {name: array for name, array in tensors.items() if not name.startswith(AT)}
    with pytest.raises(ConfigError, match="says mxfp4, but no tensor"):
        make_plan(Dequantize(), open_checkpoint(write_checkpoint(tmp_path / "none", none, config=CONFIG)))
    with pytest.raises(PlanError, match="mxfp4"):
        make_plan(load_transform("repack", {"to": "awq"}), open_checkpoint(source))
