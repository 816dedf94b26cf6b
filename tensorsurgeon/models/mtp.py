"""The head for multi-token prediction in the words of configs, where each dialect has its own.

vLLM and SGLang build it by other code from the same config: plain names under ``mtp.`` are dropped when the main model's
names are mapped, so that most dialects must name it by an expression.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

MTP_WORD: Final = "mtp"
MTP_EXPRESSION: Final = "re:^mtp.*"
"""An ignore or exclude entry that names the whole head (compressed-tensors, Quark)."""

MTP_RULE: Final = "-:.*mtp.*"
"""The rule of GPTQModel's ``dynamic`` that leaves it alone; vLLM looks for the word in it."""

_PREFIX: Final = "mtp."
_OPTIONAL: Final = r"^(model\.)?(language_model\.)?(model\.)?"
_NAMED: Final = re.compile(r"(.*?\bmtp\w*)(?=\.)")
_LAYER: Final = re.compile(r"(.*?\.\d+)(?=\.)")
_ENGINES_OWN: Final = re.compile(r"^(model\.)?(language_model\.)?(model\.)?")


def head_expressions(modules: Iterable[str]) -> list[str]:
    """Expressions for ``re.match`` that take in the heads which these modules belong to, whatever else is in them.

    ``mtp.layers.0.x`` gives ``^mtp.*``, a head that is one more layer of the model the layer by its number.
    """
    found: dict[str, None] = {}
    for module in modules:
        if named_apart(module):
            found[MTP_EXPRESSION.removeprefix("re:")] = None
            continue
        path = _NAMED.match(module) or _LAYER.match(module)
        text = module if path is None else path[1]
        found[_OPTIONAL + re.escape(_ENGINES_OWN.sub("", text)) + r"\..*"] = None
    return list(found)


def head_paths(modules: Iterable[str]) -> list[str]:
    """The paths that lead to the heads which these modules belong to, such as ``mtp`` or ``layers.61``."""
    found: dict[str, None] = {}
    for module in modules:
        path = None if named_apart(module) else _NAMED.match(module) or _LAYER.match(module)
        found[MTP_WORD if path is None else _ENGINES_OWN.sub("", path[1])] = None
    return list(found)


def named_apart(module: str) -> bool:
    """Whether a module lies under a name that only heads have, and engines never put a prefix before."""
    return module.startswith(_PREFIX)


def inside_blocks(block: str) -> bool:
    """Whether a list of layers by its path (``block_name_to_quantize``) takes in the head, or part of it."""
    return _PREFIX.startswith(block) or block.startswith(_PREFIX)
