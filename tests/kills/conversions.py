"""The four kinds of run that are killed, each begun, killed and resumed by the command in a process of its own.

A process forks before it has threads, so that a run begins without the seconds that imports take. Units are small and slow
here: a run of a fraction of a second is like minutes of a large model.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Final, NamedTuple

from tensorsurgeon.calibrate.log import LOG_NAME
from tensorsurgeon.cli import main
from tensorsurgeon.planning import work
from tensorsurgeon.running import executor
from tests.checkpoints import FIXTURE, folder_bytes

TEXT: Final = FIXTURE.parent / "text" / "calibration.txt"
_SHARDS: Final = ("--max-shard-size", "3MB", "--workers", "2")
_CALIBRATED: Final = ("--calibration", str(TEXT), "--samples", "2", "--sequence-length", "32", "--no-polish")
# Name: transform and options, and the run whose output it starts from; None is the fixture.
RUNS: Final[dict[str, tuple[tuple[str, ...], str | None]]] = {
    "rtn": (("quark-w8a8-int8",), None),
    "repack": (("repack", "--set", "to=awq", "--set", "inexact_scales=round"), "rtn-int4"),
    "dequantize": (("dequantize",), "rtn-int4"),
    "calibrated": (("ct-w4a16-g32", *_CALIBRATED), None),
}
_MADE_FIRST: Final = {"rtn-int4": ("gptq-int4-g128", "--set", "scope=all", "--set", "method=rtn")}


class Ended(NamedTuple):
    """How a process ended: its exit code, or None where it was killed; and all that it printed."""

    code: int | None
    said: str


def import_what_runs_need() -> None:
    """Imports, before anything forks; none of these has threads yet."""
    for name in (
        "torch", "transformers", "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe", "numba", "tensorsurgeon.calibrate.run",
        "tensorsurgeon.calibrate.driver", "tensorsurgeon.recipes.library", "tensorsurgeon.quant.rtn.fast",
    ):  # fmt: skip
        import_module(name)


def small_and_slow_units() -> None:
    """Many small units, frequent commits, and time between them."""
    work.COPY_BYTES = 64 << 10
    executor.COMMIT_BYTES = 256 << 10
    run_unit = executor.run_unit

    def slowly(*arguments: object, **named: object) -> object:
        time.sleep(0.004)
        return run_unit(*arguments, **named)  # type: ignore[arg-type]

    executor.run_unit = slowly  # type: ignore[assignment]


def command_of(name: str, sources: Path, target: Path) -> list[str]:
    """The words of one of ``RUNS``, whose source is made where it has to be."""
    (transform, *options), origin = RUNS[name]
    source = FIXTURE
    if origin is not None:
        source = sources / origin
        if not source.exists():
            first, *more = _MADE_FIRST[origin]
            ended = surgeon(["apply", first, str(FIXTURE), str(source), *more])
            assert ended.code == 0, ended.said
    return ["apply", transform, str(source), str(target), *options, *_SHARDS]


def surgeon(words: list[str], kill: Callable[[float], bool] | None = None) -> Ended:
    """Run the command; ``kill`` is asked every millisecond, with the seconds since the start, whether to kill it now."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _become(words, reading, writing)
    os.close(writing)
    began = time.monotonic()
    killed = False
    while kill is not None and not killed:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        if kill(time.monotonic() - began):
            os.kill(child, signal.SIGKILL)
            killed = True
        time.sleep(0.001)
    else:
        # It prints less than a pipe holds.
        status = os.waitpid(child, 0)[1]
    with os.fdopen(reading, errors="replace") as stream:
        said = stream.read()
    return Ended(None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status), said)


def _become(words: list[str], reading: int, writing: int) -> None:
    code = 70
    try:
        os.close(reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
        small_and_slow_units()
        main(words)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException as error:  # noqa: BLE001  # nothing of the parent's may run here
        print(f"Traceback: {error!r}")
    finally:
        os._exit(code)


def outcome(folder: Path) -> dict[str, bytes]:
    """Every file of an output, without the seconds that its log has."""
    files = folder_bytes(folder)
    log = files.get(LOG_NAME)
    if log is not None:
        header, *rows = log.decode().splitlines()
        at = header.split(",").index("seconds")
        files[LOG_NAME] = "\n".join(",".join(cell for n, cell in enumerate(row.split(",")) if n != at) for row in rows).encode()
    return files
