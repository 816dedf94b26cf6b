"""Calibration of a quantized source: codes equal those of calibrating what `dequantize --set dtype=F32` writes, to the bit."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from tensorsurgeon.calibrate.log import LOG_NAME, read_log
from tensorsurgeon.calibrate.run import run_calibrated
from tensorsurgeon.calibrate.walk.model import StreamedModel, read_weights
from tensorsurgeon.calibrate.walk.statistics import StoredStatistics, layer_path
from tensorsurgeon.calibrate.walk.weights import FloatWeights
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.formats.registry import FORMATS
from tensorsurgeon.ops.dequantize import Dequantize
from tensorsurgeon.ops.on_the_way import for_source
from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.planning.plan import Plan, make_plan
from tensorsurgeon.planning.rewriting import steps_of
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.run import run_plan
from tests.calibrate.commands import record, surgeon
from tests.calibrate.models import options_of, write_ids
from tests.checkpoints import Tensors, apply, read_all, write_checkpoint
from tests.families import build

FP8 = ml_dtypes.float8_e4m3fn


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts one by one, attention and a router, in BF16."""
    folder = tmp_path_factory.mktemp("plain")
    build.write("qwen3_moe", folder)
    return folder / "source"


def gptq_plan(source: Path) -> Plan:
    steps = steps_of(load_transform("quantize-linears", {"format": "ct-packed", "num_bits": 4, "group_size": 32}))
    chosen = [replace(step, method="gptq") if isinstance(step, Quantize) else step for step in steps]
    checkpoint = open_checkpoint(source)
    return make_plan(for_source(chosen, checkpoint), checkpoint)


def by_layout(name: str) -> Callable[[Path, Path], Path]:
    def write(plain: Path, folder: Path) -> Path:
        apply(steps_of(load_transform("quantize-linears", {"format": name})), plain, folder, workers=1)
        return folder

    return write


def rewritten(source: Path, folder: Path, change: Callable[[Tensors], Tensors], config: dict[str, Any]) -> Path:
    known = json.loads((source / "config.json").read_text())
    return write_checkpoint(folder, change(read_all(source)), config={**known, "quantization_config": config})


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def modelopt_nvfp4(plain: Path, folder: Path) -> Path:
    """As compressed-tensors packs it, with the second scale the other way up and what the config is not needed for."""
    apply(steps_of(load_transform("nvfp4a16", {})), plain, folder.with_name("ct"), workers=1)

    def change(tensors: Tensors) -> Tensors:
        made: Tensors = {}
        for name, array in tensors.items():
            if name.endswith("weight_global_scale"):
                made[name.replace("weight_global_scale", "weight_scale_2")] = np.float32(1) / array.reshape(())
                made[name.replace("weight_global_scale", "input_scale")] = np.array(0.1, np.float32)
            else:
                made[name.replace("weight_packed", "weight")] = array
        return made

    said = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*.mlp.gate"]}
    return rewritten(folder.with_name("ct"), folder, change, said)


def per_tensor(plain: Path, folder: Path, scale_name: str, said: dict[str, Any]) -> Path:
    def change(tensors: Tensors) -> Tensors:
        made: Tensors = {}
        for name, array in tensors.items():
            made[name] = array
            if is_linear(name):
                wide = array.astype(np.float32)
                scale = np.float32(np.abs(wide).max() / 448)
                made[name] = (wide / scale).astype(FP8)
                made[name.removesuffix("weight") + scale_name] = np.array(scale)
        return made

    return rewritten(plain, folder, change, said)


def modelopt_fp8(plain: Path, folder: Path) -> Path:
    said = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "*.mlp.gate"]}
    return per_tensor(plain, folder, "weight_scale", said)


def static_fp8(plain: Path, folder: Path) -> Path:
    said = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    return per_tensor(plain, folder, "weight_scale_inv", {**said, "modules_to_not_convert": ["lm_head", "gate"]})


SOURCES = {
    **{name: by_layout(name) for name in FORMATS},
    "modelopt nvfp4": modelopt_nvfp4,
    "modelopt fp8": modelopt_fp8,
    "fp8 per tensor": static_fp8,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SOURCES)
