"""Environments of the engines, made when first needed, and conversions made with the `surgeon` command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.engines.judging import HERE, ROOT, Conversion, Engine, write_tokens
from tests.engines.known_refusals import answers, this_cpu

Convert = Callable[..., Path]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Each layout that vLLM was asked for: its figures, or its refusal. The next CPU may give other ones."""
    if answers:
        terminalreporter.section(f"what vLLM serves on {this_cpu()}")
        for line in answers:
            terminalreporter.write_line(line)


def environment(engine: str, name: str) -> Engine:
    """The interpreter of .venvs/NAME, made by NAME_env.sh if it is absent or its pins have changed."""
    folder = ROOT / ".venvs" / name
    run = subprocess.run(["bash", HERE / f"{name}_env.sh", folder], check=False, capture_output=True, text=True)
    if run.returncode:
        pytest.fail(f"{engine}: {name}_env.sh failed with {run.returncode}: {run.stderr[-2000:]}")
    return Engine(engine, folder / "bin" / "python")


@pytest.fixture(scope="session")
def vllm() -> Engine:
    return environment("vLLM 0.32 on the CPU", "vllm")


@pytest.fixture(scope="session")
def transformers() -> Engine:
    return environment("transformers 5.23", "transformers")


@pytest.fixture(scope="session")
def gptqmodel() -> Engine:
    return environment("GPTQModel 6.0.3", "gptqmodel")


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tokens.json")


@pytest.fixture(scope="session")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """convert(SOURCE, CONVERSION...) -> the folder that `surgeon apply` makes of it, one after the other; each once."""
    folder = tmp_path_factory.mktemp("converted")
    surgeon = Path(sys.executable).with_name("surgeon")

    @cache
    def apply(source: Path, conversion: Conversion) -> Path:
        target = folder / f"{source.name}--{conversion}"
        settings = [word for setting in conversion.settings for word in ("--set", setting)]
        command = [surgeon, "apply", "--quiet", conversion.transform, source, target, *settings, *conversion.calibration]
        run = subprocess.run(command, check=False, capture_output=True, text=True)
        if run.returncode:
            pytest.fail(f"surgeon apply {conversion} of {source.name} ended with {run.returncode}: {run.stderr}")
        return target

    def convert(source: Path, *conversions: Conversion) -> Path:
        for conversion in conversions:
            source = apply(source, conversion)
        return source

    return convert
