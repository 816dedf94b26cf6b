"""A plan is everything a run will do, known from headers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import ConfigError, PlanError, RecipeError
from tensorsurgeon.ops.cast import Cast
from tensorsurgeon.ops.drop import Drop
from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.ops.rename import Rename
from tensorsurgeon.ops.transpose import Transpose
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.planning.work import COPY_BYTES
from tensorsurgeon.recipes.library import load_transform
from tests.checkpoints import FIXTURE, moe_config, tiny_moe, write_checkpoint

ROOT = Path(__file__).parents[2]


def test_planning_reads_headers_and_not_one_byte_of_weights(monkeypatch):
    """The fixture has megabytes of weights; every read is counted."""
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: read.append((offset, count)) or pread(fd, count, offset))
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("weights were read"))
    checkpoint = open_checkpoint(FIXTURE)
    plan = make_plan(load_transform("quark-w8a8-int8"), checkpoint)
    assert plan.units
    assert plan.fingerprint
    headers = sum(8 + len(shard.raw) for shard in checkpoint.shards)
    assert sum(count for _, count in read) == headers


def test_every_output_byte_is_written_exactly_once(moe):
    steps = [
        load_transform("split-experts"),
        Transpose(where=("{p*}.down_proj.weight",)),
        Cast(where=("lm_head.weight",), dtype="F32"),
    ]
    plan = make_plan(steps, open_checkpoint(moe), max_shard_bytes=2000)
    places = sorted((p.shard, p.offset, p.nbytes) for unit in plan.units for p in (*unit.writes, *unit.copies))
    ends = {number: len(shard.header) for number, shard in enumerate(plan.layout.shards)}
    for shard, offset, nbytes in places:
        assert offset == ends[shard]
        ends[shard] = offset + nbytes
    assert ends == {number: shard.file_bytes for number, shard in enumerate(plan.layout.shards)}
    assert sum(unit.written_bytes for unit in plan.units) == plan.output_bytes


def test_long_copies_are_cut_and_neighbours_go_together(tmp_path):
    tensors = {"a": np.zeros(COPY_BYTES + 5, np.uint8), "b": np.zeros(10, np.uint8), "c": np.zeros(10, np.uint8)}
    plan = make_plan([], open_checkpoint(write_checkpoint(tmp_path / "s", tensors)))
    assert [sum(c.nbytes for c in unit.copies) for unit in plan.units] == [COPY_BYTES, 25]
    assert all(len(unit.copies) == 1 for unit in plan.units)
    assert plan.peak_unit_bytes == 0


def test_the_memory_of_a_unit_is_what_its_arrays_take(tmp_path):
    tensors = {"a.weight": np.zeros((30, 20), np.float32), "b.weight": np.zeros((3, 2), np.float32)}
    source = open_checkpoint(write_checkpoint(tmp_path / "s", tensors))
    assert make_plan(Transpose(where=("a.weight",)), source).peak_unit_bytes == 2 * 30 * 20 * 4
    assert make_plan(Cast(where=("a.weight",), dtype="F16"), source).peak_unit_bytes == 30 * 20 * (4 + 2) + 30 * 20 * 48
    assert make_plan(Rename(where=("a.weight",), to="c"), source).peak_unit_bytes == 0
    assert make_plan(Drop(where=("a.weight",), only_if="zero"), source).peak_unit_bytes == 30 * 20 * 4


def test_a_plan_has_the_same_name_in_every_process(moe):
    code = (
        "import sys; from tensorsurgeon.checkpoint.folder import open_checkpoint;"
        "from tensorsurgeon.recipes.library import load_transform;"
        "from tensorsurgeon.planning.plan import make_plan;"
        "print(make_plan(load_transform('ct-w8a8-int8'), open_checkpoint(sys.argv[1])).fingerprint)"
    )
    names = {
        subprocess.run(
            [sys.executable, "-c", code, str(moe)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(names) == 1
    assert len(names.pop().strip()) == 64


def test_the_backend_is_no_part_of_a_run_s_name_but_the_recipe_is(moe):
    def name(**parameters):
        backend = parameters.pop("backend", "auto")
        return make_plan(load_transform("quark-w8a8-int8", parameters, backend=backend), open_checkpoint(moe)).fingerprint

    assert name(backend="fast") == name(backend="torch") == name()
    assert name(rule="compressed-tensors") != name()


def test_steps_that_write_one_format_in_two_versions_are_refused(tmp_path):
    """GPTQ v1 and v2 have one name; one config would have every zero point of the other read off by one."""
    weights = {f"model.layers.0.mlp.{n}_proj.weight": np.ones((64, 64), np.float32) for n in ("gate", "up", "down")}
    source = open_checkpoint(write_checkpoint(tmp_path / "s", weights, config={"model_type": "llama"}))
    fields = {"num_bits": 4, "group_size": 32}
    mixed = [
        Quantize(where=("{p*}.down_proj.weight",), format="gptq", **fields),
        Quantize(where=("maybe:{p*}.gate_proj.weight", "{p*}.up_proj.weight"), format="gptq-v2", **fields),
    ]
    with pytest.raises(PlanError, match=r"gptq and gptq-v2.*one format for all steps"):
        make_plan(mixed, source)


def test_a_step_without_a_repr_is_refused_since_its_run_could_never_be_resumed(moe):
    class Nameless:
        def plan(self, specs):
            return ()

        def apply(self, rewrite, inputs):
            return ()

    with pytest.raises(RecipeError, match=r"Nameless has no repr.*frozen dataclass"):
        make_plan(Nameless(), open_checkpoint(moe))


def test_the_config_is_edited_and_unknown_keys_stay_in_their_order(moe):
    plan = make_plan(load_transform("quark-w8a8-int8"), open_checkpoint(moe))
    config = json.loads(plan.files.contents["config.json"])
    assert config.pop("quantization_config")["quant_method"] == "quark"
    assert list(config.items()) == list(moe_config().items())


def test_a_config_that_need_not_change_keeps_its_bytes(moe):
    (moe / "config.json").write_text(json.dumps(moe_config(), indent=7) + "\n\n")
    plan = make_plan(load_transform("split-experts"), open_checkpoint(moe))
    assert plan.files.contents["config.json"] == (moe / "config.json").read_bytes()


@pytest.mark.parametrize(
    "more",
    [
        {"quantization_config": "none"},
        {"quantization_config": 3},
        {"quantization_config": ["int8"]},
        {"quantization_config": {"quant_method": "gptq"}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
    ],
)
def test_a_source_that_says_it_is_quantized_is_refused_wherever_and_however_it_says_so(more, tmp_path):
    source = write_checkpoint(tmp_path / "m", tiny_moe(), config=moe_config(**more))
    # A built-in transform would dequantize it on the way, and finds that it cannot.
    with pytest.raises((PlanError, ConfigError), match="quantiz"):
        make_plan(load_transform("quark-w8a8-int8"), open_checkpoint(source))


@pytest.mark.parametrize("key", ["tie_word_embeddings", "text_config"])
def test_a_head_that_is_tied_to_the_embedding_is_not_quantized_beside_it(key, tmp_path):
    """Readers would answer with the embedding, in floats, and never look at it; a copy beside the embedding goes along."""
    said = True if key == "tie_word_embeddings" else {"tie_word_embeddings": True, "hidden_size": 16, "num_experts": 4}
    tensors = tiny_moe()
    tied = open_checkpoint(write_checkpoint(tmp_path / "tied", tensors, config=moe_config(**{key: said})))
    where = ("{path*}.self_attn.{x}.weight", "lm_head.weight")
    with pytest.raises(PlanError, match=r"lm_head: config\.json says tie_word_embeddings"):
        make_plan(Quantize(where=where, format="ct-int"), tied)
    assert make_plan(Quantize(where=where[:1], format="ct-int"), tied).specs["lm_head.weight"].dtype.name == "BF16"
    free = write_checkpoint(tmp_path / "free", tensors, config=moe_config(tie_word_embeddings=False))
    assert "lm_head" in make_plan(Quantize(where=where, format="ct-int"), open_checkpoint(free)).quantized
