"""The page as a browser has it: a real Chromium draws every chart, asks nobody for anything and complains of nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tensorsurgeon.cli import main
from tests.checkpoints import FIXTURE, tiny_moe, write_checkpoint

pytest.importorskip("vl_convert", reason="pages need the extra [page]")
TEXT = FIXTURE.parent / "text"


def surgeon(*arguments: object, status: int = 0) -> Any:
    run = CliRunner().invoke(main, [str(a) for a in arguments])
    assert run.exit_code == status, run.output
    return run


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    return found


class Seen(HTMLParser):
    """What is in a page: how many drawings each chart has, and addresses that a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.charts: dict[str, int] = {}
        self.marks = 0
        self.inks: Counter[str] = Counter()
        self.loaded: list[str] = []
        self.drawn: str | None = None
        self._chart = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if (given.get("id") or "").startswith("chart-"):
            self._chart = given["id"] or ""
            self.charts[self._chart] = 0
        if tag == "svg" and self._chart:
            self.charts[self._chart] += 1
        if tag == "path" and given.get("aria-roledescription"):
            self.marks += 1
        if tag == "text":
            self.inks[str(given.get("fill"))] += 1
        if tag == "body":
            self.drawn = given.get("data-drawn")
        if tag in ("script", "img", "link", "iframe") and (address := given.get("src") or given.get("href")):
            self.loaded.append(address)


def look(chromium: str, page: Path, tmp_path: Path, *more: str) -> tuple[Seen, str]:
    """The page after its scripts ran, and what the console said."""
    run = subprocess.run(
        [
            chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr", "--virtual-time-budget=20000", *more, "--dump-dom", page.as_uri(),
        ],
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    seen = Seen()
    seen.feed(run.stdout)
    return seen, "\n".join(line for line in run.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which everything is known: calibrated, evaluated, verified."""
    target = tmp_path_factory.mktemp("page") / "tiny <b>&Int4"
    surgeon(
        "apply", "gptq-int4-g128", FIXTURE, target, "-q", "--calibration", TEXT / "calibration.txt", "--samples", "4",
        "--sequence-length", "64", "--set", "scope=all", "--no-polish", "--fallback-tokens", "40", "--minimum-tokens", "1",
    )  # fmt: skip
    surgeon("evaluate", target, "--against", FIXTURE, "--text", TEXT / "heldout.txt", "--samples", "2", "--sequence-length", "32")
    assert surgeon("page", target, "--against", FIXTURE).stdout.strip() == str(target / "surgeon.html")
    return target


def test_every_chart_is_drawn_and_the_console_is_silent(made: Path, chromium: str, tmp_path: Path) -> None:
    seen, console = look(chromium, made / "surgeon.html", tmp_path)
    assert console == ""
    assert seen.charts == {f"chart-{k}": 1 for k in range(7)}
    assert seen.drawn == "7"
    assert seen.marks > 100
    assert seen.loaded == []


@pytest.mark.parametrize(("scheme", "ink", "other"), [("1", "#5b6875", "#9aa5b1"), ("0", "#9aa5b1", "#5b6875")])
def test_charts_have_the_ink_of_the_page(scheme: str, ink: str, other: str, made: Path, chromium: str, tmp_path: Path) -> None:
    seen, console = look(chromium, made / "surgeon.html", tmp_path, f"--blink-settings=preferredColorScheme={scheme}")
    assert (seen.drawn, console) == ("7", "")
    assert seen.inks[ink] > 20
    assert other not in seen.inks


def test_it_prints(made: Path, chromium: str, tmp_path: Path) -> None:
    out = tmp_path / "page.pdf"
    subprocess.run(
        [
            chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=20000", "--no-pdf-header-footer", f"--print-to-pdf={out}", (made / "surgeon.html").as_uri(),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert out.read_bytes()[:5] == b"%PDF-"
    assert out.stat().st_size > 50_000


def test_the_tables_say_what_is_known(made: Path) -> None:
    text = (made / "surgeon.html").read_text().split("<script>")[0]
    titles = re.findall(r"<h2>([^<]*)</h2>", text)
    assert titles == [
        "Size by part", "KL divergence", "Error of hidden states", "Error of weights", "Loss in calibration", "Tokens by expert",
        "Loss by expert", "Worst modules by loss", "Rounded to nearest all the same", "Worst weights by error", "Layouts",
        "Engines", "Steps of the plan", "Kept as it was",
    ]  # fmt: skip
    # A stranger's folder is text, never markup.
    assert "<h1>tiny &lt;b&gt;&amp;Int4</h1>" in text
    assert "loads and answers nonsense" in text
    assert "http://" not in text
    rows = [row for row in (made / "quant_log.csv").read_text().splitlines() if ",rtn," in row]
    assert rows, "with four short samples some expert must be cold"
    assert "saw" in text
    # The record knows the page, so verify has nothing to say and overwriting takes it away.
    found = json.loads(surgeon("verify", made, "--against", FIXTURE, "--json").stdout)
    assert found["faults"] == []
    assert not [note for note in found["notes"] if note["kind"].startswith("file")]


def test_of_a_stranger_s_checkpoint_sizes_are_drawn(chromium: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_moe(), config={"model_type": "x", "architectures": ["X"]})
    surgeon("page", folder, "--out", tmp_path / "page.html")
    assert not (folder / "surgeon.html").exists()
    seen, console = look(chromium, tmp_path / "page.html", tmp_path)
    assert (seen.charts, console) == ({"chart-0": 1}, "")
