"""Layouts of text models of families that have neither a row in the table nor, most of them, a data file: names and axes as
published, sizes small. Whoever adds a rule sees here what it does elsewhere (``test_invented.py``).
"""

from __future__ import annotations

from collections.abc import Callable

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
    numbered,
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


def step3p5() -> Invented:
    at = LAYER
    tensors = ends() | qkvo(f"{at}.self_attn") | norms(at, "input_layernorm") | mlp(f"{at}.share_expert")
    tensors |= {f"{at}.moe.gate.weight": ("-", (E, H)), f"{at}.moe.router_bias": ("-", (E,))}
    tensors |= {f"{at}.moe.{leaf}.weight": ("q", (E, INNER, H)) for leaf in ("gate_proj", "up_proj")}
    tensors |= {f"{at}.moe.down_proj.weight": ("q", (E, H, INNER))}
    head = "model.layers.1"
    tensors |= qkvo(f"{head}.self_attn", "-") | mlp(f"{head}.mlp", mark="-") | stays(head, "eh_proj", shape=(H, 2 * H))
    tensors |= stays(f"{head}.transformer.shared_head", "output", shape=(V, H))
    more = {"moe_num_experts": E, "moe_intermediate_size": INNER, "num_nextn_predict_layers": 1}
    return Invented(config("step3p5", "Step3p5ForCausalLM", **more), tensors)


def mimo_v2() -> Invented:
    at = LAYER
    tensors = ends() | linears(f"{at}.self_attn", "qkv_proj", shape=(1024, H)) | linears(f"{at}.self_attn", "o_proj")
    tensors |= {f"{at}.self_attn.attention_sink_bias": ("-", (4,)), f"{at}.mlp.gate.weight": ("-", (E, H))}
    tensors |= numbered(f"{at}.mlp.experts") | norms(at, "input_layernorm")
    head = "model.mtp.layers.0"
    tensors |= (
        qkvo(f"{head}.self_attn", "-")
        | mlp(f"{head}.mlp", mark="-")
        | stays(head, "eh_proj", shape=(H, 2 * H))
        | norms(head, "enorm")
    )
    return Invented(config("mimo_v2_flash", "MiMoV2FlashForCausalLM", **EXPERTS), tensors)


def kimi_k3() -> Invented:
    at = LAYER
    tensors = ends() | linears(f"{at}.self_attn", "q_proj", "k_proj", "v_proj", "o_proj") | norms(at, "input_layernorm")
    tensors |= {f"{at}.self_attn.{x}_conv1d.weight": ("-", (H, 1, 4)) for x in "qkv"}
    tensors |= linears(f"{at}.self_attn", "f_a_proj", "g_a_proj", shape=(128, H)) | linears(
        f"{at}.self_attn", "b_proj", shape=(64, H)
    )
    tensors |= linears(f"{at}.self_attn", "f_b_proj", "g_b_proj", shape=(H, 128))
    tensors |= {
        f"{at}.self_attn.A_log": ("-", (1, 1, 4, 1)),
        f"{at}.self_attn.dt_bias": ("-", (H,)),
        f"{at}.self_attention_res_proj.weight": ("-", (1, H)),
    }
    tensors |= numbered(f"{at}.block_sparse_moe.experts", ("w1", "w3", "w2")) | mlp(f"{at}.block_sparse_moe.shared_experts")
    tensors |= {
        f"{at}.block_sparse_moe.gate.weight": ("-", (E, H)),
        f"{at}.block_sparse_moe.gate.e_score_correction_bias": ("-", (E,)),
    }
    return Invented(config("kimi_linear", "KimiLinearForCausalLM", **EXPERTS), tensors)


def longcat() -> Invented:
    at = LAYER
    tensors = ends() | numbered(f"{at}.mlp.experts") | {f"{at}.mlp.router.classifier.weight": ("-", (E + 4, H))}
    for n in range(2):
        attention = f"{at}.self_attn.{n}"
        tensors |= linears(attention, "q_a_proj", shape=(256, H)) | linears(attention, "kv_a_proj_with_mqa", shape=(192, H))
        tensors |= (
            linears(attention, "q_b_proj", shape=(H, 256))
            | linears(attention, "kv_b_proj", shape=(H, 128))
            | linears(attention, "o_proj")
        )
        tensors |= mlp(f"{at}.mlps.{n}") | norms(at, f"input_layernorm.{n}", f"post_attention_layernorm.{n}")
    head = "model.mtp.layers.0"
    tensors |= (
        stays(head, "eh_proj", shape=(H, 2 * H))
        | mlp(f"{head}.transformer_layer.mlp", mark="-")
        | stays("model.mtp", "embed_tokens", shape=(V, H))
    )
    return Invented(
        config("longcat_flash", "LongcatFlashForCausalLM", n_routed_experts=E, zero_expert_num=4, num_layers=1), tensors
    )


