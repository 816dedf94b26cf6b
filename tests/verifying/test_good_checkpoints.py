"""Good checkpoints raise no fault: ours in every layout, and those that other tools wrote."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.verifying import verify
from tests.checkpoints import FIXTURE, apply, write_checkpoint
from tests.verifying.subjects import DENSE, GOLDEN, MOE, RECIPES, Spoilt, source_of, subject

PEERS = sorted(p.parent.name for p in GOLDEN.glob("*/config.json") if list(p.parent.glob("*.safetensors")))


@pytest.mark.parametrize("name", RECIPES)
def test_what_this_program_writes_is_sound_against_its_source(name: str) -> None:
    found = verify(subject(name), source_of(name))
    assert not found.faults
    assert found.digested_bytes == sum(p.stat().st_size for p in subject(name).glob("*.safetensors"))
    assert found.equal_bytes > 0
    if name != "split":
        assert found.compared
        assert sum(found.schemes.values()) == len(found.compared)
        assert min(f.snr_db for f in found.compared) > (11 if "3bit" in name else 18)


@pytest.mark.parametrize("name", PEERS)
def test_what_other_tools_write_is_sound_against_its_source(name: str) -> None:
    source = MOE if name.endswith("moe") else DENSE
    found = verify(GOLDEN / name, source)
    assert not found.faults
    assert found.digested_bytes is None
    assert bool(found.compared) == (not name.startswith("source"))


def test_peers_of_every_tool_are_here() -> None:
    assert {name.partition("-")[0].partition("_")[0] for name in PEERS} >= {"llmcompressor", "quark", "autoround", "gptqmodel"}


def test_a_checkpoint_is_sound_against_itself_without_decoding_a_weight() -> None:
    found = verify(subject("gptq"), subject("gptq"))
    assert found.is_sound
    assert not found.compared
    assert found.equal_bytes == found.nbytes


def test_splitting_is_accounted_for_in_both_directions() -> None:
    split = subject("split")
    there, back = verify(split, FIXTURE), verify(FIXTURE, split)
    assert there.is_sound
    assert back.is_sound
    assert there.equal_bytes == back.equal_bytes == there.nbytes
    assert not there.compared
    assert not back.compared


def test_the_number_of_workers_changes_no_finding() -> None:
    one = verify(subject("ct-asym"), MOE, workers=1)
    four = verify(subject("ct-asym"), MOE, workers=4)
    assert one == four


def test_progress_counts_the_bytes_read() -> None:
    read: list[int] = []
    verify(subject("quark-int8"), MOE, workers=1, progress=read.append)
    files = sum(p.stat().st_size for p in Path(subject("quark-int8")).glob("*.safetensors"))
    assert sum(read) > files


def test_fp8_with_one_scale_for_each_tensor_is_sound_as_autofp8_wrote_it(tmp_path: Path) -> None:
    made = Spoilt(subject("hf-fp8"), tmp_path / "autofp8")
    for name in [name for name in made.tensors if name.endswith(".weight_scale_inv")]:
        # Every weight of this model is one block.
        made.tensors[name.removesuffix("_inv")] = made.tensors.pop(name).reshape(())
        made.tensors[name.replace("weight_scale_inv", "input_scale")] = np.ones((), np.float32)
    del made.quantization["weight_block_size"]
    made.quantization["activation_scheme"] = "static"
    found = verify(made.save(), MOE)
    assert not found.faults
    assert found.schemes == {"fp8 8 bits, per tensor": 16}
    assert min(f.snr_db for f in found.compared) > 30


def test_a_contradiction_that_the_source_has_as_well_is_no_fault_of_what_was_made_from_it(tmp_path: Path) -> None:
    spoilt = Spoilt(MOE, tmp_path / "source")
    spoilt.config["vocab_size"] += 1
    source = spoilt.save()
    apply(load_transform("ct-w8a8-int8"), source, tmp_path / "out")
    assert [fault.kind for fault in verify(tmp_path / "out").faults] == ["config-size"]
    found = verify(tmp_path / "out", source)
    assert found.is_sound
    assert [note.where for note in found.notes if note.kind == "config-size"] == ["config.json vocab_size"]
    # Against the source that is whole, the same checkpoint is not that model.
    assert {fault.kind for fault in verify(tmp_path / "out", MOE).faults} >= {"config-size", "config-differs"}


def test_a_few_modules_with_signed_scales_among_others_are_no_fault(tmp_path: Path) -> None:
    """As where one step chooses codes by calibration and another rounds to nearest."""
    made, signed = Spoilt(subject("ct-packed"), tmp_path / "mixed"), Spoilt(subject("ct-packed-signed"), tmp_path / "signed")
    module = next(name.removesuffix(".weight_scale") for name in made.tensors if name.endswith("q_proj.weight_scale"))
    for name in [name for name in made.tensors if name.startswith(f"{module}.")]:
        made.tensors[name] = signed.tensors[name]
    found = verify(made.save(), MOE)
    assert not found.faults, [str(fault) for fault in found.faults]
    assert [note.kind for note in found.notes].count("signed-scales") == 1


@pytest.mark.parametrize("shape", [(1, 33), (33, 1), (33, 2), (2, 3)])
@pytest.mark.parametrize("name", ["ct-w8a8-int8", "quark-w8a8-int8"])
def test_weights_of_a_few_dozen_elements_raise_no_alarm(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    for number in range(6):
        tensors = {"model.layers.0.mlp.odd.weight": rng.standard_normal(shape).astype(ml_dtypes.bfloat16)}
        source = write_checkpoint(tmp_path / f"source-{number}", tensors, config={"model_type": "llama"})
        apply(load_transform(name), source, tmp_path / f"out-{number}")
        assert not verify(tmp_path / f"out-{number}", source).faults


def test_groups_next_to_nothing_are_no_fault_where_record_or_source_explain_them(tmp_path: Path) -> None:
    """GPTQModel rounds a scale to F16 after it has chosen the codes: below 6e-8 it is 0, and the codes stay."""
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((64, 256)).astype(np.float32)
    weight[5, :128] *= 1e-9
    source = write_checkpoint(
        tmp_path / "source",
        {"model.layers.0.mlp.up_proj.weight": weight.astype(ml_dtypes.bfloat16)},
        config={"model_type": "llama"},
    )
    apply(load_transform("gptq-int4-g128", {"scope": "all"}), source, tmp_path / "out")
    for against in (None, source):
        found = verify(tmp_path / "out", against)
        assert not found.faults
        assert [note.kind for note in found.notes] == ["zero-scale"]
    (tmp_path / "out" / "surgeon.json").unlink()
    assert verify(tmp_path / "out", source).is_sound
    assert [fault.kind for fault in verify(tmp_path / "out").faults] == ["zero-scale"]
    # A scale that was lost and counted is found by what the source holds.
    other = weight.copy()
    other[5, :128] *= 1e9
    full = write_checkpoint(
        tmp_path / "full", {"model.layers.0.mlp.up_proj.weight": other.astype(ml_dtypes.bfloat16)}, config={"model_type": "llama"}
    )
    assert "zero-scale" in {fault.kind for fault in verify(tmp_path / "out", full).faults}
