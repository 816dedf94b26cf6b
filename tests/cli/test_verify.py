"""``surgeon verify``: the verdict first, exit code 60 for faults, everything in ``--json``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tensorsurgeon.cli import main
from tests.verifying.subjects import GOLDEN, MOE, Spoilt, subject


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, args)])


def test_a_good_checkpoint() -> None:
    result = run(subject("quark-int8"), "--against", MOE)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "sound"
    assert "quark int 8 bits, per channel" in result.stdout
    assert "match surgeon.json" in result.stdout
    kinds = [line for line in lines if line.startswith("model.layers.*.mlp.experts.*.up_proj")]
    assert [line.split()[1:3] for line in kinds] == [["x", "4"]]
    assert float(kinds[0].split()[-1]) > 40
    assert "worst 10:" in lines


def test_an_engine_that_is_required_is_asked_of_the_finished_checkpoint() -> None:
    served = run(subject("ct-packed"), "--require", "vllm:tp=2")
    assert served.exit_code == 0, served.output
    refused = run(subject("quark-int8"), "--require", "sglang")
    assert refused.exit_code == 37
    assert refused.stdout.startswith("sound")
    assert "sglang: refuses: " in refused.stderr
    unread = run(subject("quark-int8"), "--require", "vllm:tq=2")
    assert unread.exit_code == 20 or "'tq' is none of its keys" in unread.stderr
    assert not unread.stdout


def test_json_has_every_weight() -> None:
    result = run(subject("quark-int8"), "--against", MOE, "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 0
    assert data["sound"] is True
    assert data["faults"] == []
    assert len(data["weights"]) == data["quantized_modules"]["int 8 bits, per channel"] == 16
    assert sum(kind["count"] for kind in data["kinds"]) == 16
    assert [w["snr_db"] for w in data["worst"]] == sorted(w["snr_db"] for w in data["weights"])[:10]


def test_weights_without_an_error_are_exact_and_json_stays_json() -> None:
    result = run(subject("gptq"), "--against", subject("gptq"), "--json")
    assert json.loads(result.stdout, parse_constant=pytest.fail)["sound"] is True


def test_faults_are_listed_and_the_exit_code_is_60(tmp_path: Path) -> None:
    spoilt = Spoilt(subject("quark-int8"), tmp_path / "spoilt")
    for expert in range(4):
        spoilt.drop(f"model.layers.0.mlp.experts.{expert}.up_proj.weight_scale")
    spoilt.tensors["model.layers.0.self_attn.q_proj.weight_scale"][0] = float("nan")
    folder = spoilt.save()
    result = run(folder)
    assert result.exit_code == 60
    lines = result.stdout.splitlines()
    assert lines[0] == "5 faults"
    # Four experts with the same fault are one line; --json has all of them.
    assert sum(line.startswith("fault") for line in lines) == 2
    assert "and 3 more such: model.layers.*.mlp.experts.*.up_proj.weight_scale" in result.stdout
    assert "self_attn.q_proj.weight_scale[0]: nan is not finite" in result.stdout
    data = json.loads(run(folder, "--json").stdout)
    assert len(data["faults"]) == 5
    assert {f["kind"] for f in data["faults"]} == {"missing-tensor", "scale"}


def test_one_fault_is_one_fault(tmp_path: Path) -> None:
    spoilt = Spoilt(subject("quark-int8"), tmp_path / "spoilt")
    spoilt.tensors["model.layers.0.self_attn.q_proj.weight_scale"][0] = float("nan")
    assert run(spoilt.save()).stdout.splitlines()[0] == "1 fault"


def test_what_is_no_checkpoint_is_one_line_on_stderr(tmp_path: Path) -> None:
    result = run(tmp_path / "nowhere")
    assert result.exit_code == 20
    assert result.stdout == ""
    assert result.stderr.startswith("surgeon: ")
    assert result.stderr.count("\n") == 1


def test_a_checkpoint_of_another_tool_is_told_what_it_is() -> None:
    result = run(GOLDEN / "llmcompressor_file-w4a16-qwen3-moe")
    assert result.exit_code == 0
    assert "compressed-tensors pack-quantized" in result.stdout


def test_verify_imports_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from click.testing import CliRunner; from tensorsurgeon.cli import main;"
        f"r = CliRunner().invoke(main, ['verify', {str(subject('gptq'))!r}, '--against', {str(MOE)!r}]);"
        "assert r.exit_code == 0, r.output; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
