"""Which modules a written checkpoint quantizes and which not, in the few names that a config needs.

A mixture of experts has 30,000 modules; its config has 200 lines. Numbered experts are therefore folded into
their layer (``x.mlp.experts``) the moment they are met, and a multi-token-prediction head that stays whole is
kept apart, because every dialect has its own word for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from tensorsurgeon.errors import RecipeError, SpecError, did_you_mean
from tensorsurgeon.formats.base import QuantizedModel
from tensorsurgeon.models.describe import Model, describe_model
from tensorsurgeon.models.experts import experts_of, is_expert_list, stacked_experts
from tensorsurgeon.models.fused import check_siblings, describe, fused_name
from tensorsurgeon.models.mtp import named_apart
from tensorsurgeon.models.patterns import spellings
from tensorsurgeon.quant.scheme import Scheme


class Coverage(NamedTuple):
    """The written modules, experts folded.

    Schemes are reduced to what a file can show: how a scale was found (rule, clip search) and stored is left out.
    ``linears``: quantized modules that are no numbered experts. ``experts``: quantized expert lists
    (``x.mlp.experts``), and ``expert_leaves`` their linears (``gate_proj``). ``float_linears`` and
    ``float_experts``: the same left unquantized, without the MTP head if that is wholly unquantized; then
    ``float_mtp`` has its modules, expert lists folded. ``tied_head``: engines make an ``lm_head`` of which the
    file has no tensor. ``has_parts``: the text model is one part of several, which loaders may put elsewhere.
    ``engines_names``: what an engine calls a module, and the one that it is fused into, where that is not the file's name.
    """

    linears: dict[str, Scheme]
    experts: dict[str, Scheme]
    expert_leaves: tuple[str, ...]
    float_linears: tuple[str, ...]
    float_experts: tuple[str, ...]
    float_mtp: tuple[str, ...]
    tied_head: bool
    has_parts: bool
    engines_names: Mapping[str, tuple[str, str]]

    def spelled(self, modules: Iterable[str]) -> list[str]:
        """The modules, each followed by the name that an engine asks for where it has its own."""
        own = self.engines_names
        return list(dict.fromkeys(name for module in modules for name in (module, *own.get(module, ())[:1])))

    def fused(self, modules: Iterable[str]) -> list[str]:
        """What engines call the modules that these are fused into, in their own names too."""
        found: dict[str, None] = {}
        for module in modules:
            usual = fused_name(module)
            if usual is not None and not named_apart(module):
                found[usual] = None
            found.update(dict.fromkeys(filter(None, self.engines_names.get(module, ())[1:])))
        return list(found)

    def schemes(self) -> dict[Scheme, list[str]]:
        """Linears and expert lists under each scheme."""
        groups: dict[Scheme, list[str]] = {}
        for part in (self.linears, self.experts):
            for module, scheme in part.items():
                groups.setdefault(scheme, []).append(module)
        return groups

    def only_scheme(self, format_name: str) -> Scheme:
        """The one scheme of the checkpoint; SpecError if there are several, for dialects that can name one only."""
        groups = self.schemes()
        if len(groups) != 1:
            examples = "; ".join(f"{modules[0]}: {describe(s)}" for s, modules in groups.items())
            raise SpecError(f"{format_name} can describe one scheme for all modules, found {len(groups)} ({examples})")
        return next(iter(groups))

    def quantized_names(self) -> list[str]:
        """Every quantized linear, and for each expert list the linears of expert 0."""
        experts = [f"{prefix}.0.{leaf}" for prefix in self.experts for leaf in self.expert_leaves]
        return [*self.linears, *experts]

    def left_out(self) -> list[str]:
        """Unquantized linears by name, then unquantized expert lists, then the tied head; MTP apart."""
        return [*self.float_linears, *self.float_experts, *(["lm_head"] if self.tied_head else [])]


def activations_of(model: QuantizedModel, format_name: str, allowed: tuple[str, ...]) -> str:
    """What the config is to say of activations; RecipeError for an option or value that the format does not have."""
    for key in model.options:
        if key != "activations":
            raise RecipeError(f"{format_name} has no option {key!r}{did_you_mean(key, ['activations'])}")
    given = model.options.get("activations", allowed[0])
    values = [given] if isinstance(given, str) else list(given)
    if len(values) != 1 or values[0] not in allowed:
        raise RecipeError(f"{format_name} takes activations {' or '.join(allowed)}, found {' and '.join(map(str, values))}")
    return str(values[0])


def cover(model: QuantizedModel) -> Coverage:
    """Fold a written checkpoint; SpecError if engines would find parts of one kernel treated differently."""
    if not model.modules:
        raise SpecError("no module is quantized, so there is nothing a quantization_config could say")
    linears, experts, leaves = _fold_quantized(model)
    float_linears, float_experts = _fold_unquantized(model, experts)
    described = describe_model(model.specs)
    check_siblings(linears, float_linears, described.fused_name)
    is_mtp = described.is_mtp
    mtp_quantized = any(is_mtp(name) for part in (linears, experts) for name in part)
    float_mtp: list[str] = []
    if not mtp_quantized:
        float_mtp = [name for name in (*float_linears, *float_experts) if is_mtp(name)]
        float_linears = [name for name in float_linears if not is_mtp(name)]
        float_experts = [name for name in float_experts if not is_mtp(name)]
    return Coverage(
        linears, experts, tuple(leaves), tuple(float_linears), tuple(float_experts), tuple(float_mtp),
        "lm_head.weight" not in model.specs and "lm_head" not in linears, described.sizes.has_text_config,
        _engines_names(described, (*linears, *experts, *float_linears, *float_experts)),
    )  # fmt: skip


def _engines_names(described: Model, modules: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Where an engine's names are not the file's, whatever stands before the layers."""
    found: dict[str, tuple[str, str]] = {}
    answer = described.answer
    for module in modules:
        if answer is None or named_apart(module):
            continue
        whole = described.fused_name(module) or ""
        own, fused = answer.engines_name(module), whole and answer.engines_name(whole)
        if own not in (module, *spellings(module)) or fused not in (whole, *spellings(whole)):
            found[module] = own, fused
    return found


