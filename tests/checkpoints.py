"""Small checkpoints made with the safetensors library, in every shape that a source can have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import deserialize
from safetensors.numpy import save_file

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.running.run import RunResult, run_plan
from tensorsurgeon.tensors.dtypes import DTYPES

Tensors = dict[str, np.ndarray]
INDEX = "model.safetensors.index.json"
FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-qwen3_5-moe"


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Random bits as finite values: every exponent, signs and zeros, but no NaN, which would compare unequal."""
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-6, 6, shape)).astype(dtype)


def tiny_moe(
    seed: int = 0, *, layers: int = 2, experts: int = 4, hidden: int = 16, inner: int = 8, dtype: Any = ml_dtypes.bfloat16
) -> Tensors:
    """A model in miniature: fused experts, a router, norms, an integer buffer, a scalar and an empty tensor."""
    rng = np.random.default_rng(seed)

    def make(*shape: int, dtype: Any = dtype) -> np.ndarray:
        return random_array(rng, shape, dtype)

    tensors = {"model.embed_tokens.weight": make(32, hidden), "lm_head.weight": make(32, hidden)}
    for n in range(layers):
        at = f"model.layers.{n}"
        tensors |= {
            f"{at}.input_layernorm.weight": make(hidden, dtype=np.float32),
            f"{at}.self_attn.q_proj.weight": make(hidden, hidden),
            f"{at}.self_attn.k_proj.weight": make(hidden // 2, hidden),
            f"{at}.mlp.gate.weight": make(experts, hidden),
            f"{at}.mlp.experts.gate_up_proj": make(experts, 2 * inner, hidden),
            f"{at}.mlp.experts.down_proj": make(experts, hidden, inner),
        }
    tensors["model.rotary.inv_freq"] = make(4, dtype=np.float32)
    tensors["model.position_ids"] = make(1, 7, dtype=np.int64)
    tensors["model.temperature"] = np.asarray(0.5, np.float16)
    tensors["model.unused"] = make(0, 3, dtype=np.float16)
    return tensors


def moe_config(*, experts: int = 4, hidden: int = 16, inner: int = 8, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["TinyForCausalLM"],
        "model_type": "tiny_moe",
        "hidden_size": hidden,
        "moe_intermediate_size": inner,
        "num_experts": experts,
        "a_key_that_nobody_knows": {"kept": True},
        **more,
    }


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
    index: bool | None = None,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Path:
    """Write a folder of ``shards`` files, tensors dealt out at random; ``index`` defaults to more than one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    np.random.default_rng(seed).shuffle(names)
    weight_map = {}
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: np.ascontiguousarray(tensors[name]).reshape(tensors[name].shape) for name in names[number::shards]}
        save_file(part, folder / file, metadata=dict(metadata or {"format": "pt"}))
        weight_map |= dict.fromkeys(part, file)
    if shards > 1 if index is None else index:
        total = sum(t.nbytes for t in tensors.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def write_snapshot(cache: Path, tensors: Mapping[str, np.ndarray], **options: Any) -> Path:
    """The same as a snapshot of the Hub's cache, whose files are links to blobs named by a digest."""
    snapshot = write_checkpoint(cache / "snapshots" / "0123abcd", tensors, **options)
    blobs = cache / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(Path("../../blobs") / f"{number:064x}")
    return snapshot


def read_file(path: Path) -> Tensors:
    """One file, parsed by the safetensors library; its NumPy front end knows no FP8."""
    return {
        name: np.frombuffer(bytes(entry["data"]), DTYPES[entry["dtype"]].numpy).reshape(entry["shape"])
        for name, entry in deserialize(path.read_bytes())
    }


def read_all(folder: Path) -> Tensors:
    """Every tensor of a folder, read with the safetensors library."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = read_file(path)
        assert not tensors.keys() & part.keys(), path
        tensors |= part
    return tensors


def assert_same(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    """Names, dtypes, shapes and every bit."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by relative path: for comparing whole outputs."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def apply(transform: Any, source: Path, target: Path, **options: Any) -> RunResult:
    """Plan and run, as the command line does."""
    plan_options = {k: options.pop(k) for k in ("max_shard_bytes",) if k in options}
    return run_plan(make_plan(transform, open_checkpoint(source), **plan_options), target, **options)
