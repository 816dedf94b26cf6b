"""docs/adding.md is true: its class and its line make a format, and nothing else has to change."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.engines.advice import advice_as_text, advise_all
from tensorsurgeon.formats.registry import FORMATS, Entry, format_named, quantization_config
from tensorsurgeon.ops.dequantize import Dequantize
from tensorsurgeon.ops.repack import Repack
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import BF16
from tensorsurgeon.tensors.spec import TensorSpec
from tests.checkpoints import apply, read_all, write_checkpoint
from tests.contract.formats import Case, FormatContract, Mutation, Refusal
from tests.ops.quantized import CONFIG, config_of, dense, quantize

PAGE = (Path(__file__).parents[2] / "docs" / "adding.md").read_text()
MODULE = "tensorsurgeon.formats.plain_int8"


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def from_the_page() -> tuple[Any, str, Entry]:
    module = ModuleType(MODULE)
    exec(compile(block("class"), "docs/adding.md", "exec"), module.__dict__)
    (line,) = ast.literal_eval("{" + re.sub(r"Entry(\(.*?\))", r"\1", block("line")) + "}").items()
    sys.modules[MODULE] = module
    return module.__dict__["PlainInt8"], line[0], Entry(*line[1])


CLASS, NAME, ENTRY = from_the_page()
LAYOUT = CLASS()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, NAME, ENTRY)


class TestPlainInt8(FormatContract):
    CASES = (Case(LAYOUT, Scheme(num_bits=8)),)
    REFUSALS = (Refusal(LAYOUT, TensorSpec("m.weight", BF16, (8, 96)), Scheme(num_bits=4), "num_bits 8, found 4"),)
    MUTATIONS = (Mutation(("left_out",), ["model.language_model"], "says model.language_model.layers.0"),)


def test_a_checkpoint_goes_there_and_back(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "s", dense(), config=CONFIG)
    plan = make_plan(quantize(NAME), open_checkpoint(source))
    # An engine that has never heard of the method is not said to load it.
    assert f"quant_method 'plain' ({NAME}) is none that vllm is known to read" in advice_as_text(advise_all(plan))
    apply(quantize(NAME), source, tmp_path / "q")
    stored = read_all(tmp_path / "q")
    config = quantization_config(config_of(tmp_path / "q"))
    assert config is not None
    assert config["quant_method"] == "plain"
    opened = open_checkpoint(tmp_path / "q")
    assert set(format_named(NAME).read_config(config, opened.specs)) == {n[:-7] for n in dense() if ".mlp." in n}
    apply(Dequantize(dtype="F32"), tmp_path / "q", tmp_path / "f")
    found = read_all(tmp_path / "f")
    assert found.keys() == dense().keys()
    for name in (n for n in found if ".mlp." in n):
        scales = stored[name.removesuffix("weight") + "scales"]
        np.testing.assert_array_equal(found[name], stored[name].astype(np.float32) * scales[:, None])
    apply(Repack(to="ct-int", inexact_scales="keep"), tmp_path / "q", tmp_path / "r")
    repacked = read_all(tmp_path / "r")
    assert all(repacked[name].tobytes() == stored[name].tobytes() for name in stored if name.endswith("proj.weight"))
