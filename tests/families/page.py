"""The table of families as docs/families.md shows it: made from the rows of a run, never written by hand."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

from tests.families.table import FAMILIES

TEMPLATE = Path(__file__).with_name("page.md")


def word_of(stages: dict[str, str], at: str) -> str:
    """One cell: `right`, `refused`, or the first stage that went wrong."""
    own = {name.removeprefix(f"{at} "): word for name, word in stages.items() if name == at or name.startswith(f"{at} ")}
    for name, word in own.items():
        if word.startswith(("traceback", "exit 70")):  # 70: the command line caught what it did not expect
            return "**traceback**"
        if word != "right":
            return "refused" if name in ("plan", "apply", at) and word.startswith(("exit 2", "exit 3")) else f"**wrong: {name}**"
    return "right" if own else ""


def engine_word(architecture: str, asked: dict[str, Any]) -> str:
    entry = asked.get(architecture)
    if entry is None:
        return "not asked"
    if "gone" in entry:
        return f"gone since {entry['gone']}"
    return f"{entry['how']} without {', '.join(entry['aside'])}" if "aside" in entry else str(entry["how"])


def page_of(rows: dict[str, Any]) -> str:
    """Markdown: the table, what was wrong by family, what was asked only, and how to add one."""
    said = json.loads(resources.files("tensorsurgeon.models").joinpath("asked/vllm.json").read_text())
    asked = said["architectures"]
    table, faults = [], []
    counts: dict[str, Counter[str]] = {"w4a16": Counter(), "w8a8": Counter(), "gptq": Counter()}
    for name in (name for name in FAMILIES if name in rows):
        stages = rows[name]["stages"]
        words = {at: word_of(stages, at) for at in counts}
        if stages["built"] != "right":
            words["w4a16"] = "not built"
        for at, word in words.items():
            counts[at].update([word.strip("*").split(":")[0]] if word else [])
        architecture = FAMILIES[name].architecture
        source = f", source {FAMILIES[name].source}" if FAMILIES[name].source else ""
        table.append(f"| {name} | {architecture}{source} | {' | '.join(words.values())} | {engine_word(architecture, asked)} |")
        wrong: dict[str, list[str]] = {}
        for stage, word in stages.items():
            if word != "right":
                wrong.setdefault(word, []).append(stage)
        faults += [f"- **{name}**, {', '.join(found)}: {word.replace('|', chr(92) + '|')}" for word, found in wrong.items()]
    summary = "\n".join(
        f"- {label}: " + ", ".join(f"{number} {word}" for word, number in counts[at].most_common())
        for at, label in (("w4a16", "W4A16"), ("w8a8", "W8A8"), ("gptq", "gptq"))
    )
    versions = f"{said['engine'].replace('vllm', 'vLLM')}; {len(table)} families, {len(asked)} architectures asked or read"
    mistakes = sum(rows[name]["stages"].get("mistakes show") == "right" for name in rows)
    only = sorted(
        {FAMILIES[name].architecture for name in FAMILIES if not FAMILIES[name].built}
        | {a for a in asked if not asked[a]["families"]}
    )
    return TEMPLATE.read_text().format(
        versions=versions,
        counts=summary,
        mistakes=mistakes,
        table="\n".join(table),
        only=", ".join(only),
        faults="\n".join(faults),
    )
