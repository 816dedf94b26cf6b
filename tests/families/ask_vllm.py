"""What vLLM's model classes say of themselves: made by building them, tiny and without weights.

    .venvs/vllm/bin/python -m tests.families.ask_vllm [FAMILY...] [--to tensorsurgeon/models/asked/vllm.json]

The environment is tests/engines/vllm_env.sh's. Every class is built from a row of `table.yaml` with a quantization config that
records who asks it for a method. So a module is one of two kinds: it *takes* a quantization config (a weight there may be
quantized), or it *never* does (the class builds it without one, and codes under its name cannot be loaded). A class that
cannot be built says why; `read.yaml` then holds what was read in its source, with the line.

Names are the engine's, with `*` for numbers. Without --to, JSON goes to stdout. With FAMILY and --to, only theirs are replaced.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

os.environ |= {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

import torch
import transformers
import vllm
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import config as fused_moe
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as plain_moe
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm.models.qwen4_exp.common import ngram_embedding
from vllm.models.qwen4_exp.nvidia import model as qwen4_exp  # noqa: F401  before qsa, which imports it
from vllm.models.qwen4_exp.nvidia import qsa
from vllm.platforms.cpu import CpuPlatform
from vllm.triton_utils import triton

from tests.families.asked import as_text, by_architecture, replace
from tests.families.table import FAMILIES, Family

PROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "CLIPImageProcessor"}
GENERIC = re.compile(r"LayerNorm\.|weight_[gv]\$")  # renamings that the Transformers backend adds to every class


class Recorder(CompressedTensorsConfig):
    """A compressed-tensors config that gives everybody the unquantized method, and remembers who asked."""

    def __init__(self) -> None:
        super().__init__(target_scheme_map={}, ignore=[], quant_format="pack-quantized", config={})
        self.asked: dict[str, str] = {}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        self.asked[prefix] = type(layer).__name__
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def get_scheme_dict(self, layer: nn.Module | None, layer_name: str | None = None) -> None:
        return None


def unpinned(empty: Any, *size: Any, **options: Any) -> torch.Tensor:
    """``torch.empty`` where no memory can be pinned."""
    return empty(*size, **{**options, "pin_memory": False})


def set_aside_platform() -> set[str]:
    """Leave out what a CPU refuses when a model is built though it matters only when one runs, and return what was left out.

    The set fills while models are built. Attention backends, kernels for experts and those made in CuTe, pinned memory, streams:
    none of them decides which module gets a quantization config.
    """
    used: set[str] = set()
    backend = CpuPlatform.get_attn_backend_cls
    experts = plain_moe.select_unquantized_moe_backend

    def attention(selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        if attn_selector_config.use_sparse:
            used.add("sparse attention")
        return backend(selected_backend, attn_selector_config._replace(use_sparse=False), num_heads)

    def moe(moe_config: Any) -> Any:
        try:
            return experts(moe_config)
        except NotImplementedError:
            used.add("kernels for these experts")
            return UnquantizedMoeBackend.CPU, None

    CpuPlatform.get_attn_backend_cls = staticmethod(attention)
    plain_moe.select_unquantized_moe_backend = moe
    fused_moe.current_platform = SimpleNamespace(is_cuda_alike=lambda: True, is_xpu=lambda: False, is_rocm=lambda: False)
    sys.modules["vllm.model_executor.kernels.linear.cute_dsl.gemm_rs_ar"] = MagicMock()
    torch.empty = partial(unpinned, torch.empty)
    ngram_embedding.get_accelerator_view_from_cpu_tensor = lambda tensor: tensor
    qsa.is_flash_attn_varlen_func_available = lambda: True
    triton.set_allocator = lambda allocator: None
    triton.next_power_of_2 = lambda number: 1 << (number - 1).bit_length()
    torch.cuda.Event = torch.cuda.Stream = torch.Event = torch.Stream = MagicMock
    registry._run_in_subprocess = lambda function: function()  # vLLM looks at each class in a process of its own, 10 s each
    return used


@contextlib.contextmanager
def engine_config(family: Family, **more: Any) -> Iterator[VllmConfig]:
    """The engine's config for a tiny model of a family, current while its class is built."""
    with tempfile.TemporaryDirectory() as folder:
        config = {**family.config, "architectures": [family.architecture], "dtype": "bfloat16"}
        Path(folder, "config.json").write_text(json.dumps(config))
        Path(folder, "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        made = EngineArgs(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=64,
            disable_log_stats=True,
            enable_prefix_caching=False,
            **more,
        ).create_engine_config()
        with set_current_vllm_config(made):
            yield made


def fold(name: str) -> str:
    """Numbers that stand alone become `*`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def renamed(mapper: Any) -> dict[str, Any]:
    """How a name on disk becomes a name in the engine: the parts of its `hf_to_vllm_mapper` that are not empty, in its order."""
    if mapper is None:
        return {}
    renamings = [[list(r.source_patterns), list(r.target_patterns)] for r in mapper.orig_to_new_renaming]
    parts = {
        "renaming": [pair for pair in renamings if not any(map(GENERIC.search, pair[0]))],
        "regex": {pattern.pattern: new for pattern, new in mapper.orig_to_new_regex.items()},
        "substring": dict(mapper.orig_to_new_substr),
        "stacked": {fold(old): [fold(new), shard] for old, (new, shard) in mapper.orig_to_new_stacked.items()},
        "prefix": dict(mapper.orig_to_new_prefix),
        "suffix": dict(mapper.orig_to_new_suffix),
    }
    return {key: value for key, value in parts.items() if value}


def expert_names(model: nn.Module) -> dict[str, str]:
    """The name on disk of each matrix of an expert, by the engine's own word for it (w1 gate, w2 down, w3 up)."""
    mapping = getattr(model, "get_expert_mapping", None)
    try:
        rows = mapping() if mapping else []
    except (AttributeError, NotImplementedError, TypeError):
        rows = []
    lists = [module for module in model.modules() if type(module) is RoutedExperts]  # others load by hand
    if not rows and lists:
        found = lists[0]
        names = named_by_hand(model) or (found.ckpt_gate_proj_name, found.ckpt_down_proj_name, found.ckpt_up_proj_name)
        return {shard: name for shard, name in zip(("w1", "w2", "w3"), names, strict=True) if name}
    return {shard: re.sub(r"^experts\.\d+\.|\.$", "", weight) for _, weight, expert, shard in rows if expert == 0}


