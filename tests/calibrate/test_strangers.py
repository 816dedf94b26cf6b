"""A stranger's config.json before the layer walk: no Python of theirs is run, no billion layers are built, no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tensorsurgeon.calibrate.walk.building import model_builder
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import CheckpointError, PlanError
from tests.calibrate.models import TEXT
from tests.checkpoints import FIXTURE

CONFIG: dict[str, Any] = json.loads((FIXTURE / "config.json").read_text())


def with_config(folder: Path, **keys: Any) -> Path:
    """The fixture with other keys, which go into ``text_config`` where that has them."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in keys.items():
        inner = key in config["text_config"] and key != "model_type"
        (config["text_config"] if inner else config)[key] = value
    shutil.copytree(FIXTURE, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_python_beside_a_checkpoint_is_not_run_whatever_is_answered(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(FIXTURE, source)
    known = json.loads((source / name).read_text())
    if name == "config.json":
        known |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    else:
        known |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (source / name).write_text(json.dumps(known))
    mark = tmp_path / "ran"
    (source / "evil.py").write_text(f"open({str(mark)!r}, 'w').write('x')\n")
    done = subprocess.run(
        [sys.executable, "-m", "tensorsurgeon", "apply", "ct-w4a16-g32", source, tmp_path / "out", "-q", "--calibration", TEXT,
         "--samples", "2", "--sequence-length", "32"],
        input="y\n" * 9, capture_output=True, text=True, env={"HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert not mark.exists()
    assert "Do you wish to run" not in done.stdout + done.stderr
    assert done.returncode == (20 if name == "config.json" else 0), done.stderr


@pytest.mark.parametrize(
    "keys",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"num_hidden_layers": "x"},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"hidden_act": "__import__"},
        {"model_type": "t5"},
        {"model_type": ["a"]},
        {"rope_parameters": 5},
        {"dtype": "float99"},
        {"layer_types": ["x"] * 4},
        {"vision_config": {"depth": 10**9, "model_type": "qwen3_5_moe_vision"}},
        {"_attn_implementation": "evil/kernel"},
        {"text_config": {**CONFIG["text_config"], "_experts_implementation": "evil/kernel"}},
    ],
    ids=str,
)
def test_a_config_that_no_model_can_be_built_from_is_one_clear_error(keys: dict[str, Any], tmp_path: Path) -> None:
    import torch

    with pytest.raises((CheckpointError, PlanError)) as caught, torch.device("meta"):
        model_builder(open_checkpoint(with_config(tmp_path / "source", **keys)), "eager")()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("architectures", [["pipeline"], ["AutoTokenizer"], [3], "Foo", None])
def test_an_architecture_that_is_no_model_leaves_the_choice_to_the_model_type(architectures: Any, tmp_path: Path) -> None:
    import torch

    source = open_checkpoint(with_config(tmp_path / "source", architectures=architectures))
    with torch.device("meta"):
        assert type(model_builder(source, "eager")()).__name__ == "Qwen3_5MoeForCausalLM"
