"""Faults in config.json."""

from __future__ import annotations

from typing import Any

from tests.verifying.plants.ground import KINDS, Ground, Kind, kind, not_here


def another(key: str, change: Any) -> None:
    """A kind: one key of the model's config with another value, where it has one."""

    def plant(g: Ground) -> None:
        with g.model() as config:
            if config.get(key) is None:
                not_here()
            config[key] = change(config[key]) if callable(change) else change

    KINDS.append(Kind(f"another_{key}", "configs", plant))


for _key, _change in (
    ("hidden_size", lambda n: n * 2), ("num_hidden_layers", lambda n: n + 1), ("num_attention_heads", lambda n: n * 2),
    ("num_key_value_heads", lambda n: n * 2), ("head_dim", lambda n: n // 2), ("vocab_size", lambda n: n + 64),
    ("intermediate_size", lambda n: n * 2), ("moe_intermediate_size", lambda n: n * 2), ("num_experts", lambda n: n * 2),
    ("num_experts_per_tok", lambda n: n + 1), ("rms_norm_eps", 1e-2), ("hidden_act", "gelu"), ("model_type", "llama"),
    ("tie_word_embeddings", lambda flag: not flag), ("max_position_embeddings", lambda n: n * 4), ("eos_token_id", 7),
    ("norm_topk_prob", lambda flag: not flag), ("layer_types", lambda kinds: kinds[:-1]), ("attention_bias", True),
    ("architectures", ["LlamaForCausalLM"]),
):  # fmt: skip
    another(_key, _change)


@kind
def fewer_layers(g: Ground) -> None:
    with g.model() as config:
        config["num_hidden_layers"] -= 1


@kind
def another_base_of_positions(g: Ground) -> None:
    with g.model() as config:
        where = config.get("rope_parameters") or config
        where["rope_theta"] = 5.0


@kind
def another_dtype(g: Ground) -> None:
    with g.model() as config:
        config["dtype"] = "float64"


@kind
def a_scaling_of_positions_more(g: Ground) -> None:
    with g.model() as config:
        config["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}


@kind
def a_key_less(g: Ground) -> None:
    with g.model() as config:
        del config["rms_norm_eps"]


@kind
def no_config(g: Ground) -> None:
    (g.folder / "config.json").unlink()


@kind
def an_empty_config(g: Ground) -> None:
    (g.folder / "config.json").write_text("{}")


@kind
def a_config_that_is_none(g: Ground) -> None:
    (g.folder / "config.json").write_text('{"model_type": ')


@kind
def no_quantization(g: Ground) -> None:
    with g.json() as config:
        config.pop("quantization_config", None) or not_here()


@kind
def another_method(g: Ground) -> None:
    with g.quantization() as found:
        found["quant_method"] = "gptqq"


def each(found: Any, key: str) -> list[dict[str, Any]]:
    """Every mapping in a config that has this key."""
    if isinstance(found, list):
        return [hit for item in found for hit in each(item, key)]
    if not isinstance(found, dict):
        return []
    return ([found] if found.get(key) is not None else []) + [hit for item in found.values() for hit in each(item, key)]


@kind
def other_bits(g: Ground) -> None:
    with g.quantization() as found:
        hits = [(h, k) for k in ("num_bits", "bits") for h in each(found, k)]
        for hit, key in hits or not_here():
            hit[key] = 8 if hit[key] == 4 else 4


@kind
def other_dtype_of_codes(g: Ground) -> None:
    with g.quantization() as found:
        for hit in each(found.get("global_quant_config", {}), "dtype") or not_here():
            hit["dtype"] = {"int8": "fp8_e4m3", "fp8_e4m3": "int8", "int4": "uint4"}.get(hit["dtype"], "int8")


@kind
def other_groups(g: Ground) -> None:
    with g.quantization() as found:
        hits = [h for h in each(found, "group_size") if h["group_size"] > 0]
        for hit in hits or not_here():
            hit["group_size"] = hit["group_size"] // 2


@kind
def other_blocks(g: Ground) -> None:
    with g.quantization() as found:
        hits = [(h, k) for k in ("block_structure", "weight_block_size") for h in each(found, k)]
        for hit, key in hits or not_here():
            hit[key] = [32, 32]


@kind
def symmetry_turned_over(g: Ground) -> None:
    with g.quantization() as found:
        hits = [(h, k) for k in ("symmetric", "sym") for h in each(found, k)]
        for hit, key in hits or not_here():
            hit[key] = not hit[key]


@kind
def another_strategy(g: Ground) -> None:
    with g.quantization() as found:
        hits = [(h, k) for k in ("strategy", "qscheme") for h in each(found, k)]
        for hit, key in hits or not_here():
            hit[key] = "tensor" if key == "strategy" else "per_tensor"
            hit.pop("group_size", None)


@kind
def another_format_of_words(g: Ground) -> None:
    with g.quantization() as found:
        for key, values in (
            ("checkpoint_format", ("gptq", "gptq_v2")), ("pack_method", ("order", "reorder")),
            ("packing_format", ("auto_round:auto_gptq", "auto_round:auto_awq")), ("format", ("pack-quantized", "int-quantized")),
            ("version", ("gemm", "gemv")),
        ):  # fmt: skip
            for hit in each(found, key):
                hit[key] = values[1] if hit[key] == values[0] else values[0]


LISTS = ("ignore", "exclude", "modules_to_not_convert", "ignored_layers")


@kind
def nothing_kept_out(g: Ground) -> None:
    with g.quantization() as found:
        for key in LISTS:
            if found.get(key):
                found[key] = []
        if found.get("dynamic"):
            found["dynamic"] = {}
        if found.get("extra_config"):
            found["extra_config"] = {}


@kind
def one_less_kept_out(g: Ground) -> None:
    with g.quantization() as found:
        for key in LISTS:
            if found.get(key):
                found[key] = found[key][:-1]
                return
        for key in ("dynamic", "extra_config"):
            if found.get(key):
                found[key] = dict(list(found[key].items())[:-1])
                return
        not_here()


@kind
def a_quantized_module_kept_out(g: Ground) -> None:
    with g.quantization() as found:
        key = next((k for k in LISTS if isinstance(found.get(k), list)), None)
        if key:
            found[key] = [*found[key], g.module]
        elif isinstance(found.get("dynamic"), dict):
            found["dynamic"] = {f"-:{g.module}": {}, **found["dynamic"]}
        else:
            not_here()


@kind
def a_misspelt_entry(g: Ground) -> None:
    with g.quantization() as found:
        key = next((k for k in LISTS if found.get(k)), None) or not_here()
        found[key] = [*found[key][:-1], found[key][-1] + "x"]


@kind
def an_entry_more_that_names_nothing(g: Ground) -> None:
    with g.quantization() as found:
        key = next((k for k in LISTS if isinstance(found.get(k), list)), None) or not_here()
        found[key] = [*found[key], "model.layers.0.mlp.no_such_proj"]