def test_codes_equal_those_of_calibrating_the_weights_in_f32(name: str, plain: Path, tmp_path: Path) -> None:
    source = SOURCES[name](plain, tmp_path / "source")
    options = options_of(write_ids(tmp_path / "ids.npy", rows=12, vocabulary=400), samples=12)
    run_calibrated(gptq_plan(source), tmp_path / "direct", options, workers=2)
    apply(Dequantize(dtype="F32"), source, tmp_path / "f32", workers=1)
    run_calibrated(gptq_plan(tmp_path / "f32"), tmp_path / "by-way", options, workers=2)
    direct, other = read_all(tmp_path / "direct"), read_all(tmp_path / "by-way")
    assert direct.keys() == other.keys()
    packed = [key for key in direct if key.endswith((".weight_packed", ".weight_scale"))]
    assert len(packed) == 2 * (2 * 4 + 2 * 8 * 3)
    assert all(direct[key].tobytes() == other[key].tobytes() for key in packed)
    log, log_by_way = (read_log(tmp_path / each / LOG_NAME) for each in ("direct", "by-way"))
    assert {row.method for row in log} == {"gptq"}
    assert [row._replace(seconds=0) for row in log] == [row._replace(seconds=0) for row in log_by_way]


@pytest.mark.filterwarnings("ignore")
def test_experts_stacked_in_mxfp4_are_calibrated_one_by_one(tmp_path: Path) -> None:
    build.write("gpt_oss_mxfp4", tmp_path)
    source = tmp_path / "source"
    options = options_of(write_ids(tmp_path / "ids.npy", rows=12, vocabulary=400), samples=12)
    run_calibrated(gptq_plan(source), tmp_path / "direct", options, workers=2)
    apply(Dequantize(dtype="F32"), source, tmp_path / "f32", workers=1)
    run_calibrated(gptq_plan(tmp_path / "f32"), tmp_path / "by-way", options, workers=2)
    direct, other = read_all(tmp_path / "direct"), read_all(tmp_path / "by-way")
    packed = [key for key in direct if key.endswith((".weight_packed", ".weight_scale"))]
    assert len(packed) == 2 * (2 * 4 + 2 * 8 * 3)
    assert all(direct[key].tobytes() == other[key].tobytes() for key in packed)
    assert {row.method for row in read_log(tmp_path / "direct" / LOG_NAME)} == {"gptq"}


