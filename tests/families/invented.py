"""Layouts of text models of families that have neither a row in the table nor, most of them, a data file: names and axes as
published, sizes small. Whoever adds a rule sees here what it does elsewhere (``test_invented.py``).
"""

from __future__ import annotations

from collections.abc import Callable

from tests.families import invented_experts as mixtures
from tests.families import invented_towers as towers
from tests.families.layouts import (
    EXPERTS,
    INNER,
    LAYER,
    E,
    H,
    Invented,
    Marked,
    V,
    config,
    ends,
    linears,
    mlp,
    norms,
    qkvo,
    stays,
)  # fmt: skip


def internlm2() -> Invented:
    at = LAYER
    tensors = ends("model.tok_embeddings", head="output") | linears(f"{at}.attention", "wqkv", shape=(1024, H))
    tensors |= (
        linears(f"{at}.attention", "wo") | mlp(f"{at}.feed_forward", ("w1", "w3", "w2")) | norms(at, "attention_norm", "ffn_norm")
    )
    return Invented(config("internlm2", "InternLM2ForCausalLM"), tensors)


def qwen_1() -> Invented:
    at = "transformer.h.0"
    tensors = ends("transformer.wte", "transformer.ln_f") | linears(f"{at}.attn", "c_attn", shape=(3 * H, H))
    tensors |= linears(f"{at}.attn", "c_proj") | mlp(f"{at}.mlp", ("w1", "w2", "c_proj")) | norms(at, "ln_1", "ln_2")
    return Invented(config("qwen", "QWenLMHeadModel"), tensors)


def mpt() -> Invented:
    at = "transformer.blocks.0"
    tensors = ends("transformer.wte", "transformer.norm_f", "") | linears(f"{at}.attn", "Wqkv", shape=(3 * H, H))
    tensors |= (
        linears(f"{at}.attn", "out_proj") | linears(f"{at}.ffn", "up_proj", shape=(4 * H, H)) | norms(at, "norm_1", "norm_2")
    )
    tensors |= linears(f"{at}.ffn", "down_proj", shape=(H, 4 * H))
    return Invented(config("mpt", "MPTForCausalLM", d_model=H, n_layers=1), tensors)


def chatglm() -> Invented:
    at = "transformer.encoder.layers.0"
    tensors = ends("transformer.embedding.word_embeddings", "transformer.encoder.final_layernorm", "transformer.output_layer")
    tensors |= linears(f"{at}.self_attention", "query_key_value", shape=(768, H)) | linears(f"{at}.self_attention", "dense")
    tensors |= linears(f"{at}.mlp", "dense_h_to_4h", shape=(2 * H, H)) | linears(f"{at}.mlp", "dense_4h_to_h")
    return Invented(config("chatglm", "ChatGLMModel", num_layers=1), tensors | norms(at, "input_layernorm"))


def exaone_1() -> Invented:
    at = "transformer.h.0"
    tensors = ends("transformer.wte", "transformer.ln_f") | qkvo(f"{at}.attn.attention") | norms(at, "ln_1", "ln_2")
    del tensors[f"{at}.attn.attention.o_proj.weight"]
    tensors |= linears(f"{at}.attn.attention", "out_proj") | mlp(f"{at}.mlp", ("c_fc_0", "c_fc_1", "c_proj"))
    return Invented(config("exaone", "ExaoneForCausalLM", num_layers=1), tensors)


def openelm() -> Invented:
    at = "transformer.layers.0"
    tensors = ends("transformer.token_embeddings", "transformer.norm", "") | linears(f"{at}.attn", "qkv_proj", shape=(768, H))
    tensors |= (
        linears(f"{at}.attn", "out_proj") | linears(f"{at}.ffn", "proj_1", shape=(1024, H)) | linears(f"{at}.ffn", "proj_2")
    )
    return Invented(config("openelm", "OpenELMForCausalLM"), tensors | norms(at, "attn_norm", "ffn_norm", "attn.q_norm"))


def t5() -> Invented:
    tensors: Marked = {"shared.weight": ("-", (V, H)), "lm_head.weight": ("-", (V, H))}
    for side in ("encoder", "decoder"):
        at = f"{side}.block.0.layer"
        tensors |= linears(f"{at}.0.SelfAttention", "q", "k", "v", "o") | stays(
            f"{at}.0.SelfAttention", "relative_attention_bias", shape=(32, 4)
        )
        tensors |= linears(f"{at}.1.DenseReluDense", "wi_0", "wi_1", shape=(1024, H)) | linears(
            f"{at}.1.DenseReluDense", "wo", shape=(H, 1024)
        )
        tensors |= norms(at, "0.layer_norm", "1.layer_norm") | norms(side, "final_layer_norm")
    return Invented(config("t5", "T5ForConditionalGeneration", d_model=H, num_layers=1, is_encoder_decoder=True), tensors)


