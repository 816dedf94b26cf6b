"""What a ``quantization_config`` claims about each module, in the few facts that decide how its bytes are read."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from tensorsurgeon.models.fused import FUSED, fused_name
from tensorsurgeon.models.patterns import spellings
from tensorsurgeon.tensors.dtypes import I8, DType
from tensorsurgeon.tensors.expressions import Expression
from tensorsurgeon.verifying.findings import Findings

Layout = Literal["plain", "ct-packed", "nvfp4", "mxfp4", "gptq", "awq", "quark-packed"]
TOP: Final = "quantization_config"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """How one module is said to be stored.

    ``layout``: which tensors there are. ``plain`` is one element per weight in ``weight`` (``code_dtype``).
    ``group_size``: inputs per scale, -1 for one per output channel, 0 for one per tensor; ``block`` excludes it.
    ``scale_name``: the local name of the scales; ``vector_scale``: per-channel scales are [N] instead of [N, 1].
    ``zero_offset``: what is missing from stored zero points (1 in GPTQ v1). ``interleaved``: AWQ's nibble order.
    ``transposed``: Quark packs outputs of a transposed weight [K, N / 8] (groups), or inputs [N, K / 8] (channels).
    ``unsigned``: Quark's uint4. ``static_inputs``: activations have a scale in the file too,
    called ``input_scale_name``.
    """

    layout: Layout
    num_bits: int
    group_size: int = -1
    symmetric: bool = True
    block: tuple[int, int] | None = None
    code_dtype: DType = I8
    scale_name: str = "weight_scale"
    vector_scale: bool = False
    zero_offset: int = 0
    interleaved: bool = False
    transposed: bool = False
    unsigned: bool = False
    static_inputs: bool = False
    input_scale_name: str = "input_scale"
    desc_act: bool = False

    def describe(self) -> str:
        """The claim in the words of the field: ``int 4 bits, group_size 32``."""
        kind = "int"
        if self.layout in ("nvfp4", "mxfp4"):
            return self.layout
        if self.layout == "plain" and self.code_dtype.is_float:
            kind = "fp8"
        shape = (
            f"block {self.block[0]}x{self.block[1]}"
            if self.block
            else {-1: "per channel", 0: "per tensor"}.get(self.group_size, f"group_size {self.group_size}")
        )
        return f"{kind} {self.num_bits} bits, {shape}{'' if self.symmetric else ', asymmetric'}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a list that names modules; ``how`` says by what rule its readers match it."""

    key: str
    text: str
    how: Literal["exact", "match", "search", "glob", "substring", "affix"]
    _regex: Expression | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, key: str, text: str, how: Literal["exact", "match", "search", "glob", "substring", "affix"]) -> Entry:
        """Raises re.error for an expression that does not compile."""
        if how in ("match", "search"):
            return cls(key, text, how, Expression(text.removeprefix("re:")))
        if how == "glob":
            return cls(key, text, how, Expression(fnmatch.translate(text)))
        return cls(key, text, how)

    @property
    def is_expression(self) -> bool:
        """Whether it is meant for many names."""
        return self.how in ("match", "search", "glob", "substring")

    def matches(self, module: str) -> bool:
        """Whether readers of this list take the entry to mean this module."""
        if self._regex is not None:
            return (self._regex.search if self.how == "search" else self._regex.match)(module) is not None
        if self.how == "substring":
            return self.text in module
        if self.how == "affix":
            return module == self.text or module.startswith(self.text + ".") or module.endswith("." + self.text)
        return module == self.text


class Claims:
    """The whole config: ``of`` a module gives its claim, or None for a module that stays unquantized."""

    def __init__(
        self,
        label: str,
        of: Callable[[str], Claim | None],
        entries: Iterable[Entry],
        kept_out_by: str,
    ) -> None:
        self.label = label
        self._of = of
        self.entries = tuple(entries)
        self.kept_out_by = f"{TOP}.{kept_out_by}"
        self._known: dict[str, Claim | None] = {}

    def of(self, module: str) -> Claim | None:
        """How the module is said to be stored; None for unquantized."""
        if module not in self._known:
            self._known[module] = self._of(module)
        return self._known[module]


class EntryList:
    """Entries ready to be asked about many names: exact ones by hash, the others one by one."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = tuple(entries)
        self._exact = frozenset(e.text for e in self.entries if e.how == "exact")
        self._others = tuple(e for e in self.entries if e.how != "exact")

    def matches(self, module: str) -> bool:
        """Whether any entry means this module, by its name in the file or by one that loaders have for it."""
        return any(name in self._exact or any(e.matches(name) for e in self._others) for name in (module, *spellings(module)))


def names_of(modules: Iterable[str], stacked: Iterable[str]) -> set[str]:
    """Every name that an entry may rightly match: modules, their parents, fused modules, experts of stacked tensors.

    ``stacked``: prefixes (``x.mlp.experts``) whose experts lie in one 3-D tensor; engines ask for expert 0 of them.
    ``lm_head`` always counts: with tied embeddings engines make one of which the file has no tensor.
    """
    names = {"lm_head"}
    for module in modules:
        names.add(module)
        fused = fused_name(module)
        if fused is not None:
            names.add(fused)
        while module := module.rpartition(".")[0]:
            if module in names:
                break
            names.add(module)
    for prefix in stacked:
        names.add(prefix)
        names.update(f"{prefix}.0.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj", *FUSED))
    return names


def strings_of(config: Mapping[str, Any], key: str, findings: Findings, path: str | None = None) -> list[str]:
    """A list of strings, empty where absent or null; a fault, and an empty list, for anything else."""
    found = config.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(e, str) for e in found):
        findings.fault("config", f"config.json {TOP}.{path or key}", f"expected a list of strings, found {found!r}")
        return []
    return found


def mapping_of(config: Mapping[str, Any], key: str, findings: Findings) -> Mapping[str, Any]:
    """A mapping, empty where absent or null; a fault, and an empty one, for anything else."""
    found = config.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        findings.fault("config", f"config.json {TOP}.{key}", f"expected a mapping, found {found!r}")
        return {}
    return found


def integer_of(config: Mapping[str, Any], key: str, default: int | None = None) -> int | None:
    """An integer value; ``default`` where absent or null; None for anything else."""
    value = config.get(key)
    if value is None:
        return default
    return value if isinstance(value, int) and not isinstance(value, bool) else None
