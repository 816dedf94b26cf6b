"""Quantized checkpoints as they are published are read to the bit; what contradicts its config is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import ConfigError, NumericError, SurgeonError
from tensorsurgeon.formats.registry import FORMATS
from tensorsurgeon.ops.dequantize import Dequantize
from tensorsurgeon.planning.plan import make_plan
from tests.checkpoints import apply, read_all, write_checkpoint
from tests.ops.arrays import BF16
from tests.ops.published import PUBLISHED, UP, Published, fp8_blocks
from tests.ops.quantized import CONFIG, MLP, config_of, rewritten, write_quantized


def written(folder: Path, published: Published) -> Path:
    floats = {"model.embed_tokens.weight": np.ones((8, 8), BF16), "lm_head.weight": np.ones((8, 8), BF16)}
    config = {**CONFIG, "quantization_config": published.config} if published.config else CONFIG
    write_checkpoint(folder, published.tensors | floats, config=config)
    for name, content in published.files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_are_read_to_the_bit(name, tmp_path):
    published = PUBLISHED[name]()
    source = written(tmp_path / "s", published)
    apply(Dequantize(dtype="F32"), source, tmp_path / "t")
    found = read_all(tmp_path / "t")
    for module, weight in published.weights.items():
        assert found[f"{module}.weight"].tobytes() == weight.astype(np.float32).tobytes(), module
    left = {n for n in found if "scale" in n or n.endswith("_packed")}
    assert not left
    assert "quantization_config" not in config_of(tmp_path / "t")
    assert not (tmp_path / "t" / "hf_quant_config.json").exists()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_layout_with_a_tensor_of_another_shape_is_refused(name, tmp_path):
    published = PUBLISHED[name]()
    module = next(iter(published.weights))
    for number, (key, array) in enumerate(published.tensors.items()):
        if array.size < 2 or not key.startswith(module) or "per tensor" in name or name == "modelopt fp8":
            # Any number of rows goes with one scale.
            continue
        damaged = published._replace(tensors={**published.tensors, key: np.concatenate([array, array])})
        source = written(tmp_path / str(number), damaged)
        with pytest.raises(SurgeonError) as caught:
            make_plan(Dequantize(), open_checkpoint(source))
        assert module in str(caught.value)


@pytest.mark.parametrize("layout", sorted(FORMATS))
def test_every_tensor_of_every_layout_is_compared_with_what_the_config_calls_for(layout, tmp_path):
    source = write_quantized(tmp_path / "q", layout)
    module = f"{MLP}.up_proj"
    names = [name for name in read_all(source) if name.startswith(module)]
    assert len(names) > 1
    for number, name in enumerate(names):
        for kind in ("missing", "longer", "another dtype", "an axis more"):

            def change(tensors, name=name, kind=kind):
                array = tensors.pop(name)
                if kind == "longer":
                    tensors[name] = np.concatenate([array, array])
                elif kind == "another dtype":
                    tensors[name] = np.zeros(array.shape, np.int16)
                elif kind == "an axis more":
                    tensors[name] = np.stack([array, array])

            damaged = rewritten(tmp_path / f"{number}-{kind}", source, change)
            if kind == "missing" and name.endswith(".g_idx"):
                # Readers of today have no use for it, and weights without activation order need none.
                make_plan(Dequantize(), open_checkpoint(damaged))
                continue
            with pytest.raises(SurgeonError) as caught:
                make_plan(Dequantize(), open_checkpoint(damaged))
            assert module in str(caught.value), (name, kind, str(caught.value))


def test_both_shapes_are_named(tmp_path):
    source = write_quantized(tmp_path / "q", "ct-packed", group_size=32)
    config = config_of(source)
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64
    wrong = write_checkpoint(tmp_path / "w", read_all(source), config=config)
    wanted = r"down_proj\.weight_scale: .* has BF16 \[128, 4\], but the file has BF16 \[128, 8\]"
    with pytest.raises(ConfigError, match=wanted):
        make_plan(Dequantize(), open_checkpoint(wrong))


def test_codes_that_the_config_says_nothing_of_are_not_left_behind(tmp_path):
    published = fp8_blocks()
    stray = {"model.layers.1.mlp.up_proj.weight_packed": np.zeros((4, 4), np.int32)}
    source = written(tmp_path / "s", published._replace(tensors=published.tensors | stray))
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj\.weight_packed: stored as I32 \[4, 4\], but"):
        make_plan(Dequantize(), open_checkpoint(source))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_what_is_not_finite_stops_the_run_by_name(dtype, tmp_path):
    published = fp8_blocks()
    codes = published.tensors[f"{UP}.weight"].copy()
    codes.view(np.uint8)[5, 7] = 0x7F
    source = written(tmp_path / "s", published._replace(tensors={**published.tensors, f"{UP}.weight": codes}))
    with pytest.raises(NumericError, match=rf"{UP}: 1 of 61440 weights are not finite, the first at row 5, column 7 \(nan\)"):
        apply(Dequantize(dtype=dtype), source, tmp_path / "t")


def test_a_product_that_the_dtype_cannot_hold_stops_the_run(tmp_path):
    published = fp8_blocks()
    large = {f"{UP}.weight_scale_inv": np.full((2, 3), 1e4, np.float32)}
    source = written(tmp_path / "s", published._replace(tensors=published.tensors | large))
    apply(Dequantize(), source, tmp_path / "t")
    with pytest.raises(NumericError, match="float16 cannot hold their product"):
        apply(Dequantize(dtype="F16"), source, tmp_path / "u")


def test_scales_of_the_cache_go_with_their_scheme(tmp_path):
    source = write_quantized(tmp_path / "q", "ct-int")
    config = config_of(source)
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    scales = {f"model.layers.0.self_attn.{n}_scale": np.array([0.03], np.float32) for n in "kv"}
    cached = write_checkpoint(tmp_path / "c", read_all(source) | scales, config=config)
    apply(Dequantize(), cached, tmp_path / "t")
    assert not [n for n in read_all(tmp_path / "t") if "scale" in n]
    assert "kv_cache_scheme" not in json.dumps(config_of(tmp_path / "t"))


@pytest.mark.parametrize("place", ["text_config", "llm_config", "language_config", "thinker_config"])
def test_the_config_of_a_model_within_the_model_may_have_the_quantization(place, tmp_path):
    source = write_quantized(tmp_path / "q", "ct-int")
    config = config_of(source)
    inner = {"quantization_config": config.pop("quantization_config")}
    if place == "thinker_config":
        inner = {"text_config": inner}
    moved = write_checkpoint(tmp_path / "m", read_all(source), config={**config, place: inner})
    for folder, result in ((source, "t"), (moved, "u")):
        apply(Dequantize(), folder, tmp_path / result)
    assert {n: a.tobytes() for n, a in read_all(tmp_path / "t").items()} == {
        n: a.tobytes() for n, a in read_all(tmp_path / "u").items()
    }
    assert "quant" not in json.dumps(config_of(tmp_path / "u"))


def test_a_stale_file_beside_float_weights_says_nothing(tmp_path):
    source = write_checkpoint(tmp_path / "s", {"a.weight": np.ones((8, 8), BF16)}, config=CONFIG)
    (source / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    assert "quantization_config" not in open_checkpoint(source).config


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "hqq", "gguf"])
def test_what_cannot_be_read_is_named(method, tmp_path):
    config = {"quantization_config": {"quant_method": method}}
    source = write_checkpoint(tmp_path / "s", {"a.weight": np.ones((8, 8), np.uint8)}, config=config)
    with pytest.raises(ConfigError, match=f"cannot read '{method}'; known: .*compressed-tensors"):
        make_plan(Dequantize(), open_checkpoint(source))


def test_mlx_is_named(tmp_path):
    config = {"quantization": {"group_size": 64, "bits": 4}}
    source = write_checkpoint(tmp_path / "s", {"a.weight": np.ones((8, 8), np.uint32)}, config=config)
    with pytest.raises(ConfigError, match="as MLX writes it"):
        make_plan(Dequantize(), open_checkpoint(source))


def test_e4m3_is_what_these_tests_think_it_is():
    assert np.isnan(np.array(0x7F, np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
