"""What stands behind a verdict: that architecture in that layout was served, its class was asked or read, or nothing is known."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from tensorsurgeon.engines.base import Source
from tensorsurgeon.engines.facts import Facts

_FILE: Final = Path(__file__).with_name("served.yaml")


def evidence(engine: str, facts: Facts) -> Source:
    """How far it is known that an engine serves this architecture in its layout; rules that found nothing are no evidence."""
    known = _table()[engine]
    architectures = facts.config.get("architectures")
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    layout = "+".join(sorted(part.layout for part in facts.parts)) or facts.layout
    if any(layout in known["served"].get(name, ()) for name in names):
        return "tested"
    if any(name in known["read"] for name in names) or (engine == "vllm" and facts.model.answer is not None):
        return "read"
    return "not known"


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return found
