"""GPTQModel reads our GPTQ and AWQ words: the weights that it multiplies by are our dequantized weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import read_file
from tests.engines.conftest import Convert
from tests.engines.judging import DENSE, Conversion, Engine, Row, conversion, rms

pytestmark = pytest.mark.engine

# kind of module -> what it is loaded into
READ: dict[Conversion, str] = {
    conversion("gptq-int4-g128", "scope=all"): "TorchQuantLinear",
    conversion("gptq-int4-g128", "scope=all", "format=gptq-v2"): "TorchQuantLinear",
    conversion("gptq-int4-g128", "scope=all", "num_bits=8", "group_size=32"): "TorchQuantLinear",
    conversion("awq-int4-g128"): "AwqTorchQuantLinear",
}
# Equal weights give unequal logits: GPTQModel multiplies by the transposed matrix, whose sums run in another order. In F16,
# 0.0001 (rms) was measured where quantizing to int4 moves the logits by 0.05.
TOLERANCE = 0.0005


@pytest.fixture(scope="module")
def asked(
    gptqmodel: Engine, convert: Convert, tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Row]]:
    out = tmp_path_factory.mktemp("gptqmodel")
    checkpoints = [DENSE, *(convert(DENSE, made) for made in READ)]
    checkpoints += [convert(DENSE, *made.then_dequantized("F16")) for made in READ]
    return out, gptqmodel.ask("gptqmodel_logits.py", out, *checkpoints, "--tokens", tokens)


@pytest.mark.parametrize("made", READ, ids=str)
def test_the_weights_and_logits(
    gptqmodel: Engine, convert: Convert, asked: tuple[Path, dict[str, Row]], made: Conversion
) -> None:
    out, rows = asked
    quantized, dequantized = convert(DENSE, made), convert(DENSE, *made.then_dequantized("F16"))
    modules = gptqmodel.accepted(rows, quantized)["modules"]
    gptqmodel.accepted(rows, dequantized)
    assert modules[READ[made]] == 14, f"{gptqmodel.name} loaded {made} into {modules}"
    if READ[made] == "TorchQuantLinear":
        theirs, ours = read_file(out / f"{quantized.name}.safetensors"), read_file(next(dequantized.glob("*.safetensors")))
        assert len(theirs) == 14
        for name, weight in theirs.items():
            assert np.array_equal(weight, ours[name]), f"{gptqmodel.name} dequantizes {name} of {made} to other weights"
    found, wanted, source = (np.load(out / f"{path.name}.npy") for path in (quantized, dequantized, DENSE))
    apart, moved = rms(found - wanted), rms(wanted - source)
    print(f"{made}: logits {apart:.6f} from its dequantized weights, which are {moved:.5f} from BF16")
    assert apart <= TOLERANCE < moved, f"{gptqmodel.name}: logits of {made} are {apart:.6f} from those of our weights"