def named_by_hand(model: nn.Module) -> tuple[str, ...]:
    """Names of gate, down and up that a `load_weights` of the class's own file looks for instead of the experts' own."""
    keys = ("ckpt_gate_proj_name", "ckpt_down_proj_name", "ckpt_up_proj_name")
    for node in ast.walk(ast.parse(inspect.getsource(sys.modules[type(model).__module__]))):
        given = {word.arg: word.value for word in node.keywords} if isinstance(node, ast.Call) else {}
        names = [given[key].value for key in keys if isinstance(given.get(key), ast.Constant)]
        if len(names) == len(keys) and "gate_up_proj" not in names:
            return tuple(map(str, names))
    return ()


def stacked_on_loading(model: nn.Module, leaves: set[str]) -> dict[str, list[str]]:
    """What its `load_weights` puts together without declaring it: rows (module, part, shard) of `stacked_params_mapping`.

    They are local to a function, so they are read from the source of the modules that the model is made of. Only
    the modules named in ``leaves`` count: a file may serve several architectures.
    """
    found: dict[str, list[str]] = {}
    for file in sorted({type(part).__module__ for part in model.modules() if ".models." in type(part).__module__}):
        for node in ast.walk(ast.parse(inspect.getsource(sys.modules[file]))):
            if not isinstance(node, ast.Tuple) or len(node.elts) != 3:
                continue
            # The shard may be computed; module and part are written out.
            texts = [part.value for part in node.elts[:2] if isinstance(part, ast.Constant)]
            if len(texts) == 2 and all(isinstance(text, str) for text in texts):
                module, part = texts[0].strip("."), texts[1].strip(".")
                if module.split(".")[-1] in leaves and part not in found.setdefault(module, []):
                    found[module].append(part)
    return found


def ask(family: Family, *, mtp: bool = False) -> dict[str, Any]:
    """Build the class, or the one that the engine has for the MTP head, and say who asked, who did not, and what it declares."""
    speculative = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}} if mtp else {}
    with engine_config(family, **speculative) as config:
        recorder = config.quant_config = Recorder()
        model = initialize_model(config, model_config=config.speculative_config.draft_model_config if mtp else None)
    never: dict[str, str] = {}
    paths: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase | nn.Linear):
            continue
        prefix = getattr(module, "prefix", "") or name
        if prefix in recorder.asked and fold(prefix) != fold(name):
            paths[fold(prefix)] = fold(name)
        elif prefix not in recorder.asked and name not in recorder.asked:
            never[fold(name)] = type(module).__name__
    leaves = {name.split(".")[-1] for name in [*recorder.asked, *never]}
    found = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "takes": {fold(name): kind for name, kind in recorder.asked.items() if name and "Attention" not in kind},
        "never": never,
        "paths": paths,
        "fused": {name: list(parts) for name, parts in (getattr(model, "packed_modules_mapping", None) or {}).items()},
        "stacked": stacked_on_loading(model, leaves),
        "names": renamed(getattr(model, "hf_to_vllm_mapper", None)),
        "experts": expert_names(model),
    }
    return {key: value for key, value in found.items() if value}


def attempt(family: Family, aside: set[str], *, mtp: bool = False) -> dict[str, Any]:
    """What `ask` found, or why the engine would not build the class: whatever it raises is an answer."""
    aside.clear()
    try:
        found = ask(family, mtp=mtp)
        return {"how": "asked", **({"aside": sorted(aside)} if aside else {}), **found}
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        line = re.sub(r"/tmp/\S+", "FOLDER", re.sub(r"0x[0-9a-f]+", "0x", line))
        return {"how": "refused", "reason": f"{type(error).__name__}: {line[:200]}"}


def has_mtp(family: Family) -> bool:
    return family.layout == "mtp" or bool(family.config.get("num_nextn_predict_layers"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", metavar="FAMILY")
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    aside = set_aside_platform()
    with engine_config(FAMILIES["qwen3_moe"]):  # a mixture, so that the group for experts is made
        init_distributed_environment(1, 0, f"file://{tempfile.gettempdir()}/ask-vllm-{os.getpid()}", 0, "gloo")
        initialize_model_parallel(1, 1)
    torch.set_default_dtype(torch.bfloat16)
    answers: dict[str, Any] = {}
    for name in arguments.family or [name for name, family in FAMILIES.items() if family.asked]:
        answers[name] = attempt(FAMILIES[name], aside)
        if has_mtp(FAMILIES[name]):
            answers[name]["mtp"] = attempt(FAMILIES[name], aside, mtp=True)
        print(
            name,
            answers[name]["how"],
            answers[name].get("reason", ""),
            answers[name].get("mtp", {}).get("reason", ""),
            file=sys.stderr,
            flush=True,
        )
    made = {
        "engine": f"vllm {vllm.__version__}",
        "transformers": transformers.__version__,
        "architectures": by_architecture(answers),
    }
    if arguments.to is None:
        sys.stdout.write(as_text(made))
    else:
        replace(arguments.to, made, every=not arguments.family)


if __name__ == "__main__":
    main()
