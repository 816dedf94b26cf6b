"""Bad input: one clear message on stderr, an exit code of its own, no traceback, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

from tensorsurgeon import errors
from tensorsurgeon.cli import main
from tensorsurgeon.ops.quantize import Quantize
from tests.checkpoint.test_folder import INDEX_FAULTS, edit_index
from tests.checkpoint.test_header import REFUSED
from tests.checkpoints import FIXTURE, INDEX, folder_bytes, moe_config, read_all, tiny_moe, write_checkpoint

ROOT = Path(__file__).parents[2]


def refused(code: int, *arguments: object, **options: object) -> str:
    """The one message of a command that fails with ``code``."""
    result = CliRunner().invoke(main, list(map(str, arguments)), **options)
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("surgeon: ")
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.fixture
def safe(tmp_path: Path) -> Iterator[Path]:
    """Where the target goes; after the test nothing visible may lie there, and no file of the source may differ."""
    yield tmp_path / "target"
    assert not list((tmp_path / "target").glob("*.safetensors"))
    assert not (tmp_path / "target" / INDEX).exists()


def test_every_error_has_an_exit_code_of_its_own():
    found, queue = [], [errors.SurgeonError]
    while queue:
        queue += queue[0].__subclasses__()
        found.append(queue.pop(0))
    codes = [cls.exit_code for cls in found]
    assert len(found) > 20
    assert len(set(codes)) == len(codes)
    assert not {0, 2} & set(codes)  # success, and click's usage errors


# --- the source --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", REFUSED)
@pytest.mark.parametrize("command", ["plan", "apply"])
def test_a_truncated_or_hostile_header(label, command, tmp_path, safe):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(REFUSED[label][0])
    arguments = [folder] if command == "plan" else [folder, safe]
    assert "model.safetensors: " in refused(21, command, "split-experts", *arguments)
    assert (folder / "model.safetensors").read_bytes() == REFUSED[label][0]


@pytest.mark.parametrize("label", INDEX_FAULTS)
def test_an_index_that_disagrees(label, moe, safe):
    edit, error, _ = INDEX_FAULTS[label]
    edit_index(moe, edit)
    refused(error.exit_code, "apply", "split-experts", moe, safe)


def test_a_missing_shard(moe, safe):
    (moe / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors missing" in refused(23, "apply", "split-experts", moe, safe)
    (moe / INDEX).unlink()
    assert "model-00002-of-00003.safetensors" in refused(23, "apply", "split-experts", moe, safe)


def test_a_config_that_is_no_json(moe, safe):
    (moe / "config.json").write_text("{")
    assert "config.json" in refused(24, "apply", "split-experts", moe, safe)


def test_a_source_that_is_not_there(moe, tmp_path, safe):
    assert "did you mean 'moe'" in refused(20, "apply", "split-experts", tmp_path / "moo", safe)
    (tmp_path / "empty").mkdir()
    assert "found: nothing" in refused(20, "apply", "split-experts", tmp_path / "empty", safe)


# As root everything may be read and written, so the command becomes nobody; it has loaded its modules by then, for
# the interpreter itself may lie where nobody can read.
AS_NOBODY = """
import os, sys
from tensorsurgeon.cli import main
main(["apply", "split-experts", sys.argv[1], sys.argv[2], "--quiet"], standalone_mode=False)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
main(["apply", "split-experts", *sys.argv[3:]])
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become nobody")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that nobody can reach, with a source in it."""
    with tempfile.TemporaryDirectory() as folder:
        source = write_checkpoint(Path(folder) / "source", tiny_moe(), shards=3, config=moe_config())
        (source / "tokenizer.json").write_text("{}")
        for path in source.iterdir():
            path.chmod(0o644)  # the safetensors library writes for the owner alone
        Path(folder).chmod(0o777)
        yield Path(folder)


