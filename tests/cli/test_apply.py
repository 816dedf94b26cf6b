"""``surgeon plan`` and ``surgeon apply``, as somebody at a terminal meets them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.cli import main
from tests.checkpoints import FIXTURE, assert_same, folder_bytes, moe_config, read_all, tiny_moe, write_checkpoint

ROOT = Path(__file__).parents[2]


def surgeon(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def ok(*arguments: object) -> Result:
    result = surgeon(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def test_apply_writes_and_says_what_it_wrote(moe, tmp_path):
    result = ok("apply", "split-experts", moe, tmp_path / "out")
    assert str(tmp_path / "out") in result.stdout
    found = open_checkpoint(tmp_path / "out").specs
    assert f"{len(found)} tensors" in result.stdout
    assert found["model.layers.1.mlp.experts.3.up_proj.weight"].shape == (8, 16)


def test_json_is_one_document_on_stdout_and_agrees_with_the_output(moe, tmp_path):
    result = ok("apply", "split-experts", moe, tmp_path / "out", "--json", "--max-shard-size", "2000")
    data = json.loads(result.stdout)
    found = open_checkpoint(tmp_path / "out")
    assert data["tensors"] == len(found.specs)
    assert data["bytes"] == found.weight_bytes
    assert data["shards"] == len(found.shards) > 1


def test_plan_agrees_with_what_apply_then_writes_and_writes_nothing(moe, tmp_path):
    before = folder_bytes(moe.parent)
    planned = json.loads(ok("plan", "split-experts", moe, "--json", "--max-shard-size", "2000").stdout)
    assert folder_bytes(moe.parent) == before
    ok("apply", "split-experts", moe, tmp_path / "out", "--max-shard-size", "2000")
    found = open_checkpoint(tmp_path / "out")
    assert planned["output"]["tensors"] == len(found.specs)
    assert planned["output"]["bytes"] == found.weight_bytes
    assert [(s["name"], s["bytes"], s["tensors"]) for s in planned["output"]["shards"]] == [
        (s.path.name, s.file_bytes, len(s.specs)) for s in found.shards
    ]
    on_disk = sum(
        p.stat().st_size for p in (tmp_path / "out").iterdir() if p.name not in ("surgeon.json", *planned["files_copied"])
    )
    assert planned["disk_bytes"] == on_disk
    assert "split-experts" not in ok("plan", "split-experts", moe).stderr


def test_transforms_are_chained_and_parameters_go_to_those_that_have_them(moe, tmp_path):
    (tmp_path / "shout.yaml").write_text(
        "description: renames\nparameters:\n  prefix2: {default: a, description: x}\n"
        "steps:\n  - rename: {where: '{rest*}', to: '${prefix2}.{rest}'}\n"
    )
    ok(
        "apply",
        "split-experts",
        moe,
        tmp_path / "out",
        "--then",
        tmp_path / "shout.yaml",
        "--then",
        "fuse-experts",
        "--set",
        "prefix2=zz",
    )
    assert_same(read_all(tmp_path / "out"), {f"zz.{name}": array for name, array in tiny_moe().items()})


def test_the_same_command_twice_is_refused_and_with_resume_says_that_it_is_done(moe, tmp_path):
    ok("apply", "split-experts", moe, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    assert surgeon("apply", "split-experts", moe, tmp_path / "out").exit_code == 35
    assert "was complete already" in ok("apply", "split-experts", moe, tmp_path / "out", "--resume").stdout
    assert folder_bytes(tmp_path / "out") == before
    ok("apply", "split-experts", moe, tmp_path / "out", "--overwrite")
    assert folder_bytes(tmp_path / "out") == before


def test_quiet_says_nothing_on_stderr_and_otherwise_oddities_are_told(moe, tmp_path):
    (moe / "pytorch_model.bin").write_text("")
    (moe / "model.safetensors.index.json").write_text(
        (moe / "model.safetensors.index.json").read_text().replace('"total_size": ', '"total_size": 1')
    )
    loud = ok("apply", "split-experts", moe, tmp_path / "loud").stderr
    assert "pytorch_model.bin stays behind" in loud
    assert "total_size" in loud
    assert ok("apply", "split-experts", moe, tmp_path / "quiet", "--quiet").stderr == ""


def test_workers_and_memory_change_no_byte(moe, tmp_path):
    outputs = []
    for number, options in enumerate((["--workers", "1"], ["--workers", "4"], ["--max-ram", "100kB"], ["--max-ram", "1TiB"])):
        ok("apply", "ct-w8a8-int8", moe, tmp_path / str(number), *options)
        outputs.append(folder_bytes(tmp_path / str(number)))
    assert all(output == outputs[0] for output in outputs)


def test_the_fixture_becomes_int8_with_everything_else_untouched(tmp_path):
    ok("apply", "quark-w8a8-int8", FIXTURE, tmp_path / "out")
    before, after = read_all(FIXTURE), read_all(tmp_path / "out")
    untouched = [name for name in before if name in after and not name.endswith("_scale")]
    same = [name for name in untouched if before[name].tobytes() == after[name].tobytes()]
    assert any(name.startswith("mtp.") for name in same)
    assert any("visual" in name for name in same)
    assert {"lm_head.weight"} <= set(same)
    for name in set(untouched) - set(same):
        assert after[name].dtype == "int8", name
        assert after[name + "_scale"].shape == before[name].shape[:1]
    for path in FIXTURE.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", "model.safetensors.index.json"):
            # The original's card describes another model than this one.
            name = "README.base.md" if path.name == "README.md" else path.name
            assert (tmp_path / "out" / name).read_bytes() == path.read_bytes()
    old, new = json.loads((FIXTURE / "config.json").read_text()), json.loads((tmp_path / "out" / "config.json").read_text())
    assert new.pop("quantization_config")
    assert new == old


def test_what_a_command_line_cannot_mean_is_a_usage_error(moe, tmp_path):
    for arguments, message in (
        (["apply", "split-experts", moe], "TARGET"),
        (["apply", "split-experts", moe, tmp_path / "t", "--resume", "--overwrite"], "give one of them"),
        (["apply", "split-experts", moe, tmp_path / "t", "--workers", "0"], "--workers"),
        (["apply", "split-experts", moe, tmp_path / "t", "--backend", "cuda"], "--backend"),
        (["aply", "split-experts", moe, tmp_path / "t"], "did you mean 'apply'"),
        (["apply", "--no-such", "x"], "--no-such"),
    ):
        result = surgeon(*arguments)
        assert result.exit_code == 2, arguments
        assert message in result.stderr
    assert not (tmp_path / "t").exists()


def test_help_of_every_command_ends_well():
    assert "apply" in ok("--help").stdout
    for command in main.commands:
        assert "Usage" in ok(command, "--help").stdout


# --- signals, in a real process ----------------------------------------------------------------------------------

# The command with many small and slow units: what takes minutes for a large model.
SLOW = """
import sys, time
from tensorsurgeon.planning import work
from tensorsurgeon.running import executor
work.COPY_BYTES = 4096
executor.COMMIT_BYTES = 1
real = executor.run_unit
def slowly(*arguments):
    time.sleep(0.05)
    return real(*arguments)
