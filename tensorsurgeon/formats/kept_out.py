"""Lists of modules that are not quantized, as transformers and ModelOpt match them.

Tools write the names that their loader has, which for models of several parts are others than the file's.

An entry is a module, all that lies under a module (``model.vision_tower``), the end of many names (``mlp.gate``), or has
stars in it (``model.layers.*.self_attn``).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from tensorsurgeon.models.patterns import spellings


class KeptOut:
    """The entries of one such list, ready to be asked about many names."""

    def __init__(self, entries: Iterable[str]) -> None:
        entries = tuple(entries)
        self.plain = frozenset(entry.removesuffix(".weight") for entry in entries if "*" not in entry)
        globs = [fnmatch.translate(entry.removesuffix("*").removesuffix(".")) for entry in entries if "*" in entry]
        self.expressions = [re.compile(glob.removesuffix(r"\Z").removesuffix(r"\z") + r"(\..*)?\Z") for glob in globs]

    def __bool__(self) -> bool:
        return bool(self.plain or self.expressions)

    def __contains__(self, module: str) -> bool:
        return self._names(module) or any(map(self._names, spellings(module)))

    def _names(self, module: str) -> bool:
        if module in self.plain or any(expression.match(module) for expression in self.expressions):
            return True
        parts = module.split(".")
        return any(".".join(parts[:at]) in self.plain or ".".join(parts[at:]) in self.plain for at in range(1, len(parts)))
