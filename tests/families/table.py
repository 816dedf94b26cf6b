"""The rows of `table.yaml`, their configs spelled out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

Config = dict[str, Any]


class Family(NamedTuple):
    """One row.

    ``architecture``: what the config names. ``layout``: how publishers store it if not as transformers saves it, words of
    `published.as_published` joined by +. ``stays``: a pattern of further modules whose linears must stay as they are.
    ``source``: the format that it is published in, with more for its config in ``quantization``.
    ``asked``, ``built``: false for rows that only the other half can try.
    """

    architecture: str
    config: Config
    layout: str = ""
    stays: str = ""
    source: str = ""
    quantization: Config = {}  # noqa: RUF012
    asked: bool = True
    built: bool = True


def spelled_out(value: Any, parts: Config) -> Any:
    """A config with the parts that its `from` names put in, at every depth; what stands beside `from` comes last."""
    if not isinstance(value, dict):
        return value
    named = [spelled_out(parts[name], parts) for name in value.get("from", ())]
    own = {key: spelled_out(inner, parts) for key, inner in value.items() if key != "from"}
    return {key: inner for part in (*named, own) for key, inner in part.items()}


def read_table() -> dict[str, Family]:
    table = yaml.safe_load(Path(__file__).with_name("table.yaml").read_text())
    return {name: Family(**spelled_out(row, table["parts"])) for name, row in table["families"].items()}


FAMILIES = read_table()
