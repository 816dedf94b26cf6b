"""The configs in docs/formats are what the formats write, not what somebody typed.

TENSORSURGEON_WRITE_DOCS=1 pytest tests/formats/test_docs.py     writes them anew
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tensorsurgeon.formats.registry import FORMATS, format_class
from tensorsurgeon.tensors.dtypes import BF16
from tests.contract.written_models import qwen_weights, under, written

PAGES = Path(__file__).parents[2] / "docs" / "formats"
BLOCK = re.compile(r"<!-- config: ([\w-]+) -->\n(?:\n```json\n.*?\n```\n)?", re.DOTALL)


def example(name: str) -> str:
    """The config for one layer, one vision block, the head and the MTP head."""
    layout = format_class(name)()
    scheme = layout.resolve_scheme(layout.default_scheme(), BF16)
    weights = (w for w in qwen_weights(layers=1) if not re.search(r"visual\.(blocks\.1|merger)", w.name))
    config = layout.config_files(written(layout, under(scheme), weights)).quantization_config
    lines = (f'  "{key}": {json.dumps(value)}' for key, value in config.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def with_examples(page: str) -> str:
    return BLOCK.sub(lambda found: f"<!-- config: {found[1]} -->\n\n```json\n{example(found[1])}\n```\n", page)


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda path: path.stem)
def test_configs_are_what_the_formats_write(page):
    text = page.read_text()
    if os.environ.get("TENSORSURGEON_WRITE_DOCS"):
        page.write_text(with_examples(text))
    assert page.read_text() == with_examples(text)


def test_every_format_has_a_page_with_its_config():
    shown = {name for page in PAGES.glob("*.md") for name in BLOCK.findall(page.read_text())}
    assert shown | {"ct-mxfp4"} == {format_class(name).name for name in FORMATS}
