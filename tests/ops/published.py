"""Small checkpoints as they are published: tensors, config and the weights they stand for, by the layouts' descriptions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tests.checkpoints import Tensors
from tests.ops.arrays import BF16

FP8, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
N, K = 192, 320
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
RNG = np.random.default_rng(11)


class Published(NamedTuple):
    """``weights``: F32 by module; ``files``: what lies beside config.json."""

    tensors: Tensors
    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    files: Mapping[str, Any] = MappingProxyType({})


def fp8(rows: int = N, columns: int = K) -> np.ndarray:
    return (RNG.standard_normal((rows, columns)) * 60).clip(-440, 440).astype(FP8)


def wide(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


def in_blocks(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return wide(codes) * np.kron(wide(scale), np.ones((128, 128), np.float32))[: codes.shape[0], : codes.shape[1]]


def fp8_blocks(scale_dtype: Any = np.float32, **config: Any) -> Published:
    codes = fp8()
    scale = 2.0 ** RNG.integers(-12, -8, (2, 3))
    tensors = {f"{UP}.weight": codes, f"{UP}.weight_scale_inv": scale.astype(scale_dtype)}
    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", **config}
    return Published(tensors, method, {UP: in_blocks(codes, scale)})


def fp8_per_tensor() -> Published:
    codes, scale = fp8(), np.array(0.0078125, BF16)
    tensors = {f"{UP}.weight": codes, f"{UP}.weight_scale_inv": scale, f"{UP}.activation_scale": np.array(0.5, BF16)}
    config = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False}
    return Published(tensors, config, {UP: wide(codes) * wide(scale)})


def fp8_per_channel(method: str = "fbgemm_fp8") -> Published:
    codes, scale = fp8(), RNG.uniform(1e-4, 1e-3, (N, 1)).astype(np.float32)
    tensors = {f"{UP}.weight": codes, f"{UP}.weight_scale": scale}
    return Published(tensors, {"quant_method": method, "modules_to_not_convert": ["lm_head"]}, {UP: wide(codes) * scale})


def ct(**groups: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": ["lm_head"], "config_groups": groups}


def ct_per_tensor() -> Published:
    codes, scale = fp8(), np.array([0.0078125], BF16)
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    config = ct(group_0={"targets": ["Linear"], "weights": weights}) | {"format": "float-quantized"}
    return Published({f"{UP}.weight": codes, f"{UP}.weight_scale": scale}, config, {UP: wide(codes) * wide(scale)})


def nvfp4() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes, local scales, and the values of the codes times these scales."""
    packed = RNG.integers(0, 256, (N, K // 2)).astype(np.uint8)
    local = RNG.uniform(1, 200, (N, K // 16)).astype(FP8)
    values = np.stack([E2M1[packed & 15], E2M1[packed >> 4]], -1).reshape(N, K)
    return packed, local, values


def ct_mixed(named: bool = True) -> Published:
    codes, scale = fp8(), RNG.uniform(1e-4, 1e-3, (N, 1)).astype(BF16)
    packed, local, values = nvfp4()
    whole = np.array([500.0], np.float32)
    tensors = {
        f"{Q}.weight": codes, f"{Q}.weight_scale": scale,
        f"{UP}.weight_packed": packed, f"{UP}.weight_scale": local, f"{UP}.weight_global_scale": whole,
        f"{UP}.input_global_scale": whole,
    }  # fmt: skip
    w8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    w4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    one: dict[str, Any] = {"targets": ["re:.*self_attn.*"], "weights": w8}
    two: dict[str, Any] = {"targets": ["re:.*mlp.*"], "weights": w4}
    if named:
        one["format"], two["format"] = "float-quantized", "nvfp4-pack-quantized"
    by_group = (wide(local) / whole).repeat(16, 1)
    return Published(tensors, ct(group_0=one, group_1=two), {Q: wide(codes) * wide(scale), UP: values * by_group})


def modelopt_nvfp4(beside: bool = False) -> Published:
    packed, local, values = nvfp4()
    second = np.array(0.0021, np.float32)
    tensors = {
        f"{UP}.weight": packed, f"{UP}.weight_scale": local, f"{UP}.weight_scale_2": second,
        f"{UP}.input_scale": np.array(0.1, np.float32), "model.layers.0.self_attn.k_proj.k_scale": np.array(0.1, np.float32),
    }  # fmt: skip
    weights = {UP: values * (wide(local) * second).repeat(16, 1)}
    if beside:
        said = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}
        return Published(tensors, {}, weights, {"hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": said}})
    return Published(tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, weights)


def modelopt_fp8() -> Published:
    codes, scale = fp8(), np.array(0.0071, np.float32)
    tensors = {f"{UP}.weight": codes, f"{UP}.weight_scale": scale, f"{UP}.input_scale": scale}
    config = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*self_attn*"]}
    return Published(tensors, config, {UP: wide(codes) * scale})


def modelopt_mixed() -> Published:
    one, two = modelopt_nvfp4(), modelopt_fp8()
    tensors = one.tensors | {name.replace(UP, Q): array for name, array in two.tensors.items()}
    layers = {UP: {"quant_algo": "NVFP4", "group_size": 16}, Q: {"quant_algo": "FP8"}}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    return Published(tensors, config, one.weights | {Q: two.weights[UP]})


def deepseek_v4() -> Published:
    attention, expert = "layers.0.attn.wq_a", "layers.0.ffn.experts.0.w1"
    codes, scale = fp8(), (2.0 ** RNG.integers(-12, -8, (2, 3))).astype(E8M0)
    packed, exponents = (
        RNG.integers(-128, 128, (N, K // 2)).astype(np.int8),
        (2.0 ** RNG.integers(-9, -4, (N, K // 32))).astype(E8M0),
    )
    tensors = {
        f"{attention}.weight": codes, f"{attention}.scale": scale, f"{expert}.weight": packed, f"{expert}.scale": exponents,
        "layers.0.ffn.gate.tid2eid": np.zeros((4, 4), np.int64),
    }  # fmt: skip
    config = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    unsigned = packed.view(np.uint8)
    values = np.stack([E2M1[unsigned & 15], E2M1[unsigned >> 4]], -1).reshape(N, K)
    return Published(tensors, config, {attention: in_blocks(codes, scale), expert: values * wide(exponents).repeat(32, 1)})


PUBLISHED: dict[str, Callable[[], Published]] = {
    "fp8 blocks": fp8_blocks,
    "fp8 blocks, fmt of MiniMax": lambda: fp8_blocks(fmt="float8_e4m3fn", modules_to_not_convert=["gate", "lm_head"]),
    "fp8 blocks, scales in E8M0": lambda: fp8_blocks(E8M0, fmt="e4m3", scale_fmt="ue8m0"),
    "fp8 per tensor, static": fp8_per_tensor,
    "fp8 per channel": fp8_per_channel,
    "fp8 per channel, method fp8": lambda: fp8_per_channel("fp8"),
    "ct fp8 per tensor": ct_per_tensor,
    "ct fp8 and nvfp4": ct_mixed,
    "ct fp8 and nvfp4, formats by their arguments": lambda: ct_mixed(named=False),
    "modelopt nvfp4": modelopt_nvfp4,
    "modelopt nvfp4 in hf_quant_config.json": lambda: modelopt_nvfp4(beside=True),
    "modelopt fp8": modelopt_fp8,
    "modelopt mixed": modelopt_mixed,
    "deepseek v4": deepseek_v4,
}
