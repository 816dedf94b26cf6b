import numpy as np
import pytest

from tensorsurgeon.errors import NoMatchError, RecipeError, SpecError
from tensorsurgeon.ops.expect import Expect
from tests.contract.ops import Case, OpContract, Refusal
from tests.ops.arrays import F32, bits

CONFIG = {"hidden_size": 4, "num_experts": 2, "text_config": {"moe_intermediate_size": 3, "num_experts": 3}}
SHAPE = ("num_experts|num_local_experts", "2*moe_intermediate_size|intermediate_size", "hidden_size")
GU = bits((3, 6, 4))


class TestExpect(OpContract):
    CASES = (
        Case(
            "fits_and_changes_nothing",
            Expect(where=("gu",), shape=SHAPE),
            {"gu": GU, "b": bits(())},
            {"gu": GU, "b": bits(())},
            config=CONFIG,
        ),
        Case("numbers_and_any", Expect(where=("gu",), shape=("3", "any", "4")), {"gu": GU}, {"gu": GU}),
        Case("scalar", Expect(where=("s",), shape=()), {"s": bits(())}, {"s": bits(())}),
        Case("may_be_absent_needs_no_config", Expect(where=("maybe:none",), shape=SHAPE), {"gu": GU}, {"gu": GU}),
        Case("dtype", Expect(where=("gu",), shape=("any",) * 3, dtype=("F16", "BF16")), {"gu": GU}, {"gu": GU}),
    )
    REFUSALS = (
        Refusal(
            "transposed",
            Expect(where=("gu",), shape=SHAPE),
            {"gu": GU.swapaxes(1, 2)},
            SpecError,
            "stored transposed",
            config=CONFIG,
        ),
        Refusal(
            "other_size",
            Expect(where=("gu",), shape=SHAPE),
            {"gu": bits((3, 5, 4))},
            SpecError,
            "2*moe_intermediate_size|intermediate_size (6)",
            config=CONFIG,
        ),
        Refusal("other_rank", Expect(where=("gu",), shape=SHAPE), {"gu": bits((3, 6))}, SpecError, "found [3, 6]", config=CONFIG),
        Refusal(
            "model_type",
            Expect(where=("gu",), shape=SHAPE, not_model_type=("gpt_oss",)),
            {"gu": GU},
            SpecError,
            "gpt_oss",
            config={**CONFIG, "model_type": "gpt_oss"},
        ),
        Refusal(
            "model_type_of_the_text_model",
            Expect(where=("gu",), shape=SHAPE, not_model_type=("llama4",)),
            {"gu": GU},
            SpecError,
            "llama4_text",
            config={**CONFIG, "text_config": {**CONFIG["text_config"], "model_type": "llama4_text"}},
        ),
        Refusal(
            "no_config",
            Expect(where=("gu",), shape=SHAPE),
            {"gu": GU},
            SpecError,
            "config.json has no num_experts or num_local_experts",
        ),
        Refusal("nothing_matches", Expect(where=("gx",), shape=SHAPE), {"gu": GU}, NoMatchError, "'gx'", config=CONFIG),
        Refusal(
            "dtype",
            Expect(where=("gu",), shape=("any",) * 3, dtype=("BF16",)),
            {"gu": bits((3, 6, 4), F32)},
            SpecError,
            "expected BF16, found F32",
        ),
        Refusal(
            "codes",
            Expect(where=("gu",), shape=("any",), dtype=("BF16",)),
            {"gu": np.zeros(3, np.int8)},
            SpecError,
            "dequantize it first",
        ),
    )


@pytest.mark.parametrize("entry", ["2*", "-1", "hidden size", ""])
def test_a_size_that_is_none_is_refused(entry):
    from tests.contract.ops import spec_map

    with pytest.raises(RecipeError, match="is no size"):
        Expect(where=("gu",), shape=(entry,)).plan(spec_map({"gu": GU}))
