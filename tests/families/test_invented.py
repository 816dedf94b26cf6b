"""The four conversions of layouts that nobody made a table for: none silently wrong, none in a traceback, refusals by name."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path

import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.planning.plan import Plan, make_plan
from tensorsurgeon.recipes.library import load_transform
from tests.families.invented import INVENTED, Invented

CONVERSIONS = ("ct-w4a16-g32", "ct-w8a8-int8", "nvfp4a16", "fp8-block")
# A row per head, which group formats leave alone.
NARROW = re.compile(r"\.b_proj\.weight$")


def planned(layout: Invented, transform: str, folder: Path) -> Plan:
    write_holes(folder, layout)
    return make_plan(load_transform(transform), open_checkpoint(folder))


def write_holes(folder: Path, layout: Invented) -> None:
    """A checkpoint in BF16 whose data is a hole in the file: planning reads headers only."""
    folder.mkdir()
    header: dict[str, object] = {}
    end = 0
    for name, (_, shape) in layout.tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + 2 * prod(shape)]}
        end += 2 * prod(shape)
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(layout.config))


def kept(plan: Plan, name: str) -> bool:
    return name in plan.specs and plan.specs[name] == plan.source.specs[name]


@pytest.mark.parametrize("transform", CONVERSIONS)
@pytest.mark.parametrize("name", INVENTED)
def test_what_is_quantized_is_what_should_be(name: str, transform: str, tmp_path: Path) -> None:
    layout = INVENTED[name]()
    if layout.refused:
        with pytest.raises(SurgeonError, match=layout.refused):
            planned(layout, transform, tmp_path / "source")
        return
    plan = planned(layout, transform, tmp_path / "source")
    # A stack's biases are split with it.
    wrong = {
        name for name, (mark, _) in layout.tensors.items() if mark == "-" and not kept(plan, name) and not name.endswith("_bias")
    }
    missed = {name for name, (mark, _) in layout.tensors.items() if mark == "q" and kept(plan, name) and not NARROW.search(name)}
    assert not wrong
    assert not missed
