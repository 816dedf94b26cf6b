"""The file that `ask_vllm.py` makes: answers by architecture, joined with what was read where the engine refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.families.table import FAMILIES

READ = Path(__file__).with_name("read.yaml")
JOINED = ("takes", "never", "paths", "fused", "stacked", "names", "experts")


def by_architecture(answers: dict[str, Any]) -> dict[str, Any]:
    """Answers by family as one entry for each architecture. Two rows of one architecture (dense, with experts) are joined.

    Where the engine refused, the entry of `read.yaml` stands in and keeps the engine's reason beside its source.
    """
    read = yaml.safe_load(READ.read_text())
    found: dict[str, Any] = {}
    for name, answer in answers.items():
        architecture = FAMILIES[name].architecture
        if answer["how"] == "refused":
            answer = {"how": "read", "reason": answer["reason"], **read[architecture]} if architecture in read else answer
        entry = found.setdefault(architecture, {"families": [], "model_types": []})
        entry["families"].append(name)
        model_type = FAMILIES[name].config["model_type"]
        entry["model_types"] += [] if model_type in entry["model_types"] else [model_type]
        for key, value in answer.items():
            if key not in entry:
                entry[key] = value
            elif key in JOINED:
                entry[key] = {**entry[key], **value}
            elif entry[key] != value:
                raise ValueError(f"{architecture}: {name} has {key} {value!r}, another family of it {entry[key]!r}")
        if both := set(entry.get("takes", ())) & set(entry.get("never", ())):
            raise ValueError(f"{architecture}: {sorted(both)} take a quantization config in one family and not in another")
    return found


def add_read(architectures: dict[str, Any]) -> None:
    """Add what was read of classes that no row builds."""
    for architecture, entry in yaml.safe_load(READ.read_text()).items():
        if architecture not in architectures:
            architectures[architecture] = {"families": [], "model_types": entry["model_types"], "how": "read", **entry}


def as_text(made: dict[str, Any]) -> str:
    """JSON with one line for each fact of an architecture: short enough to read, and a change shows as a line."""
    lines = []
    for architecture, entry in sorted(made["architectures"].items()):
        facts = ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items())
        lines.append(f"  {json.dumps(architecture)}: {{\n{facts}\n  }}")
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in made.items() if key != "architectures")
    return "{\n" + head + ' "architectures": {\n' + ",\n".join(lines) + "\n }\n}\n"


def replace(path: Path, made: dict[str, Any], *, every: bool) -> None:
    """Write the file, or replace in it what was asked anew; never a file of two versions."""
    if not every and path.exists():
        old = json.loads(path.read_text())
        for key in ("engine", "transformers"):
            if old[key] != made[key]:
                raise SystemExit(f"{path} is from {old[key]}, this is {made[key]}: ask every family")
        made["architectures"] = old["architectures"] | made["architectures"]
    add_read(made["architectures"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_text(made))
