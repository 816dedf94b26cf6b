"""Whatever stands in a config or a header, ``verify`` answers with findings and never with a traceback."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.look.inspecting import inspect_checkpoint
from tensorsurgeon.tensors.spec import SpecMap
from tensorsurgeon.verifying import verify
from tensorsurgeon.verifying.described import check_config_copies, check_described
from tensorsurgeon.verifying.dialects import read_claims
from tensorsurgeon.verifying.findings import Findings
from tests.verifying.planting import E1
from tests.verifying.subjects import Spoilt, subject

STRANGE: tuple[Any, ...] = (None, [], {}, 0, -1, 2.5, True, "x", "re:(", ["x", 3], [["x"]], {"x": 1}, {"(": {}}, 10**20)
CONFIGS = ["quark-int8", "quark-int4", "ct-int", "ct-packed", "ct-nvfp4", "gptq-hybrid", "autoround", "awq", "hf-fp8"]
MODULES = ["quark-int8", "quark-int4", "ct-asym", "ct-nvfp4", "ct-mxfp4", "gptq", "awq", "hf-fp8"]


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of nested mappings and the first item of every list."""
    items = tree.items() if isinstance(tree, dict) else list(enumerate(tree))[:1] if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(tree)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n == "gptq-hybrid" else []) for n in CONFIGS])
def test_no_value_of_a_config_stops_the_judge(name: str) -> None:
    checkpoint = open_checkpoint(subject(name))
    config = dict(checkpoint.config)
    for place in places({"quantization_config": config["quantization_config"]}):
        for value in STRANGE:
            spoilt = replace(checkpoint, specs=SpecMap(checkpoint.specs.values(), put(config, place, value)))
            findings = Findings()
            with TensorReader(spoilt) as reader:
                claims = read_claims(spoilt.specs, findings)
                check_described(reader, claims, findings, known_method=claims is not None)
                check_config_copies(spoilt, findings)
            assert all(f.message and f.where for f in (*findings.faults, *findings.notes)), (place, value)


def strange_arrays(array: np.ndarray) -> Iterator[np.ndarray]:
    yield np.zeros((), np.float32)
    yield np.zeros(0, array.dtype)
    yield np.zeros((0, 4), array.dtype)
    yield np.zeros((*array.shape, 2), array.dtype)
    yield np.zeros(array.shape, np.bool_)
    yield np.zeros(array.shape, np.int64)
    yield np.ones(array.shape, np.float64)
    yield array[:1].copy()


@pytest.mark.parametrize("name", MODULES)
def test_no_tensor_of_a_module_stops_the_judge(name: str, tmp_path: Path) -> None:
    spoilt = Spoilt(subject(name), tmp_path / "spoilt")
    for tensor in [t for t in spoilt.tensors if t.startswith(E1)]:
        original = spoilt.tensors[tensor]
        for array in strange_arrays(original):
            if (array.shape, array.dtype) == (original.shape, original.dtype):
                continue
            spoilt.tensors[tensor] = array
            folder = spoilt.save()
            assert not verify(folder, workers=1).is_sound, (tensor, array.shape, array.dtype)
            assert inspect_checkpoint(folder)["tensors"] == len(spoilt.tensors)
        spoilt.tensors[tensor] = original
    assert verify(spoilt.save(), workers=1).is_sound