def as_nobody(place: Path, moe: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", AS_NOBODY, moe, place / "first", place / "source", target]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@needs_root
@pytest.mark.parametrize(
    ("closed", "code"),
    [("model-00001-of-00003.safetensors", 21), ("config.json", 20), (INDEX, 20), ("tokenizer.json", 20), ("", 20)],
)
def test_a_place_that_may_not_be_read(closed, code, place, moe):
    (place / "source" / closed).chmod(0)
    done = as_nobody(place, moe, place / "t")
    assert done.returncode == code, done.stderr
    assert (closed or "source") in done.stderr
    assert "cannot be read: Permission denied" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (place / "t").exists()


@needs_root
@pytest.mark.parametrize("target", ["closed", "closed/t", "source/../closed/deep/t"])
def test_a_place_that_may_not_be_written(target, place, moe):
    (place / "closed").mkdir(mode=0o755)
    done = as_nobody(place, moe, place / target)
    assert done.returncode == 35, done.stderr
    assert "cannot be used: Permission denied" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(place / "closed") == []


# --- the transform -----------------------------------------------------------------------------------------------


def recipe(folder: Path, steps: str, head: str = "") -> Path:
    (folder / "my.yaml").write_text(f"description: for a test\n{head}steps:\n{steps}")
    return folder / "my.yaml"


@pytest.mark.parametrize(
    ("code", "steps", "message"),
    [
        (10, "  - renmae: {where: a, to: b}\n", "my.yaml:3: step 1: unknown op 'renmae'; did you mean 'rename'"),
        (10, "  - rename: {where: a, too: b}\n", "rename has no field 'too'; did you mean 'to'"),
        (10, "  - cast: {where: '{x*}', dtype: FP16}\n", "unknown dtype 'FP16'"),
        (10, "  - keep: {where: 're:('}\n", "is not a valid expression"),
        (10, "  - keep: {where: '{x'}\n", "braces"),
        (31, "  - drop: {where: 'lm_haed.weight'}\n", "matches no tensor; the nearest names are lm_head.weight"),
        (31, "  - cast: {where: '{x*}', exclude: 'nope', dtype: F32}\n", "'nope' matches no tensor"),
        (32, "  - rename: {where: '{x*}.weight', to: 'same'}\n", "same: two rewrites make a tensor of this name"),
        (32, "  - rename: {where: 'lm_head.weight', to: 'model.embed_tokens.weight'}\n", "one exists and stays"),
        (32, "  - rename: {where: 'lm_head.weight', to: '__metadata__'}\n", "cannot be the name"),
        (33, "  - split: {where: 'lm_head.weight', into: [a, b, c]}\n", "axis 0 of [32, 16] does not divide into 3 equal parts"),
        (33, "  - split: {where: 'lm_head.weight', into: [a, b], sizes: [1, 2]}\n", "add up to 3"),
        (33, "  - reshape: {where: 'lm_head.weight', shape: [7, -1]}\n", "512 elements"),
        (33, "  - squeeze: {where: 'lm_head.weight'}\n", "no axis -1 of size 1"),
        (33, "  - transpose: {where: 'model.temperature'}\n", "cannot be transposed"),
        (33, "  - unstack: {where: 'model.temperature', into: '{index}'}\n", "no first axis"),
        (33, "  - concat: {parts: ['lm_head.weight', 'model.layers.0.mlp.gate.weight'], into: x, axis: 1}\n", "cannot be joined"),
        (23, "  - concat: {parts: ['{p*}.q_proj.weight', '{p*}.gate.weight'], into: '{p}.x'}\n", "has no counterpart"),
        (
            23,
            "  - rename: {where: model.layers.1.mlp.gate.weight, to: model.layers.5.mlp.gate.weight}\n"
            "  - stack: {where: 'model.layers.{index}.mlp.gate.weight', into: x}\n",
            "number 1 of 2 is missing",
        ),
        (20, "  - drop: {where: '{x*}'}\n", "no tensor would be left"),
        (33, "  - expect: {where: 'lm_head.weight', shape: [vocab, hidden_size]}\n", "config.json has no vocab"),
    ],
)
def test_a_recipe_that_does_not_fit(code, steps, message, moe, tmp_path, safe):
    assert message in refused(code, "apply", recipe(tmp_path, steps), moe, safe)
    assert not safe.exists()


def test_a_transform_that_is_not_there(moe, safe):
    assert "did you mean 'quark-w8a8-int8'" in refused(10, "apply", "quark-w8a8-int", moe, safe)
    assert "no such transform file" in refused(10, "apply", "./my.yaml", moe, safe)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rul=quark", "has no parameter 'rul'; did you mean 'rule'"),
        ("rule", "--set takes KEY=VALUE"),
        ("=x", "--set takes KEY=VALUE"),
        ("rule=quarck", "must be one of quark, compressed-tensors, found 'quarck'; did you mean 'quark'"),
        ("split_experts=perhaps", "split_experts must be true or false, found 'perhaps'"),
        ("also_exclude={x", "braces"),
        ("also_exclude=nope.weight", "'nope.weight' matches no tensor"),
    ],
)
def test_a_setting_that_means_nothing(setting, message, moe, safe):
    code = 31 if "nope" in setting else 10
    assert message in refused(code, "apply", "quark-w8a8-int8", moe, safe, "--set", setting)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-ram", "lots", "--max-ram must be a size"),
        ("--max-ram", "0", "--max-ram must be"),
        ("--max-shard-size", "5XB", "--max-shard-size must be"),
        ("--max-ram", "9" * 400, "--max-ram must be"),
    ],
)
def test_a_size_that_is_none(option, value, message, moe, safe):
    assert message in refused(10, "apply", "split-experts", moe, safe, option, value)


