"""Good checkpoints raise no fault: ours in every layout, and those that other tools wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tensorsurgeon.verifying import verify
from tests.checkpoints import FIXTURE
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
