"""A publisher's life against the loopback Hub: plan, apply, verify, evaluate, card, page, push, and load what was pushed."""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tensorsurgeon.cli import main
from tests.calibrate.models import TEXT
from tests.checkpoints import FIXTURE
from tests.engines.judging import HERE, ROOT
from tests.hub.conversions import shard_names
from tests.hub.server import Hub
from tests.hub.test_killed import environment

pytestmark = pytest.mark.usefixtures("logged_in")

FEW = ["--samples", "4", "--sequence-length", "64"]


def surgeon(*arguments: str) -> str:
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == 0, (arguments, done.output)
    return str(done.stdout)


def live(hub: Hub, out: Path, transform: str) -> dict[str, Any]:
    """Everything up to the push; what was found on the way."""
    hub.storage.add_model("owner/tiny", FIXTURE)
    surgeon("plan", transform, "owner/tiny")
    surgeon("apply", transform, "owner/tiny", str(out), "--calibration", "builtin", *FEW)
    # So small a model is fetched once, calibration or not.
    assert hub.fetched() == dict.fromkeys(shard_names(FIXTURE), 1)
    surgeon("verify", str(out), "--against", "owner/tiny")
    found = json.loads(surgeon("evaluate", str(out), "--against", "owner/tiny", "--text", str(TEXT), *FEW, "--json"))
    surgeon("card", str(out), "--against", "owner/tiny")
    if find_spec("altair") is not None:  # of the extra [page]
        surgeon("page", str(out))
    assert surgeon("push", str(out), "owner/tiny-int4") == f"{hub.endpoint}/owner/tiny-int4\n"
    return dict(found)


@pytest.mark.slow
def test_from_a_name_to_a_published_repository(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    live(hub, out, "gptq-int4-g128")
    back = hub.storage.check_out("owner/tiny-int4", tmp_path / "back")
    assert {p.name for p in back.iterdir()} - {".gitattributes"} == {p.name for p in out.iterdir() if p.name != ".cache"}
    card = (back / "README.md").read_text()
    assert "base_model: owner/tiny" in card
    assert json.loads((back / "surgeon.json").read_text())["source"]["hub"]["repository"] == "owner/tiny"
    # As whoever downloads it will judge it.
    surgeon("verify", "owner/tiny-int4", "--against", "owner/tiny")


LOAD = """
import sys, numpy, torch, transformers
for name, out in (sys.argv[1:3], sys.argv[3:5]):
    model = transformers.Qwen3_5MoeForConditionalGeneration.from_pretrained(name, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        numpy.save(out, model(input_ids=torch.arange(24)[None] + 3).logits.float().numpy())
"""


@pytest.mark.engine
def test_transformers_loads_the_pushed_quantized_model_by_its_name(hub: Hub, tmp_path: Path) -> None:
    import numpy as np

    out = tmp_path / "out"
    live(hub, out, "ct-w4a16-g32")
    python = ROOT / ".venvs" / "transformers"
    made = subprocess.run(["bash", HERE / "transformers_env.sh", python], check=False, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    hub.requests.clear()
    pushed, here = tmp_path / "pushed.npy", tmp_path / "here.npy"
    command = [python / "bin" / "python", "-c", LOAD, "owner/tiny-int4", pushed, out, here]
    variables = {**environment(hub, tmp_path / "other-cache"), "HF_TOKEN": "hf_of_the_tests", "PYTHONPATH": ""}
    loaded = subprocess.run(command, env=variables, check=False, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert any("/owner/tiny-int4/resolve/" in r.path for r in hub.requests)
    assert np.array_equal(np.load(pushed), np.load(here))
    assert np.isfinite(np.load(here)).all()
