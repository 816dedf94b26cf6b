"""Do the sizes in config.json fit the tensors? An engine builds the model from the one and fills it from the other.

Only what the same key means in nearly every family is compared, and only tensors that carry the usual names; a family that
means something else by a key has other names, or another key beside it that says so.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final, NamedTuple

from tensorsurgeon.models.describe import describe_model
from tensorsurgeon.models.roles import Role
from tensorsurgeon.tensors.spec import SpecMap
from tensorsurgeon.verifying.described import Described
from tensorsurgeon.verifying.findings import Findings

# The decoder's own prefix, and not that of a tower beside it.
_DECODER: Final = r"(?:model\.|language_model\.|model\.language_model\.|language_model\.model\.|transformer\.)?"
_LAYER: Final = re.compile(rf"{_DECODER}layers\.(\d{{1,6}})\..+")
_EMBEDDING: Final = re.compile(rf"{_DECODER}embed_tokens")
_NORM: Final = re.compile(rf"{_DECODER}norm")
# Keys beside which the plain ones no longer say how wide attention is.
_OTHER_ATTENTION: Final = frozenset({
    "kv_lora_rank", "q_lora_rank", "global_head_dim", "qk_nope_head_dim", "swa_num_attention_heads", "num_global_key_value_heads",
    "block_configs", "head_dim_per_layer", "num_attention_groups", "attention_other_setting", "v_head_dim", "swa_head_dim",
    "linear_attn_config", "num_key_value_heads_per_layer", "num_attention_heads_per_layer", "multi_query_group_num",
})  # fmt: skip
_OTHER_WIDTH: Final = frozenset({
    "intermediate_size_mlp", "block_configs", "use_double_wide_mlp", "dense_intermediate_size", "shared_intermediate_size",
    "block_auto_adjust_ff_dim", "num_attention_groups", "prefix_dense_intermediate_size",
})  # fmt: skip
# Mllama's embeddings have rows for images, which its head has not.
_EXTRA_ROWS: Final = {"cross_attention_layers": 8}
_EXTRA_LAYERS: Final = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")


class _Sizes(NamedTuple):
    """What the tensors say: ``linears`` are the shapes of a layer's linears by role and last part of the name."""

    embedding: tuple[int, int] | None
    norm: int | None
    layers: int
    linears: Mapping[tuple[Role, str], frozenset[tuple[int, int]]]

    def only(self, role: Role, *leaves: str) -> tuple[int, int] | None:
        """The shape of these linears where all have one; without leaves, of all of that role."""
        shapes: set[tuple[int, int]] = set()
        for (found, leaf), members in self.linears.items():
            if found is role and (leaf in leaves or not leaves):
                shapes |= members
        return next(iter(shapes)) if len(shapes) == 1 else None


class Contradiction(NamedTuple):
    """A ``key`` of the config that says one thing, and ``where`` in the tensors another is found."""

    key: str
    said: int
    found: int | str
    where: str


def check_model_sizes(
    specs: SpecMap, described: Described, findings: Findings, inherited: Collection[Contradiction] = ()
) -> None:
    """One fault for each key of config.json that contradicts the tensors; a note for those that the source has as well.

    What a checkpoint was made from may be odd; asked whether it still is that model, the answer is yes.
    """
    for contradiction in contradictions_of(specs, described):
        key, said, found, where = contradiction
        message = f"is {said}, but {where} says {found}"
        if contradiction in inherited:
            findings.note("config-size", f"config.json {key}", f"{message}; the source has it so")
        else:
            findings.fault("config-size", f"config.json {key}", message)


def contradictions_of(specs: SpecMap, described: Described) -> tuple[Contradiction, ...]:
    """Where the sizes in config.json and the shapes of the tensors do not go together."""
    return tuple(Contradiction(*found) for found in _contradictions(_text_config(specs.config), _sizes(specs, described)))


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("text_config", "llm_config", "language_config"):
        inner = config.get(key)
        if isinstance(inner, Mapping):
            return {**config, **inner}
    return config


