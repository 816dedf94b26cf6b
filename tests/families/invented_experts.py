"""Layouts of mixtures of experts of families that have neither a row in the table nor, most of them, a data file."""

from __future__ import annotations

from tests.families.layouts import (
    EXPERTS,
    INNER,
    LAYER,
    E,
    H,
    Invented,
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
