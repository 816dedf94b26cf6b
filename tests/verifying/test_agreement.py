"""The judge decodes weights by its own reading of each layout; the formats must read the same."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

import tensorsurgeon.verifying
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.formats.registry import detect, quantization_config
from tensorsurgeon.verifying.described import check_described
from tensorsurgeon.verifying.dialects import DIALECTS, read_claims
from tensorsurgeon.verifying.findings import Findings
from tensorsurgeon.verifying.layouts import stored_weight
from tests.verifying.subjects import GOLDEN, RECIPES, subject
from tests.verifying.test_good_checkpoints import PEERS

SUBJECTS = [*(name for name in RECIPES if name != "split"), *(name for name in PEERS if not name.startswith("source"))]


def folder_of(name: str) -> Path:
    return subject(name) if name in RECIPES else GOLDEN / name


@pytest.mark.parametrize("name", SUBJECTS)
def test_judge_and_format_see_the_same_modules_and_codes(name: str) -> None:
    checkpoint = open_checkpoint(folder_of(name), tolerant=True)
    specs = checkpoint.specs
    layout = detect(checkpoint.config, specs)
    config = quantization_config(checkpoint.config)
    assert layout is not None
    assert config is not None
    schemes = layout.read_config(config, specs)
    with TensorReader(checkpoint) as reader:
        findings = Findings()
        modules = check_described(reader, read_claims(specs, findings), findings, known_method=True).modules
        assert modules.keys() == schemes.keys()
        for module in list(modules.values())[::7]:
            scheme = schemes[module.name]
            local = {k: spec._replace(name=k) for k, spec in module.tensors.items()}
            assert layout.weight_shape(local, scheme) == module.shape
            arrays = {k: reader.array(f"{module.name}.{k}") for k in module.tensors}
            quantized = layout.unpack(arrays, scheme)
            mine = stored_weight(reader, module.name, module.claim, module.shape)
            rows = module.shape[0]
            codes = mine.codes(0, rows).astype(np.float32)
            if mine.zero_point is not None:
                codes = codes - np.repeat(mine.zero_point, module.shape[1] // mine.zero_point.shape[1], axis=1)
            if scheme.type == "int":
                theirs = quantized.codes.astype(np.float32)
                if quantized.zero_point is not None:
                    zeros = quantized.zero_point.astype(np.float32)
                    theirs = theirs - np.repeat(zeros, module.shape[1] // zeros.shape[1], axis=1)
                np.testing.assert_array_equal(codes, theirs)
            if scheme.type == "fp8":
                np.testing.assert_array_equal(codes, quantized.codes.astype(np.float32))
            if scheme.type in ("int", "fp8"):
                np.testing.assert_array_equal(mine.scale, quantized.scale.reshape(mine.scale.shape))


@pytest.mark.parametrize("name", SUBJECTS)
def test_rows_do_not_depend_on_where_they_are_cut(name: str) -> None:
    checkpoint = open_checkpoint(folder_of(name), tolerant=True)
    with TensorReader(checkpoint) as reader:
        findings = Findings()
        modules = check_described(reader, read_claims(checkpoint.specs, findings), findings, known_method=True).modules
        module = next(iter(modules.values()))
        weight = stored_weight(reader, module.name, module.claim, module.shape)
        whole = weight.rows(0, module.shape[0])
        cut = [weight.rows(start, min(start + 24, module.shape[0])) for start in range(0, module.shape[0], 24)]
        np.testing.assert_array_equal(whole, np.concatenate(cut))


def test_every_method_of_the_registry_has_a_dialect_here() -> None:
    from tensorsurgeon.formats.registry import FORMATS

    assert {entry.quant_method for entry in FORMATS.values()} <= DIALECTS.keys()


def test_the_judge_shares_no_code_with_what_wrote() -> None:
    """But for planning, which states what was asked for, where a recipe is replayed: the record's, or splitting stacks."""
    replaying = {"recipes.py", "planned.py", "lineage.py", "stacks.py"}
    never = {"formats", "quant", "engines", "calibrate"}
    shared = set()
    for path in Path(tensorsurgeon.verifying.__file__).parent.rglob("*.py"):
        refused = never if path.name in replaying else never | {"planning", "ops", "recipes"}
        for node in ast.walk(ast.parse(path.read_text())):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            # How tables are printed is nobody's secret.
            if (
                module.startswith("tensorsurgeon.")
                and module.split(".")[1] in refused
                and module != "tensorsurgeon.planning.report"
            ):
                shared.add((path.name, module))
    assert not shared
