"""Codes move between layouts without being chosen again, and come back byte for byte."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.checkpoint.header import build_header
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.ops.rename import Rename
from tensorsurgeon.ops.repack import Repack
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.run import run_plan
from tensorsurgeon.tensors.dtypes import BF16
from tensorsurgeon.tensors.spec import TensorSpec

PREFIX = "model.layers.0.mlp"
INT4_LAYOUTS = ("gptq", "gptq-v2", "autoround", "ct-packed", "quark-int4", "quark-int4-reorder")


def write_model(folder: Path, rows: int, columns: int, seed: int) -> None:
    """A dense model of one MLP, whose weights are ordinary but for a row of zeros and one of outliers."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in (("gate_proj", (rows, columns)), ("up_proj", (rows, columns)), ("down_proj", (columns, rows))):
        weight = rng.normal(0, 0.05, shape).astype(np.float32)
        weight[0] = 0
        weight[1, 0] = 3.0
        weights[f"{PREFIX}.{name}.weight"] = weight.astype(ml_dtypes.bfloat16)
    specs = [TensorSpec(name, BF16, weight.shape) for name, weight in weights.items()]
    header, _, _ = build_header(specs, {"format": "pt"})
    (folder / "model.safetensors").write_bytes(header + b"".join(w.tobytes() for w in weights.values()))
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}')


def apply(name: str, source: Path, target: Path, **parameters: object) -> Path:
    run_plan(make_plan(load_transform(name, parameters), open_checkpoint(source)), target, workers=1)
    return target


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "surgeon.json"}


@settings(max_examples=30)
@given(
    pair=st.sampled_from(list(permutations(INT4_LAYOUTS, 2))),
    rows=st.sampled_from([64, 96]),
    columns=st.sampled_from([64, 128]),
    seed=st.integers(0, 99),
)
def test_there_and_back_gives_the_same_bytes(
    pair: tuple[str, str], rows: int, columns: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first, second = pair
    folder = tmp_path_factory.mktemp("repack")
    write_model(folder / "bf16", rows, columns, seed)
    start = apply("quantize-linears", folder / "bf16", folder / "a", format=first, group_size=32, split_experts=False)
    there = apply("repack", start, folder / "b", to=second, inexact_scales="keep")
    back = apply("repack", there, folder / "c", to=first)
    assert files_of(back) == files_of(start)


@pytest.mark.parametrize("first", INT4_LAYOUTS)
def test_every_layout_expresses_what_every_other_wrote(first: str, tmp_path: Path) -> None:
    write_model(tmp_path / "bf16", 64, 64, 1)
    start = apply("quantize-linears", tmp_path / "bf16", tmp_path / "a", format=first, group_size=32, split_experts=False)
    at = start
    for number, layout in enumerate(INT4_LAYOUTS):
        at = apply("repack", at, tmp_path / f"step{number}", to=layout, inexact_scales="keep")
    assert files_of(apply("repack", at, tmp_path / "back", to=first)) == files_of(start)


ASYMMETRIC_LAYOUTS = ("awq", "autoround-awq", "gptq-v2", "ct-packed", "quark-int4", "quark-int4-reorder")


@pytest.mark.parametrize(("first", "second"), list(permutations(ASYMMETRIC_LAYOUTS, 2)))
def test_asymmetric_codes_and_zero_points_go_there_and_back(first: str, second: str, tmp_path: Path) -> None:
    write_model(tmp_path / "bf16", 64, 64, 2)
    start = apply(
        "quantize-linears", tmp_path / "bf16", tmp_path / "a", format=first, group_size=32, symmetric=False, split_experts=False
    )
    there = apply("repack", start, tmp_path / "b", to=second, inexact_scales="keep")
    assert files_of(apply("repack", there, tmp_path / "c", to=first)) == files_of(start)


def test_a_scale_that_would_change_stops_the_run_and_says_what_to_set(tmp_path: Path) -> None:
    write_model(tmp_path / "bf16", 64, 128, 0)
    gptq = apply("quantize-linears", tmp_path / "bf16", tmp_path / "a", format="gptq", group_size=32, split_experts=False)
    with pytest.raises(
        SurgeonError, match=r"model.layers.0.mlp.*would be stored in BF16.*inexact_scales=keep.*inexact_scales=round"
    ):
        apply("repack", gptq, tmp_path / "b", to="ct-packed")
    apply("repack", gptq, tmp_path / "c", to="ct-packed", inexact_scales="round")


def test_int8_moves_between_quark_and_compressed_tensors(tmp_path: Path) -> None:
    write_model(tmp_path / "bf16", 64, 128, 0)
    quark = apply("quantize-linears", tmp_path / "bf16", tmp_path / "quark", format="quark-int8", split_experts=False)
    ct = apply("repack", quark, tmp_path / "ct", to="ct-int")
    assert files_of(apply("repack", ct, tmp_path / "back", to="quark-int8")) == files_of(quark)


def test_awq_of_symmetric_weights_becomes_symmetric_when_asked(tmp_path: Path) -> None:
    write_model(tmp_path / "bf16", 64, 128, 0)
    start = apply("quantize-linears", tmp_path / "bf16", tmp_path / "a", format="gptq", group_size=32, split_experts=False)
    awq = apply("repack", start, tmp_path / "awq", to="awq")
    back = apply("repack", awq, tmp_path / "back", to="gptq", symmetric=True)
    assert files_of(back) == files_of(start)


def test_asymmetric_codes_are_refused_by_a_symmetric_layout_with_the_reason(tmp_path: Path) -> None:
    write_model(tmp_path / "bf16", 64, 128, 0)
    awq = apply("quantize-linears", tmp_path / "bf16", tmp_path / "a", format="awq", group_size=32, split_experts=False)
    with pytest.raises(SurgeonError, match=r"zero points are not zero.*asymmetric"):
        apply("repack", awq, tmp_path / "b", to="gptq", symmetric=True)
    with pytest.raises(SurgeonError, match="codes are int, but hf-fp8 holds fp8"):
        make_plan(Repack(to="hf-fp8"), open_checkpoint(awq))


def test_an_unquantized_checkpoint_cannot_be_repacked(tmp_path: Path) -> None:
    write_model(tmp_path / "bf16", 64, 128, 0)
    with pytest.raises(SurgeonError, match="not quantized"):
        apply("repack", tmp_path / "bf16", tmp_path / "b", to="gptq")


def test_modules_that_the_quantization_names_keep_their_names(tmp_path: Path) -> None:
    """Else an exclude list would point at nothing, and engines would take a float module for a quantized one."""
    write_model(tmp_path / "bf16", 64, 128, 0)
    quantize = Quantize(where=("{path*}.up_proj.weight",), exclude=("maybe:{path*}.gate_proj.weight",), format="ct-int")
    with pytest.raises(SurgeonError):  # gate and up are one module to engines
        make_plan(quantize, open_checkpoint(tmp_path / "bf16"))
    quantize = Quantize(where=("{path*}.down_proj.weight",), format="ct-int")
    run_plan(make_plan(quantize, open_checkpoint(tmp_path / "bf16")), tmp_path / "int8")
    rename = Rename(where=("{path*}.gate_proj.weight",), to="{path}.gate.weight")
    with pytest.raises(SurgeonError, match=r"gate_proj: quantization_config names this module"):
        make_plan(rename, open_checkpoint(tmp_path / "int8"))
