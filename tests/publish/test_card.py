"""The card of a quantized checkpoint: first written by apply, refreshed by card, and never a person's words lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from tensorsurgeon.checkpoint.telling import BEGIN
from tensorsurgeon.cli import main
from tensorsurgeon.publish.card import END, weights_digest
from tests.checkpoints import FIXTURE, tiny_moe, write_checkpoint

TEXT = FIXTURE.parent / "text"


def surgeon(*arguments: object, status: int = 0) -> Any:
    run = CliRunner().invoke(main, [str(a) for a in arguments])
    assert run.exit_code == status, run.output
    return run


@pytest.fixture
def made(tmp_path: Path) -> Path:
    surgeon("apply", "gptq-int4-g128", FIXTURE, tmp_path / "out", "--quiet", "--set", "scope=all", "--workers", "1")
    return tmp_path / "out"


def verified(target: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(surgeon("verify", target, "--against", FIXTURE, "--json").stdout)
    assert found["sound"]
    return found


def notes_on_files(target: Path) -> list[dict[str, str]]:
    return [note for note in verified(target)["notes"] if note["kind"].startswith("file")]


def test_what_is_made_of_a_conversion_has_a_card_of_its_own(made: Path, tmp_path: Path) -> None:
    surgeon("apply", "ct-w4a16-g32", made, tmp_path / "again", "--quiet")
    text = (tmp_path / "again" / "README.md").read_text()
    assert "ct-packed (int 4 bits, group_size 32)" in text
    assert "gptq" not in text.partition("## How it was made")[0]
    # How many weights the codes of the source hide, nobody counted.
    assert "over all parameters" not in text
    # The card between the two describes neither: the one that people wrote stays the original's.
    assert (tmp_path / "again" / "README.base.md").read_bytes() == (FIXTURE / "README.md").read_bytes()


def test_what_tells_of_a_checkpoint_is_not_handed_on_to_what_is_made_of_it(made: Path, tmp_path: Path) -> None:
    """Card and page take figures from these files: another checkpoint's KL would stand under this one's name."""
    told = {"evaluation.json", "verification.json", "surgeon.html", "quant_log.csv"}
    for name in told:
        (made / name).write_text("{}")
    for transform in ("dequantize", "ct-w4a16-g32"):
        run = surgeon("apply", transform, made, tmp_path / transform)
        assert "note: evaluation.json stays behind: it was made to tell of the source alone" in run.stderr
        assert not {"evaluation.json", "verification.json", "surgeon.html", "quant_log.csv"} & set(
            os.listdir(tmp_path / transform)
        )
    # Nothing was quantized, so nothing was written in the place of card and plan; what people wrote travels.
    assert not {"README.md", "surgeon_plan.json"} & set(os.listdir(tmp_path / "dequantize"))
    assert (tmp_path / "dequantize" / "README.base.md").read_bytes() == (FIXTURE / "README.md").read_bytes()


def test_apply_writes_a_card_and_the_original_goes_along(made: Path) -> None:
    assert (made / "README.base.md").read_bytes() == (FIXTURE / "README.md").read_bytes()
    front = metadata_load(made / "README.md")
    assert front["base_model"] == "tiny-qwen3_5-moe"
    assert front["base_model_relation"] == "quantized"
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "transformers"
    assert {"gptq", "4-bit", "int4", "tensorsurgeon"} <= set(front["tags"])
    text = ModelCard.load(made / "README.md").text
    assert "surgeon apply gptq-int4-g128 tiny-qwen3_5-moe OUT --set scope=all" in text
    assert "--workers" not in text
    assert "Codes are rounded to nearest (RTN); no calibration data was used." in text
    assert "GPTQ is the name of the layout on disk here, and not of what chose the codes." in text
    assert "| `lm_head` | 1 | head (by its name) |" in text
    assert "vllm serve OWNER/NAME" in text
    assert weights_digest(json.loads((made / "surgeon.json").read_text())) in text
    # What was added is the record's: nothing to note, and overwriting may take it away.
    assert notes_on_files(made) == []
    surgeon("apply", "ct-w8a8-int8", FIXTURE, made, "--overwrite", "-q")
    assert "ct-int" in (made / "README.md").read_text()


def test_the_card_is_the_same_wherever_it_is_written(made: Path, tmp_path: Path) -> None:
    surgeon("apply", "gptq-int4-g128", FIXTURE, tmp_path / "elsewhere", "-q", "--set", "scope=all", "--max-ram", "1GB")
    assert (tmp_path / "elsewhere" / "README.md").read_bytes() == (made / "README.md").read_bytes()
    assert str(tmp_path) not in (made / "README.md").read_text() + (made / "surgeon_plan.json").read_text()


def test_refreshing_keeps_what_a_person_wrote(made: Path) -> None:
    card = (made / "README.md").read_text()
    front, body = card.split("---\n", 2)[1:]
    mine = f"---\n{front}thumbnail: me.png\n---\n# My own title\n\nFor Ada.\n\n{body.strip()}\n\nBelow, too.\n"
    (made / "README.md").write_text(mine.replace("- gptq\n", "- gptq\n- my-own-tag\n").replace("no calibration data", "lies"))
    surgeon("card", made, "--base-model", "Qwen/Qwen3.6", "--name", "me/Qwen3.6-Int4", "--against", FIXTURE)
    again = (made / "README.md").read_text()
    loaded = ModelCard.load(made / "README.md")
    assert loaded.data.to_dict()["thumbnail"] == "me.png"
    assert loaded.data.to_dict()["base_model"] == "Qwen/Qwen3.6"
    assert "my-own-tag" in loaded.data.to_dict()["tags"]
    assert "lies" not in again
    assert loaded.text.startswith("# My own title\n\nFor Ada.\n\n")
    assert again.endswith(f"{END}\n\nBelow, too.\n")
    assert again.count(BEGIN) == 1
    assert "[Qwen/Qwen3.6](https://huggingface.co/Qwen/Qwen3.6)" in again
    assert "vllm serve me/Qwen3.6-Int4" in again
    assert "dB" in again
    # It is a person's file now: overwriting refuses to take it away, and verify has nothing against it.
    assert verified(made)["faults"] == []
    refused = surgeon("apply", "ct-w8a8-int8", FIXTURE, made, "--overwrite", "-q", status=35)
    assert "README.md" in refused.output
    # Names are remembered, and refreshing once more changes nothing.
    surgeon("card", made)
    assert (made / "README.md").read_text() == again


def test_a_refreshed_card_that_nobody_touched_stays_the_program_s_own(made: Path) -> None:
    surgeon("card", made, "--against", FIXTURE)
    assert (made / "verification.json").exists()
    assert notes_on_files(made) == []
    surgeon("apply", "ct-w8a8-int8", FIXTURE, made, "--overwrite", "-q")
    assert not (made / "verification.json").exists()


def test_a_calibrated_card_names_its_data(tmp_path: Path) -> None:
    surgeon(
        "apply", "gptq-int4-g128", FIXTURE, tmp_path / "out", "-q", "--calibration", TEXT / "calibration.txt", "--samples", "4",
        "--sequence-length", "64", "--seed", "3", "--no-polish",
    )  # fmt: skip
    surgeon(
        "evaluate", tmp_path / "out", "--against", FIXTURE, "--text", TEXT / "heldout.txt", "--samples", "3", "--sequence-length",
        "64", "-q",
    )  # fmt: skip
    run = surgeon("card", tmp_path / "out", "--json")
    assert json.loads(run.stdout)["missing"] == [
        "the original's name on the Hub: surgeon card TARGET --base-model OWNER/NAME",
        "a verification: surgeon card TARGET --against SOURCE",
    ]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Calibrated on 4 sequences of 64 tokens, drawn with seed 3, from:" in text
    assert "- calibration.txt (text, 4 sequences, digest `xxh3_128:" in text
    assert "--calibration calibration.txt --samples 4 --sequence-length 64 --seed 3 --no-polish" in text
    assert "RTN" not in text.split("## How it was made")[1].split("##")[0]
    assert "| KL(original, this), nats per token |  | 0." in text
    assert "Not measured yet" not in text


def test_a_hand_written_card_of_a_checkpoint_of_others_is_kept(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_moe(), config={"model_type": "x", "architectures": ["X"]})
    (folder / "README.md").write_text("# Mine\n\nWords.\n")
    surgeon("card", folder)
    text = (folder / "README.md").read_text()
    assert text.endswith(f"{END}\n\n# Mine\n\nWords.\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("---\na: [\n---\nText\n", "front matter is no YAML"),
        ("---\n- a\n---\nText\n", "front matter is list and no mapping"),
        (f"{BEGIN}\ntext\n", "has 1 and 0 of the lines around what is generated"),
        (f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n", "has 2 and 2 of the lines"),
    ],
)
def test_a_card_that_cannot_be_mended_is_left_alone(content: str, message: str, made: Path) -> None:
    (made / "README.md").write_text(content)
    assert message in surgeon("card", made, status=20).output
    assert (made / "README.md").read_text() == content
