"""vLLM serves what we write, and predicts held-out text as well as it does with the BF16 model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import FIXTURE, read_all
from tests.engines.conftest import Convert
from tests.engines.judging import DENSE, HELDOUT, Conversion, Engine, Row, calibrated, conversion, in_format, rms
from tests.engines.known_refusals import answer, ask_again_with_settings, served

pytestmark = pytest.mark.engine

# How far the perplexity may be from that of BF16: 0.5 % at 8 bits, 1.5 % at int4 g32, 2 % at g64, 3 % at g128. Calibrated codes
# have bounds of their own, between what was measured and what GPTQ gives that compensates for other inputs than it should
# (its Hessians with the features in reverse order):
#
#                                     gptq-int4-g128   ct-w4a16-g32 (where the kernel quantizes inputs to int8 too)
#   calibrated, three samples of text   .03 to .07 %     .39 to .67 %
#   rounded to nearest                  .13              .82
#   bound                               .3               1.0
#   Hessians in reverse order           .46              1.13
#   one of 32 up_proj in wrong order    2.7 (nibbles)    2.0 (rows)
#   every code one too large            144              2423
SERVED: dict[Conversion, float] = {
    conversion("quark-w8a8-int8"): 0.005,
    conversion("ct-w8a8-int8"): 0.005,
    conversion("ct-w8a8-int8", "rule=quark"): 0.005,
    conversion("ct-w8a8-int8", "signed=true"): 0.005,
    conversion("ct-w4a16-g32"): 0.015,
    conversion("ct-w4a16-g32", "group_size=64"): 0.02,
    conversion("mixed", "experts=w4a16", "attention=w8a8", "mlp=w8a8"): 0.015,
    conversion("gptq-int4-g128"): 0.03,
    conversion("gptq-int4-g128", "scope=all"): 0.03,
    calibrated("gptq-int4-g128"): 0.003,
    calibrated("ct-w4a16-g32"): 0.01,
}

# On a dense model, for kernels that have no MoE form on every CPU: what is served, and whose dequantized weights it is held
# against, for layouts that share their codes.
DENSE_PAIRS: dict[Conversion, Conversion] = {
    (autoround := conversion("autoround-int4-g128")): autoround,
    (awq := conversion("awq-int4-g128")): awq,
    (gptq := conversion("gptq-int4-g128", "scope=all")): gptq,
    conversion("gptq-int4-g128", "scope=all", "format=gptq-v2"): gptq,
    (asymmetric := in_format("ct-packed", "num_bits=4", "group_size=32", "symmetric=false")): asymmetric,
    (quark := in_format("quark-int4")): quark,
    in_format("quark-int4-reorder"): quark,
    (fp8 := in_format("ct-float")): fp8,
    in_format("quark-fp8"): fp8,
    (quark_int8 := conversion("quark-w8a8-int8")): quark_int8,
    # Scales that are negative in half of the groups, which calibrated codes have by default: whoever multiplies by them is right.
    (signed := in_format("ct-packed", "num_bits=4", "group_size=32", "signed=true")): signed,
    (signed_channels := in_format("ct-packed", "num_bits=4", "group_size=-1", "signed=true")): signed_channels,
    (signed_gptq := conversion("gptq-int4-g128", "scope=all", "signed=true")): signed_gptq,
    conversion("gptq-int4-g128", "scope=all", "format=gptq-v2", "signed=true"): signed_gptq,
    (signed_quark := in_format("quark-int4", "signed=true")): signed_quark,
    (signed_ct_int8 := conversion("ct-w8a8-int8", "signed=true")): signed_ct_int8,
    (signed_quark_int8 := conversion("quark-w8a8-int8", "signed=true")): signed_quark_int8,
}
# Distances of log-probabilities relative to the distance that quantizing makes. vLLM's kernels for the CPU differ in how
# they multiply: 0 to 0.04 was measured where they dequantize, 0.08 (ct-w4a16-g32) where they quantize the inputs to int8, and
# 0.84 for FP8, whose configs ask for inputs in FP8, an error like that of the weights. One up_proj with its rows in reverse
# order is at 8.5. INT8 inputs are at 0.97 of what INT8 weights move, which is a fourteenth of what int4 moves.
DENSE_TOLERANCE = dict.fromkeys(DENSE_PAIRS, 0.15) | dict.fromkeys((fp8, in_format("quark-fp8")), 1.25)
DENSE_TOLERANCE |= dict.fromkeys((quark_int8, signed_ct_int8, signed_quark_int8), 1.5)


@pytest.fixture(scope="module")
def scores(vllm: Engine, convert: Convert) -> dict[str, Row]:
    """The fixture in BF16 and in each layout, every model served once."""
    checkpoints = [FIXTURE, *(convert(FIXTURE, made) for made in SERVED)]
    return vllm.ask("vllm_score.py", "--json", "--tokens", HELDOUT, *checkpoints)


@pytest.mark.parametrize("made", SERVED, ids=str)
def test_perplexity_on_held_out_text(vllm: Engine, convert: Convert, scores: dict[str, Row], made: Conversion) -> None:
    base = vllm.accepted(scores, FIXTURE)
    assert base["perplexity"] < 25, f"{vllm.name} does not predict text with the BF16 fixture itself: {base}"
    row, how = served(vllm, scores, convert(FIXTURE, made), FIXTURE, made)
    change = row["perplexity"] / base["perplexity"] - 1
    answer(FIXTURE, made, f"perplexity {row['perplexity']:.4f}, {change:+.2%} of BF16, {row['seconds']} s{how}")
    assert row["tokens"] == base["tokens"] == 5976
    assert row["nll"] != base["nll"], f"{vllm.name} scores {made} exactly as BF16: nothing was quantized"
    assert abs(change) <= SERVED[made], f"{vllm.name}: {made} has perplexity {row['perplexity']:.4f}, {change:+.2%} of BF16"


def test_experts_of_quark_int8_are_those_of_a_layout_that_is_served(convert: Convert) -> None:
    """Where vLLM refuses Quark's INT8 experts, compressed-tensors' layout holds the same numbers, and is scored."""
    quark, ct = (read_all(convert(FIXTURE, conversion(*made))) for made in (("quark-w8a8-int8",), ("ct-w8a8-int8", "rule=quark")))
    assert quark.keys() == ct.keys()
    for name, array in quark.items():
        if name.endswith(".weight_scale"):  # F32 [out] and BF16 [out, 1]
            assert np.array_equal(array.astype(np.float32), ct[name][:, 0].astype(np.float32)), name
        else:
            assert array.tobytes() == ct[name].tobytes(), name
    assert sum(array.dtype == np.int8 for array in quark.values()) == 127


@pytest.fixture(scope="module")
def dense_scores(vllm: Engine, convert: Convert, tokens: Path) -> dict[str, Row]:
    def ask(*checkpoints: Path, settings: tuple[str, ...] = ()) -> dict[str, Row]:
        return vllm.ask("vllm_score.py", "--json", "--each", "--tokens", tokens, *checkpoints, settings=settings)

    dequantized = [convert(DENSE, *judge.then_dequantized()) for judge in dict.fromkeys(DENSE_PAIRS.values())]
    quantized = {made: convert(DENSE, made) for made in DENSE_PAIRS}
    rows = ask(DENSE, *quantized.values(), *dequantized)
    ask_again_with_settings(ask, rows, DENSE, quantized)
    return rows


@pytest.mark.parametrize("made", DENSE_PAIRS, ids=str)
def test_a_dense_model_scores_as_its_dequantized_weights(
    vllm: Engine, convert: Convert, dense_scores: dict[str, Row], made: Conversion
) -> None:
    def logprobs(checkpoint: Path) -> np.ndarray:
        return np.array(vllm.accepted(dense_scores, checkpoint)["logprobs"])

    row, how = served(vllm, dense_scores, convert(DENSE, made), DENSE, made)
    source, quantized = logprobs(DENSE), np.array(row["logprobs"])
    dequantized = logprobs(convert(DENSE, *DENSE_PAIRS[made].then_dequantized()))
    moved, apart = rms(dequantized - source), rms(quantized - dequantized)
    shift = float(np.mean(quantized) - np.mean(dequantized))
    figures = f"{apart:.5f} nats from its dequantized weights (mean {shift:+.6f}), which are {moved:.5f} from BF16"
    answer(DENSE, made, f"{figures}, {row['seconds']} s{how}")
    message = f"{vllm.name}: {made} is {apart:.5f} nats from its dequantized weights, these {moved:.5f} from BF16"
    assert apart <= DENSE_TOLERANCE[made] * moved, message
    assert abs(shift) <= 0.001, message
