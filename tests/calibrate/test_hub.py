"""Data sets of the Hub by name: `datasets` itself reads them, here from a cache as an earlier run with a connection left it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from tensorsurgeon.calibrate.data.documents import open_documents
from tests.calibrate.commands import FEW, assert_finite, calibrate, record, refused
from tests.calibrate.models import TEXT

CHAT = [{"role": "user", "content": "hello " * 30}, {"role": "assistant", "content": "def f(): pass\n" * 30}]
TEXTS = {"train": [f"x{n} = 1\n" * 60 for n in range(20)], "test": [f"y{n} = 2\n" * 60 for n in range(5)]}
# name -> config -> split -> rows
PUBLISHED: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {
    "people/texts": {"default": {split: [{"text": text} for text in texts] for split, texts in TEXTS.items()}},
    "people/chats": {
        "short": {"train_sft": [{"messages": CHAT[:1], "score": 0.5}] * 3},
        "long": {"train_sft": [{"messages": CHAT, "score": 0.5}] * 3},
    },
    "people/pairs": {"default": {"train": [{"question": "x", "answer": "y"}] * 4}},
}


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of what is PUBLISHED: `datasets` prepares folders, and their results are filed under the names on the Hub."""
    folder = tmp_path_factory.mktemp("hub")
    for name, configs in PUBLISHED.items():
        short = name.partition("/")[2]
        for config, splits in configs.items():
            data = folder / config / short / "data"
            data.mkdir(parents=True)
            for split, rows in splits.items():
                (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            files = {split: str(data / f"{split}.jsonl") for split in splits}
            datasets.load_dataset(str(data.parent), data_files=files, cache_dir=str(folder / config / "made"))
            made = next((folder / config / "made" / short).glob("*/*/*/dataset_info.json"))
            made.write_text(json.dumps(json.loads(made.read_text()) | {"config_name": config}))
            kept = folder / "cache" / name.replace("/", "___") / config / "0.0.0"
            kept.mkdir(parents=True)
            made.parent.rename(kept / ("0" * 40))
    return folder / "cache"


@pytest.fixture(autouse=True)
def _offline(downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", downloaded)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("location", "wanted"),
    [
        ("people/texts", TEXTS["train"]),
        ("people/texts:test", TEXTS["test"]),
        ("people/texts:default:test", TEXTS["test"]),
        ("people/texts:train[:10%]", TEXTS["train"][:2]),
        ("people/texts:test[-2:]", TEXTS["test"][-2:]),
        ("people/texts:train+test", TEXTS["train"] + TEXTS["test"]),
        ("people/chats:long:train_sft", [CHAT] * 3),
    ],
)
def test_a_name_may_say_config_and_split(location: str, wanted: list[Any]) -> None:
    documents = open_documents(location)
    assert [documents.read(n) for n in range(documents.count)] == wanted
    assert documents.kind == "hub"
    # The same name means the same rows in another run, or it could not be resumed.
    assert documents.digest == open_documents(location).digest


def test_a_run_mixes_a_data_set_with_a_file_and_records_both(tmp_path: Path) -> None:
    calibrate(tmp_path / "out", "--calibration", "people/texts:train:3", "--calibration", f"{TEXT}:1", *FEW, "--no-polish")
    sources = record(tmp_path / "out")["sources"]
    assert sources[0].pop("digest").startswith("datasets:")
    assert sources[0] == {"name": "people/texts:train", "kind": "hub", "weight": 3.0, "samples": 3}
    assert sources[1]["name"] == "calibration.txt"
    assert_finite(tmp_path / "out", tmp_path / "back")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("people/absent", "not in the cache of data sets, and the Hub cannot be reached (HF_HUB_OFFLINE is set); load it once"),
        ("people/texts:validation", "Unknown split \"validation\". Should be one of ['train', 'test']"),
        ("people/texts:other:train", "Available configs in the cache: ['default']"),
        ("people/chats", "OWNER/NAME:CONFIG:SPLIT names a part"),
        ("people/pairs", "has no text, messages or input_ids (found: question, answer)"),
        ("people/absent.txt", "no such file, and not the name of a Hub data set"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_named_with_what_to_do(location: str, message: str, tmp_path: Path) -> None:
    said = refused(tmp_path / "out", "--calibration", location, *FEW)
    assert said.startswith(f"surgeon: {location}")
    assert message in said


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        # As datasets 5.2 says them for a refused connection, a name that the Hub does not have, and a damaged download.
        (ConnectionError("Couldn't reach 'a/b' on the Hub (ConnectError)"), "reached (Couldn't reach 'a/b' on the Hub (ConnectE"),
        (DatasetNotFoundError("Dataset 'a/b' doesn't\nexist."), "cannot be loaded from the Hub: Dataset 'a/b' doesn't exist."),
        (
            raised(DatasetGenerationError("An error occurred"), ValueError("JSON parse error")),
            "cannot be loaded from the Hub: An error occurred: JSON parse error",
        ),
    ],
)
def test_what_goes_wrong_on_the_way_is_one_message(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert message in refused(tmp_path / "out", "--calibration", "a/b", *FEW)


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    said = refused(tmp_path / "out", "--calibration", "people/texts", *FEW)
    assert "to read it from the Hub, pip install 'tensorsurgeon[datasets]'" in said
