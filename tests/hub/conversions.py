"""What the streaming tests share: models in many shards, conversions of them, and what a run left."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorsurgeon import api
from tests.checkpoints import moe_config, tiny_moe, write_checkpoint
from tests.hub.server import Hub

LARGE = {"hidden": 256, "inner": 128}


def in_shards(folder: Path, shards: int = 12, *, layers: int = 12) -> Path:
    """Some megabytes in shards that take tensors as they come; some of a layer lie in any of them."""
    return write_checkpoint(folder, tiny_moe(layers=layers, **LARGE), shards=shards, config=moe_config(**LARGE))


def contents(folder: Path) -> dict[str, Any]:
    """Every file by name; of the record all but where the source lay, and of card and plan all but what it is called."""
    found: dict[str, Any] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    record = json.loads(found.pop("surgeon.json"))
    record["source"].pop("hub", None)
    if "surgeon_plan.json" in found:
        plan = json.loads(found["surgeon_plan.json"])
        name = plan["source"].pop("name")
        found["surgeon_plan.json"] = plan
        card = re.sub(r"\n\nThe original was read at commit `[0-9a-f]{40}`\.", "", found["README.md"].decode())
        found["README.md"] = _without_name(card, name)
        assert record["files"].pop("README.md")
        assert record["files"].pop("surgeon_plan.json")
    return {**found, "record": record}


def _without_name(card: str, name: str) -> str:
    """A card whose three words for the original are replaced: in the front matter, the title and the first sentence."""
    link = f"[{name}](https://huggingface.co/{name})" if "/" in name else name
    for before, word in (("\nbase_model: ", name), ("\n# ", name.rpartition("/")[2]), ("\nA quantized version of ", link)):
        assert card.count(before + word) == 1
        card = card.replace(before + word, before + "SOURCE")
    return card


def convert(transform: Any, source: str | Path, target: Path, **more: Any) -> Any:
    return api.apply(api.plan(transform, source), target, **more)


@contextmanager
def watched(target: Path) -> Iterator[dict[str, int]]:
    """The most bytes, and shards of the source, that lay below the target while the block ran."""
    seen = {"bytes": 0, "shards": 0}
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            total = shards = 0
            for at, _, names in os.walk(target):
                for name in names:
                    path = Path(at) / name
                    try:
                        total += path.stat().st_blocks * 512
                    except FileNotFoundError:
                        continue
                    shards += "spool" in path.parts and (name.endswith(".safetensors") or name.endswith(".incomplete"))
            seen["bytes"], seen["shards"] = max(seen["bytes"], total), max(seen["shards"], shards)
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def shard_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.safetensors"))


def fetched_once(hub: Hub, names: list[str]) -> None:
    assert hub.fetched() == dict.fromkeys(names, 1)