def bert() -> Invented:
    at = "bert.encoder.layer.0"
    tensors = stays("bert.embeddings", "word_embeddings", shape=(V, H)) | stays(
        "bert.embeddings", "position_embeddings", shape=(512, H)
    )
    tensors |= linears(f"{at}.attention.self", "query", "key", "value") | linears(f"{at}.attention.output", "dense")
    tensors |= linears(f"{at}.intermediate", "dense", shape=(1024, H)) | linears(f"{at}.output", "dense", shape=(H, 1024))
    return Invented(
        config("bert", "BertModel"), tensors | stays("bert.pooler", "dense", shape=(H, H)) | norms(f"{at}.output", "LayerNorm")
    )


def privacy_filter() -> Invented:
    """Transposed stacks with biases, the gate first: what transformers' class says, and no table."""
    at = LAYER
    tensors = ends(head="score") | qkvo(f"{at}.self_attn") | norms(at, "input_layernorm")
    tensors |= {f"{at}.mlp.experts.gate_up_proj": ("q", (E, H, 2 * INNER)), f"{at}.mlp.experts.down_proj": ("q", (E, INNER, H))}
    tensors |= {f"{at}.mlp.experts.gate_up_proj_bias": ("-", (E, 2 * INNER)), f"{at}.mlp.experts.down_proj_bias": ("-", (E, H))}
    tensors |= {
        f"{at}.mlp.router.weight": ("-", (E, H)),
        f"{at}.mlp.router.bias": ("-", (E,)),
        f"{at}.self_attn.sinks": ("-", (4,)),
    }
    return Invented(config("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification", num_local_experts=E), tensors)


def unheard_of_stack() -> Invented:
    at = LAYER
    tensors = (
        ends()
        | qkvo(f"{at}.self_attn")
        | {f"{at}.mlp.experts.gate_up_proj": ("q", (E, H, 2 * INNER))}
        | norms(at, "input_layernorm")
    )
    tensors |= {f"{at}.mlp.experts.down_proj": ("q", (E, INNER, H)), f"{at}.mlp.gate.weight": ("-", (E, H))}
    return Invented(
        config("next_year", "NextYearForCausalLM", **EXPERTS),
        tensors,
        "down_proj: expected num_experts x out x in .* transposed, and no table",
    )


def unheard_of_matrix() -> Invented:
    at = LAYER
    tensors = (
        ends()
        | qkvo(f"{at}.self_attn")
        | mlp(f"{at}.mlp")
        | {f"{at}.mystery.weight": ("-", (H, H))}
        | norms(at, "input_layernorm")
    )
    return Invented(config("next_year", "NextYearForCausalLM"), tensors, "mystery.weight .*what this matrix is for is not known")


def plamo() -> Invented:
    at = "model.layers.layers.0"
    tensors = ends() | linears(f"{at}.mixer", "qkv_proj", shape=(1024, H)) | linears(f"{at}.mixer", "o_proj") | mlp(f"{at}.mlp")
    tensors |= norms(at, "pre_mixer_norm", "post_mixer_norm") | linears("model.layers.layers.1.mixer", "in_proj", shape=(1024, H))
    tensors |= linears("model.layers.layers.1.mixer", "out_proj") | linears(
        "model.layers.layers.1.mixer", "bcdt_proj", shape=(128, H)
    )
    tensors |= linears("model.layers.layers.1.mixer", "dt_proj", shape=(256, 64)) | {
        "model.layers.layers.1.mixer.conv1d.weight": ("-", (H, 1, 4))
    }
    return Invented(config("plamo2", "Plamo2ForCausalLM", num_hidden_layers=2), tensors)


INVENTED: dict[str, Callable[[], Invented]] = {
    made.__name__: made
    for made in (
        internlm2, qwen_1, mpt, chatglm, exaone_1, openelm, mixtures.step3p5, mixtures.mimo_v2, mixtures.kimi_k3,
        mixtures.longcat, mixtures.nemotron_3, t5, bert, mixtures.arctic, privacy_filter, mixtures.bailing,
        mixtures.minimax_01, mixtures.hy_v4, plamo, unheard_of_stack, unheard_of_matrix, towers.molmo, towers.phi4_multimodal,
        towers.minimax_m3, towers.ernie_vl, towers.qwen3_omni, towers.deepseek_ocr, towers.aria, towers.minicpm_o,
        towers.pixtral_native, towers.deepseek_vl2, towers.paddleocr_vl, towers.granite_speech,
    )
}  # fmt: skip
