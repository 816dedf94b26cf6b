"""Quantize: what it plans is what it makes, and what it cannot quantize it refuses before anything is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import NumericError, PlanError, RecipeError, SpecError
from tensorsurgeon.formats.registry import FORMATS
from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.planning.rewriting import advance
from tests.checkpoints import apply, read_all, write_checkpoint
from tests.contract.ops import Case, OpContract, Refusal, array_of, spec_map
from tests.ops.arrays import BF16
from tests.ops.quantized import CONFIG, MLP, dense, quantize, write_quantized

# Both tools spread the range over 127.5 steps each way: the scales are 1 and 0.5 exactly, 127.5 is clipped to 127.
EXACT = np.array([[127.5, -127.5, 1, 0], [63.75, 0.5, -63.75, 1]], np.float32)
CODES = np.array([[127, -128, 1, 0], [127, 1, -128, 2]], np.int8)
EXPERTS = "model.layers.0.mlp.experts"


def int8(*where, **fields):
    return Quantize(where=where, format="quark-int8", **fields)


class TestQuantize(OpContract):
    CASES = (
        Case(
            "by_hand",
            int8("a.weight"),
            {"a.weight": EXACT, "a.bias": EXACT[0], "b.weight": EXACT},
            {"a.weight": CODES, "a.weight_scale": np.array([1, 0.5], np.float32), "a.bias": EXACT[0], "b.weight": EXACT},
            reversible=False,
        ),
        Case(
            "excluded_stays",
            int8("{n}.weight", exclude=("b.weight",)),
            {"a.weight": EXACT.astype(BF16), "b.weight": EXACT},
            {"a.weight": CODES, "a.weight_scale": np.array([1, 0.5], np.float32), "b.weight": EXACT},
            reversible=False,
        ),
        Case(
            "compressed_tensors_scales_stand_upright",
            Quantize(where=("a.weight",), format="ct-int"),
            {"a.weight": EXACT},
            {"a.weight": CODES, "a.weight_scale": np.array([[1], [0.5]], np.float32)},
            reversible=False,
        ),
    )
    REFUSALS = (
        Refusal("nothing_matches", int8("c.weight"), {"a.weight": EXACT}, PlanError, "'c.weight' matches no tensor"),
        Refusal("not_two_axes", int8("a.weight"), {"a.weight": np.ones((2, 2, 2), np.float32)}, SpecError, "[2, 2, 2]"),
        Refusal("vector", int8("a.weight"), {"a.weight": np.ones(4, np.float32)}, SpecError, "a linear weight [out, in]"),
        Refusal("codes", int8("a.weight"), {"a.weight": np.ones((2, 4), np.int8)}, SpecError, "dequantize it first"),
        Refusal("float64", int8("a.weight"), {"a.weight": np.ones((2, 4))}, SpecError, "cannot quantize F64"),
        Refusal(
            "group_does_not_divide",
            Quantize(where=("a.weight",), format="ct-packed", num_bits=4, group_size=32),
            {"a.weight": np.ones((64, 48), np.float32)},
            SpecError,
            "48",
        ),
        Refusal(
            "experts_left_stacked",
            int8("{p*}.experts.{e}.{projection}.weight", "{p*}.q_proj.weight"),
            {f"{EXPERTS}.down_proj": np.ones((2, 4, 4), BF16), "model.q_proj.weight": np.ones((4, 4), BF16)},
            # The pattern of experts that do not exist yet is the first thing to be noticed.
            PlanError,
            "experts",
        ),
        Refusal(
            "experts_left_stacked_in_a_wide_scope",
            int8("{p*}.layers.{n}.{m*}.weight"),
            {f"{EXPERTS}.down_proj": np.ones((2, 4, 4), BF16), "model.layers.0.q_proj.weight": np.ones((4, 4), BF16)},
            SpecError,
            "stacked experts, which no engine reads quantized; put split-experts before quantize",
        ),
    )


@pytest.mark.parametrize("layout", sorted(FORMATS))
def test_every_layout_makes_the_tensors_it_planned_and_leaves_the_weight_alone(layout):
    tensors = dense()
    specs = spec_map(tensors, CONFIG)
    op = quantize(layout)
    rewrites = op.plan(specs)
    after = advance(specs, rewrites)
    made = {}
    for rewrite in rewrites:
        inputs = [array_of(region, tensors) for region in rewrite.inputs]
        before = [array.tobytes() for array in inputs]
        first = [np.array(array) for array in op.apply(rewrite, inputs)]
        second = op.apply(rewrite, inputs)
        assert [array.tobytes() for array in inputs] == before
        assert [a.tobytes() for a in first] == [np.ascontiguousarray(a).tobytes() for a in second]
        for region, array in zip(rewrite.outputs, first, strict=True):
            assert (array.dtype, array.shape) == (region.spec.dtype.numpy, region.shape)
            made[region.spec.name] = array
    assert made.keys() | {"model.norm.weight"} == set(after)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", sorted(FORMATS))
def test_a_weight_that_is_not_finite_stops_the_run_and_is_named(layout, wrong, tmp_path):
    tensors = dense()
    tensors[f"{MLP}.up_proj.weight"][5, 7] = wrong
    source = write_checkpoint(tmp_path / "s", tensors, config=CONFIG)
    with pytest.raises(NumericError, match=r"mlp.up_proj.weight.*not finite.*row 5, column 7"):
        apply(quantize(layout), source, tmp_path / "t", workers=1)
    assert not list((tmp_path / "t").glob("*.safetensors"))


def test_a_source_that_is_quantized_already_is_refused_also_where_it_has_float_weights_left(tmp_path):
    source = write_quantized(tmp_path / "q", "gptq", num_bits=4, group_size=32)
    lone = read_all(source) | {"lm_head.weight": np.ones((64, 128), BF16)}
    config = open_checkpoint(source).config
    with pytest.raises(PlanError, match=r"already quantized \(gptq\).*dequantize"):
        make_plan(int8("lm_head.weight"), open_checkpoint(write_checkpoint(tmp_path / "s", lone, config=config)))


def test_a_large_weight_goes_in_pieces_to_the_same_bytes(tmp_path, monkeypatch):
    weight = np.random.default_rng(0).normal(0, 1, (1000, 64)).astype(BF16)
    source = write_checkpoint(tmp_path / "s", {"a.weight": weight}, config=CONFIG)
    apply(int8("a.weight"), source, tmp_path / "whole")
    monkeypatch.setattr("tensorsurgeon.ops.row_blocks.CHUNK_BYTES", 20_000)
    plan = make_plan(int8("a.weight"), open_checkpoint(source))
    assert len(plan.units) == 8
    apply(int8("a.weight"), source, tmp_path / "pieces", workers=3)
    whole, pieces = read_all(tmp_path / "whole"), read_all(tmp_path / "pieces")
    assert {n: a.tobytes() for n, a in whole.items()} == {n: a.tobytes() for n, a in pieces.items()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bits": 9}, "2 to 8"),
        ({"group_size": 0}, "positive, or -1"),
        ({"block": (128,)}, "two positive sizes"),
        ({"scale_dtype": "BF61"}, "BF16"),
        ({"rule": "gtpq"}, "gptq"),
    ],
)
def test_fields_out_of_range_are_refused_when_the_step_is_made(fields, message):
    with pytest.raises(RecipeError, match=message):
        quantize("ct-packed", **fields)


def test_an_unknown_format_names_the_nearest():
    with pytest.raises(RecipeError, match=r"unknown format 'ct-pakced'.*ct-packed"):
        quantize("ct-pakced").plan(spec_map(dense()))


WARMED_UP = """
import json, sys
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.quant.loops import bitpack, float_codes, integer_codes
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.running.run import run_plan
from tensorsurgeon.running.work_queue import warming_up
from tests.ops.quantized import quantize

def prepared():
    loops = [loop for module in (bitpack, float_codes, integer_codes) for loop in vars(module).values() if hasattr(loop, "stats")]
    found = {(loop.__name__, str(types)) for loop in loops for types in (*loop.stats.cache_hits, *loop.stats.cache_misses)}
    return sorted(found)

layout, source, target = sys.argv[1:]
plan = make_plan(quantize(layout), open_checkpoint(source))
with warming_up(plan, range(len(plan.units))):
    pass
warmed = prepared()
run_plan(plan, target, workers=1)
print(json.dumps([warmed, prepared()]))
"""


@pytest.mark.parametrize("layout", sorted(FORMATS))
def test_warming_up_loads_the_very_code_that_the_weights_need(layout, tmp_path):
    """A worker that finds other code missing would load it, or compile it, with all others waiting."""
    source = write_checkpoint(tmp_path / "s", dense(), config=CONFIG)
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", WARMED_UP, layout, str(source), str(tmp_path / "t")]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE, text=True, check=True
    )
    warmed, needed = json.loads(done.stdout)
    assert warmed
    assert needed == warmed
