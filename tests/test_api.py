"""The public API: what __init__ lists exists, and a conversion takes a few lines."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tensorsurgeon as ts
from tensorsurgeon.cli import main

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-qwen3_5-moe"


@pytest.mark.parametrize("name", ts.__all__)
def test_every_public_name_can_be_used_and_is_documented(name: str) -> None:
    value = getattr(ts, name)
    assert name.startswith("__") or (value.__doc__ or "").strip()


def test_no_module_has_the_name_of_a_public_function() -> None:
    """Importing such a module would put it in the function's place."""
    modules = {path.stem for path in (Path(ts.__file__).parent).iterdir()}
    assert not modules & set(ts.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ts.nonsense  # noqa: B018  # looking is the test


def test_a_list_of_ops_is_planned_looked_at_and_run(tmp_path: Path) -> None:
    quantize = ts.Quantize(
        where=("{path*}.experts.{e}.{projection}.weight",),
        exclude=("maybe:mtp.{rest*}",),
        format="ct-packed",
        num_bits=4,
        group_size=32,
    )
    plan = ts.plan([ts.transform("split-experts"), quantize], FIXTURE, max_shard_size="4MB")
    assert len(plan.quantized) == 96
    assert "quantized: 96 of" in ts.describe(plan)
    done: list[int] = []
    ts.apply(plan, tmp_path / "out", workers=2, max_ram="1GB", progress=done.append)
    assert sum(done) == plan.output_bytes
    assert ts.verify(tmp_path / "out", against=FIXTURE).is_sound
    assert not ts.diff(FIXTURE, tmp_path / "out").is_equal
    assert ts.inspect(tmp_path / "out")["tensors"]


@pytest.mark.parametrize("name", ["card", "evaluate", "inspect", "page", "push", "verify"])
def test_a_function_has_the_words_of_its_command(name: str) -> None:
    own = main.commands[name].params
    words = {max(p.opts, key=len).removeprefix("--").replace("-", "_") for p in own} - {"json", "quiet"}
    # verify needs no --require: the caller looks at ``faults``. Workers of verify are the machine's.
    later = {"progress"} | ({"require", "workers"} if name == "verify" else set())
    assert set(inspect.signature(getattr(ts, name)).parameters) ^ words <= later


def test_what_is_published_is_made_by_functions_too(tmp_path: Path) -> None:
    out, text = tmp_path / "out", FIXTURE.parent / "text" / "heldout.txt"
    ts.apply(ts.plan("quark-w8a8-int8", FIXTURE), out)
    first = (out / "README.md").read_text()
    assert "not measured" in first.lower()
    assert (out / "README.base.md").read_bytes() == (FIXTURE / "README.md").read_bytes()
    steps: list[tuple[int, int]] = []
    found = ts.evaluate(
        out,
        text=text,
        against=FIXTURE,
        samples=2,
        sequence_length=16,
        progress=lambda done, total, _: steps.append((done, total)),
    )
    assert isinstance(found, ts.Evaluation)
    assert json.loads((out / "evaluation.json").read_text())["target"]["kl"] == found.targets[0]["kl"] > 0
    assert steps
    assert all(done <= total for done, total in steps)
    again = ts.evaluate([out, out], text=[text], samples=1, sequence_length=16, no_file=True)
    assert len(again.targets) == 2
    assert json.loads((out / "evaluation.json").read_text())["source"] is not None
    card = ts.card(out, base_model="owner/tiny", name="me/tiny", against=FIXTURE)
    assert card == out / "README.md"
    assert "dB" in card.read_text()
    assert "vllm serve me/tiny" in card.read_text()
    pytest.importorskip("altair")
    assert ts.page(out) == out / "surgeon.html"
    assert ts.page(out, out=tmp_path / "page.html").stat().st_size > 500_000
    with pytest.raises(ts.SurgeonError, match="is no folder of a checkpoint"):
        ts.card(tmp_path / "none")


def test_experts_that_were_split_are_fused_again(tmp_path: Path) -> None:
    ts.apply(ts.plan("split-experts", FIXTURE), tmp_path / "split")
    ts.apply(ts.plan("fuse-experts", tmp_path / "split"), tmp_path / "back")
    assert ts.diff(FIXTURE, tmp_path / "back").is_equal


def test_importing_the_package_imports_almost_nothing() -> None:
    code = "import tensorsurgeon, sys; print('numpy' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"


def test_a_step_that_wants_calibration_is_not_rounded_instead(tmp_path: Path) -> None:
    plan = ts.plan(ts.transform("gptq-int4-g128", method="gptq"), FIXTURE)
    with pytest.raises(ts.SurgeonError, match="calibrat"):
        ts.apply(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
