"""Entries of a config name modules as the file does and as loaders do, in models whose parts transformers calls otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.formats.ct_targets import Matcher
from tensorsurgeon.models.patterns import exact_pattern, renamed_by_loaders, spellings
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.tensors.expressions import Expression
from tensorsurgeon.verifying.judging import verify
from tests.families import build
from tests.families.table import FAMILIES
from tests.families.trial import surgeon

# Text below language_model.model, below model beside a tower, below model.language_model; towers at the top and below model.
SEVERAL = ("llava", "gemma3", "qwen2_vl", "mistral3", "internvl", "qwen3_vl", "smolvlm", "qwen2_audio")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def source(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            build.write(name, made[name])
        return made[name] / "source"

    return source


def planned_config(transform: str, source: Path, **values: str) -> dict[str, Any]:
    plan = make_plan(load_transform(transform, values), open_checkpoint(source))
    found: dict[str, Any] = json.loads(plan.files.contents["config.json"])["quantization_config"]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SEVERAL)
def test_what_stays_float_is_ignored_under_the_names_of_transformers(name: str, sources: Any) -> None:
    ignore = Matcher(planned_config("ct-w8a8-int8", sources(name))["ignore"])
    model = build.model_of(FAMILIES[name])
    layers = build.decoder_layers(model)
    linears = [module for module, kind in model.named_modules() if isinstance(kind, nn.Linear)]
    # As compressed-tensors matches them: by these names alone.
    kept = {n for n in linears if n in ignore.exact or any(e.match(n) for e in ignore.expressions)}
    assert kept == {module for module in linears if not module.startswith(layers)}
    assert len(kept) > 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", ["quark-w8a8-int8", "gptq-int4-g128"])
def test_other_dialects_say_the_same(transform: str, sources: Any) -> None:
    values = {"group_size": "32"} if "gptq" in transform else {}
    config = planned_config(transform, sources("llava"), **values)
    rules = [key.removeprefix("-:") for key in config.get("dynamic", {})] or [
        entry.removeprefix("re:") for entry in config["exclude"] if entry.startswith("re:")
    ]
    expressions = [Expression(rule) for rule in rules]
    for module in ("model.vision_tower.encoder.layers.1.self_attn.q_proj", "model.multi_modal_projector.linear_1"):
        assert any(e.match(module) for e in expressions), module
    assert not any(e.match("model.language_model.layers.1.self_attn.q_proj") for e in expressions)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("transform", "key"),
    [
        ("ct-w8a8-int8", "ignore"),
        ("fp8-block", "modules_to_not_convert"),
        ("quark-w8a8-int8", "exclude"),
    ],
)
def test_lists_in_the_names_of_a_loader_are_read_and_judged(transform: str, key: str, sources: Any, tmp_path: Path) -> None:
    surgeon("apply", transform, sources("llava"), tmp_path / "out", "--quiet")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"][key] = [
        name if name == "lm_head" else "model." + name
        for name in config["quantization_config"][key]
        if not name.startswith("re:")
    ]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    (tmp_path / "out" / "surgeon.json").unlink()
    assert make_plan(load_transform("dequantize"), open_checkpoint(tmp_path / "out")).units
    assert not verify(tmp_path / "out", sources("llava")).faults
    # Names of nobody keep nothing out.
    config["quantization_config"][key] = [name.replace("vision", "vidion") for name in config["quantization_config"][key]]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert verify(tmp_path / "out", sources("llava")).faults


def test_a_module_has_the_names_that_loaders_put_before_it() -> None:
    assert "model.language_model.layers.0.mlp.gate" in spellings("language_model.model.layers.0.mlp.gate")
    assert "model.vision_tower.encoder.fc" in spellings("vision_tower.vision_model.encoder.fc")
    assert not spellings("mtp.fc")
    assert not spellings("model.layers.0.mlp.experts.3.up_proj")
    assert Expression(exact_pattern("vision_tower.vision_model.fc")).match("model.vision_tower.fc")


def test_a_tower_is_one_expression_unless_a_part_of_it_is_quantized() -> None:
    modules = ["visual.blocks.0.fc", "visual.blocks.1.fc", "lm_head", "mtp.fc"]
    linears = [*modules, "model.layers.0.q_proj"]
    assert renamed_by_loaders(modules, linears, ["model.layers.0.q_proj"]) == [
        r"(model\.)?(language_model\.)?(model\.)?visual(\..*)?$"
    ]
    (found,) = renamed_by_loaders(modules, linears, ["visual.blocks.0.proj"])
    assert Expression(found).match("model.visual.blocks.1.fc")
    assert not Expression(found).match("model.visual.blocks.0.proj")
    assert renamed_by_loaders(["model.visual.fc"], ["model.visual.fc", "lm_head"], []) == []
