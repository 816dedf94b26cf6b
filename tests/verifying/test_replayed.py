"""What the recorded recipe makes is what the checkpoint must hold: surgery of every kind is judged, and not faulted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorsurgeon.ops.registry import OPS, op_named
from tensorsurgeon.verifying import Verification, verify
from tests.checkpoints import apply
from tests.verifying.subjects import DENSE, MOE, Spoilt, subject, write_shard


def op(name: str, **fields: Any) -> Any:
    return op_named(name)(**fields)


SURGERY: dict[str, Callable[[], list[Any]]] = {
    "transpose": lambda: [op("transpose", where=("{path*}.mlp.up_proj.weight",))],
    "transpose, then quantize": lambda: [
        op("transpose", where=("{path*}.mlp.up_proj.weight",)),
        op("quantize", where=("{path*}.mlp.{p}_proj.weight",), format="ct-int"),
    ],
    "rename, then quantize": lambda: [
        op("rename", where=("model.{rest*}",), to="tower.{rest}"),
        op("quantize", where=("{path*}.mlp.{p}_proj.weight",), format="ct-packed", num_bits=4, group_size=32),
    ],
    "quantize, then rename": lambda: [
        op("quantize", where=("{path*}.mlp.{p}_proj.weight",), format="ct-int"),
        op("rename", where=("{path*}.mlp.up_proj.{t}",), to="{path}.mlp.up_proj.{t}"),
    ],
    "rename, then cast": lambda: [
        op("rename", where=("model.{rest*}",), to="tower.{rest}"),
        op("cast", where=("tower.{rest*}",), dtype="F16"),
    ],
    "rename, then drop": lambda: [
        op("rename", where=("model.{rest*}",), to="tower.{rest}"),
        op("drop", where=("tower.layers.1.{rest*}",)),
    ],
    "split and concat along rows": lambda: [
        op("split", where=("{path*}.q_proj.weight",), into=("{path}.a.weight", "{path}.b.weight"), axis=0),
        op("concat", parts=("{path*}.k_proj.weight", "{path*}.v_proj.weight"), into="{path}.kv_proj.weight", axis=0),
    ],
    "split and concat along columns": lambda: [
        op("split", where=("{path*}.q_proj.weight",), into=("{path}.a.weight", "{path}.b.weight"), axis=1),
        op("concat", parts=("{path*}.k_proj.weight", "{path*}.v_proj.weight"), into="{path}.kv_proj.weight", axis=1),
    ],
    "cast, then transpose": lambda: [
        op("cast", where=("{path*}.mlp.up_proj.weight",), dtype="F32"),
        op("transpose", where=("{path*}.mlp.up_proj.weight",)),
    ],
    "nvfp4 of a renamed tower": lambda: [
        op("rename", where=("model.{rest*}",), to="tower.{rest}"),
        op("quantize", where=("{path*}.self_attn.{p}_proj.weight",), format="ct-nvfp4"),
    ],
    "keep": lambda: [op("keep", where=("{path*}.mlp.{p}_proj.weight",))],
    "nothing": list,
}


def made(name: str, folder: Path) -> Path:
    apply(SURGERY[name](), DENSE, folder / "out", workers=1)
    return folder / "out"


def config_free(found: Verification) -> list[str]:
    """Faults but for what config.json says of sizes that surgery changed on purpose."""
    return [str(fault) for fault in found.faults if not fault.where.startswith("config.json")]


@pytest.mark.parametrize("name", SURGERY)
def test_surgery_is_judged_and_not_faulted(name: str, tmp_path: Path) -> None:
    found = verify(made(name, tmp_path), DENSE)
    assert not config_free(found)
    assert found.equal_bytes or name == "rename, then cast"
    assert not [note for note in found.notes if note.kind == "not-judged"]


@pytest.mark.parametrize("name", SURGERY)
def test_one_changed_tensor_is_found_in_all_surgery(name: str, tmp_path: Path) -> None:
    """Without digests of bytes, so that only the recipe can tell."""
    out = made(name, tmp_path)
    spoilt = Spoilt(out, tmp_path / "spoilt")
    for tensor, array in spoilt.tensors.items():
        if tensor.endswith("weight") and array.dtype.itemsize > 1 and array.ndim == 2 and "embed" not in tensor:
            array[3] = -array[3] * 2
            break
    else:
        pytest.fail("nothing to change")
    record = json.loads((out / "surgeon.json").read_text())
    folder = spoilt.save(keep_record=True)
    (folder / "surgeon.json").write_text(json.dumps({**record, "shards": {}}))
    found = verify(folder, DENSE)
    assert [f for f in found.faults if f.where.startswith(tensor.removesuffix(".weight"))], [str(f) for f in found.faults]


def test_what_the_recipe_does_not_make_is_a_fault(tmp_path: Path) -> None:
    out = made("rename, then quantize", tmp_path)
    spoilt = Spoilt(out, tmp_path / "spoilt")
    spoilt.tensors["more.weight"] = np.ones((2, 2), np.float32)
    spoilt.drop("tower.norm.weight")
    found = verify(spoilt.save(keep_record=True), DENSE)
    assert {("new", "more.weight"), ("missing-tensor", "tower.norm.weight")} <= {(f.kind, f.where) for f in found.faults}


def test_one_new_tensor_stands_for_one_lost_and_no_more(tmp_path: Path) -> None:
    bias = np.linspace(0, 1, 64, dtype=np.float32)
    for folder, names in (("source", ("a.bias", "b.bias")), ("out", ("c.bias",))):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "model.safetensors", dict.fromkeys(names, bias))
    found = verify(tmp_path / "out", tmp_path / "source")
    assert [(f.kind, f.where) for f in found.faults] == [("lost", "b.bias")]


HOSTILE: dict[str, tuple[Any, str]] = {
    "a number": ([1], "no list of steps"),
    "no list": (5, "no list of steps"),
    "nothing": (None, "no list of steps"),
    "a call inside": (["Drop(where=open('x'))"], "is none"),
    "a number for patterns": (["Drop(where=5)"], "does not fit this source"),
    "numbers for patterns": (["Drop(where=(1, 2))"], "does not fit this source"),
    "brackets": (["(" * 20000], "is none"),
    "signs": (["Drop(where=" + "-" * 50000 + "1)"], "is none"),
    "a zero byte": (["\0"], "is none"),
    "many steps": (["Expect()"] * 5000, "no list of steps"),
    "a long step": (["Drop(where=('" + "a" * 100000 + "',))"], "is none"),
    "a pattern that runs away": ([r"Drop(where=('re:(m+o*)+x',))"], "take forever"),
    "a template that runs away": (["Drop(where=('" + "".join(f"{{a{i}*}}" for i in range(20)) + "',))"], "take forever"),
    "no expression": (["Drop(where=('re:(',))"], "does not fit this source"),
    "no such field": (["Drop(what=('a',))"], "no field 'what'"),
    "a collision": (["Rename(where=('model.{x*}',), to='same')"], "does not fit this source"),
    "nothing matches": (["Rename(where=('nothing',), to='same')"], "does not fit this source"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_a_finding(name: str, tmp_path: Path) -> None:
    recipe, words = HOSTILE[name]
    made = Spoilt(subject("quark-int8"), tmp_path / "out")
    record = json.loads((subject("quark-int8") / "surgeon.json").read_text())
    folder = made.save(keep_record=True)
    (folder / "surgeon.json").write_text(json.dumps({**record, "recipe": recipe}))
    found = verify(folder, MOE)
    assert [f for f in found.faults if f.kind == "recipe" and words in f.message], [str(f) for f in found.faults]


def test_an_op_of_somebody_else_is_noted_and_names_are_compared(tmp_path: Path) -> None:
    record = json.loads((subject("quark-int8") / "surgeon.json").read_text())
    made = Spoilt(subject("quark-int8"), tmp_path / "out")
    folder = made.save(keep_record=True)
    (folder / "surgeon.json").write_text(json.dumps({**record, "recipe": [*record["recipe"], "MyOwnOp(size=3)"]}))
    found = verify(folder, MOE)
    assert [n.kind for n in found.notes if n.where == "surgeon.json"] == ["unknown-op"]
    assert found.compared


def test_every_op_has_surgery_here() -> None:
    used = {type(step) for steps in SURGERY.values() for step in steps()}
    # Splitting experts has a test of its own; repacking and dequantizing: test_structure, test_good_checkpoints.
    others = {
        "dequantize",
        "expect",
        "repack",
        "reshape",
        "round",
        "split_experts",
        "squeeze",
        "stack",
        "stack_experts",
        "unsqueeze",
        "unstack",
    }
    assert {name for name in OPS if op_named(name) not in used} == others


def test_experts_stored_transposed_and_in_turn_are_judged(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    experts, hidden, inner = 4, 64, 96
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": rng.normal(size=(experts, hidden, 2 * inner)),
        "model.layers.0.mlp.experts.down_proj": rng.normal(size=(experts, inner, hidden)),
        "model.layers.0.mlp.experts.gate_up_proj_bias": rng.normal(size=(experts, 2 * inner)),
        "model.layers.0.mlp.experts.down_proj_bias": rng.normal(size=(experts, hidden)),
    }
    (tmp_path / "source").mkdir()
    write_shard(tmp_path / "source" / "model.safetensors", {name: a.astype(np.float32) for name, a in tensors.items()})
    config = {"model_type": "gpt_oss", "hidden_size": hidden, "intermediate_size": inner, "num_local_experts": experts}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    quantize = op("quantize", where=("{path*}_proj.weight",), format="ct-int")
    for folder, steps in (("out", [op("split_experts")]), ("quantized", [op("split_experts"), quantize])):
        apply(steps, tmp_path / "source", tmp_path / folder, workers=1)
        found = verify(tmp_path / folder, tmp_path / "source")
        assert not config_free(found)
        assert not [note for note in found.notes if note.kind == "not-judged"]
        assert len(found.compared) == (3 * experts if folder == "quantized" else 0)
        assert all(f.snr_db > 30 for f in found.compared)
    gate = "model.layers.0.mlp.experts.1.gate_proj.weight"
    spoilt = Spoilt(tmp_path / "out", tmp_path / "spoilt")
    spoilt.tensors[gate][5] = spoilt.tensors[gate][6]
    found = verify(spoilt.save(keep_record=True), tmp_path / "source")
    assert ("bytes", gate) in {(f.kind, f.where) for f in found.faults}
