"""Layouts with towers or other models beside the text model, of families that have neither a row in the table nor a data file."""

from __future__ import annotations

from tests.families.layouts import (
    EXPERTS,
    INNER,
    LAYER,
    VISION,
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


def molmo() -> Invented:
    at = "model.transformer.blocks.0"
    tensors = ends("model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out")
    tensors |= {"model.transformer.wte.embedding": ("-", (V, H)), "model.transformer.wte.new_embedding": ("-", (128, H))}
    tensors |= linears(at, "att_proj", shape=(768, H)) | linears(at, "attn_out") | linears(at, "ff_proj", shape=(1024, H))
    tensors |= linears(at, "ff_out") | norms(at, "attn_norm", "ff_norm")
    vision = "model.vision_backbone.image_vit.transformer.resblocks.0"
    tensors |= stays(f"{vision}.attention", "wq", "wk", "wv", "wo") | stays(f"{vision}.feed_forward", "w1", "w2")
    tensors |= stays("model.vision_backbone.image_pooling_2d", "wq", "wo") | stays(
        "model.vision_backbone.image_projector", "w1", "w2"
    )
    return Invented(config("molmo", "MolmoForCausalLM"), tensors)


def phi4_multimodal() -> Invented:
    at = LAYER
    tensors = ends() | norms(at, "input_layernorm", "post_attention_layernorm")
    for module, shape in (
        ("self_attn.qkv_proj", (1024, H)),
        ("self_attn.o_proj", (H, H)),
        ("mlp.gate_up_proj", (1024, H)),
        ("mlp.down_proj", (H, H)),
    ):
        tensors |= linears(f"{at}.{module}", "base_layer", shape=shape)
        for kind in ("vision", "speech"):
            tensors |= {
                f"{at}.{module}.lora_A.{kind}.weight": ("-", (64, shape[1])),
                f"{at}.{module}.lora_B.{kind}.weight": ("-", (shape[0], 64)),
            }
    image, audio = "model.embed_tokens_extend.image_embed", "model.embed_tokens_extend.audio_embed"
    tensors |= stays(f"{image}.img_processor.encoder.layers.0.self_attn", "q_proj", "out_proj") | stays(
        f"{image}.img_projection", "0", "2"
    )
    tensors |= stays(f"{audio}.encoder.encoders.0.self_attn", "linear_q", "linear_out") | stays(
        f"{audio}.audio_projection.speech", "0", "2"
    )
    return Invented(config("phi4mm", "Phi4MMForCausalLM"), tensors)


def minimax_m3() -> Invented:
    at = "language_model.model.layers.0"
    tensors = ends("language_model.model.embed_tokens", "language_model.model.norm", "language_model.lm_head")
    tensors |= qkvo(f"{at}.self_attn", "-") | stays(f"{at}.self_attn", "index_q_proj", "index_k_proj", shape=(64, H))
    tensors[f"{at}.self_attn.o_proj.weight"] = ("q", (H, H))
    tensors |= numbered(f"{at}.block_sparse_moe.experts", ("w1", "w3", "w2")) | {
        f"{at}.block_sparse_moe.gate.weight": ("-", (E, H))
    }
    tensors |= mlp(f"{at}.block_sparse_moe.shared_experts")
    tensors |= stays("vision_tower.vision_model.encoder.layers.0.self_attn", "q_proj", "out_proj")
    tensors |= stays("multi_modal_projector", "linear_1", "linear_2") | stays("patch_merge_mlp", "linear_1", "linear_2")
    text = config("minimax_m3_vl_text", "", num_local_experts=E)
    whole = {"model_type": "minimax_m3_vl", "architectures": ["MiniMaxM3SparseForConditionalGeneration"], "text_config": text}
    return Invented(whole, tensors)


def ernie_vl() -> Invented:
    at = LAYER
    tensors = (
        ends()
        | qkvo(f"{at}.self_attn")
        | norms(at, "input_layernorm")
        | numbered(f"{at}.mlp.experts")
        | mlp(f"{at}.mlp.shared_experts")
    )
    tensors |= {f"{at}.mlp.gate.weight": ("-", (E // 2, H)), f"{at}.mlp.gate.weight_1": ("-", (E // 2, H))}
    tensors |= {f"{at}.mlp.moe_statics.e_score_correction_bias": ("-", (2, E // 2))}
    tensors |= stays("vision_model.blocks.0.attn", "qkv", "proj") | stays("vision_model.blocks.0.mlp", "fc1", "fc2")
    tensors |= stays("model.resampler_model", "spatial_linear.0", "spatial_linear.2", "mlp")
    return Invented(
        config("ernie4_5_moe_vl", "Ernie4_5_VLMoeForConditionalGeneration", moe_num_experts=[E // 2, E // 2]), tensors
    )


def qwen3_omni() -> Invented:
    at = "thinker.model.layers.0"
    tensors = ends("thinker.model.embed_tokens", "thinker.model.norm", "thinker.lm_head") | qkvo(f"{at}.self_attn")
    tensors |= numbered(f"{at}.mlp.experts") | {f"{at}.mlp.gate.weight": ("-", (E, H))} | norms(at, "input_layernorm")
    tensors |= stays("thinker.visual.blocks.0.attn", "qkv", "proj") | stays("thinker.visual.merger.mlp", "0", "2")
    tensors |= stays("thinker.audio_tower.layers.0.self_attn", "q_proj", "out_proj") | stays(
        "thinker.audio_tower", "proj1", "proj2"
    )
    tensors |= stays("talker.model.layers.0.self_attn", "q_proj", "o_proj") | stays(
        "code2wav.pre_transformer.layers.0.self_attn", "q_proj"
    )
    text = config("qwen3_omni_moe_text", "", **EXPERTS)
    whole = {
        "model_type": "qwen3_omni_moe",
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "thinker_config": {"text_config": text},
    }
    return Invented(whole, tensors)


def deepseek_ocr() -> Invented:
    at = LAYER
    tensors = (
        ends()
        | qkvo(f"{at}.self_attn")
        | numbered(f"{at}.mlp.experts")
        | mlp(f"{at}.mlp.shared_experts")
        | norms(at, "input_layernorm")
    )
    tensors |= {f"{at}.mlp.gate.weight": ("-", (E, H)), "model.image_newline": ("-", (H,)), "model.view_seperator": ("-", (H,))}
    tensors |= stays("model.sam_model.blocks.0.attn", "qkv", "proj") | stays(
        "model.vision_model.transformer.layers.0.self_attn", "qkv_proj", "out_proj"
    )
    tensors |= stays("model.projector", "layers", shape=(H, VISION))
    return Invented(config("DeepseekOCR", "DeepseekOCRForCausalLM", n_routed_experts=E, moe_intermediate_size=INNER), tensors)


def aria() -> Invented:
    at = "language_model.model.layers.0"
    tensors = ends("language_model.model.embed_tokens", "language_model.model.norm", "language_model.lm_head") | qkvo(
        f"{at}.self_attn"
    )
    tensors |= {f"{at}.mlp.experts.fc1.weight": ("q", (E, H, 2 * INNER)), f"{at}.mlp.experts.fc2.weight": ("q", (E, INNER, H))}
    tensors |= {f"{at}.mlp.router.weight": ("-", (E, H))} | mlp(f"{at}.mlp.shared_experts") | norms(at, "input_layernorm")
    tensors |= stays("vision_tower.vision_model.encoder.layers.0.self_attn", "q_proj", "out_proj")
    tensors |= stays("multi_modal_projector.cross_attn", "q_proj", "linear") | {
        "multi_modal_projector.query": ("-", (128, VISION))
    }
    text = config("aria_text", "", moe_num_experts=E, intermediate_size=INNER)
    return Invented({"model_type": "aria", "architectures": ["AriaForConditionalGeneration"], "text_config": text}, tensors)


def minicpm_o() -> Invented:
    at = "llm.model.layers.0"
    tensors = (
        ends("llm.model.embed_tokens", "llm.model.norm", "llm.lm_head")
        | qkvo(f"{at}.self_attn")
        | mlp(f"{at}.mlp")
        | norms(at, "input_layernorm")
    )
    tensors |= stays("vpm.encoder.layers.0.self_attn", "q_proj", "out_proj") | stays(
        "apm.layers.0.self_attn", "q_proj", "out_proj"
    )
    tensors |= stays("resampler.attn", "out_proj") | {
        "resampler.query": ("-", (64, VISION)),
        "resampler.kv_proj.weight": ("-", (VISION, 144)),
    }
    tensors |= stays("tts.model.layers.0.self_attn", "q_proj", "o_proj") | stays("audio_projection_layer", "linear1", "linear2")
    return Invented(config("minicpmo", "MiniCPMO"), tensors)


def pixtral_native() -> Invented:
    at = "layers.0"
    tensors = ends("tok_embeddings", "norm", "output") | linears(f"{at}.attention", "wq", "wo")
    tensors |= linears(f"{at}.attention", "wk", "wv", shape=(H // 2, H)) | mlp(f"{at}.feed_forward", ("w1", "w3", "w2"))
    tensors |= norms(at, "attention_norm", "ffn_norm") | stays("vision_language_adapter", "w_in", "w_out")
    tower = "vision_encoder.transformer.layers.0"
    tensors |= stays(f"{tower}.attention", "wq", "wk", "wv", "wo") | stays(f"{tower}.feed_forward", "w1", "w2", "w3")
    return Invented(config("pixtral", "PixtralForConditionalGeneration"), tensors)


def deepseek_vl2() -> Invented:
    at = "language.model.layers.0"
    tensors = ends("language.model.embed_tokens", "language.model.norm", "language.lm_head") | norms(at, "input_layernorm")
    tensors |= qkvo(f"{at}.self_attn") | numbered(f"{at}.mlp.experts") | mlp(f"{at}.mlp.shared_experts")
    tensors |= {f"{at}.mlp.gate.weight": ("-", (E, H)), "image_newline": ("-", (H,)), "view_seperator": ("-", (H,))}
    tensors |= (
        stays("vision.blocks.0.attn", "qkv", "proj") | stays("vision.attn_pool", "q", "kv") | stays("projector.layers", "0", "2")
    )
    language = config("deepseek_v2", "", n_routed_experts=E, moe_intermediate_size=INNER)
    return Invented(
        {"model_type": "deepseek_vl_v2", "architectures": ["DeepseekVLV2ForCausalLM"], "language_config": language}, tensors
    )


def paddleocr_vl() -> Invented:
    at = LAYER
    tensors = (
        ends()
        | qkvo(f"{at}.self_attn")
        | mlp(f"{at}.mlp")
        | norms(at, "input_layernorm")
        | stays("mlp_AR", "linear_1", "linear_2")
    )
    tower = "visual.vision_model"
    tensors |= stays(f"{tower}.encoder.layers.0.self_attn", "q_proj", "out_proj") | stays(f"{tower}.head.mlp", "fc1", "fc2")
    tensors |= stays(f"{tower}.embeddings", "position_embedding", "packing_position_embedding")
    return Invented(config("paddleocr_vl", "PaddleOCRVLForConditionalGeneration", vision_config={"hidden_size": VISION}), tensors)


def granite_speech() -> Invented:
    at = "language_model.model.layers.0"
    tensors = ends("language_model.model.embed_tokens", "language_model.model.norm", "language_model.lm_head")
    tensors |= qkvo(f"{at}.self_attn") | mlp(f"{at}.mlp") | norms(at, "input_layernorm")
    tensors |= {f"{at}.self_attn.q_proj.lora_A.weight": ("-", (64, H)), f"{at}.self_attn.q_proj.lora_B.weight": ("-", (H, 64))}
    tensors |= stays("encoder.layers.0.attn", "to_q", "to_kv", "to_out") | stays("encoder.layers.0.ff1", "up_proj", "down_proj")
    tensors |= stays("encoder", "input_linear", "out") | stays(
        "projector.qformer.encoder.layer.0.attention.attention", "query", "key"
    )
    whole = {"model_type": "granite_speech", "architectures": ["GraniteSpeechForConditionalGeneration"]}
    return Invented({**whole, "text_config": config("granite", "GraniteForCausalLM")}, tensors)
