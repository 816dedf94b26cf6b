"""Every config, read by the readers' own code: what is quantized in the file is what they take for quantized.

Set VLLM_PYTHON and CT_PYTHON to interpreters that can import vllm (0.32) and compressed_tensors (0.17 to 0.20).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tensorsurgeon.formats.base import Format, QuantizedModel
from tensorsurgeon.formats.registry import FORMATS, format_class
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import BF16
from tests.contract.written_models import language_linears, qwen_weights, written

pytestmark = pytest.mark.engine
JUDGES = Path(__file__).parent / "judges"
# vLLM never hands these its quantization config.
NEVER_ASKED = ("mlp.gate", "shared_expert_gate", "lm_head")

Chooser = Callable[[str], bool]
MODELS: dict[str, tuple[Chooser, tuple[str, ...]]] = {
    "all": (language_linears, ("mtp",)),
    "experts float and stacked": (lambda m: language_linears(m) and ".experts." not in m, ("mtp", "model")),
    "experts float, one by one": (lambda m: language_linears(m) and ".experts." not in m, ()),
    "some layers float": (lambda m: language_linears(m) and not re.search(r"layers\.[03]\.", m), ()),
    "experts only": (lambda m: language_linears(m) and ".experts." in m, ("mtp",)),
}


def layouts() -> list[tuple[str, Format, Scheme, Scheme | None]]:
    """Each format with its default scheme, and those with several schemes with a second one for attention."""
    found = []
    for name in FORMATS:
        layout: Format = format_class(name)()
        scheme = layout.resolve_scheme(layout.default_scheme(), BF16)
        found.append((name, layout, scheme, None))
        if name in ("ct-packed", "gptq", "autoround"):
            wide = layout.resolve_scheme(Scheme(num_bits=8, group_size=32), BF16)
            found.append((f"{name}, attention at 8 bits", layout, scheme, wide))
    return found


def models() -> dict[str, tuple[QuantizedModel, dict]]:
    made = {}
    for name, layout, scheme, attention in layouts():
        for kind, (chosen, fused) in MODELS.items():

            def scheme_for(module: str, chosen: Chooser = chosen, scheme=scheme, attention=attention) -> Scheme | None:
                if not chosen(module):
                    return None
                return attention if attention is not None and ".self_attn." in module else scheme

            model = written(layout, scheme_for, qwen_weights(layers=8, fused=fused))
            made[f"{name}: {kind}"] = (model, layout.config_files(model).quantization_config)
    return made


def wanted(model: QuantizedModel, config: dict) -> dict[str, tuple[bool, int | None]]:
    """By HF name, expert lists folded: whether it is one, and its bits."""
    found: dict[str, tuple[bool, int | None]] = {}
    for module in (*model.modules, *model.unquantized):
        if module.endswith(NEVER_ASKED):
            continue
        # A BF16 MTP head beside fp8 is known not to survive: vLLM's mapper drops the names (docs/formats/hf_fp8.md).
        if config["quant_method"] == "fp8" and module.startswith("mtp."):
            continue
        experts = re.match(r".*\.experts(?=\.|$)", module)
        name = experts[0] if experts else module
        found[name] = (bool(experts), model.modules[module].num_bits if module in model.modules else None)
    return found


def ask(script: str, variable: str, questions: dict, folder: Path) -> dict:
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no interpreter")
    (folder / "questions.json").write_text(json.dumps(questions))
    command = [python, str(JUDGES / script), str(folder / "questions.json"), str(folder / "answers.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "answers.json").read_text())


def test_vllm_quantizes_what_is_quantized(tmp_path):
    made = models()
    asked = {case: wanted(model, config) for case, (model, config) in made.items()}
    questions = {
        case: {"config": made[case][1], "modules": [[name, kind] for name, (kind, _) in names.items()]}
        for case, names in asked.items()
    }
    answers = ask("ask_vllm.py", "VLLM_PYTHON", questions, tmp_path)
    for case, names in asked.items():
        for name, (_, bits) in names.items():
            found = answers[case][name]
            assert found == ("quantized" if bits is not None and found == "quantized" else bits), (case, name)


def test_compressed_tensors_quantizes_what_is_quantized(tmp_path):
    made = {case: value for case, value in models().items() if case.startswith("ct_")}
    questions = {
        case: {"config": config, "modules": [[m, False] for m in (*model.modules, *model.unquantized)]}
        for case, (model, config) in made.items()
    }
    answers = ask("ask_compressed_tensors.py", "CT_PYTHON", questions, tmp_path)
    for case, (model, _) in made.items():
        for module in (*model.modules, *model.unquantized):
            if module.endswith(".experts"):
                continue
            bits = model.modules[module].num_bits if module in model.modules else None
            assert answers[case][module] == bits, (case, module)
