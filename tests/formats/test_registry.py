"""What stands as a list of layouts elsewhere is what the registry has."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tensorsurgeon.formats.registry import FORMATS, format_named
from tensorsurgeon.quant.scheme import RULES

TRANSFORMS = Path(__file__).parents[2] / "transforms"


def parameters(name: str) -> dict:
    return yaml.safe_load((TRANSFORMS / f"{name}.yaml").read_text())["parameters"]


def test_repack_offers_every_integer_layout_and_no_other():
    integer = {name for name in FORMATS if format_named(name).default_scheme().type == "int"}
    assert set(parameters("repack")["to"]["choices"]) == integer


@pytest.mark.parametrize("name", sorted(path.stem for path in TRANSFORMS.glob("*.yaml")))
def test_formats_and_rules_that_a_transform_names_exist(name):
    found = parameters(name) if "parameters" in (TRANSFORMS / f"{name}.yaml").read_text() else {}
    rules, formats = found.get("rule", {}), found.get("format", {})
    assert {rules.get("default"), *rules.get("choices", ())} <= {None, *RULES}
    assert {formats.get("default"), *formats.get("choices", ())} <= {None, *FORMATS}


@pytest.mark.parametrize("name", FORMATS)
def test_a_message_of_a_format_calls_it_what_users_write(name):
    assert format_named(name).name in FORMATS