def layout_of(scheme: Scheme) -> Scheme:
    """The scheme without what no config shows: whose rule found the scales, with what signs and search, stored as what."""
    return replace(scheme, rule="compressed-tensors", signed=None, clip_search=False, scale_dtype=None)


def _fold_quantized(model: QuantizedModel) -> tuple[dict[str, Scheme], dict[str, Scheme], dict[str, None]]:
    linears: dict[str, Scheme] = {}
    experts: dict[str, Scheme] = {}
    leaves: dict[str, None] = {}
    # By identity, because hashing 30,000 dataclasses costs more than everything else here.
    layouts: dict[int, Scheme] = {}
    # Most modules are another expert of the layer just met, under the same scheme: told by one comparison.
    below, given_last = "\n", None
    for module, given in model.modules.items():
        if given is given_last and module.startswith(below):
            number, _, leaf = module[len(below) :].partition(".")
            if number.isdigit():
                leaves[leaf] = None
                continue
        scheme = layouts.get(id(given))
        if scheme is None:
            scheme = layouts[id(given)] = layout_of(given)
        prefix = experts_of(module)
        if prefix is None:
            linears[module] = scheme
            continue
        known = experts.setdefault(prefix, scheme)
        if known is not scheme and known != scheme:
            raise SpecError(
                f"{module}: {describe(scheme)}, but other experts of {prefix} have {describe(known)}; engines run the "
                "experts of a layer in one kernel: give them all one scheme"
            )
        below, given_last = prefix + ".", given
        leaves[module[len(below) :].partition(".")[2]] = None
    return linears, experts, leaves


def _fold_unquantized(model: QuantizedModel, experts: dict[str, Scheme]) -> tuple[list[str], list[str]]:
    linears: list[str] = []
    lists: dict[str, str] = {}
    for module in model.unquantized:
        prefix = module if is_expert_list(module) else experts_of(module)
        if prefix is None:
            linears.append(module)
        else:
            lists.setdefault(prefix, module)
    # Fused experts are parameters of their layer, which engines ask for all the same.
    for prefix, spec in stacked_experts(model.specs.values()).items():
        lists.setdefault(prefix, spec.name)
    for prefix, name in lists.items():
        if prefix in experts:
            raise SpecError(
                f"{name} is not quantized, but other experts of {prefix} are; engines run the experts of a layer in "
                "one kernel: quantize all of them or none"
            )
    return linears, list(lists)
