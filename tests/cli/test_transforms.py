"""The built-in transforms: what each promises, through the command line, on the trained fixture and on small models."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result

from tensorsurgeon.cli import main
from tests.checkpoints import FIXTURE, assert_same, folder_bytes, moe_config, read_all, tiny_moe, write_checkpoint


def surgeon(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def ok(*arguments: object) -> str:
    result = surgeon(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def apply(transform: object, source: Path, target: Path, *more: object) -> Path:
    ok("apply", transform, source, target, "--quiet", *more)
    return target


# --- listing -----------------------------------------------------------------------------------------------------


def test_all_built_ins_are_listed_with_what_they_do():
    listed = {entry["name"]: entry["description"] for entry in json.loads(ok("transforms", "--json"))}
    assert {"split-experts", "fuse-experts", "quark-export-rename", "quark-w8a8-int8", "ct-w8a8-int8"} <= listed.keys()
    text = ok("transforms")
    whole = " ".join(text.split())
    assert all(name in text and " ".join(description.split()) in whole for name, description in listed.items())


def test_one_is_shown_with_parameters_defaults_and_file():
    shown = ok("transforms", "quark-w8a8-int8")
    assert "  rule: " in shown
    assert "      default: quark\n      choices: quark, compressed-tensors\n" in shown
    assert "..." not in shown
    assert "quark-w8a8-int8.yaml" in shown
    data = json.loads(ok("transforms", "quark-w8a8-int8", "--json"))
    assert {"name": "rule", "default": "quark", "choices": ["quark", "compressed-tensors"]}.items() <= next(
        p for p in data["parameters"] if p["name"] == "rule"
    ).items()


# --- experts -----------------------------------------------------------------------------------------------------


def test_split_experts_cuts_gate_first_and_up_second(moe, tmp_path):
    apply("split-experts", moe, tmp_path / "split")
    before, after = tiny_moe(), read_all(tmp_path / "split")
    wanted = {name: array for name, array in before.items() if ".experts." not in name}
    for n in range(2):
        at = f"model.layers.{n}.mlp.experts"
        for e in range(4):
            wanted[f"{at}.{e}.gate_proj.weight"] = before[f"{at}.gate_up_proj"][e, :8]
            wanted[f"{at}.{e}.up_proj.weight"] = before[f"{at}.gate_up_proj"][e, 8:]
            wanted[f"{at}.{e}.down_proj.weight"] = before[f"{at}.down_proj"][e]
    assert_same(after, wanted)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_splitting_and_fusing_gives_back_every_byte(dtype, tmp_path):
    # Eleven experts: the tenth must not come before the second.
    tensors = tiny_moe(dtype=dtype, experts=11)
    source = write_checkpoint(tmp_path / "source", tensors, shards=4, config=moe_config(experts=11))
    apply("split-experts", source, tmp_path / "split", "--max-shard-size", "3kB")
    apply("fuse-experts", tmp_path / "split", tmp_path / "fused", "--max-shard-size", "5kB")
    assert_same(read_all(tmp_path / "fused"), tensors)


def test_the_fixture_is_split_with_its_mtp_head_and_fused_again_to_the_byte(tmp_path):
    apply("split-experts", FIXTURE, tmp_path / "split")
    split = read_all(tmp_path / "split")
    assert any(name.startswith("mtp.") and ".experts.0.gate_proj.weight" in name for name in split)
    assert not any(name.endswith("gate_up_proj") for name in split)
    apply("fuse-experts", tmp_path / "split", tmp_path / "fused")
    assert_same(read_all(tmp_path / "fused"), read_all(FIXTURE))
    assert json.loads((tmp_path / "fused" / "config.json").read_text()) == json.loads((FIXTURE / "config.json").read_text())


def test_a_chain_of_both_writes_the_source_again_by_copying_alone(tmp_path):
    data = json.loads(ok("plan", "split-experts", FIXTURE, "--then", "fuse-experts", "--json"))
    assert data["copied_bytes"] == data["output"]["bytes"] == data["source"]["bytes"]
    assert data["peak_unit_bytes"] == 0
    apply("split-experts", FIXTURE, tmp_path / "same", "--then", "fuse-experts")
    assert_same(read_all(tmp_path / "same"), read_all(FIXTURE))


def test_experts_of_a_quantized_checkpoint_are_not_fused_without_their_scales(tmp_path):
    apply("quark-w8a8-int8", FIXTURE, tmp_path / "int8")
    result = surgeon("apply", "fuse-experts", tmp_path / "int8", tmp_path / "fused")
    assert result.exit_code == 33
    assert "means nothing without its scales" in result.stderr


# --- quantization ------------------------------------------------------------------------------------------------


def by_hand(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """INT8 with one scale per row, as compressed-tensors and Quark say it, in plain NumPy.

    Only what both tools agree on to the bit is stated here; tests/formats holds each to its own golden files.
    """
    exact = weight.astype(np.float64)
    return exact, np.abs(exact).max(axis=1)


@pytest.mark.parametrize("transform", ["quark-w8a8-int8", "ct-w8a8-int8"])
def test_codes_and_scales_stand_for_the_weights_they_were_made_of(transform, tmp_path):
    apply(transform, FIXTURE, tmp_path / "out")
    apply("split-experts", FIXTURE, tmp_path / "split")
    weights, found = read_all(tmp_path / "split"), read_all(tmp_path / "out")
    scales = [name for name in found if name.endswith("_scale")]
    assert len(scales) > 100
    for name in scales:
        exact, largest = by_hand(weights[name.removesuffix("_scale")])
        codes, scale = found[name.removesuffix("_scale")], found[name].astype(np.float64).reshape(-1)
        assert codes.dtype == np.int8
        # BF16 scales are off by up to 2**-9 of themselves, which shows most at the largest code.
        assert np.all(np.abs(codes * scale[:, None] - exact) <= 0.5 * scale[:, None] * 1.01 + np.abs(exact) * 2**-8), name
        assert np.all(np.abs(scale * 127.5 - largest) <= largest * 0.01), name


def test_mtp_experts_are_split_only_when_asked_and_stay_bf16(tmp_path):
    plain = read_all(apply("quark-w8a8-int8", FIXTURE, tmp_path / "plain"))
    split = read_all(apply("quark-w8a8-int8", FIXTURE, tmp_path / "split", "--set", "mtp=split"))
    names = {name for name in plain if name.startswith("mtp.")}
    assert names == {name for name in read_all(FIXTURE) if name.startswith("mtp.")}
    assert len(names) == 19
    numbered = {name for name in split if name.startswith("mtp.") and ".experts.0." in name}
    assert len(numbered) == 3
    assert {split[name].dtype.name for name in split if name.startswith("mtp.")} == {"bfloat16"}
    assert {name: a.tobytes() for name, a in plain.items() if not name.startswith("mtp.")} == {
        name: a.tobytes() for name, a in split.items() if not name.startswith("mtp.")
    }


def test_what_is_excluded_stays_and_the_config_says_so(tmp_path):
    patterns = "{path*}.in_proj_a.weight,{path*}.in_proj_b.weight"
    apply("quark-w8a8-int8", FIXTURE, tmp_path / "out", "--set", f"also_exclude={patterns}")
    found, before = read_all(tmp_path / "out"), read_all(FIXTURE)
    kept = [name for name in before if name.endswith((".in_proj_a.weight", ".in_proj_b.weight"))]
    assert kept
    excluded = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["exclude"]
    for name in kept:
        assert found[name].tobytes() == before[name].tobytes()
        assert name + "_scale" not in found
        assert name.removesuffix(".weight") in excluded
    assert "lm_head" in excluded


def test_half_of_what_engines_fuse_cannot_be_excluded(tmp_path):
    pattern = "{path*}.in_proj_a.weight"
    result = surgeon("apply", "quark-w8a8-int8", FIXTURE, tmp_path / "out", "--set", f"also_exclude={pattern}")
    assert 30 <= result.exit_code < 40
    assert "in_proj_b" in result.stderr
    assert "in_proj_a" in result.stderr
    assert not (tmp_path / "out").exists()


def test_backends_write_the_same_bytes(tmp_path):
    fast = folder_bytes(apply("quark-w8a8-int8", FIXTURE, tmp_path / "fast", "--backend", "fast"))
    torch = folder_bytes(apply("quark-w8a8-int8", FIXTURE, tmp_path / "torch", "--backend", "torch"))
    assert fast == torch


def test_a_dense_model_needs_no_experts(tmp_path):
    tensors = {name: array for name, array in tiny_moe().items() if ".experts." not in name}
    source = write_checkpoint(tmp_path / "m", tensors, config={"model_type": "dense", "hidden_size": 16})
    found = read_all(apply("quark-w8a8-int8", source, tmp_path / "out"))
    assert found["model.layers.0.self_attn.q_proj.weight"].dtype == np.int8
    assert found["model.layers.0.mlp.gate.weight"].dtype == ml_dtypes.bfloat16


# --- a raw Quark export ------------------------------------------------------------------------------------------


def raw_export(folder: Path, published: Path, *, zero_point: int = 0) -> Path:
    """The published form turned back into what ``quark`` writes: other keys, [out, 1] scales, zero points."""
    raw = {}
    for name, array in read_all(published).items():
        if name.endswith(".weight_scale"):
            stem = name.removesuffix("_scale")
            raw[f"{stem}_quantizer.scale"] = array[:, None]
            raw[f"{stem}_quantizer.zero_point"] = np.full((array.size, 1), zero_point, np.int8)
        else:
            raw[name] = array
    write_checkpoint(folder, raw, shards=3)
    (folder / "config.json").write_bytes((published / "config.json").read_bytes())
    return folder


def test_a_raw_quark_export_comes_out_as_what_we_write(tmp_path):
    published = apply("quark-w8a8-int8", FIXTURE, tmp_path / "published")
    raw = raw_export(tmp_path / "raw", published)
    assert any("_quantizer.zero_point" in name for name in read_all(raw))
    mended = apply("quark-export-rename", raw, tmp_path / "mended")
    assert_same(read_all(mended), read_all(published))
    assert (mended / "config.json").read_bytes() == (published / "config.json").read_bytes()


def test_zero_points_that_say_something_are_not_dropped(tmp_path):
    raw = raw_export(tmp_path / "raw", apply("quark-w8a8-int8", FIXTURE, tmp_path / "published"), zero_point=3)
    result = surgeon("apply", "quark-export-rename", raw, tmp_path / "mended")
    assert result.exit_code == 42
    assert "expected zeros only" in result.stderr
    assert not list((tmp_path / "mended").glob("*.safetensors"))


def test_an_export_that_needs_no_repair_is_told_so(tmp_path):
    published = apply("quark-w8a8-int8", FIXTURE, tmp_path / "published")
    result = surgeon("apply", "quark-export-rename", published, tmp_path / "mended")
    assert result.exit_code == 31
    assert "_quantizer.scale" in result.stderr


def test_help_has_every_command_under_a_heading_with_its_whole_first_line():
    listed = [name for names in main.SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(main.commands)
    text = ok("--help")
    assert [line.rstrip(":") for line in text.splitlines() if line.rstrip(":") in main.SECTIONS] == list(main.SECTIONS)
    for name, command in main.commands.items():
        assert f"  {name.ljust(10)}  {command.short_help}\n" in text


def test_a_transform_is_shown_whole():
    text = ok("transforms", "ct-w4a16-g32")
    assert "      choices: true, false, null\n" in text
    assert "\nsteps: quantize-linears\n" in text
    assert "split-experts (when ${split_experts})" in ok("transforms", "quantize-linears")


def test_home_is_known_wherever_a_file_may_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("description: x\nsteps:\n  - use: split-experts\n")
    assert json.loads(ok("transforms", "~/mine.yaml", "--json"))["name"] == "mine"
    ok("plan", "~/mine.yaml", FIXTURE)
    said = surgeon("evaluate", FIXTURE, "--text=~/none.txt").stderr
    assert f"{tmp_path}/none.txt: no such file" in said
    said = surgeon("plan", "gptq-int4-g128", FIXTURE, "--calibration=~/none.txt").stderr
    assert f"{tmp_path}/none.txt: no such file" in said
