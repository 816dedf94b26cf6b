"""What a stranger's checkpoint or transform does to the command: no stall, no escape sequence, no traceback."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from tensorsurgeon.cli import main
from tensorsurgeon.cli.terminal import one_line, printable
from tests.checkpoints import apply, moe_config, tiny_moe, write_checkpoint

ESCAPES = "\x1b[2J\x1b]0;pwned\x07\x9b31m\u202e"


def surgeon(*arguments: object) -> Result:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code not in ((70,) if arguments[0] == "diff" else (1, 70)), result.output
    return result


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A checkpoint that says escape sequences wherever a checkpoint can say anything."""
    tensors = {**tiny_moe(), f"model.{ESCAPES}.weight": np.zeros((2, 2), np.float32), "model.two\nlines": np.zeros(1, np.int8)}
    config = {
        **moe_config(),
        "model_type": ESCAPES,
        "architectures": [ESCAPES, 7],
        "quantization_config": {"quant_method": ESCAPES},
    }
    folder = write_checkpoint(tmp_path / "hostile", tensors, shards=2, config=config, metadata={"format": "pt", "x": ESCAPES})
    (folder / f"{ESCAPES}.txt").write_text("x")
    (folder / f"{ESCAPES}.gguf").write_text("x")
    (folder / "surgeon.json").write_text(json.dumps({"digest": ESCAPES, "shards": {}}))
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["metadata"]["total_size"] = ESCAPES
    index.write_text(json.dumps(document))
    return folder