def _sizes(specs: SpecMap, described: Described) -> _Sizes:
    model = describe_model(specs)
    shapes: dict[str, tuple[int, int]] = {name: module.shape for name, module in described.modules.items()}
    embedding, norm, layers = None, None, 0
    for name, spec in specs.items():
        module, _, local = name.rpartition(".")
        if local == "weight" and len(spec.shape) == 2 and module not in described.stored:
            shapes[module] = (spec.shape[0], spec.shape[1])
        if local == "weight" and len(spec.shape) == 1 and _NORM.fullmatch(module):
            norm = spec.shape[0]
        found = _LAYER.fullmatch(module)
        if found is not None:
            layers = max(layers, int(found.group(1)) + 1)
    linears: dict[tuple[Role, str], set[tuple[int, int]]] = {}
    for module, shape in shapes.items():
        if _EMBEDDING.fullmatch(module):
            embedding = shape
        elif _LAYER.fullmatch(module) and (role := model.module_use(module).role) is not None:
            linears.setdefault((role, module.rpartition(".")[2]), set()).add(shape)
    return _Sizes(embedding, norm, layers, {key: frozenset(found) for key, found in linears.items()})


def _contradictions(config: Mapping[str, Any], sizes: _Sizes) -> Iterator[tuple[str, int, int | str, str]]:
    """Key, what the config says, what the tensors say, and which."""
    hidden = _integer(config, "hidden_size")
    width = _integer(config, "word_embed_proj_dim") or _integer(config, "embedding_size") or hidden
    vocabulary = _integer(config, "vocab_size")
    if sizes.embedding is not None:
        more = sum(rows for key, rows in _EXTRA_ROWS.items() if key in config)
        if vocabulary is not None and sizes.embedding[0] not in (vocabulary, vocabulary + more):
            yield "vocab_size", vocabulary, sizes.embedding[0], "embed_tokens.weight"
        if width is not None and width != sizes.embedding[1]:
            yield "hidden_size", width, sizes.embedding[1], "embed_tokens.weight"
    if hidden is not None and sizes.norm is not None and hidden != sizes.norm:
        yield "hidden_size", hidden, sizes.norm, "norm.weight"
    layers = _integer(config, "num_hidden_layers")
    if layers is not None and sizes.layers:
        more = max((_integer(config, key) or 0 for key in _EXTRA_LAYERS), default=0)
        if not layers <= sizes.layers <= layers + more:
            yield "num_hidden_layers", layers, sizes.layers, "the number of the last layer"
    if _OTHER_ATTENTION.isdisjoint(config):
        yield from _attention(config, sizes, hidden)
    if _OTHER_WIDTH.isdisjoint(config):
        yield from _feed_forward(config, sizes)


def _attention(config: Mapping[str, Any], sizes: _Sizes, hidden: int | None) -> Iterator[tuple[str, int, int | str, str]]:
    heads, groups = _integer(config, "num_attention_heads"), _integer(config, "num_key_value_heads")
    size = (
        _integer(config, "attention_head_dim") or _integer(config, "head_dim") or (hidden // heads if hidden and heads else None)
    )
    if not size or not heads:
        return
    queries, keys = sizes.only(Role.ATTENTION, "q_proj"), sizes.only(Role.ATTENTION, "k_proj")
    # A gate of the output may lie beside the queries.
    if queries is not None and queries[0] not in (heads * size, 2 * heads * size):
        yield "num_attention_heads", heads, f"{queries[0]} outputs, which are no heads of {size}", "q_proj"
    if keys is not None and groups is not None and keys[0] != groups * size:
        yield "num_key_value_heads", groups, f"{keys[0]} outputs, which are no heads of {size}", "k_proj"


def _feed_forward(config: Mapping[str, Any], sizes: _Sizes) -> Iterator[tuple[str, int, int | str, str]]:
    width = _integer(config, "intermediate_size")
    found = sizes.only(Role.MLP, "up_proj")
    if width is not None and found is not None and found[0] not in (width, 2 * width):
        yield "intermediate_size", width, found[0], "mlp.up_proj"
    key = "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
    width = _integer(config, key)
    found = sizes.only(Role.EXPERT, "up_proj", "w3")
    if width is not None and found is not None and found[0] != width and "expert_ffn_hidden_size" not in config:
        yield key, width, found[0], "up_proj of the experts"
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        count, router = _integer(config, key), sizes.only(Role.ROUTER)
        if count is not None and router is not None and count != router[0] and "zero_expert_num" not in config:
            yield key, count, router[0], "the router"


def _integer(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
