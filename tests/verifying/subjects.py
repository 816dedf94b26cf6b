"""Good checkpoints in every layout, made by this program, and a way to spoil one of them in one place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from tensorsurgeon.checkpoint.header import build_header
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.tensors.dtypes import dtype_of
from tensorsurgeon.tensors.spec import TensorSpec
from tests.checkpoints import FIXTURE, INDEX, Tensors, apply, read_all

GOLDEN: Final = FIXTURE.parent / "golden" / "models"
DENSE: Final = GOLDEN / "source-qwen3"
MOE: Final = GOLDEN / "source-qwen3-moe"

# name -> transform, its parameters, and the source
# fmt: off
RECIPES: Final[dict[str, tuple[str, dict[str, str], Path]]] = {
    "split": ("split-experts", {}, FIXTURE),
    "quark-int8": ("quark-w8a8-int8", {}, MOE),
    "quark-int8-hybrid": ("quark-w8a8-int8", {}, FIXTURE),
    "ct-int": ("ct-w8a8-int8", {}, MOE),
    "ct-int-hybrid": ("ct-w8a8-int8", {}, FIXTURE),
    "ct-w8a16": ("ct-w8a16", {}, FIXTURE),
    "ct-w4a16-g32": ("ct-w4a16-g32", {}, FIXTURE),
    "gptq-hybrid": ("gptq-int4-g128", {}, FIXTURE),
    "autoround-hybrid": ("autoround-int4-g128", {}, FIXTURE),
    "awq-hybrid": ("awq-int4-g128", {}, FIXTURE),
    "fp8-hybrid": ("fp8-block", {}, FIXTURE),
    "nvfp4-hybrid": ("nvfp4a16", {}, FIXTURE),
    "ct-packed": ("quantize-linears", {"format": "ct-packed", "num_bits": "4", "group_size": "32"}, MOE),
    "ct-packed-signed": (
        "quantize-linears", {"format": "ct-packed", "num_bits": "4", "group_size": "32", "signed": "true"}, MOE,
    ),
    "ct-int-signed": ("ct-w8a8-int8", {"signed": "true"}, MOE),
    "quark-int4-signed": ("quantize-linears", {"format": "quark-int4", "group_size": "32", "signed": "true"}, MOE),
    "ct-packed-3bit": ("quantize-linears", {"format": "ct-packed", "num_bits": "3", "group_size": "-1"}, MOE),
    "ct-asym": ("quantize-linears", {"format": "ct-packed", "num_bits": "4", "group_size": "32", "symmetric": "false"}, MOE),
    "ct-float": ("quantize-linears", {"format": "ct-float"}, MOE),
    "ct-nvfp4": ("quantize-linears", {"format": "ct-nvfp4"}, MOE),
    "ct-mxfp4": ("quantize-linears", {"format": "ct-mxfp4"}, MOE),
    "gptq": ("quantize-linears", {"format": "gptq", "group_size": "32"}, MOE),
    "gptq-v2": ("quantize-linears", {"format": "gptq-v2", "group_size": "32"}, MOE),
    "gptq-asym": ("quantize-linears", {"format": "gptq-v2", "group_size": "32", "symmetric": "false"}, MOE),
    "autoround": ("quantize-linears", {"format": "autoround"}, MOE),
    "autoround-awq": ("quantize-linears", {"format": "autoround-awq"}, MOE),
    "awq": ("quantize-linears", {"format": "awq", "group_size": "32"}, MOE),
    "quark-int4": ("quantize-linears", {"format": "quark-int4", "group_size": "32"}, MOE),
    "quark-int4-reorder": ("quantize-linears", {"format": "quark-int4-reorder", "group_size": "32"}, MOE),
    "hf-fp8": ("quantize-linears", {"format": "hf-fp8"}, MOE),
}
# fmt: on


@cache
def _root() -> Path:
    import atexit
    import tempfile

    root = Path(tempfile.mkdtemp(prefix="surgeon-verifying-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@cache
def subject(name: str) -> Path:
    """The folder of a good checkpoint; made once for a session, never to be changed."""
    transform, settings, source = RECIPES[name]
    apply(load_transform(transform, settings), source, _root() / name, workers=1)
    return _root() / name


def source_of(name: str) -> Path:
    return RECIPES[name][2]


def write_shard(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One file in any element type; the safetensors library's NumPy side knows no FP8."""
    specs = [TensorSpec(name, dtype_of(array), array.shape) for name, array in tensors.items()]
    header = build_header(specs, {"format": "pt"})[0]
    path.write_bytes(header + b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values()))


class Spoilt:
    """A copy of a checkpoint whose tensors and config can be changed; ``save`` writes it as one shard.

    ``surgeon.json`` is left out unless ``keep_record``: else every change would be found by its digest alone.
    """

    def __init__(self, origin: Path, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(origin, folder)
        self.tensors: Tensors = {name: array.copy() for name, array in read_all(folder).items()}
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())

    @property
    def quantization(self) -> dict[str, Any]:
        return self.config["quantization_config"]

    @property
    def ct_group(self) -> dict[str, Any]:
        """The first group of a compressed-tensors config."""
        return next(iter(self.quantization["config_groups"].values()))

    def drop(self, *names: str) -> None:
        for name in names:
            del self.tensors[name]

    def drop_module(self, module: str) -> None:
        self.drop(*[name for name in self.tensors if name.rpartition(".")[0] == module])

    def dequantized(self, module: str, source: Path) -> None:
        """Put a module's float weight back, as a publisher does who forgets to tell the config."""
        self.drop_module(module)
        self.tensors[f"{module}.weight"] = read_all(source)[f"{module}.weight"]

    def save(self, *, keep_record: bool = False, copies: bool = True) -> Path:
        for path in [*self.folder.glob("*.safetensors"), self.folder / INDEX]:
            path.unlink(missing_ok=True)
        if not keep_record:
            (self.folder / "surgeon.json").unlink(missing_ok=True)
        write_shard(self.folder / "model.safetensors", self.tensors)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        for name in ("quantize_config.json", "quantization_config.json"):
            if copies and (self.folder / name).exists():
                (self.folder / name).write_text(json.dumps(self.quantization))
        return self.folder
