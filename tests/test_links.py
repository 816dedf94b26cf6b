"""Links of README and docs lead to what is there; those of the wheel's long description work without the repository."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "fixtures" / "README.md"])
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them: small letters, words joined by hyphens."""
    heads = re.findall(r"^#+ +(.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower().replace("`", "")).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_something(page: Path) -> None:
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} of {page.name} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{target.name} has no heading #{anchor}"


def long_description() -> str:
    """As the build makes it of the README (tests/wheel.sh looks at that of a real wheel)."""
    text = (ROOT / "README.md").read_text()
    for rule in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    return text


def test_the_wheel_s_long_description_needs_no_repository() -> None:
    urls = PROJECT["project"]["urls"]
    assert urls.keys() == {"Homepage", "Documentation", "Issues"}
    links = LINK.findall(long_description())
    assert len(links) == len(LINK.findall((ROOT / "README.md").read_text())) > 15
    for link in links:
        if "raw.githubusercontent.com" in link:
            where = urls["Homepage"].replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
        else:
            where = urls["Homepage"] + "/blob/main/"
        assert link.startswith(where), link
        assert (ROOT / link.removeprefix(where).partition("#")[0]).exists()