def test_a_memory_cap_that_no_unit_fits(moe, safe):
    assert "more than --max-ram 100" in refused(34, "apply", "quark-w8a8-int8", moe, safe, "--max-ram", "100")


# --- what is to be quantized -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_nan_or_infinity_in_a_weight(bad, dtype, tmp_path, safe):
    tensors = tiny_moe(dtype=dtype)
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = bad
    source = write_checkpoint(tmp_path / "m", tensors, config=moe_config())
    message = refused(42, "apply", "quark-w8a8-int8", source, safe)
    assert "model.layers.1.self_attn.k_proj.weight" in message
    assert "--resume would stop here again: change the source or the transform and use --overwrite" in message


def test_a_step_that_breaks_its_own_plan_says_whose_fault_that_is(moe, safe, monkeypatch):
    whole = Quantize.apply
    monkeypatch.setattr(Quantize, "apply", lambda *given: [array[:1] for array in whole(*given)])
    message = refused(41, "apply", "quark-w8a8-int8", moe, safe)
    assert "this is a fault of surgeon's own, please report it" in message
    assert "--resume" not in message


def test_nan_in_a_weight_that_stays_as_it_is_is_none_of_our_business(tmp_path):
    tensors = tiny_moe()
    tensors["lm_head.weight"][0, 0] = np.nan
    source = write_checkpoint(tmp_path / "m", tensors, config=moe_config())
    assert CliRunner().invoke(main, ["apply", "quark-w8a8-int8", str(source), str(tmp_path / "t")]).exit_code == 0
    assert read_all(tmp_path / "t")["lm_head.weight"].tobytes() == tensors["lm_head.weight"].tobytes()


def test_stacked_experts_left_unsplit(moe, safe):
    message = refused(33, "apply", "quantize-linears", moe, safe, "--set", "split_experts=false", "--set", "format=quark-int8")
    assert "experts stored in one tensor" in message
    assert "split-experts" in message


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [
        ("gpt_oss", (4, 24, 16)),
        ("llama4", (4, 24, 16)),
        ("unheard_of", (4, 20, 16)),
    ],
)
def test_experts_in_another_layout_are_not_split_wrongly(model_type, shape, tmp_path, safe):
    tensors = tiny_moe()
    for n in range(2):
        tensors[f"model.layers.{n}.mlp.experts.gate_up_proj"] = np.zeros(shape, ml_dtypes.bfloat16)
    source = write_checkpoint(tmp_path / "m", tensors, config=moe_config(model_type=model_type))
    message = refused(33, "apply", "split-experts", source, safe)
    assert "experts." in message
    assert (model_type in message) or "expected num_experts" in message


