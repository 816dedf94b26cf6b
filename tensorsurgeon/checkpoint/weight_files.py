"""Which files of a folder without an index are its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from tensorsurgeon.checkpoint.layout import STEMS
from tensorsurgeon.errors import CheckpointError, MissingTensorError
from tensorsurgeon.tensors.names import natural_key

# What transformers and diffusers open where there is no index, whatever else lies in the folder.
_WHOLE_MODELS: Final = tuple(f"{stem}.safetensors" for stem in STEMS)
_ADAPTER: Final = re.compile(r"adapter_model.*\.safetensors")


def shards_without_index(names: Iterable[str], where: str) -> list[str]:
    """The weight files among those of a folder that has no index, in natural order; CheckpointError where there are none."""
    names = sorted(names)
    present = [name for name in names if name.endswith(".safetensors")]
    for name in _WHOLE_MODELS:
        if name in present:
            # As transformers and diffusers read it: what else lies here is a copy for other programs, or an adapter.
            return [name]
    weights = [name for name in present if not _ADAPTER.fullmatch(name)]
    if not weights:
        if present:
            raise CheckpointError(
                f"holds an adapter (LoRA) only, {present[0]}, which is no model by itself; name the model that it belongs to",
                where=where,
            )
        others = names[:8]
        raise CheckpointError(f"holds no .safetensors file (found: {', '.join(others) or 'nothing'})", where=where)
    _refuse_incomplete(weights, where)
    return sorted(weights, key=natural_key)


def _refuse_incomplete(present: list[str], where: str) -> None:
    """Without an index only the names can tell that shards are missing: ``model-00002-of-00005``."""
    for name in present:
        found = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.safetensors", name)
        if found is None:
            continue
        stem, _, count = found.groups()
        wanted = [f"{stem}-{i:05d}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
        missing = [w for w in wanted if w not in present]
        if missing:
            raise MissingTensorError(
                f"{name} belongs to {int(count)} shards, of which {len(missing)} are missing, first {missing[0]}",
                where=where,
            )
