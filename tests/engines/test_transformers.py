"""transformers, with the library of each format, computes what our dequantized weights compute, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.checkpoints import FIXTURE, assert_same, read_all
from tests.engines.conftest import Convert
from tests.engines.judging import DENSE, Conversion, Engine, Judgement, Row, calibrated, conversion, in_format

pytestmark = pytest.mark.engine

# Layouts that transformers loads into the MoE model.
MOE = (
    conversion("autoround-int4-g128"),
    conversion("ct-w8a16"),
    conversion("ct-w4a16-g32"),
    conversion("fp8-block"),
    in_format("ct-mxfp4"),
    calibrated("fp8-block"),
    calibrated("mxfp4a16"),
)
# The others on the dense model: for the MoE one, transformers 5.23 refuses compressed-tensors' int-quantized and
# float-quantized ("automatic conversion of the weights") and loads NVFP4 into experts that are wrong, without a word.
DENSE_WEIGHTS = (conversion("fp8-block"), conversion("nvfp4a16"))
# These quantize activations while they run, which dequantized weights do not: with that taken out of the config, the weights
# are judged alone.
DENSE_ACTIVATIONS = (
    conversion("ct-w8a8-int8"),
    conversion("ct-w8a8-int8", "signed=true"),
    in_format("ct-float"),
    conversion("fp8-block", "format=ct-float"),
)
# No engine here loads these (transformers refuses packed zero points, llm-compressor's own too); compressed-tensors has a
# converter that dequantizes whole checkpoints.
DECOMPRESSED = (
    (DENSE, in_format("ct-packed", "num_bits=4", "group_size=32", "symmetric=false")),
    (DENSE, in_format("ct-packed", "num_bits=3", "group_size=64", "symmetric=false")),
    (DENSE, in_format("ct-packed", "num_bits=8", "group_size=-1", "symmetric=false")),
    # Scales that are negative in half of the groups.
    *((DENSE, in_format("ct-packed", f"num_bits={bits}", "group_size=32", "signed=true")) for bits in (2, 3, 4, 8)),
    (DENSE, in_format("ct-mxfp4")),
    (DENSE, conversion("nvfp4a16")),
    (FIXTURE, conversion("nvfp4a16")),
    (FIXTURE, in_format("ct-mxfp4")),
    (FIXTURE, calibrated("nvfp4a16")),
    (FIXTURE, calibrated("mxfp4a16")),
)


@pytest.fixture(scope="module")
def without_activations(tmp_path_factory: pytest.TempPathFactory, convert: Convert) -> dict[Conversion, Path]:
    """Copies of the dense checkpoints that quantize activations, told not to."""
    folder, copies = tmp_path_factory.mktemp("weights-only"), {}
    for made in DENSE_ACTIVATIONS:
        copies[made] = Path(shutil.copytree(convert(DENSE, made), folder / f"{made}-weights-only"))
        config = json.loads((copies[made] / "config.json").read_text())
        for group in config["quantization_config"]["config_groups"].values():
            assert group["input_activations"] is not None
            group["input_activations"] = None
        (copies[made] / "config.json").write_text(json.dumps(config))
    return copies


@pytest.fixture(scope="module")
def judgement(
    transformers: Engine,
    convert: Convert,
    without_activations: dict[Conversion, Path],
    tokens: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Judgement:
    pairs = [(FIXTURE, made) for made in MOE] + [(DENSE, made) for made in DENSE_WEIGHTS]
    checkpoints = [FIXTURE, DENSE, *(convert(source, made) for source, made in pairs), *without_activations.values()]
    pairs += [(DENSE, made) for made in DENSE_ACTIVATIONS]
    checkpoints += [convert(source, *made.then_dequantized()) for source, made in pairs]
    return Judgement(transformers, tmp_path_factory.mktemp("logits"), tokens, checkpoints)


@pytest.mark.parametrize("made", MOE, ids=str)
def test_the_moe_model(judgement: Judgement, convert: Convert, made: Conversion) -> None:
    modules = judgement.equal(FIXTURE, convert(FIXTURE, made), convert(FIXTURE, *made.then_dequantized()))
    if made.transform.startswith("autoround"):
        # 96 experts' linears, 3 layers' in_proj_qkv, in_proj_z and out_proj, 1 layer's q, k, v and o
        assert modules["QuantLinear"] == 109, modules


@pytest.mark.parametrize("made", DENSE_WEIGHTS, ids=str)
def test_a_dense_model(judgement: Judgement, convert: Convert, made: Conversion) -> None:
    judgement.equal(DENSE, convert(DENSE, made), convert(DENSE, *made.then_dequantized()))


@pytest.mark.parametrize("made", DENSE_ACTIVATIONS, ids=str)
def test_weights_of_a_dense_model_without_its_activations(
    judgement: Judgement, convert: Convert, without_activations: dict[Conversion, Path], made: Conversion
) -> None:
    judgement.equal(DENSE, without_activations[made], convert(DENSE, *made.then_dequantized()))


@pytest.fixture(scope="module")
def decompressed(transformers: Engine, convert: Convert, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Row]]:
    out = tmp_path_factory.mktemp("decompressed")
    return out, transformers.ask("ct_dequantize.py", out, *(convert(source, made) for source, made in DECOMPRESSED))


@pytest.mark.parametrize(("source", "made"), DECOMPRESSED, ids=lambda value: getattr(value, "name", str(value)))
def test_compressed_tensors_dequantizes_to_the_same_weights(
    transformers: Engine, convert: Convert, decompressed: tuple[Path, dict[str, Row]], source: Path, made: Conversion
) -> None:
    out, rows = decompressed
    checkpoint = convert(source, made)
    transformers.accepted(rows, checkpoint)
    ours, theirs = read_all(convert(source, *made.then_dequantized())), read_all(out / checkpoint.name)
    assert_same(theirs, ours)
    assert any(ours[name].tobytes() != array.tobytes() for name, array in read_all(source).items() if name in ours)
