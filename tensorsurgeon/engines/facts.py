"""What a plan says of the checkpoint it will write, in the few forms that rules look at.

A mixture of experts has 30,000 quantized modules and some twenty forms of them: same name but for its numbers, same
shape, same scheme. Modules are put together here once, and every rule judges forms.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tensorsurgeon.engines.sharding import Experts, Heads, Linear
from tensorsurgeon.errors import ConfigError
from tensorsurgeon.formats.base import Format
from tensorsurgeon.formats.registry import formats_of, quantization_config
from tensorsurgeon.models.describe import Model, describe_model, masked
from tensorsurgeon.models.experts import GATED, any_expert, is_expert_list, numbered
from tensorsurgeon.models.fused import FUSED, describe
from tensorsurgeon.models.roles import NO_LINEARS, Role
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import WEIGHT_DTYPES
from tensorsurgeon.tensors.spec import SpecMap


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The written checkpoint as engines see it.

    ``format``: None if nothing is quantized, or if ``unreadable`` says why the config could not be understood.
    ``settings``: its ``quantization_config``. ``quantized``: every quantized linear and expert list by name.
    ``float_experts``: expert lists left unquantized, ``stacked`` and ``split`` those of them stored as one tensor or
    one by one (a list may be both); ``stacked_quantized``: stacked experts in another dtype than a float.
    ``float_mtp``: the unquantized modules of the multi-token-prediction head. ``model``: what tensors are for. ``parts``: where
    several layouts lie in one checkpoint, the facts of each; ``format`` is None then.
    """

    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    format: Format | None
    unreadable: str | None
    linears: tuple[Linear, ...]
    experts: tuple[Experts, ...]
    quantized: tuple[str, ...]
    stacked: tuple[str, ...]
    split: tuple[str, ...]
    stacked_quantized: tuple[str, ...]
    float_mtp: tuple[str, ...]
    heads: Heads
    model: Model
    parts: tuple[Facts, ...] = ()

    @property
    def layout(self) -> str:
        """The format's name, empty where nothing is quantized."""
        return "" if self.format is None else self.format.name

    @property
    def float_experts(self) -> tuple[str, ...]:
        """Expert lists of which nothing is quantized."""
        quantized = frozenset(self.quantized)
        return tuple(dict.fromkeys(name for name in (*self.stacked, *self.split) if name not in quantized))

    @property
    def forms(self) -> tuple[Linear | Experts, ...]:
        """Whatever is quantized."""
        return (*self.experts, *self.linears)

    @property
    def quantized_experts(self) -> tuple[str, ...]:
        """Expert lists that are quantized, by name."""
        return tuple(name for name in self.quantized if is_expert_list(name))

    @property
    def has_quantized_mtp(self) -> bool:
        return any(form.is_mtp for form in self.forms)

    def stored_both_ways(self) -> tuple[str, str] | None:
        """A stacked expert list of the main model and one that is stored one by one, if it has both."""
        is_mtp = self.model.is_mtp
        stacked = next((m for m in self.stacked if not is_mtp(m)), None)
        split = next((m for m in (*self.split, *self.quantized_experts) if not is_mtp(m)), None)
        return None if stacked is None or split is None else (stacked, split)

    def names_in_engines(self) -> tuple[str, ...]:
        """The quantized linears and expert lists under their own names, fused ones under both."""
        names = dict.fromkeys(self.quantized)
        for name in self.quantized:
            fused = self.model.fused_name(name)
            if fused is not None:
                names[fused] = None
        return tuple(names)

    def described(self) -> str:
        """The layout and its schemes in a few words."""
        if self.parts:
            return " + ".join(part.described() for part in self.parts)
        if not self.layout:
            return "not judged" if self.unreadable else "unquantized"
        kinds = dict.fromkeys(describe(form.scheme) for form in self.forms)
        return f"{self.layout} ({'; '.join(kinds)})"


class _Stored(NamedTuple):
    module: str
    leaf: str
    shape: tuple[int, int]
    scheme: Scheme
    number: int


