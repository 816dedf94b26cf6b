"""The head for multi-token prediction in the words of configs, where each dialect has its own.

vLLM and SGLang build it by other code from the same config: plain names under ``mtp.`` are dropped when the main model's
names are mapped, so that most dialects must name it by an expression.
"""

from __future__ import annotations

from typing import Final

MTP_WORD: Final = "mtp"
MTP_EXPRESSION: Final = "re:^mtp.*"
"""An ignore or exclude entry that names the whole head (compressed-tensors, Quark)."""

MTP_RULE: Final = "-:.*mtp.*"
"""The rule of GPTQModel's ``dynamic`` that leaves it alone; vLLM looks for the word in it."""

_PREFIX: Final = "mtp."


def named_apart(module: str) -> bool:
    """Whether a module lies under a name that only heads have, and engines never put a prefix before."""
    return module.startswith(_PREFIX)


def inside_blocks(block: str) -> bool:
    """Whether a list of layers by its path (``block_name_to_quantize``) takes in the head, or part of it."""
    return _PREFIX.startswith(block) or block.startswith(_PREFIX)