@pytest.mark.filterwarnings("ignore")
def test_units_whose_codes_were_chosen_unpack_nothing(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = by_layout("hf-fp8")(plain, tmp_path / "source")
    unpacked: list[str] = []
    plain_rows = Dequantize.rows

    def noting(self: Dequantize, rewrite: Any, inputs: Any) -> Any:
        if threading.current_thread().name.startswith("surgeon"):
            unpacked.append(rewrite.outputs[0].spec.name)
        return plain_rows(self, rewrite, inputs)

    monkeypatch.setattr(Dequantize, "rows", noting)
    options = options_of(write_ids(tmp_path / "ids.npy", rows=12, vocabulary=400), samples=12)
    run_calibrated(gptq_plan(source), tmp_path / "gptq", options, workers=2)
    assert not unpacked
    plan = make_plan(for_source(steps_of(load_transform("ct-w4a16-g32", {})), open_checkpoint(source)), open_checkpoint(source))
    run_plan(plan, tmp_path / "rtn", workers=2)
    assert len(unpacked) == 2 * (4 + 8 * 3)


@pytest.mark.filterwarnings("ignore")
def test_statistics_equal_those_of_a_bf16_copy(plain: Path, tmp_path: Path) -> None:
    """The walk computes in the model's dtype, whatever it is filled from."""
    source = by_layout("hf-fp8")(plain, tmp_path / "source")
    apply(Dequantize(dtype="BF16"), source, tmp_path / "copy", workers=1)
    ids = write_ids(tmp_path / "ids.npy", rows=12, vocabulary=400)
    for name in ("source", "copy"):
        options = options_of(ids, samples=12, sequential=False, write_statistics=tmp_path / f"{name}-statistics")
        run_calibrated(gptq_plan(tmp_path / name), tmp_path / f"{name}-out", options, workers=2)
    for number in range(2):
        one, other = (StoredStatistics(layer_path(tmp_path / f"{name}-statistics", number)) for name in ("source", "copy"))
        assert one.tokens == other.tokens
        assert len(one.tokens) > 4
        for key in one.tokens:
            found, expected = one.of(key), other.of(key)
            assert found is not None
            assert expected is not None
            assert torch.equal(found.hessian, expected.hessian)
    codes = [read_all(tmp_path / f"{name}-out") for name in ("source", "copy")]
    assert any(codes[0][key].tobytes() != codes[1][key].tobytes() for key in codes[0])


@pytest.mark.filterwarnings("ignore")
def test_the_codes_are_not_those_of_rounding_nor_of_other_text(plain: Path, tmp_path: Path) -> None:
    """What the equality above would not show: that statistics were used at all."""
    source = by_layout("hf-fp8")(plain, tmp_path / "source")
    made = []
    for seed in (0, 1):
        options = options_of(write_ids(tmp_path / f"{seed}.npy", rows=12, vocabulary=400, seed=seed), samples=12)
        run_calibrated(gptq_plan(source), tmp_path / str(seed), options, workers=2)
        made.append(read_all(tmp_path / str(seed)))
    assert all(made[0][key].tobytes() != made[1][key].tobytes() for key in made[0] if key.endswith("q_proj.weight_packed"))


@pytest.mark.filterwarnings("ignore")
def test_fp8_to_gptq_by_the_command_and_no_float_copy_on_disk(plain: Path, tmp_path: Path) -> None:
    source = by_layout("hf-fp8")(plain, tmp_path / "source")
    ids = write_ids(tmp_path / "ids.npy", rows=12, vocabulary=400)
    options = ("--calibration", ids, "--samples", 12, "--sequence-length", 64, "--quiet")
    result = surgeon("apply", "gptq-int4-g128", source, tmp_path / "out", *options, "--set", "method=gptq")
    assert result.exit_code == 0, result.stderr
    assert record(tmp_path / "out")["tokens"] == [12, 64]
    rows = read_log(tmp_path / "out" / LOG_NAME)
    assert {row.method for row in rows} == {"gptq"}
    assert any(row.expert is not None for row in rows)
    assert surgeon("verify", tmp_path / "out", "--against", source).exit_code == 0
    assert not list((tmp_path / "out").glob(".surgeon/*"))


@pytest.mark.filterwarnings("ignore")
def test_a_layer_takes_what_it_takes_in_the_models_dtype(plain: Path, tmp_path: Path) -> None:
    source = by_layout("hf-fp8")(plain, tmp_path / "source")
    small, large = StreamedModel(open_checkpoint(source)), StreamedModel(open_checkpoint(plain))
    assert small.layer_bytes(0) == large.layer_bytes(0)
    with Source(small.checkpoint) as shards, small.layer(0, read_weights(small.weights.reader(shards))) as layer:
        assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}


def test_weights_have_the_names_and_values_that_dequantize_writes(plain: Path, tmp_path: Path) -> None:
    source = by_layout("ct-packed")(plain, tmp_path / "source")
    apply(Dequantize(dtype="F32"), source, tmp_path / "f32", workers=1)
    weights, written = FloatWeights(open_checkpoint(source)), read_all(tmp_path / "f32")
    assert weights.specs.keys() == written.keys()
    with Source(weights.checkpoint) as shards:
        reader = weights.reader(shards)
        assert all(reader.array(name).tobytes() == array.tobytes() for name, array in written.items())


def test_a_source_that_cannot_be_read_is_refused_by_its_name(plain: Path, tmp_path: Path) -> None:
    source = rewritten(plain, tmp_path / "s", lambda tensors: tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(SurgeonError, match="bitsandbytes"):
        StreamedModel(open_checkpoint(source))
