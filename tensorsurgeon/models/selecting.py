"""Select tensors by name patterns and roles: the one place where steps choose among a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tensorsurgeon.errors import NoMatchError, PlanError, SpecError
from tensorsurgeon.models.describe import Model, describe_model, masked
from tensorsurgeon.models.experts import after_splitting, numbered
from tensorsurgeon.models.floats import stacked_weight
from tensorsurgeon.models.roles import LINEARS, NO_LINEARS, PARTS, Role
from tensorsurgeon.tensors.dtypes import WEIGHT_DTYPES
from tensorsurgeon.tensors.names import Pattern, Selector
from tensorsurgeon.tensors.spec import SpecMap


def selected(specs: SpecMap, where: Sequence[str], exclude: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Tensors that any of ``where`` and none of ``exclude`` selects, with the fields of the pattern that did.

    NoMatchError for a pattern that selects nothing and does not say ``maybe:``.
    """
    return Selector(where, exclude).select(specs, describe_model(specs).chooser)


def selected_linears(specs: SpecMap, where: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Weights to quantize. A name pattern takes what it names; a role its linears' weights, and passes over the rest.

    Biases, norms and scales have a role too. NoMatchError as ``selected``; PlanError for a matrix whose role nobody
    knows, if the scope is given by roles and says nothing of it by name.
    """
    selector = Selector(where, exclude)
    model = describe_model(specs)
    chosen = selector.names(specs, model.chooser)
    if not any(pattern.role for pattern in selector.where):
        return chosen
    _refuse_unknown(model, selector)
    named = [pattern for pattern in selector.where if not pattern.role]
    is_linear = _linear_test(specs, model)
    linears = [name for name in chosen if is_linear(name) or any(pattern.match(name) is not None for pattern in named)]
    _refuse_left_over(specs, model, chosen, linears)
    _refuse_transposed(specs, model, linears)
    if chosen and not linears:
        raise NoMatchError(
            f"none of the {len(chosen)} tensors that {', '.join(where)} selects is a linear's weight{_built_float(specs, model)}"
        )
    return linears


def _built_float(specs: SpecMap, model: Model) -> str:
    """Where engines build all linears without a config: the first of them, why it stays, and how it is quantized all the same."""
    is_linear = _linear_test(specs, model)
    for name in specs:
        use = model.use(name)
        if use.role in LINEARS and not use.has_config and is_linear(name):
            pattern = "{path*}." + masked(name).rpartition("*.")[2]
            return f"; {name}: {use.how}, so codes would have no reader; '{pattern}' in where quantizes it for another engine"
    return ""


def _linear_test(specs: SpecMap, model: Model) -> Callable[[str], bool]:
    """A test for names that a role has: whether it is the weight of a linear."""
    may_be = model.told_by_use(lambda use: use.role not in PARTS or use.within not in NO_LINEARS)
    return lambda name: len(specs[name][2]) == 2 and name.endswith(".weight") and may_be(name)


def _refuse_left_over(specs: SpecMap, model: Model, chosen: Sequence[str], linears: Sequence[str]) -> None:
    """Experts in a form that quantize cannot take must not stay behind in silence."""
    taken = frozenset(linears)
    for name in chosen:
        spec = specs[name]
        if name in taken or len(spec.shape) < 2 or spec.dtype not in WEIGHT_DTYPES or numbered(spec.module) is not None:
            continue
        if model.use(name).kind is Role.EXPERT:
            raise SpecError(
                f"{spec}: experts stored in one tensor, which no engine reads quantized; put split-experts before quantize, or "
                "exclude this tensor to leave it as it is"
            )


def _refuse_transposed(specs: SpecMap, model: Model, linears: Sequence[str]) -> None:
    """Groups and scales run along a weight's inputs, and every reader takes the last axis for them.

    vLLM 0.32 serves packed codes of a gpt2 that was turned before (seen, W4A16 and GPTQ); of INT8 it wants the codes turned back,
    for it turns every tensor of these names that ends in ``.weight``.
    """
    patterns = () if model.family is None else model.family.transposed
    for name in linears if patterns else ():
        if any(pattern.match(specs[name].module) is not None for pattern in patterns):
            raise SpecError(
                f"{specs[name]}: this family stores it [in, out] (table of {model.family.name if model.family else ''}), but "
                "codes are made of [out, in], and quantize does not turn a weight round, nor dequantize its values back; "
                "exclude it to leave it as it is"
            )


def _refuse_unknown(model: Model, selector: Selector) -> None:
    by_name = [pattern for pattern in (*selector.where, *selector.exclude) if not pattern.role]
    is_unknown = model.told_by_use(lambda use: use.role is None)
    for name, dtype, shape in model.floats:
        if len(shape) == 2 and is_unknown(name) and 0 not in shape:
            if any(pattern.match(name) is not None for pattern in by_name):
                continue
            inner = masked(name).rpartition("*.")[2]
            pattern = "{path*}." + inner if "." in inner and inner != name else name
            raise PlanError(
                f"{name} {dtype.name}{list(shape)}: what this matrix is for is not known: {model.considered(name)}. Say it: "
                f"'{pattern}' in exclude (also_exclude of a built-in transform) leaves it as it is, in where (also of a "
                "built-in transform) quantizes it"
            )


def refuse_stacked_experts(specs: SpecMap, where: Sequence[str], exclude: Sequence[str]) -> None:
    """SpecError for stacked experts in the scope: they have no ``.weight``, and would silently stay unquantized."""
    wanted, excluded = (tuple(map(Pattern.parse, patterns)) for patterns in (where, exclude))
    stacks = [spec.name for spec in specs.values() if stacked_weight(spec)]
    if not stacks:
        return
    choose = describe_model(specs).chooser
    # An expert's weight as it would be called after splitting, or the stack's own role: is that in the scope?
    tests = [(pattern, pattern.tested(choose)) for pattern in (*wanted, *excluded)]
    for name in stacks:
        split = after_splitting(name)
        assert split is not None
        hit = [bool(test(name)) or (not pattern.role and bool(test(split))) for pattern, test in tests]
        if any(hit[len(wanted) :]):
            continue
        if any(h and (p.role or p.match(split) is not None) for h, p in zip(hit, wanted, strict=False)):
            raise SpecError(
                f"{name}: {list(specs[name].shape)} are stacked experts, which no engine reads quantized; put "
                "split-experts before quantize, or exclude this tensor to leave it as it is"
            )


def why_left(specs: SpecMap, name: str, where: Sequence[str], exclude: Sequence[str]) -> str:
    """Why a tensor is in no scope given by these patterns, in words."""
    model = describe_model(specs)
    for text in exclude:
        if Pattern.parse(text).tested(model.chooser)(name):
            return f"excluded by {text.removeprefix('maybe:')}"
    outside = "outside " + " and ".join(text.removeprefix("maybe:") for text in where)
    use = model.use(name)
    if not any(Pattern.parse(text).role for text in where):
        return outside
    return f"{use}, {outside}" if use.role in LINEARS and use.has_config else f"{use} ({use.how})"
