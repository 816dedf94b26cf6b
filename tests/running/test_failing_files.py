"""Files that cannot be read or written: one message that names them and says what to do, and nothing is lost."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import SinkError, SourceError
from tensorsurgeon.planning.plan import Plan, make_plan
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.run import run_plan
from tests.checkpoints import folder_bytes, moe_config, tiny_moe, write_checkpoint

_ROOT = Path(__file__).parents[2]
_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 24, 1, 2


def as_anybody() -> None:
    """Permissions hold for root too, as in a container without capabilities."""
    if sys.platform == "linux":
        for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
            ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)


def surgeon(*words: object, before: Callable[[], None] = as_anybody) -> tuple[int, str]:
    """The exit code of a command in a process of its own, and its last line on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "tensorsurgeon", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(_ROOT)}, capture_output=True, text=True, check=False, preexec_fn=before,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("surgeon: ")]
    assert len(errors) <= 1
    return done.returncode, errors[0] if errors else done.stdout


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "source", tiny_moe(), shards=3, config=moe_config())
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    return folder


def planned(source: Path) -> Plan:
    return make_plan(load_transform("quark-w8a8-int8"), open_checkpoint(source))


@pytest.fixture
def wanted(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    run_plan(planned(source), tmp_path / "wanted")
    return folder_bytes(tmp_path / "wanted")


@pytest.fixture
def commanded(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed command writes."""
    assert surgeon("apply", "quark-w8a8-int8", source, tmp_path / "commanded")[0] == 0
    return folder_bytes(tmp_path / "commanded")


@pytest.mark.parametrize("most", [0, 1500, 8000])
def test_a_limit_on_file_sizes(most: int, source: Path, commanded: dict[str, bytes], tmp_path: Path) -> None:
    target = tmp_path / "out"
    code, said = surgeon(
        "apply", "quark-w8a8-int8", source, target, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    )
    assert code in (35, 43)
    assert str(target) in said
    assert "File too large; " in said
    again = ("resume", target) if code == 43 else ("apply", "quark-w8a8-int8", source, target, "--overwrite")
    assert surgeon(*again)[0] == 0
    assert folder_bytes(target) == commanded


@pytest.mark.parametrize("inside", [True, False])
def test_a_target_that_may_not_be_written(inside: bool, source: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    code, said = surgeon("apply", "quark-w8a8-int8", source, closed / "out" if inside else closed)
    assert code == 35
    assert str(closed) in said
    assert said.endswith("Permission denied; make it writable for you, or name another folder")
    assert not list(closed.iterdir())


@pytest.mark.parametrize(
    "name", ["model-00002-of-00003.safetensors", "config.json", "tokenizer.json", "notes.txt", "model.safetensors.index.json", ""]
)
def test_a_source_that_may_not_be_read(name: str, source: Path, tmp_path: Path) -> None:
    mode = (source / name).stat().st_mode
    (source / name).chmod(0)
    code, said = surgeon("apply", "quark-w8a8-int8", source, tmp_path / "out")
    (source / name).chmod(mode)
    assert code in (20, 21)
    assert said == f"surgeon: {source / name}: cannot be read: Permission denied; make it readable for you"
    assert not (tmp_path / "out").exists()


def test_a_target_on_another_file_system(source: Path, commanded: dict[str, bytes], tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    target = Path(tempfile.mkdtemp(dir=elsewhere))
    try:
        assert surgeon("apply", "quark-w8a8-int8", source, target)[0] == 0
        assert folder_bytes(target) == commanded
    finally:
        shutil.rmtree(target)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors", "config.json", "tokenizer.json", ""]
)
def test_a_source_that_vanishes_under_way(name: str, source: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    plan, target, aside = planned(source), tmp_path / "out", tmp_path / "aside"
    taken: list[bool] = []

    def take(_: object) -> None:
        if not taken:
            taken.append(True)
            (source / name).rename(aside)

    with pytest.raises(SourceError, match="is gone since the plan was made") as error:
        run_plan(plan, target, workers=1, progress=take)
    assert str(source) in str(error.value)
    assert "put the very file back and run the same command with resume=True" in str(error.value)
    assert not (target / "model.safetensors").exists()
    aside.rename(source / name)
    run_plan(planned(source), target, resume=True)
    assert folder_bytes(target) == wanted


def test_a_target_that_vanishes_under_way(source: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    target = tmp_path / "out"

    def remove(_: object) -> None:
        for partial in target.glob("*.partial"):
            partial.unlink()

    with pytest.raises(SinkError, match=r"partial: was written and is gone or changed.*run the same command with resume=True"):
        run_plan(planned(source), target, workers=1, progress=remove)
    run_plan(planned(source), target, resume=True)
    assert folder_bytes(target) == wanted


# On a small file system of its own, which goes with the process: run, make room, resume, and keep what came out.
_ON_A_SMALL_DISK = """
mount -t tmpfs -o "$1" none "$2" || exit 99
"$3" -m tensorsurgeon apply quark-w8a8-int8 "$4" "$2/out" >/dev/null 2>"$5/said"; echo $? >"$5/code"
mount -o remount,size=100m,nr_inodes=10000 "$2" || exit 99
"$3" -m tensorsurgeon apply quark-w8a8-int8 "$4" "$2/out" --resume >"$5/again" 2>&1 || exit 98
cp -r "$2/out" "$5/out"
"""


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ("size=17m,nr_inodes=7", 43, "the disk is full; free some space and run the same command with --resume"),
        ("size=4m", 35, "GB free; make room or name another disk"),
    ],
)
def test_a_full_disk(options: str, code: int, words: str, source: Path, commanded: dict[str, bytes], tmp_path: Path) -> None:
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    kept.mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", _ON_A_SMALL_DISK, "sh", options, small, sys.executable, source, kept],
        env={**os.environ, "PYTHONPATH": str(_ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 99 or not (kept / "code").exists():
        pytest.skip(f"may not mount: {done.stderr.strip()}")
    said = (kept / "said").read_text()
    assert (kept / "code").read_text().strip() == str(code)
    assert f"surgeon: {small}/out" in said
    assert words in said
    if code == 43:
        assert done.returncode == 0, (kept / "again").read_text()
        assert folder_bytes(kept / "out") == commanded
    else:
        # Nothing was begun, so that there is nothing to resume.
        assert "there is no stopped run" not in said


@pytest.mark.parametrize("how", ["replaced", "written"])
def test_a_source_that_changes_between_plan_and_run(how: str, source: Path, tmp_path: Path) -> None:
    plan = planned(source)
    shard = source / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    if how == "replaced":
        (tmp_path / "other").write_bytes(content)
        os.replace(tmp_path / "other", shard)
    else:
        shard.write_bytes(content)
    words = "was replaced by another file" if how == "replaced" else "was written"
    with pytest.raises(SourceError, match=rf"{shard.name}: the source changed: this file {words} after the plan was made"):
        run_plan(plan, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    """A soft limit is raised as far as the hard one lets it."""
    source = write_checkpoint(tmp_path / "source", tiny_moe(), shards=40, config=moe_config())

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 256))

    assert surgeon("apply", "quark-w8a8-int8", source, tmp_path / "out", before=few)[0] == 0
    assert surgeon("verify", tmp_path / "out", "--against", source, before=few)[0] == 0
