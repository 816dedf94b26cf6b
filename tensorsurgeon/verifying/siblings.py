"""Modules that engines run as one: they must be stored alike, and all of them must be there."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from tensorsurgeon.models.describe import describe_model
from tensorsurgeon.models.experts import experts_of
from tensorsurgeon.tensors.spec import SpecMap
from tensorsurgeon.verifying.claims import Claim
from tensorsurgeon.verifying.described import Described, float_stacks
from tensorsurgeon.verifying.findings import Findings


def check_siblings(specs: SpecMap, described: Described, findings: Findings) -> None:
    """q, k and v; gate and up; the experts of a layer: one scheme for each, or none."""
    how: dict[str, Claim | None] = {name: module.claim for name, module in described.modules.items()}
    floats = [
        name[: -len(".weight")]
        for name, spec in specs.items()
        if name.endswith(".weight") and len(spec.shape) == 2 and spec.dtype.is_float and spec.dtype.bits >= 16
    ]
    how.update((name, None) for name in floats if name not in described.stored)
    groups: dict[str, dict[str, Claim | None]] = defaultdict(dict)
    fused_name = describe_model(specs).fused_name
    for name, claim in how.items():
        fused = experts_of(name) or fused_name(name)
        if fused is not None:
            groups[fused][name] = claim
    for fused, members in groups.items():
        kinds: dict[Claim | None, list[str]] = defaultdict(list)
        for name, claim in members.items():
            kinds[claim].append(name)
        if len(kinds) < 2:
            continue
        usual = max(kinds, key=lambda claim: len(kinds[claim]))
        example = kinds[usual][0]
        for claim, names in kinds.items():
            for name in names if claim is not usual else ():
                findings.fault(
                    "siblings", name,
                    f"is {_shown(claim)}, but {example} is {_shown(usual)}, and engines run them as one {fused}",
                )  # fmt: skip


def _shown(claim: Claim | None) -> str:
    return "unquantized" if claim is None else claim.describe()


def check_experts(specs: SpecMap, config_value: Any, findings: Findings) -> None:
    """Every expert of a layer has every linear that one of them has; ``config_value`` looks up the model's config."""
    lists: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name in specs:
        prefix = experts_of(name)
        if prefix is None:
            continue
        number, _, rest = name[len(prefix) + 1 :].partition(".")
        leaf = rest.rpartition(".")[0]
        if leaf:
            lists[prefix][leaf].add(int(number))
    for prefix, leaves in lists.items():
        count = _count(leaves, config_value)
        for leaf, numbers in leaves.items():
            for missing in sorted(set(range(count)) - numbers)[:20]:
                findings.fault(
                    "missing-expert",
                    f"{prefix}.{missing}.{leaf}",
                    f"has no tensor, but {len(numbers)} of {count} experts of this layer have theirs",
                )
    for prefix, spec in float_stacks(specs).items():
        if prefix in lists:
            findings.fault(
                "stacked-and-split", spec.name, f"holds the experts of {prefix} stacked, but the file has them one by one too"
            )


def check_expert_shapes(specs: SpecMap, described: Described, findings: Findings) -> None:
    """Engines stack the experts of a layer, so each must have the shape of the others."""
    shapes: dict[str, tuple[int, ...]] = {name: module.shape for name, module in described.modules.items()}
    for name, spec in specs.items():
        if name.endswith(".weight") and spec.module not in described.stored:
            shapes[spec.module] = spec.shape
    groups: dict[tuple[str, str], dict[str, tuple[int, ...]]] = defaultdict(dict)
    for module, shape in shapes.items():
        prefix = experts_of(module)
        if prefix is not None:
            groups[prefix, module[len(prefix) + 1 :].partition(".")[2]][module] = shape
    for members in groups.values():
        counts = Counter(members.values())
        if len(counts) > 1:
            usual = max(counts, key=lambda shape: counts[shape])
            example = next(module for module, shape in members.items() if shape == usual)
            for module, shape in members.items():
                if shape != usual:
                    findings.fault(
                        "expert-shape",
                        module,
                        f"is a weight {list(shape)}, but {example} is {list(usual)}, and engines stack them",
                    )


def _count(leaves: Mapping[str, set[int]], config_value: Any) -> int:
    """Experts of a layer: what the config says, or one more than the highest number. Zero experts, which pass on what comes in
    and are counted last, need no tensors."""
    highest = 1 + max(max(numbers) for numbers in leaves.values())
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        said = config_value(key)
        if isinstance(said, int) and not isinstance(said, bool):
            return said if config_value("zero_expert_num") else max(said, highest)
    return highest


def check_global_scales(specs: SpecMap, global_scales: Mapping[str, float], findings: Findings) -> None:
    """NVFP4: engines take one global scale for a fused module, so its parts must share it."""
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    fused_name = describe_model(specs).fused_name
    for module, scale in global_scales.items():
        fused = fused_name(module)
        if fused is not None:
            groups[fused][module] = scale
    for fused, members in groups.items():
        # The odd one out is the wrong one; of two that differ, the second.
        counts = Counter(members.values())
        usual = max(counts, key=lambda scale: counts[scale])
        example = next(module for module, scale in members.items() if scale == usual)
        for module, scale in members.items():
            if scale != usual:
                findings.fault(
                    "global-scale",
                    f"{module}.weight_global_scale",
                    f"is {scale:g}, but {example} has {usual:g}, and engines take one for {fused}",
                )
