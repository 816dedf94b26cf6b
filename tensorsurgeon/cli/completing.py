"""What the shell offers while a command is typed: names of transforms, their parameters, engines; click does the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

# Said of a word: its file is the shell's to complete.
_FILE: Final = "file"


def transforms(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """A built-in transform by name, or a YAML file of one's own."""
    from tensorsurgeon.recipes.library import TRANSFORM_SUFFIXES, builtin_names

    own = [path.name for path in sorted(Path().iterdir()) if path.suffix in TRANSFORM_SUFFIXES]
    found = [CompletionItem(name) for name in (*builtin_names(), *own) if name.startswith(incomplete)]
    # A path, or what may become one.
    return found or [CompletionItem(incomplete, type=_FILE)]


def settings(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """``KEY=VALUE`` of a parameter of the transforms that were named before it."""
    from tensorsurgeon.errors import SurgeonError
    from tensorsurgeon.recipes.library import find_recipe

    known: dict[str, Any] = {}
    # Behind an option that still lacks its value click leaves arguments as the words that they are.
    transform = ctx.params.get("transform") or next(iter(ctx.args), None)
    for name in (transform, *(ctx.params.get("then") or ())):
        try:
            known |= {} if name is None else find_recipe(name).parameters
        except SurgeonError:
            continue
    return [
        CompletionItem(f"{key}=", help=parameter.description)
        for key, parameter in known.items()
        if f"{key}=".startswith(incomplete)
    ]


def engines(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """An engine; ``:tp=N`` behind it is typed."""
    from tensorsurgeon.engines.registry import ENGINES

    return [CompletionItem(name) for name in ENGINES if name.startswith(incomplete)]


def texts(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """A file of text or token ids, or ``builtin``."""
    from tensorsurgeon.calibrate.data.documents import BUILTIN

    is_begun = bool(incomplete) and BUILTIN.startswith(incomplete)
    return [CompletionItem(BUILTIN) if is_begun else CompletionItem(incomplete, type=_FILE)]