executor.run_unit = slowly
from tensorsurgeon.cli import main
main(sys.argv[1:])
"""


def start_slow(*arguments: object, seconds: float = 0.05) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW.replace("0.05", str(seconds)), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(target: Path, process: subprocess.Popen[str]) -> None:
    journal = target / ".surgeon" / "journal.jsonl"
    for _ in range(3000):
        if journal.exists() and journal.stat().st_size:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("the run never journalled a unit")


@pytest.fixture
def slow_source(tmp_path):
    return write_checkpoint(
        tmp_path / "source", tiny_moe(layers=2, hidden=64, inner=32), shards=2, config=moe_config(hidden=64, inner=32)
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_in_order_says_how_to_resume_and_loses_nothing(number, slow_source, tmp_path):
    target = tmp_path / "out"
    process = start_slow("apply", "split-experts", slow_source, target, "--workers", "1")
    wait_for_lines(target, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "stopping after the units under way" in stderr
    assert "continue with: surgeon resume " in stderr
    assert stdout == ""
    assert not list(target.glob("*.safetensors"))
    done = len((target / ".surgeon" / "journal.jsonl").read_text().splitlines())
    assert done >= 1

    result = subprocess.run(
        [sys.executable, "-c", SLOW.replace("0.05", "0"), "apply", "split-experts", slow_source, target, "--resume", "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout)["resumed_units"] == done
    ok("apply", "split-experts", slow_source, tmp_path / "whole")
    assert folder_bytes(target)["model.safetensors"] == folder_bytes(tmp_path / "whole")["model.safetensors"]
    assert not (target / ".surgeon").exists()


def test_an_impatient_second_ctrl_c_also_leaves_a_run_that_resumes(slow_source, tmp_path):
    target = tmp_path / "out"
    process = start_slow("apply", "split-experts", slow_source, target, "--workers", "1", seconds=1.0)
    wait_for_lines(target, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert ok("apply", "split-experts", slow_source, tmp_path / "whole").exit_code == 0
    done = subprocess.run(
        [sys.executable, "-c", SLOW.replace("0.05", "0"), "apply", "split-experts", slow_source, target, "--resume"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert folder_bytes(target)["model.safetensors"] == folder_bytes(tmp_path / "whole")["model.safetensors"]


def test_a_second_command_in_the_same_target_is_refused_while_the_first_runs(slow_source, tmp_path):
    target = tmp_path / "out"
    process = start_slow("apply", "split-experts", slow_source, target, "--workers", "1")
    wait_for_lines(target, process)
    result = surgeon("apply", "split-experts", slow_source, target, "--overwrite")
    assert result.exit_code == 35
    assert "another surgeon is writing here" in result.stderr
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_a_reader_that_goes_away_is_no_fault(tmp_path):
    arguments = ["surgeon", "plan", "split-experts", str(FIXTURE), "--json"]
    script = f"import sys; from tensorsurgeon.cli import run; sys.argv = {arguments}; run()"
    command = ["bash", "-c", f'{sys.executable} -c "$0" | head -c 1 > {tmp_path / "out"}; echo "${{PIPESTATUS[0]}}"', script]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert (tmp_path / "out").read_text() == "{"


def test_a_plan_says_why_each_linear_is_left_alone_and_what_room_there_is(tmp_path):
    text = ok("plan", "quark-w8a8-int8", FIXTURE).stdout
    assert re.search(r"mlp\.gate +x 4 +excluded by role:router", text)
    assert re.search(r"mtp\.layers\.\*\.mlp\.experts +x 1 +excluded by role:mtp", text)
    assert re.search(r"disk +\S+ \S+ needed \(\S+ \S+ free in the current folder\)", text)
    data = json.loads(ok("plan", "quark-w8a8-int8", FIXTURE, "--json").stdout)
    assert data["why_unquantized"].keys() == data["unquantized"].keys()
    assert data["why_unquantized"]["lm_head"] == "head (by its name)"
    assert data["free_bytes"] > 0
    # A name that a later step gave is not the one that the rules saw, so nothing is said of it.
    (tmp_path / "head.yaml").write_text("description: x\nsteps:\n  - rename: {where: [lm_head.weight], to: head.weight}\n")
    renamed = json.loads(ok("plan", "quark-w8a8-int8", FIXTURE, "--then", tmp_path / "head.yaml", "--json").stdout)
    assert "head" in renamed["unquantized"]
    assert "head" not in renamed["why_unquantized"]