def facts_of(plan: Plan) -> Facts:
    """Read the facts off a finished plan; nothing is read from disk."""
    config = json.loads(plan.files.contents.get("config.json", b"{}"))
    specs = plan.specs
    settings = quantization_config(config)
    unreadable = None
    of_formats: dict[Format, Mapping[str, Scheme]] = {}
    modules = plan.quantized
    stored: list[tuple[_Stored, ...]] = []
    if settings is not None:
        try:
            formats = formats_of(config, specs)
            if modules and len(formats) == 1:
                of_formats = {formats[0]: modules}
            else:
                of_formats = {layout: layout.read_config(settings, specs) for layout in formats}
                modules = modules or {name: scheme for part in of_formats.values() for name, scheme in part.items()}
            stored = [tuple(_forms(part, specs, layout)) for layout, part in of_formats.items()]
        except ConfigError as error:
            of_formats, stored, unreadable = {}, [], str(error)
    left = _unquantized(specs, modules, describe_model(specs))
    if len(of_formats) < 2:
        return _facts(config, specs, next(iter(of_formats), None), unreadable, stored[0] if stored else (), left)
    parts = tuple(_facts(config, specs, layout, None, forms, left) for layout, forms in zip(of_formats, stored, strict=True))
    whole = _facts(config, specs, None, None, tuple(form for forms in stored for form in forms), left)
    return replace(whole, parts=parts)


def _facts(
    config: Mapping[str, Any],
    specs: SpecMap,
    format_: Format | None,
    unreadable: str | None,
    stored: Sequence[_Stored],
    left: tuple[tuple[str, ...], ...],
) -> Facts:
    model = describe_model(specs)
    stacked, split, stacked_quantized, float_mtp = left
    singles, experts = [s for s in stored if not s.leaf], [s for s in stored if s.leaf]
    return Facts(
        config=config,
        settings=quantization_config(config) or {},
        format=format_,
        unreadable=unreadable,
        linears=tuple(_linears(singles, model)),
        experts=tuple(_experts(experts, model, split)),
        quantized=tuple(dict.fromkeys(s.module for s in stored)),
        stacked=stacked,
        split=split,
        stacked_quantized=stacked_quantized,
        float_mtp=float_mtp,
        heads=_heads(specs),
        model=model,
    )


def _forms(modules: Mapping[str, Scheme], specs: SpecMap, format_: Format) -> Iterable[_Stored]:
    """Quantized modules with equal numbered experts put together: one entry per linear and per leaf of an expert list."""
    names: dict[int, tuple[str, ...]] = {}
    counts: dict[tuple[str, tuple[int, ...], int], list[Any]] = {}
    ids: dict[Scheme, int] = {}
    known: Scheme | None = None
    local: tuple[str, ...] = ()
    number = 0
    for module, scheme in modules.items():
        if scheme is not known:
            # Equal schemes can be many objects; the first of them stands for all.
            known = scheme
            number = ids.setdefault(scheme, id(scheme))
            if number not in names:
                names[number] = tuple("." + name for name in format_.local_names(scheme))
            local = names[number]
        spec = specs.get(module + local[0])
        if spec is None or len(spec[2]) != 2:
            raise ConfigError(f"{module}: quantized, but there is no matrix {module}{local[0]}")
        shape = spec[2]
        key = any_expert(module) or module, shape, number
        entry = counts.get(key)
        if entry is None:
            counts[key] = [module, scheme, 1]
        else:
            entry[2] += 1
    for (_, _, number), (example, scheme, count) in counts.items():
        tensors = {name[1:]: specs[example + name] for name in names[number] if example + name in specs}
        expert = numbered(example)
        module, leaf = (example, "") if expert is None else (expert.experts, expert.leaf)
        yield _Stored(module, leaf, format_.weight_shape(tensors, scheme), scheme, count)


