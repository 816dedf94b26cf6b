from __future__ import annotations

from tensorsurgeon.formats.base import QuantizedModel
from tensorsurgeon.formats.ct_float import CtFloat
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import BF16, F32
from tensorsurgeon.tensors.spec import TensorSpec
from tests.contract.formats import Case, FormatContract, Mutation, Refusal
from tests.contract.goldens import Golden, GoldenContract
from tests.contract.written_models import under, written

LAYOUT = CtFloat()
CHANNEL, BLOCK = Scheme(type="fp8"), Scheme(type="fp8", block=(128, 128))
WEIGHT = TensorSpec("m.weight", BF16, (200, 160))
GROUP = ("config_groups", "group_0")


class TestCtFloat(FormatContract):
    CASES = (Case(LAYOUT, CHANNEL), Case(LAYOUT, BLOCK), Case(LAYOUT, BLOCK, weight_dtype=F32))
    REFUSALS = (
        Refusal(LAYOUT, WEIGHT, Scheme(), "type fp8, found int"),
        Refusal(LAYOUT, WEIGHT, Scheme(type="fp8", block=(64, 64)), r"block None or \(128, 128\)"),
        Refusal(LAYOUT, WEIGHT, Scheme(type="fp8", group_size=32), "group_size -1, found 32"),
    )
    MUTATIONS = (
        Mutation((*GROUP, "weights", "strategy"), "token", "strategy: found 'token', can read 'channel' or 'block'"),
        Mutation((*GROUP, "weights", "strategy"), "block", r"block_structure: expected \[rows, columns\], found None"),
        Mutation((*GROUP, "weights", "type"), "int", "type: found 'int'"),
    )

    def test_blocks_are_cut_off_at_the_edges(self) -> None:
        assert LAYOUT.tensors(WEIGHT, BLOCK)[1] == TensorSpec("weight_scale", BF16, (2, 2))

    def test_activations_beside_blocks_come_in_groups_as_wide_as_a_block(self) -> None:
        config = LAYOUT.config_files(written(LAYOUT, under(BLOCK))).quantization_config
        inputs = config["config_groups"]["group_0"]["input_activations"]
        assert (inputs["strategy"], inputs["group_size"], inputs["dynamic"]) == ("group", 128, True)

    def test_weight_only_when_the_transform_says_so(self) -> None:
        model = written(LAYOUT, under(CHANNEL))
        model = QuantizedModel(
            modules=model.modules, unquantized=model.unquantized, specs=model.specs, options={"activations": ["none"]}
        )
        config = LAYOUT.config_files(model).quantization_config
        assert config["config_groups"]["group_0"]["input_activations"] is None


class TestCtFloatGolden(GoldenContract):
    GOLDENS = (
        Golden("llmcompressor-fp8-dynamic", LAYOUT, CHANNEL),
        Golden("llmcompressor-fp8-block", LAYOUT, BLOCK),
    )
