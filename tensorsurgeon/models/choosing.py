"""The words that may stand behind ``role:`` in a pattern, and the uses that they choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from tensorsurgeon.errors import RecipeError, did_you_mean
from tensorsurgeon.models.roles import LINEARS, PARTS, Role, Use

ROLES: Final[dict[str, frozenset[Role]]] = {role.value: frozenset((role,)) for role in Role} | {
    "linear": LINEARS,
    "expert-else-linear": LINEARS,
}
"""What may stand behind ``role:``. ``linear`` is every linear of the decoder layers that engines build with a config,
``expert-else-linear`` the experts, or all of these in a model that has no experts."""


def use_test(texts: Sequence[str], with_config: bool) -> Callable[[Use], bool]:
    """A test for uses by any of what stands behind ``role:``: a role, or a part and a role in it (``mtp.expert``).

    ``with_config``: what engines build without a quantization config is not chosen. RecipeError for words that are no roles.
    """
    whole: set[Role | None] = set()
    inner: set[tuple[Role | None, Role | None]] = set()
    for text in texts:
        first, _, second = text.partition(".")
        for word in filter(None, (first, second)):
            if word not in ROLES:
                raise RecipeError(f"'role:{text}': {word!r} is no role{did_you_mean(word, list(ROLES))}")
        if second and not ROLES[first] <= PARTS:
            raise RecipeError(f"'role:{text}': only {', '.join(sorted(PARTS))} have roles within them")
        whole.update(() if second else ROLES[first])
        inner.update((part, role) for part in ROLES[first] for role in ROLES.get(second, ()))
    return lambda use: (use.role in whole or use[:2] in inner) and (use.has_config or not with_config)
