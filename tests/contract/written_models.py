"""Checkpoints as a plan sees them when it makes a config: names and header facts, no bytes.

The names are those of Qwen3.5/3.6-MoE with its vision tower and MTP head, because they hold every trap: fused
linear attention, gates that must stay float, numbered experts, a head that engines map away.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from tensorsurgeon.formats.base import Format, QuantizedModel
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import BF16
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

HIDDEN, EXPERT, HEADS, VISION = 256, 128, 32, 172


def qwen_weights(layers: int = 4, experts: int = 3, fused: tuple[str, ...] = ("mtp",)) -> Iterator[TensorSpec]:
    """Weights of a model; ``fused`` lists prefixes (``mtp``, ``model``) whose experts stay stacked."""

    def linear(name: str, rows: int, columns: int) -> TensorSpec:
        return TensorSpec(f"{name}.weight", BF16, (rows, columns))

    def mlp(prefix: str) -> Iterator[TensorSpec]:
        yield linear(f"{prefix}.gate", experts, HIDDEN)
        if prefix.startswith(fused):
            yield TensorSpec(f"{prefix}.experts.gate_up_proj", BF16, (experts, 2 * EXPERT, HIDDEN))
            yield TensorSpec(f"{prefix}.experts.down_proj", BF16, (experts, HIDDEN, EXPERT))
        else:
            for expert in range(experts):
                yield linear(f"{prefix}.experts.{expert}.gate_proj", EXPERT, HIDDEN)
                yield linear(f"{prefix}.experts.{expert}.up_proj", EXPERT, HIDDEN)
                yield linear(f"{prefix}.experts.{expert}.down_proj", HIDDEN, EXPERT)
        yield linear(f"{prefix}.shared_expert.gate_proj", EXPERT, HIDDEN)
        yield linear(f"{prefix}.shared_expert.up_proj", EXPERT, HIDDEN)
        yield linear(f"{prefix}.shared_expert.down_proj", HIDDEN, EXPERT)
        yield linear(f"{prefix}.shared_expert_gate", 1, HIDDEN)

    def attention(prefix: str) -> Iterator[TensorSpec]:
        yield linear(f"{prefix}.q_proj", 2 * HIDDEN, HIDDEN)
        yield linear(f"{prefix}.k_proj", EXPERT, HIDDEN)
        yield linear(f"{prefix}.v_proj", EXPERT, HIDDEN)
        yield linear(f"{prefix}.o_proj", HIDDEN, HIDDEN)
        yield TensorSpec(f"{prefix}.q_norm.weight", BF16, (HEADS,))

    for block in range(2):
        yield linear(f"model.visual.blocks.{block}.attn.qkv", 3 * VISION, VISION)
        yield linear(f"model.visual.blocks.{block}.attn.proj", VISION, VISION)
        yield linear(f"model.visual.blocks.{block}.mlp.linear_fc1", VISION, VISION)
    yield linear("model.visual.merger.linear_fc1", VISION, VISION)
    yield TensorSpec("model.visual.patch_embed.proj.weight", BF16, (VISION, 3, 2, 16, 16))
    yield linear("model.language_model.embed_tokens", 512, HIDDEN)
    for layer in range(layers):
        prefix = f"model.language_model.layers.{layer}"
        if layer % 4 == 3:
            yield from attention(f"{prefix}.self_attn")
        else:
            yield linear(f"{prefix}.linear_attn.in_proj_qkv", 2 * HIDDEN, HIDDEN)
            yield linear(f"{prefix}.linear_attn.in_proj_z", HIDDEN, HIDDEN)
            yield linear(f"{prefix}.linear_attn.in_proj_b", HEADS, HIDDEN)
            yield linear(f"{prefix}.linear_attn.in_proj_a", HEADS, HIDDEN)
            yield linear(f"{prefix}.linear_attn.out_proj", HIDDEN, HIDDEN)
            yield TensorSpec(f"{prefix}.linear_attn.conv1d.weight", BF16, (HIDDEN, 1, 4))
        yield from mlp(f"{prefix}.mlp")
        yield TensorSpec(f"{prefix}.input_layernorm.weight", BF16, (HIDDEN,))
    yield linear("lm_head", 512, HIDDEN)
    yield linear("mtp.fc", HIDDEN, 2 * HIDDEN)
    yield from attention("mtp.layers.0.self_attn")
    yield from mlp("mtp.layers.0.mlp")


def language_linears(module: str) -> bool:
    """What a careful transform quantizes: every language linear but gates and the small linear-attention inputs."""
    return module.startswith("model.language_model.layers.") and not re.search(r"(gate|in_proj_[ab])$", module)


def written(
    layout: Format,
    scheme_for: Callable[[str], Scheme | None],
    weights: Iterator[TensorSpec] | None = None,
) -> QuantizedModel:
    """The model after quantizing each weight under the scheme that ``scheme_for`` gives its module, if any."""
    specs = SpecMap()
    modules: dict[str, Scheme] = {}
    unquantized: list[str] = []
    for weight in weights if weights is not None else qwen_weights():
        module = weight.module
        scheme = scheme_for(module) if len(weight.shape) == 2 else None
        if scheme is None:
            specs[weight.name] = weight
            leaf = module.rpartition(".")[2]
            if len(weight.shape) == 3 and module.endswith(".experts"):
                if module not in unquantized:
                    unquantized.append(module)
            elif len(weight.shape) == 2 and "embed" not in leaf and "norm" not in leaf:
                unquantized.append(module)
            continue
        layout.check(weight, scheme)
        modules[module] = scheme
        for spec in layout.tensors(weight, scheme):
            specs[f"{module}.{spec.name}"] = spec._replace(name=f"{module}.{spec.name}")
    return QuantizedModel(modules=modules, unquantized=unquantized, specs=specs)


def under(scheme: Scheme) -> Callable[[str], Scheme | None]:
    """All language linears under one scheme."""
    return lambda module: scheme if language_linears(module) else None