def _unquantized(specs: SpecMap, modules: Mapping[str, Scheme], model: Model) -> tuple[tuple[str, ...], ...]:
    stacked: dict[str, None] = {}
    split: dict[str, None] = {}
    stacked_quantized: dict[str, None] = {}
    float_mtp: dict[str, None] = {}
    # Most tensors are scales and words; a comprehension passes over them in a third of the time of a loop.
    found = [s for s in specs.values() if len(s[2]) == 3 or (s[1].bits > 8 and s[0].endswith(".weight") and len(s[2]) == 2)]
    for name, dtype, _ in (spec for spec in found if len(spec.shape) == 3):
        module = name[: name.rfind(".")]
        if not is_expert_list(module):
            continue
        if dtype not in WEIGHT_DTYPES:
            stacked_quantized[module] = None
            continue
        stacked[module] = None
        if model.is_mtp(module):
            float_mtp[module] = None
    for name, dtype, _ in (spec for spec in found if len(spec.shape) == 2):
        module = name[:-7]
        if module in modules or dtype not in WEIGHT_DTYPES:
            continue
        expert = numbered(module)
        if expert is not None:
            split[expert.experts] = None
        if model.is_mtp(module) and model.use(name).kind not in NO_LINEARS:
            float_mtp[module] = None
    return tuple(stacked), tuple(split), tuple(stacked_quantized), tuple(float_mtp)


def _linears(stored: Iterable[_Stored], model: Model) -> Iterable[Linear]:
    """Linears as engines fuse them, those of one form put together."""
    fused: dict[tuple[str, str], list[_Stored]] = {}
    for entry in stored:
        parent, _, leaf = (model.fused_name(entry.module) or entry.module).rpartition(".")
        fused.setdefault((parent, leaf), []).append(entry)
    forms: dict[tuple[Any, ...], list[Any]] = {}
    for (parent, leaf), members in fused.items():
        if leaf in FUSED:
            # A linear that is stored under the fused name is the only member.
            order = (leaf, *FUSED[leaf])
            leaves = [entry.module.rpartition(".")[2] for entry in members]
            if set(leaves) <= set(order):
                members.sort(key=lambda entry: order.index(entry.module.rpartition(".")[2]))
        parts = tuple((entry.module.rpartition(".")[2], entry.shape[0]) for entry in members)
        subject = masked(f"{parent}.{leaf}" if parent else leaf)
        key = subject, parts, members[0].shape[1], members[0].scheme
        form = forms.setdefault(key, [leaf, members[0], 0])
        form[2] += 1
    for (subject, parts, columns, _), (leaf, member, count) in forms.items():
        use = model.module_use(member.module)
        yield Linear(subject, leaf, parts, columns, member.scheme, count, use.role is Role.MTP, use.kind)


def _experts(stored: Iterable[_Stored], model: Model, floats: Container[str]) -> Iterable[Experts]:
    layers: dict[str, list[_Stored]] = {}
    for entry in stored:
        layers.setdefault(entry.module, []).append(entry)
    forms: dict[tuple[Any, ...], list[Any]] = {}
    for prefix, entries in layers.items():
        mixed = _mixed(entries, prefix in floats)
        leaves = {e.leaf: (*e.shape, e.scheme) for e in entries}
        key = masked(prefix), tuple((e.leaf, e.shape, e.scheme) for e in entries), mixed
        form = forms.setdefault(key, [leaves, prefix, 0])
        form[2] += 1
    for (subject, _, mixed), (leaves, prefix, count) in forms.items():
        yield Experts(subject, leaves, count, mixed, model.is_mtp(prefix))


def _mixed(entries: list[_Stored], has_floats: bool = True) -> str | None:
    leaves = {entry.leaf for entry in entries}
    for names in GATED:
        # Experts without a gate have two linears, and nothing is left out.
        if leaves < names and has_floats:
            return f"{' and '.join(sorted(leaves))} quantized, {' and '.join(sorted(names - leaves))} not"
    if len({entry.scheme for entry in entries}) > 1:
        return "several schemes"
    if len(entries) > len(leaves):
        return "several shapes"
    if len({entry.number for entry in entries}) > 1:
        return "some experts quantized, others not"
    return None


def _heads(specs: SpecMap) -> Heads:
    def number(key: str) -> int:
        value = specs.config_value(key)
        return value if isinstance(value, int) and value > 0 else 0

    return Heads(
        attention=number("num_attention_heads"),
        key_values=number("num_key_value_heads"),
        linear_values_count=number("linear_num_value_heads"),
        linear_keys=number("linear_num_key_heads") * number("linear_key_head_dim"),
        linear_values=number("linear_num_value_heads") * number("linear_value_head_dim"),
    )
