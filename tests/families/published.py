"""How publishers store what transformers saves otherwise: names, axes, MTP heads, and sources that come quantized."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from tests.families.table import Family

Tensors = dict[str, Tensor]
Config = dict[str, Any]


def as_published(family: Family, saved: Tensors, native: Tensors) -> Tensors:
    """The tensors under their published names. ``native``: the model's own state, where experts are stacked."""
    layout = family.layout.split("+")
    if "stacked" in layout:  # Qwen3.5: [E, 2I, H] gate first, as in the model
        saved = {name: tensor for name, tensor in saved.items() if not re.search(r"\.experts\.\d+\.", name)}
        saved |= {name: tensor for name, tensor in native.items() if ".experts." in name}
    if "transposed" in layout:  # Qwen3-VL-MoE: [E, H, 2I] and [E, I, H]
        saved = {n: t.transpose(1, 2) if t.ndim == 3 and ".experts." in n else t for n, t in saved.items()}
    if "vision_model" in layout:  # CLIP and SigLIP towers keep the word that transformers 5 dropped
        saved = {re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", n): t for n, t in saved.items()}
    if "deepseek_v4" in layout:
        names = (
            ("model.layers.", "layers."),
            ("model.embed_tokens.", "embed."),
            ("model.norm.", "norm."),
            ("model.hc_head.hc_", "hc_head_"),
        )
        for old, new in names:
            saved = {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in saved.items()}
    return saved


def mtp_of(family: Family, published: Tensors) -> Tensors:
    """The MTP head that transformers' classes do not have."""
    if "mtp" in family.layout.split("+"):
        return mtp_head(published)
    return mtp_layer(published) if family.config.get("num_nextn_predict_layers") else {}


def mtp_head(tensors: Tensors) -> Tensors:
    """Qwen's: `mtp.layers.0` like the last layer, which has full attention, and `mtp.fc` over hidden state and embedding."""
    prefix = re.compile(r"^model\.(?:language_model\.)?layers\.1\.")
    head = {prefix.sub("mtp.layers.0.", name): tensor.clone() for name, tensor in tensors.items() if prefix.search(name)}
    norm = next(tensor for name, tensor in head.items() if name.endswith("input_layernorm.weight"))
    head["mtp.fc.weight"] = combining(len(norm))
    return head | {f"mtp.{name}.weight": norm.clone() for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}


def mtp_layer(tensors: Tensors) -> Tensors:
    """DeepSeek's: one layer more than the model has, with its own embeddings and head."""
    last = max(int(found.group(1)) for name in tensors if (found := re.match(r"model\.layers\.(\d+)\.", name)))
    at, extra = f"model.layers.{last}.", f"model.layers.{last + 1}."
    head = {extra + name.removeprefix(at): tensor.clone() for name, tensor in tensors.items() if name.startswith(at)}
    embedding, norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    head[extra + "embed_tokens.weight"] = embedding.clone()
    head[extra + "shared_head.head.weight"] = embedding.clone()
    head[extra + "eh_proj.weight"] = combining(len(norm))
    return head | {f"{extra}{name}.weight": norm.clone() for name in ("enorm", "hnorm", "shared_head.norm")}


def combining(hidden: int) -> Tensor:
    return (torch.randn(hidden, 2 * hidden) / hidden**0.5).bfloat16()


def as_source(family: Family, tensors: Tensors, config: Config, linears: set[str]) -> tuple[Tensors, Tensors, Config]:
    """The checkpoint as published, the weights that its reader computes with, and its config."""
    if not family.source:
        return tensors, tensors, config
    write = {"fp8-block": fp8_block, "fp8-tensor": fp8_tensor, "mxfp4": mxfp4}[family.source]
    source, reference = dict(tensors), dict(tensors)
    for name in sorted(
        linears if family.source != "mxfp4" else {n for n in tensors if re.search(r"experts\.(gate_up|down)_proj$", n)}
    ):
        del source[name]
        made, reference[name] = write(name, tensors[name])
        source |= made
    return source, reference, config | {"quantization_config": QUANTIZATION[family.source] | family.quantization}


QUANTIZATION: dict[str, Config] = {
    "fp8-block": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "fp8-tensor": {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": None,
        "modules_to_not_convert": ["lm_head"],
    },
    "mxfp4": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    },
}


def fp8_block(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """128 x 128 blocks, the last of each row and column as large as what is left. Scales F32."""
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // 128), -(-columns // 128))
    codes, values = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight, dtype=torch.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scale[i, j] = weight[block].float().abs().max() / 448
            codes[block] = (weight[block].float() / scale[i, j]).to(torch.float8_e4m3fn)
            values[block] = codes[block].float() * scale[i, j]
    return {name: codes, f"{name}_scale_inv": scale}, values


def fp8_tensor(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """One BF16 scale for the weight and one for what comes in."""
    scale = (weight.float().abs().max() / 448).bfloat16()
    codes = (weight.float() / scale.float()).to(torch.float8_e4m3fn)
    module = name.removesuffix(".weight")
    return {
        name: codes,
        f"{name}_scale_inv": scale,
        f"{module}.activation_scale": torch.tensor(0.02).bfloat16(),
    }, codes.float() * scale.float()


LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def mxfp4(name: str, stack: Tensor) -> tuple[Tensors, Tensor]:
    """gpt-oss: [E, H, 2I] becomes blocks of 32 along H, [E, 2I, H/32, 16] with the even element in the low half, scales E8M0."""
    blocks = stack.transpose(1, 2).float().unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1).clamp_min(2.0**-100))) - 2
    scaled = blocks / torch.exp2(exponent)[..., None]
    code = (scaled.abs()[..., None] - LEVELS).abs().argmin(-1)
    values = LEVELS[code] * scaled.sign() * torch.exp2(exponent)[..., None]
    code = (code + 8 * (scaled < 0)).to(torch.uint8)
    packed = code[..., 0::2] | (code[..., 1::2] << 4)
    return {f"{name}_blocks": packed, f"{name}_scales": (exponent + 127).to(torch.uint8)}, values.flatten(-2).transpose(1, 2)
