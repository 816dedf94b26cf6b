"""Compiled kernels run alone: right for every kind of argument, kept where nobody else can write, made again if damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tensorsurgeon.quant.loops import compiled, identity, place, store
from tensorsurgeon.quant.loops.loader import Kernel, Kernels

ROOT = Path(__file__).parents[3]
SCRIPT = """
import logging, sys, numpy as np
logging.basicConfig(level=logging.INFO, format="%(message)s")
from tensorsurgeon.quant.loops.loader import Kernels
words = np.zeros(2, np.uint32)
Kernels("bitpack").pack4(np.arange(16, dtype=np.uint8).view(np.uint64), np.uint64(1), words)
print([hex(word) for word in words], "compiled" if "numba" in sys.modules else "loaded")
"""
PACKED = "['0x87654321', '0xfedcba9']"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty place for compiled code."""
    monkeypatch.setenv("TENSORSURGEON_CACHE", str(tmp_path / "cache"))
    place.folder.cache_clear()
    yield tmp_path / "cache"
    place.folder.cache_clear()
    identity.identity.cache_clear()


def run_script(**environment: str) -> tuple[str, str]:
    """What a fresh process prints and says."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **environment}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_a_second_process_needs_no_compiler(tmp_path: Path) -> None:
    place = str(tmp_path / "made" / "on demand")
    assert run_script(TENSORSURGEON_CACHE=place) == (f"{PACKED} compiled", "")
    assert run_script(TENSORSURGEON_CACHE=place) == (f"{PACKED} loaded", "")


def test_code_is_kept_where_nobody_else_can_write(tmp_path: Path) -> None:
    assert run_script(TENSORSURGEON_CACHE=str(tmp_path / "cache"))[0].endswith("compiled")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    (tmp_path / "cache").chmod(0o777)  # anybody may have planted something
    printed, said = run_script(TENSORSURGEON_CACHE=str(tmp_path / "cache"))
    assert printed == f"{PACKED} compiled"
    assert f"compiled code cannot be kept ({tmp_path / 'cache'}: others may write it (chmod go-w)): every run" in said


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    printed, said = run_script(TENSORSURGEON_CACHE=str(tmp_path / "cache"))
    assert printed == f"{PACKED} compiled"
    assert f"({tmp_path / 'cache'}: is a link, or no folder)" in said
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_home_that_takes_nothing_leaves_the_temporary_folder(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("not a folder")
    settings = {"TENSORSURGEON_CACHE": "", "XDG_CACHE_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    assert run_script(**settings) == (f"{PACKED} compiled", "")
    assert run_script(**settings) == (f"{PACKED} loaded", "")
    (folder,) = tmp_path.glob("tensorsurgeon-*")
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "text", "head"])
def test_damaged_code_is_made_again_and_never_run(tmp_path: Path, damage: str) -> None:
    assert run_script(TENSORSURGEON_CACHE=str(tmp_path))[0].endswith("compiled")
    (file,) = tmp_path.rglob("bitpack-*")
    whole = file.read_bytes()
    changed = {"cut": whole[:-9], "emptied": b"", "text": b"hello\nworld", "flipped": whole[:-9] + bytes(9)}.get(
        damage, whole.replace(b"none", b"nome")
    )
    assert changed != whole
    file.write_bytes(changed)
    printed, said = run_script(TENSORSURGEON_CACHE=str(tmp_path))
    assert printed == f"{PACKED} compiled"
    assert f"{file} is damaged and will be made again" in said
    assert file.read_bytes() == whole
    assert run_script(TENSORSURGEON_CACHE=str(tmp_path)) == (f"{PACKED} loaded", "")


@pytest.fixture
def copied(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sources that code is kept for, where they can be edited."""
    shutil.copytree(Path(identity.__file__).parent, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(identity, "__file__", str(tmp_path / "kernels" / "identity.py"))
    identity.identity.cache_clear()
    return tmp_path / "kernels"


def test_whatever_code_depends_on_changes_its_identity(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [identity.digest()]
    for file in sorted(copied.iterdir()):
        file.write_text(f"{file.read_text()}\n# edited\n")
        seen.append(identity.digest())
    monkeypatch.setattr(identity.host, "identity", lambda: "another CPU")
    seen.append(identity.digest())
    monkeypatch.setenv("NUMBA_OPT", "0")
    seen.append(identity.digest())
    monkeypatch.setattr(identity.np, "__version__", "9")
    seen.append(identity.digest())
    assert len(seen) == len(set(seen)) == len(list(copied.iterdir())) + 4
    shutil.rmtree(copied)
    assert identity.digest() is None


def test_an_edit_while_a_process_runs_keeps_nothing_under_the_wrong_name(copied: Path, cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(store, "_sources_moved", False)
    made = store.ObjectFile("none", b"code")
    store.write("before", made)
    source = copied / "bitpack.py"
    whole = source.read_text()
    source.write_text(whole + "# edited\n")
    store.write("edited", made)
    source.write_text(whole)
    store.write("after", made)  # of a module that may have been imported in between
    assert [file.name for file in cache.rglob("*") if file.is_file()] == ["before"]
    assert store.read("before") == made


def test_code_of_versions_long_gone_is_removed(cache: Path) -> None:
    cache.mkdir(mode=0o700)
    for name, days in {"a" * 32: 31, "b" * 32: 29, "notes": 99}.items():
        (cache / name).mkdir()
        then = time.time() - days * 24 * 3600
        os.utime(cache / name, (then, then))
    made = place.folder()
    assert made is not None
    assert {file.name for file in cache.iterdir()} == {"b" * 32, "notes", made.name}


def test_many_threads_may_make_the_first_call(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def slowly(*arguments: object) -> tuple[str, bytes]:
        made.append(arguments)
        time.sleep(0.1)
        return whole(*arguments)

    whole = compiled.object_code
    monkeypatch.setattr(compiled, "object_code", slowly)
    kernels = Kernels("bitpack")
    sources = [np.arange(64 * 48, dtype=np.int32).reshape(64, 48) + n for n in range(16)]

    def transpose(source: np.ndarray) -> np.ndarray:
        target = np.empty((48, 64), np.int32)
        kernels.transpose(source, target)
        return target

    with ThreadPoolExecutor(8) as pool:
        for source, target in zip(sources, pool.map(transpose, sources), strict=True):
            assert (target == source.T).all()
    assert len(made) == 1


def test_arrays_with_gaps_are_walked_by_their_strides() -> None:
    wide = np.arange(40 * 70, dtype=np.int32).reshape(40, 70)
    source = wide[::-2, 3:63:2]
    target = np.zeros((64, 40), np.int32)[:60:2, :20]
    Kernels("bitpack").transpose(source, target)
    assert (target == source.T).all()


@pytest.mark.parametrize(
    "strange", [np.zeros(33, np.uint8)[1:].view(np.int32).reshape(2, 4), np.zeros((2, 4), ">i4")], ids=["unaligned", "swapped"]
)
def test_an_array_that_no_loop_could_read_is_refused(strange: np.ndarray) -> None:
    transpose = Kernels("bitpack").transpose
    transpose(np.zeros((2, 4), np.int32), np.zeros((4, 2), np.int32))  # what fits does not make the rest fit
    with pytest.raises(ValueError, match=r"aligned arrays in the machine's byte order, found one of \S+ \[2, 4\] that is not"):
        transpose(strange, np.zeros((4, 2), np.int32))


def test_an_array_that_may_not_be_written_is_not_written() -> None:
    source, target = np.ones((2, 4), np.int32), np.zeros((4, 2), np.int32)
    transpose = Kernels("bitpack").transpose
    source.flags.writeable = False
    transpose(source, target)
    assert target.all()
    target = np.zeros((4, 2), np.int32)
    target.flags.writeable = False
    with pytest.raises(Exception, match=r"(?i)readonly"):
        transpose(source, target)
    assert not target.any()


def test_what_is_neither_array_nor_number_is_refused() -> None:
    with pytest.raises(TypeError, match="kernels take arrays and numbers, found str"):
        Kernels("bitpack").transpose(np.zeros((2, 4), np.int32), "target")


def test_results_come_back_in_their_type() -> None:
    panel = np.array([[4.0, 0.0], [2.0, 5.0]], np.float32)
    inverse = np.empty_like(panel)
    diagonal = panel.diagonal().copy()
    factor_panel = Kernels("hessian").factor_panel
    assert factor_panel(panel, inverse, diagonal, 1e-6, np.empty((2, 2, 2))) is True
    assert panel.tolist() == [[2, 0], [1, 2]]
    assert factor_panel(-panel, inverse, diagonal, 1e-6, np.empty((2, 2, 2))) is False
    amax = Kernels("float_codes").weight_amax(np.array([[1.5, -2.25]], np.float32).view(np.uint32))
    assert amax == 2.25
    bits = np.array([[1.0, np.inf]], np.float32).view(np.uint32)
    assert Kernels("float_codes").mxfp4(bits, 2, np.empty((1, 2), np.uint8), np.empty((1, 1), np.float32)) == 0
    assert Kernels("hessian").add_rows(np.zeros(2), np.ones((3, 2))) is None


def reaches_out(values: np.ndarray) -> None:
    """A loop over a C function whose results differ between machines."""
    for i in range(values.size):
        values[i] = np.exp(values[i])


@pytest.mark.kernels_may_warn
def test_code_that_calls_something_outside_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    import tensorsurgeon.quant.loops.bitpack as module

    marked = compiled.kernel(reaches_out)
    with pytest.raises(compiled.NotSelfContainedError, match=r"refers to llvm\.exp"):
        compiled.object_code(marked, [np.ones(3)])
    monkeypatch.setattr(module, "reaches_out", marked, raising=False)
    values = np.zeros(3)
    Kernel("bitpack", "reaches_out")(values)
    assert values.tolist() == [1, 1, 1]
    assert "bitpack.reaches_out is compiled in every process" in caplog.text
    assert not list(cache.rglob("bitpack-*"))


def test_a_kernel_that_allocates_does_not_compile() -> None:
    def allocates(values: np.ndarray) -> float:
        return np.empty(3)[0] + values[0]

    with pytest.raises(Exception, match=r"(?s)No implementation.*np\.empty"):
        compiled.object_code(compiled.kernel(allocates), [np.ones(3)])
