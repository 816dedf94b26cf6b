"""A raw AMD Quark export, repaired, is what quark-w8a8-int8 writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.recipes.library import load_transform
from tests.checkpoints import FIXTURE, INDEX, Tensors, apply, assert_same, folder_bytes, read_all

SCALE = ".weight_scale"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("published") / "quark"
    apply(load_transform("quark-w8a8-int8"), FIXTURE, target)
    return target


def raw_export(published: Path, folder: Path, *, zero_point: int = 0) -> Path:
    """The same checkpoint as Quark's exporter leaves it under transformers 5: quantizers' own names, zero points, columns.

    ``zero_point`` goes to one row of one linear.
    """
    shutil.copytree(published, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX, "surgeon.json", ".surgeon"))
    raw: Tensors = {}
    for name, array in read_all(published).items():
        if not name.endswith(SCALE):
            raw[name] = array
            continue
        quantizer = f"{name.removesuffix(SCALE)}.weight_quantizer"
        raw[f"{quantizer}.scale"] = array.reshape(-1, 1)
        raw[f"{quantizer}.zero_point"] = np.zeros(array.shape[0], np.int32)
    raw[next(name for name in sorted(raw) if name.endswith("zero_point"))][-1] = zero_point
    save_file(raw, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_repaired_export_is_the_published_checkpoint(published: Path, tmp_path: Path) -> None:
    raw = raw_export(published, tmp_path / "raw")
    names = read_all(raw).keys()
    assert sum(name.endswith(".weight_quantizer.scale") for name in names) == 127
    assert not any(name.endswith(SCALE) for name in names)
    apply(load_transform("quark-export-rename"), raw, tmp_path / "repaired")
    assert_same(read_all(tmp_path / "repaired"), read_all(published))
    found, wanted = (folder_bytes(folder) for folder in (tmp_path / "repaired", published))
    assert found["config.json"] == wanted["config.json"]
    records = {"surgeon.json"}
    assert found.keys() - records == wanted.keys() - records
    assert {name for name in found.keys() - records if found[name] != wanted[name]} == set()


def test_a_zero_point_that_is_not_zero_is_kept_from_being_dropped(published: Path, tmp_path: Path) -> None:
    raw = raw_export(published, tmp_path / "raw", zero_point=3)
    with pytest.raises(SurgeonError, match="zero_point"):
        apply(load_transform("quark-export-rename"), raw, tmp_path / "repaired")