def test_transposed_experts_are_called_transposed(tmp_path, safe):
    tensors = tiny_moe(hidden=24, inner=8)
    for n in range(2):
        name = f"model.layers.{n}.mlp.experts.gate_up_proj"
        tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))
    source = write_checkpoint(tmp_path / "m", tensors, config=moe_config(hidden=24))
    assert "stored transposed" in refused(33, "apply", "split-experts", source, safe)


def test_without_a_config_the_layout_of_experts_cannot_be_known(tmp_path, safe):
    source = write_checkpoint(tmp_path / "m", tiny_moe())
    assert "put config.json beside the weights" in refused(33, "apply", "split-experts", source, safe)


@pytest.mark.parametrize("again", ["quark-w8a8-int8", "ct-w8a8-int8"])
def test_a_checkpoint_that_is_quantized_already(again, tmp_path, safe):
    assert CliRunner().invoke(main, ["apply", "quark-w8a8-int8", str(FIXTURE), str(tmp_path / "once")]).exit_code == 0
    # What its config says and its tensors do not: it cannot be dequantized on the way, and is not quantized twice.
    config = json.loads((tmp_path / "once" / "config.json").read_text())
    config["quantization_config"]["global_quant_config"]["weight"]["dtype"] = "int3"
    (tmp_path / "once" / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(main, ["apply", again, str(tmp_path / "once"), str(safe)])
    assert 20 <= result.exit_code < 40, result.stderr
    assert "int3" in result.stderr
    assert not safe.exists()


# --- the target --------------------------------------------------------------------------------------------------


def test_the_source_as_target_and_places_that_hold_something(moe, tmp_path, safe):
    before = folder_bytes(moe)
    for target in (moe, moe / "out", tmp_path):
        assert "source" in refused(35, "apply", "split-experts", moe, target, "--overwrite")
    safe.mkdir()
    (safe / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in refused(35, "apply", "split-experts", moe, safe)
    assert "thesis.tex" in refused(35, "apply", "split-experts", moe, safe, "--overwrite")
    assert "no stopped run to resume" in refused(35, "apply", "split-experts", moe, safe, "--resume")
    assert folder_bytes(safe) == {"thesis.tex": b"years of work"}
    assert folder_bytes(moe) == before


def test_a_stopped_run_of_something_else(moe, safe):
    (safe / ".surgeon").mkdir(parents=True)
    (safe / ".surgeon" / "run.json").write_text('{"fingerprint": "other"}')
    assert "--overwrite" in refused(50, "apply", "split-experts", moe, safe, "--resume")
    assert "--resume" in refused(35, "apply", "split-experts", moe, safe)


def test_an_unfinished_output_as_source(moe, safe):
    (moe / ".surgeon").mkdir()
    (moe / ".surgeon" / "run.json").write_text("{}")
    assert "finish it with --resume" in refused(20, "apply", "split-experts", moe, safe)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs the right to mount a small tmpfs")
def test_a_disk_that_is_full(tmp_path):
    source = write_checkpoint(tmp_path / "m", {"w": np.zeros((3 << 20,), np.uint8)})
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        (tmp_path / "nothing.yaml").write_text("description: nothing\nsteps:\n  - keep: {where: w}\n")
        message = refused(35, "apply", tmp_path / "nothing.yaml", source, disk / "t")
        assert "make room or name another disk" in message
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_file_too_large_for_its_owner_stops_the_run_with_a_message(moe, tmp_path):
    """A quota or ulimit speaks up only when files grow; the run must say so and be resumable."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000));"
        "from tensorsurgeon.cli import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "apply", "split-experts", str(moe), str(tmp_path / "t")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 43, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    result = CliRunner().invoke(main, ["apply", "split-experts", str(moe), str(tmp_path / "t"), "--resume"])
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "t" / "surgeon.json").read_text())


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "cast", ""),
        ("apply", "cast", "s", ""),
        ("apply", "cast", "", "t"),
        ("verify", ""),
        ("resume", ""),
        ("inspect", ""),
    ],
)
def test_a_path_of_nothing_is_not_the_current_folder(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`surgeon apply X SOURCE "$OUT"` where OUT was never set."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == 2
    assert "is empty; name a folder" in result.stderr
    assert not list(tmp_path.iterdir())
