r"""Regular expressions that name modules in every spelling engines use, and nothing else.

The checkpoint says ``model.language_model.layers.3.mlp``, vLLM ``language_model.model.layers.3.mlp``, SGLang and
text-only models ``model.layers.3.mlp``; expressions in configs are matched against all of these and never renamed. So
each is written behind optional prefixes, which no MTP head and no vision tower has, and runs to the end of the name.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from typing import Final

from tensorsurgeon.errors import SpecError
from tensorsurgeon.models.experts import experts_of
from tensorsurgeon.models.mtp import named_apart
from tensorsurgeon.models.rules import LAYERS

_PREFIXES: Final = r"(model\.)?(language_model\.)?(model\.)?"
_HEADS: Final = ("lm_head", "mtp.")
# Names that the file and transformers have in common.
_BELOW_MODEL: Final = ("model.", *_HEADS)
# What engines put in front of a layer's name, in any of their spellings; the longest first.
_RENAMED: Final = ("model.language_model.", "language_model.model.", "language_model.", "model.")
# transformers 5 dropped a word that CLIP and SigLIP towers have on disk.
_DROPPED: Final = "vision_tower.vision_model."
_INDEX: Final = re.compile(r"(?<=\\\.)\d+(?=\\\.)")


def patterns_for(modules: Iterable[str], expert_lists: Container[str], avoid: Sequence[str]) -> list[str]:
    """Expressions for ``re.match`` that hit every one of ``modules`` and none of ``avoid``.

    A module of every layer takes one expression; of some layers, one that lists them. Modules in ``expert_lists``
    are hit as a whole (``x.mlp.experts``) and expert by expert. SpecError if there is no such expression.
    """
    layers: dict[str, tuple[str, list[str]]] = {}
    for module in modules:
        exact = exact_pattern(module, module in expert_lists)
        index = _INDEX.search(exact)
        if index is None:
            layers[exact] = (module, [])
        else:
            kind = exact[: index.start()] + r"\d+" + exact[index.end() :]
            layers.setdefault(kind, (module, []))[1].append(index[0])
    patterns = []
    for kind, (module, indices) in layers.items():
        if indices and not _hit(kind, avoid):
            patterns.append(kind)
            continue
        some = kind.replace(r"\d+", "(" + "|".join(indices) + ")", 1) if indices else kind
        hit = _hit(some, avoid)
        if hit is not None:
            raise SpecError(f"no expression tells {module} from {hit}, which must not match: tried {some}")
        patterns.append(some)
    return patterns


def spellings(module: str) -> tuple[str, ...]:
    """The other names that engines and tools have for a module: with and without what stands before layers and towers.

    None for numbered experts, of which there are tens of thousands, and for the MTP head.
    """
    if named_apart(module) or experts_of(module) is not None:
        return ()
    core = _core(module)
    names = dict.fromkeys((core, *(prefix + core for prefix in _RENAMED)))
    names.update({name.replace(_DROPPED, "vision_tower."): None for name in names if _DROPPED in name})
    return tuple(name for name in names if name != module)


def _core(module: str) -> str:
    return next((module.removeprefix(prefix) for prefix in _RENAMED if module.startswith(prefix)), module)


def renamed_by_loaders(modules: Iterable[str], linears: Iterable[str], quantized: Sequence[str]) -> list[str]:
    """Expressions for those of ``modules`` that transformers may call otherwise than the file, none that hits ``quantized``.

    It puts towers and projectors below ``model.``, and the text model below ``model.language_model.``: all names differ as
    soon as any of the ``linears`` lies elsewhere. A tower of which nothing is quantized is one expression.
    """
    if all(name.startswith(_BELOW_MODEL) for name in linears):
        return []
    towers: dict[str, None] = {}
    single: list[str] = []
    for module in modules:
        if module.startswith(_HEADS):
            continue
        root, dot, _ = _core(module).partition(".")
        tower = _PREFIXES + re.escape(root) + r"(\..*)?$"
        if dot and not LAYERS.search(root) and _hit(tower, quantized) is None:
            towers[tower] = None
        else:
            single.append(module)
    return [*patterns_for(single, (), quantized), *towers]


def exact_pattern(module: str, is_expert_list: bool = False) -> str:
    """An expression for one module; for an expert list, also for everything below it."""
    end = r"(\..*)?$" if is_expert_list else "$"
    core = re.escape(_core(module)).replace(re.escape(_DROPPED), r"vision_tower\.(vision_model\.)?")
    return ("" if named_apart(module) else _PREFIXES) + core + end


def _hit(pattern: str, names: Sequence[str]) -> str | None:
    matches = re.compile(pattern).match
    return next((name for name in names if matches(name)), None)
