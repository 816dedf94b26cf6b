"""Compiled loops are used again by the next process, never believed when they are not what they say, and never in the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorsurgeon
from tensorsurgeon.quant.loops import bitpack, compiled

ROOT = Path(__file__).parents[2]
# CALLS is filled in; each loop is called on words that are known.
SCRIPT = """
import json, logging, sys, numpy as np
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
logging.getLogger("numba").setLevel(logging.WARNING)
from tensorsurgeon.quant.loops import bitpack

def pack4():
    words = np.zeros(2, np.uint32)
    bitpack.pack4(np.arange(16, dtype=np.uint8).view(np.uint64), np.uint64(1), words)
    return words.tolist()

def pack8(readonly=False):
    words, codes = np.zeros(1, np.uint64), np.arange(8, dtype=np.uint8).view(np.uint64)
    codes.flags.writeable = not readonly
    bitpack.pack8(codes, np.uint64(1), words)
    return words.view(np.uint8).tolist()

def transpose(dtype=np.int32):
    target = np.zeros((3, 2), dtype)
    bitpack.transpose(np.arange(6, dtype=dtype).reshape(2, 3), target)
    return target.tolist()

made = {call: eval(call) for call in CALLS}
loops = bitpack.pack4, bitpack.pack8, bitpack.transpose
hits, misses = [sum(sum(kind.values()) for kind in kinds) for kinds in zip(*[loop.stats[1:] for loop in loops])]
print(json.dumps({"made": made, "hits": hits, "misses": misses}))
"""
RIGHT = {
    "pack4()": [0x87654321, 0x0FEDCBA9],
    "pack8()": [1, 2, 3, 4, 5, 6, 7, 8],
    "pack8(readonly=True)": [1, 2, 3, 4, 5, 6, 7, 8],
    "transpose()": [[0, 3], [1, 4], [2, 5]],
    "transpose(np.uint32)": [[0, 3], [1, 4], [2, 5]],
    "transpose(np.uint8)": [[0, 3], [1, 4], [2, 5]],
}


def command(*calls: str) -> list[str]:
    return [sys.executable, "-c", SCRIPT.replace("CALLS", repr(calls))]


def environment(cache: Path | None, sources: Path = ROOT, **settings: str) -> dict[str, str]:
    found = {**os.environ, "PYTHONPATH": str(sources), **settings}
    found.pop("NUMBA_CACHE_DIR", None)
    return found if cache is None else {**found, "NUMBA_CACHE_DIR": str(cache)}


def run(*calls: str, cache: Path | None, **more: Any) -> tuple[int, int, str]:
    """Loops taken from the cache and loops compiled by a fresh process, and what it says; what they make is right."""
    done = subprocess.run(command(*calls), env=environment(cache, **more), cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["made"] == {call: RIGHT[call] for call in calls}
    return found["hits"], found["misses"], done.stderr


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    assert run("pack4()", cache=tmp_path) == (0, 1, "")
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nb?")}
    assert run("pack4()", cache=tmp_path) == (1, 0, "")
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nb?")} == files
    assert len(files) == 2


def test_loops_that_are_kept_and_loops_that_are_not_go_together(tmp_path: Path) -> None:
    """What is kept is loaded without making the compiler ready, which another loop then needs."""
    run("pack4()", cache=tmp_path)
    assert run("pack4()", "transpose()", "pack8()", cache=tmp_path) == (1, 2, "")
    assert run("transpose()", "transpose(np.uint8)", "pack4()", cache=tmp_path) == (2, 1, "")


def cut(data: bytes) -> bytes:
    return data[:-9]


def emptied(_: bytes) -> bytes:
    return b""


def nested(data: bytes) -> bytes:
    return b"[" * 100_000 + b"\n" + data


def in_lists(_: bytes) -> bytes:
    """Lists in lists, which unpickle."""
    return b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b"."


def other_value(_: bytes) -> bytes:
    """None, which unpickles."""
    return b"\x80\x04N."


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", [cut, emptied, nested, in_lists, other_value])
def test_a_damaged_file_is_made_again(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    run("pack4()", cache=tmp_path)
    (file,) = tmp_path.rglob(f"*.{suffix}")
    file.write_bytes(damage(file.read_bytes()))
    hits, misses, said = run("pack4()", cache=tmp_path)
    assert (hits, misses) == (0, 1)
    assert "Traceback" not in said
    assert run("pack4()", cache=tmp_path) == (1, 0, "")


@pytest.mark.slow
def test_code_with_one_wrong_bit_is_not_run(tmp_path: Path) -> None:
    run("pack4()", cache=tmp_path)
    (file,) = tmp_path.rglob("*.nbc")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    hits, misses, said = run("pack4()", cache=tmp_path)
    assert (hits, misses) == (0, 1)
    assert said.startswith("INFO bitpack.pack4-")
    assert said.endswith("damaged, or of another version) and is compiled again\n")
    assert run("pack4()", cache=tmp_path) == (1, 0, "")


@pytest.mark.slow
def test_code_of_another_loop_is_not_run(tmp_path: Path) -> None:
    """As after a folder was put together from parts of two."""
    run("pack4()", "pack8()", cache=tmp_path)
    one, other = tmp_path.rglob("*.nbc")
    swapped = other.read_bytes(), one.read_bytes()
    one.write_bytes(swapped[0])
    other.write_bytes(swapped[1])
    assert run("pack4()", "pack8()", cache=tmp_path)[:2] == (0, 2)
    assert run("pack4()", "pack8()", cache=tmp_path) == (2, 0, "")


@pytest.mark.slow
def test_code_for_other_types_is_not_run(tmp_path: Path) -> None:
    """Two processes that compile one loop at once may both number their file 1: the index of one names code of the other."""
    calls = ["transpose()", "transpose(np.uint32)"]
    for place, call in zip("ab", calls, strict=True):
        run(call, cache=tmp_path / place)
    (ours,), (theirs,) = (tmp_path / "a").rglob("*.nbc"), (tmp_path / "b").rglob("*.nbc")
    assert ours.name == theirs.name
    shutil.copy(theirs, ours)
    hits, misses, said = run(calls[0], cache=tmp_path / "a")
    assert (hits, misses) == (0, 1)
    assert "holds code for other types and is compiled again" in said
    assert run(calls[0], cache=tmp_path / "a") == (1, 0, "")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the package, to be changed."""
    package = Path(tensorsurgeon.__file__).parent
    shutil.copytree(package, tmp_path / "copy" / "tensorsurgeon", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


def test_a_change_to_any_module_makes_new_code(tmp_path: Path, copied: Path) -> None:
    """numba would look at the loop's own file alone, and run what was taken from the old version of another."""
    run("pack4()", cache=tmp_path / "cache", sources=copied)
    assert run("pack4()", cache=tmp_path / "cache", sources=copied) == (1, 0, "")
    bits = copied / "tensorsurgeon" / "quant" / "loops" / "bits.py"
    bits.write_text(f"{bits.read_text()}\n# edited\n")
    assert run("pack4()", cache=tmp_path / "cache", sources=copied)[:2] == (0, 1)
    assert run("pack4()", cache=tmp_path / "cache", sources=copied) == (1, 0, "")


def test_where_nothing_can_be_kept_one_message_says_what_it_costs(tmp_path: Path, copied: Path) -> None:
    bits = copied / "tensorsurgeon" / "quant" / "loops" / "bits.py"
    (bits.parent / "__pycache__").write_text("no folder")
    (tmp_path / "home").write_text("no folder")
    settings = {"XDG_CACHE_HOME": str(tmp_path / "home"), "HOME": str(tmp_path / "home")}
    hits, misses, said = run("pack4()", "pack8()", cache=None, sources=copied, **settings)
    assert (hits, misses) == (0, 2)
    (line,) = said.splitlines()
    assert line.startswith("WARNING compiled loops cannot be kept (cannot cache function")
    assert line.endswith("compiles them again, which takes some seconds; set NUMBA_CACHE_DIR to a folder that can be written")
    assert run("pack4()", cache=tmp_path / "cache", sources=copied, **settings) == (0, 1, "")
    assert run("pack4()", cache=tmp_path / "cache", sources=copied, **settings) == (1, 0, "")


def test_a_folder_that_is_lost_before_code_is_made_costs_no_run(tmp_path: Path) -> None:
    calls = ("pack4()", "pack8()")
    lost = (
        f"import pathlib, shutil; shutil.rmtree({str(tmp_path / 'cache')!r}); pathlib.Path({str(tmp_path / 'cache')!r}).touch()"
    )
    script = SCRIPT.replace("made =", f"{lost}\nmade =").replace("CALLS", repr(calls))
    env = environment(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["made"] == {call: RIGHT[call] for call in calls}
    assert [line[:45] for line in done.stderr.splitlines() if "WARNING" in line] == [
        "WARNING compiled loops cannot be kept ([Errno"
    ]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_many_processes_may_compile_at_once(tmp_path: Path) -> None:
    """Whatever they leave to each other, nobody's result is wrong, and soon nobody compiles any more."""
    calls = ["transpose()", "transpose(np.uint32)", "transpose(np.uint8)", "pack8()", "pack8(readonly=True)"]
    for _ in range(2):
        started = [
            subprocess.Popen(command(call), env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for call in calls
        ]
        for call, process in zip(calls, started, strict=True):
            printed, said = process.communicate()
            assert process.returncode == 0, said
            assert json.loads(printed)["made"] == {call: RIGHT[call]}
    run(*calls, cache=tmp_path)
    assert run(*calls, cache=tmp_path) == (len(calls), 0, "")


def test_many_threads_may_make_the_first_call() -> None:
    sources = [np.arange(64 * 48, dtype=np.int16).reshape(64, 48) + np.int16(n) for n in range(16)]
    before = list(bitpack.transpose.signatures)

    def transpose(source: np.ndarray) -> np.ndarray:
        target = np.empty((48, 64), np.int16)
        bitpack.transpose(source, target)
        return target

    with ThreadPoolExecutor(8) as pool:
        for source, target in zip(sources, pool.map(transpose, sources), strict=True):
            assert (target == source.T).all()
    assert len(bitpack.transpose.signatures) == len(before) + 1


def test_a_loop_divides_as_written() -> None:
    """A division by what does not change is not made a multiplication with its reciprocal, whose last bit differs."""

    def divide(values: np.ndarray, by: np.float32) -> None:
        for i in range(values.size):
            values[i] = values[i] / by

    values = np.arange(64, dtype=np.float32)
    wanted = values / np.float32(49)
    assert (wanted != values * (np.float32(1) / np.float32(49))).any()
    compiled.kernel(divide)(values, np.float32(49))
    assert (values == wanted).all()
