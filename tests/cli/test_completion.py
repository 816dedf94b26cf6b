"""What the shell offers: click's own completion asked as shells ask it, and a real bash with the script that it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from tensorsurgeon.cli import main
from tensorsurgeon.cli.terminal import Place
from tensorsurgeon.engines.registry import ENGINES
from tensorsurgeon.recipes.library import builtin_names

ROOT = Path(__file__).parents[2]


def offered(*words: str) -> list[tuple[str, str]]:
    """(type, value) for a line of words, of which the last is being typed."""
    found = ShellComplete(main, {}, "surgeon", "_SURGEON_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [(item.type, item.value) for item in found]


def plain(*words: str) -> list[str]:
    return [value for kind, value in offered(*words) if kind == "plain"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.yaml").write_text("description: x\nsteps: []\n")
    (tmp_path / "other.yml").write_text("")
    (tmp_path / "notes.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", [("plan",), ("apply",), ("transforms",), ("apply", "split-experts", "a", "b", "--then")])
def test_transforms_and_yaml_files_are_offered(words: tuple[str, ...], folder: Path) -> None:
    assert plain(*words, "") == [*builtin_names(), "mine.yaml", "other.yml"]
    assert plain(*words, "quark-w") == ["quark-w8a8-int8"]
    assert plain(*words, "min") == ["mine.yaml"]
    # What lies elsewhere the shell completes.
    assert offered(*words, "sub/mi") == [("file", "sub/mi")]


def test_parameters_of_the_transform_that_was_named(folder: Path) -> None:
    assert plain("plan", "ct-w4a16-g32", "model", "--set", "group") == ["group_size="]
    both = plain("plan", "split-experts", "model", "--then", "ct-w4a16-g32", "--set", "")
    assert "group_size=" in both
    assert plain("plan", "no-such", "model", "--set", "") == []


@pytest.mark.parametrize("words", [("plan", "ct-w8a8-int8", "model", "--require"), ("verify", "model", "--require")])
def test_engines_are_offered(words: tuple[str, ...]) -> None:
    assert plain(*words, "") == list(ENGINES)
    assert plain(*words, "vl") == ["vllm"]


@pytest.mark.parametrize("words", [("apply", "x", "a", "b", "--calibration"), ("evaluate", "a", "--text")])
def test_the_text_that_comes_along_is_offered(words: tuple[str, ...]) -> None:
    assert offered(*words, "bu") == [("plain", "builtin")]
    assert offered(*words, "") == [("file", "")]


def test_commands_and_options_are_offered_and_places_left_to_the_shell() -> None:
    assert plain("ev") == ["evaluate"]
    assert "--keep-source" in plain("plan", "--keep")
    for name, command in main.commands.items():
        for parameter in command.params:
            if isinstance(parameter.type, Place):
                context = click.Context(command, info_name=name)
                assert {item.type for item in parameter.type.shell_complete(context, parameter, "x")} == {"file"}


def asked(shell: str, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_SURGEON_COMPLETE": shell, **variables}
    command = [sys.executable, "-c", "from tensorsurgeon.cli import main; main(prog_name='surgeon')"]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_bash_and_zsh_are_answered_in_their_own_way() -> None:
    # As the functions that `_SURGEON_COMPLETE=bash_source surgeon` and zsh_source print ask.
    assert asked("bash_complete", COMP_WORDS="surgeon plan quark-w", COMP_CWORD="2") == "plain,quark-w8a8-int8\n"
    assert asked("zsh_complete", COMP_WORDS="surgeon plan quark-w", COMP_CWORD="2") == "plain\nquark-w8a8-int8\n_\n"
    assert "#compdef surgeon" in asked("zsh_source")


def test_a_real_bash_completes_with_the_script(tmp_path: Path) -> None:
    surgeon = tmp_path / "surgeon"
    surgeon.write_text(f"#!{sys.executable}\nfrom tensorsurgeon.cli import main\nmain(prog_name='surgeon')\n")
    surgeon.chmod(0o755)
    script = (
        'eval "$(_SURGEON_COMPLETE=bash_source surgeon)"; complete -p surgeon; COMP_WORDS=(surgeon apply awq); COMP_CWORD=2; '
        '_surgeon_completion surgeon awq apply; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = subprocess.run(["bash", "-c", script], env=environment, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.splitlines() == ["complete -o nosort -F _surgeon_completion surgeon", "awq-int4-g128"]
