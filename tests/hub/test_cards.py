"""The card is what the Hub takes, asked through the library's own validator; what it does not take is told before the upload."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard

from tensorsurgeon.cli import main
from tests.checkpoints import FIXTURE
from tests.hub.server import Hub


def surgeon(*arguments: object, status: int = 0) -> Result:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == status, done.output
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cards") / "out"
    surgeon("apply", "awq-int4-g128", FIXTURE, out, "-q")
    return out


@pytest.fixture
def target(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "target"))


def test_the_library_s_validator_takes_every_card(hub: Hub, target: Path, tmp_path: Path) -> None:
    ModelCard.load(target / "README.md").validate()
    surgeon("card", target, "--base-model", "owner/tiny", "--name", "me/tiny-awq", "--against", FIXTURE)
    card = ModelCard.load(target / "README.md")
    card.validate()
    hub.settle()
    assert len([r for r in hub.requests if r.path == "/api/validate-yaml"]) == 2
    assert card.data.base_model == "owner/tiny"
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    # And it is no validator that takes everything.
    card.data.license = "of my own"
    with pytest.raises(ValueError, match=r"license.* must be one of the known ones, not 'of my own'"):
        card.validate()


def test_a_folder_whose_name_no_model_can_have_is_not_named_as_the_original(hub: Hub, tmp_path: Path) -> None:
    source = shutil.copytree(FIXTURE, tmp_path / "my model, v2")
    surgeon("apply", "ct-w8a8-int8", source, tmp_path / "out", "-q")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    card.validate()
    assert card.data.base_model is None
    assert "A quantized version of my model, v2:" in card.text
    said = surgeon("card", tmp_path / "out", "--base-model", "/home/me/model", status=10).stderr
    assert "'/home/me/model' is no name of a model on the Hub; give owner/name" in said


@pytest.mark.usefixtures("logged_in")
def test_a_card_that_the_hub_does_not_take_stops_the_push_before_any_weights(hub: Hub, target: Path) -> None:
    card = (target / "README.md").read_text()
    (target / "README.md").write_text(card.replace("license: apache-2.0", "license: mine"))
    said = surgeon("push", target, "owner/out", "--anyway", status=45).stderr
    assert "owner/out: the Hub refuses: " in said
    assert "must be one of the known ones, not 'mine'" in said
    assert not [r for r in hub.requests if r.method == "PUT"]