def test_no_escape_sequence_reaches_the_terminal(hostile: Path, tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", tiny_moe(), config=moe_config())
    said = ""
    for arguments in (
        ("inspect", hostile),
        ("diff", plain, hostile),
        ("plan", "split-experts", hostile),
        ("plan", "dequantize", hostile),
        ("verify", hostile),
        ("verify", hostile, "--against", plain),
        ("apply", "split-experts", hostile, tmp_path / "out"),
        ("apply", f"{ESCAPES}.yaml", hostile, tmp_path / "out2"),
        ("inspect", tmp_path / ESCAPES),
    ):
        said += surgeon(*arguments).output
    assert "pwned" in said
    assert printable(said) == said


@pytest.mark.parametrize("command", [("inspect",), ("plan", "split-experts")])
def test_a_name_of_two_lines_begins_no_line_of_a_table(command: tuple[str, ...], hostile: Path) -> None:
    assert "two\nlines" not in surgeon(*command, hostile).output


def test_no_name_begins_a_line_of_its_own(tmp_path: Path) -> None:
    """A tensor that is called like a verdict must not be read as one."""
    forged = "x\nsound\nfault  y\tz"
    config = {
        "model_type": forged, "architectures": [forged],
        "quantization_config": {"quant_method": "fp8", "modules_to_not_convert": [forged]}, forged: forged,
    }  # fmt: skip
    tensors = {
        f"model.layers.0.mlp.{forged}.weight": np.full((4, 4), np.nan, np.float32),
        "model.layers.0.mlp.up_proj.weight": np.zeros((4, 4), np.float32),
        f"{forged}.experts.0.up_proj.weight": np.zeros((4, 4), np.float32),
    }
    here = write_checkpoint(tmp_path / "here", tensors, config=config)
    (here / f"{forged.replace('/', '')}.gguf").write_text("x")
    there = write_checkpoint(tmp_path / "there", tiny_moe(), config=moe_config())
    for arguments in (
        ("verify", here),
        ("verify", here, "--against", there),
        ("verify", there, "--against", here),
        ("inspect", here),
        ("diff", here, there),
        ("diff", there, here),
        ("plan", "dequantize", here),
        ("plan", "split-experts", here),
        ("plan", "quantize-linears", here, "--set", "format=ct-int"),
        ("apply", "split-experts", here, tmp_path / "out"),
        ("card", here),
    ):
        lines = surgeon(*arguments).output.splitlines()
        assert not [line for line in lines if line.strip() == "sound" or line.startswith("fault  y")], arguments


@pytest.mark.parametrize("text", ["plain ü 日本 😀\n\tas it is", ""])
def test_what_only_shows_is_printed_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_what_acts_is_written_as_an_escape() -> None:
    assert printable("a\x1b[0m\x07\r\x85\ud800\u202e") == "a\\x1b[0m\\x07\\r\\x85\\ud800\\u202e"
    assert one_line("a\nb\tc") == "a\\nb\\tc"


def test_half_a_character_in_a_config_stays_what_it_was(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "s", tiny_moe(), config={**moe_config(), "note": "\ud800"})
    for arguments in (("inspect", source), ("verify", source), ("plan", "quark-w8a8-int8", source)):
        surgeon(*arguments)
    assert surgeon("apply", "quark-w8a8-int8", source, tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["note"] == "\ud800"


@pytest.mark.parametrize("number", ["9" * 5000, "-" + "9" * 5000, "1" * 19])
def test_a_number_without_end(number: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "s", tiny_moe(), config=moe_config())
    assert surgeon("plan", "ct-w4a16-g32", source, "--set", f"group_size={number}").exit_code == 10


BOMB = "description: x\nsteps:\n- drop:\n    where: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"- drop:\n    where: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    "text", [BOMB, "&a [*a]", "[" * 50_000, "a: " + "9" * 5000, "x" * (1 << 21), "a: !!python/object:os.system 1"]
)
def test_a_transform_that_means_more_than_it_says(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(text)
    source = write_checkpoint(tmp_path / "s", tiny_moe(), config=moe_config())
    began = time.process_time()
    assert surgeon("plan", tmp_path / "t.yaml", source).exit_code == 10
    assert time.process_time() - began < 20


@pytest.mark.parametrize("shape", [(10**8, 2, 0), (10**15, 2, 0), (2**62, 1, 0)])
def test_experts_without_number_and_without_bytes(shape: tuple[int, ...], tmp_path: Path) -> None:
    header = {
        "model.layers.0.mlp.experts.gate_up_proj": {"dtype": "BF16", "shape": list(shape), "data_offsets": [0, 0]},
        "model.layers.0.mlp.experts.down_proj": {"dtype": "BF16", "shape": [shape[0], 0, 1], "data_offsets": [0, 0]},
    }
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    config = {"model_type": "qwen3_moe", "num_experts": shape[0], "moe_intermediate_size": shape[1] // 2, "hidden_size": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    began = time.process_time()
    assert surgeon("plan", "split-experts", tmp_path).exit_code in (21, 33)
    assert time.process_time() - began < 5


def test_a_fault_of_ours_is_one_line_and_vv_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: object) -> None:
        raise ZeroDivisionError(f"deep \x1b inside\n{path}")

    monkeypatch.setattr("tensorsurgeon.look.inspecting.inspect_checkpoint", broken)
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 70
    (line,) = result.stderr.splitlines()
    assert line.startswith("surgeon: ZeroDivisionError: deep \\x1b inside")
    assert "this is a fault of surgeon's own, please report it" in line
    result = CliRunner().invoke(main, ["-vv", "inspect", str(tmp_path)])
    assert "Traceback" in result.stderr


def test_names_of_other_writing_survive(tmp_path: Path) -> None:
    names = ("схема.权重", "a b", 'q"uote', "back\\slash", "tab\tname", "x" * 5000, "..", "emoji.😀", "{braces}", "%s")
    (tmp_path / "s").mkdir()
    save_file({name: np.ones((2, 2), np.float32) for name in names}, tmp_path / "s" / "model.safetensors")
    apply([], tmp_path / "s", tmp_path / "out")
    assert surgeon("verify", tmp_path / "out", "--against", tmp_path / "s").exit_code == 0
    assert surgeon("inspect", tmp_path / "out").exit_code == 0