def nemotron_3() -> Invented:
    tensors = ends("backbone.embeddings", "backbone.norm_f")
    at = "backbone.layers"
    tensors |= linears(f"{at}.0.mixer", "in_proj", shape=(1024, H)) | linears(f"{at}.0.mixer", "out_proj")
    tensors |= {
        f"{at}.0.mixer.conv1d.weight": ("-", (1024, 1, 4)),
        f"{at}.0.mixer.A_log": ("-", (8,)),
        f"{at}.0.mixer.D": ("-", (8,)),
    }
    tensors |= qkvo(f"{at}.1.mixer") | norms(at, "0.norm", "1.norm", "2.norm")
    for e in range(E):
        tensors |= linears(f"{at}.2.mixer.experts.{e}", "up_proj", shape=(INNER, H)) | linears(
            f"{at}.2.mixer.experts.{e}", "down_proj", shape=(H, INNER)
        )
    tensors |= linears(f"{at}.2.mixer.shared_experts", "up_proj", shape=(INNER, H)) | linears(
        f"{at}.2.mixer.shared_experts", "down_proj", shape=(H, INNER)
    )
    tensors |= {f"{at}.2.mixer.gate.weight": ("-", (E, H)), f"{at}.2.mixer.gate.e_score_correction_bias": ("-", (E,))}
    tensors |= stays("mtp.layers.0", "eh_proj", shape=(H, 2 * H)) | stays("mtp.layers.0.mixer", "q_proj", "o_proj", shape=(H, H))
    return Invented(
        config("nemotron_h", "NemotronHForCausalLM", n_routed_experts=E, moe_intermediate_size=INNER, num_hidden_layers=3),
        tensors,
    )


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


def arctic() -> Invented:
    at = LAYER
    tensors = (
        ends()
        | qkvo(f"{at}.self_attn")
        | numbered(f"{at}.block_sparse_moe.experts", ("w1", "w3", "w2"))
        | norms(at, "input_layernorm")
    )
    tensors |= {f"{at}.block_sparse_moe.gate.weight": ("-", (E, H))} | mlp(f"{at}.residual_mlp", ("w1", "w3", "w2"))
    return Invented(config("arctic", "ArcticForCausalLM", num_local_experts=E), tensors)


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


def bailing() -> Invented:
    at = LAYER
    tensors = (
        ends("model.word_embeddings")
        | linears(f"{at}.attention", "query_key_value", shape=(1024, H))
        | linears(f"{at}.attention", "dense")
    )
    tensors |= (
        numbered(f"{at}.mlp.experts")
        | mlp(f"{at}.mlp.shared_experts")
        | norms(at, "input_layernorm", "attention.query_layernorm")
    )
    tensors |= {f"{at}.mlp.gate.weight": ("-", (E, H)), f"{at}.mlp.gate.expert_bias": ("-", (E,))}
    head = "model.layers.1"
    tensors |= (
        stays(head, "eh_proj", shape=(H, 2 * H))
        | linears(f"{head}.attention", "query_key_value", mark="-")
        | norms(head, "enorm", "hnorm")
    )
    return Invented(config("bailing_moe_v2", "BailingMoeV2ForCausalLM", num_nextn_predict_layers=1, **EXPERTS), tensors)


def minimax_01() -> Invented:
    at = LAYER
    tensors = (
        ends() | linears(f"{at}.self_attn", "qkv_proj", shape=(3 * H, H)) | linears(f"{at}.self_attn", "out_proj", "output_gate")
    )
    tensors |= numbered(f"{at}.block_sparse_moe.experts", ("w1", "w3", "w2")) | {
        f"{at}.block_sparse_moe.gate.weight": ("-", (E, H))
    }
    tensors |= (
        mlp(f"{at}.shared_mlp") | {f"{at}.coefficient.weight": ("-", (1, H))} | norms(at, "input_layernorm", "self_attn.norm")
    )
    return Invented(config("minimax_text_01", "MiniMaxText01ForCausalLM", num_local_experts=E), tensors)


def hy_v4() -> Invented:
    at = LAYER
    tensors = (
        ends() | linears(f"{at}.self_attn", "q_a_proj", shape=(256, H)) | linears(f"{at}.self_attn", "q_b_proj", shape=(H, 256))
    )
    tensors |= linears(f"{at}.self_attn", "kv_a_proj_with_mqa", shape=(192, H)) | linears(
        f"{at}.self_attn", "kv_b_proj", shape=(H, 128)
    )
    tensors |= linears(f"{at}.self_attn", "o_proj") | stays(f"{at}.self_attn.indexer", "wq_b", "wk", "weights_proj")
    tensors |= {
        f"{at}.self_attn.learnable_sink_param": ("-", (4,)),
        f"{at}.mlp.gate.weight": ("-", (E, H)),
        f"{at}.hc_attn_layer.hc_fn": ("-", (24, 4 * H)),
    }
    tensors |= {"model.hc_head_fn": ("-", (4, 4 * H)), f"{at}.mlp.gate.e_score_correction_bias": ("-", (E,))} | norms(
        at, "input_layernorm"
    )
    tensors |= {f"{at}.mlp.experts.gate_up_proj": ("q", (E, 2 * INNER, H)), f"{at}.mlp.experts.down_proj": ("q", (E, H, INNER))}
    return Invented(
        config("hy_v4", "HYV4ForCausalLM", n_routed_experts=E, moe_intermediate_size=INNER),
        tensors | mlp(f"{at}.mlp.shared_experts"),
    )


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
        internlm2, qwen_1, mpt, chatglm, exaone_1, openelm, step3p5, mimo_v2, kimi_k3, longcat, nemotron_3, t5, bert, arctic,
        privacy_filter, bailing, minimax_01, hy_v4, plamo, unheard_of_stack, unheard_of_matrix, towers.molmo,
        towers.phi4_multimodal, towers.minimax_m3, towers.ernie_vl, towers.qwen3_omni, towers.deepseek_ocr, towers.aria,
        towers.minicpm_o, towers.pixtral_native, towers.deepseek_vl2, towers.paddleocr_vl, towers.granite_speech,
    )
}  # fmt: skip
