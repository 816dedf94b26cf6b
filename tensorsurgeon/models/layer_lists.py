"""Which list of layers is the text model's, where a checkpoint has several: towers and other models lie beside it.

Names of towers tell most of them (``rules.part_of``), and ``language_model`` in a name tells the rest. What they leave open the
embeddings tell: the text model's layers lie nearest to the matrix that has a row for each word of the config.
"""

from __future__ import annotations

import re
from typing import Final

from tensorsurgeon.models.experts import EXPERTS
from tensorsurgeon.models.rules import LAYERS, part_of
from tensorsurgeon.tensors.spec import SpecMap

_LANGUAGE_MODEL: Final = re.compile(r"(?:^|\.)(?:language_model|text_model|llm)\.")
_FIRST: Final = re.compile(r"\.\d+\.")


def lists_of_other_models(specs: SpecMap, embedding: tuple[int, int]) -> frozenset[str]:
    """The paths, with their last dot, of lists of layers outside the text model.

    ``embedding``: its shape by the config; where no tensor has it, nothing is known by it. Encoders with a decoder are one model.
    """
    if specs.config.get("is_encoder_decoder"):
        return frozenset()
    lists: dict[str, None] = {}
    embeddings: list[list[str]] = []
    for name, _, shape in specs.values():
        # By far most names are an expert's, whose list others have named.
        if EXPERTS in name:
            continue
        found = _FIRST.search(name)
        if found is not None:
            path = name[: found.start()]
            if path not in lists and LAYERS.search(path.rpartition(".")[2]) and not _is_part(path):
                lists[path] = None
        elif shape == embedding and 0 not in embedding and not _is_part(name):
            embeddings.append(name.split(".")[:-1])
    if "text_config" in specs.config and any(_LANGUAGE_MODEL.search(name) for name in specs):
        return frozenset(f"{path}." for path in lists if _LANGUAGE_MODEL.search(f"{path}.") is None)
    if len(lists) < 2 or not embeddings:
        return frozenset()
    near = {path: max(_nearness(path.split(".")[:-1], other) for other in embeddings) for path in lists}
    best = max(near.values())
    return frozenset(f"{path}." for path, score in near.items() if score < best)


def _is_part(path: str) -> bool:
    """Whether a name tells already that it lies in a tower, or in an MTP head, which has embeddings of its own."""
    return part_of("", False, False, path.split(".")) is not None


def _nearness(parent: list[str], embedding: list[str]) -> tuple[int, int]:
    """How many words both paths begin with, and how few follow in that of the list."""
    common = next(
        (n for n, (a, b) in enumerate(zip(parent, embedding, strict=False)) if a != b), min(len(parent), len(embedding))
    )
    return common, common - len(parent)
