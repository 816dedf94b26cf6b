"""Where a run may write, and what a disk that is full or closed does to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import JournalError, SinkError, SourceError, TargetError
from tensorsurgeon.ops.transpose import Transpose
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.running.ownership import own_files
from tensorsurgeon.running.run import run_plan
from tests.checkpoints import (
    INDEX,
    apply,
    assert_same,
    folder_bytes,
    moe_config,
    read_all,
    tiny_moe,
    write_checkpoint,
    write_snapshot,
)

STEPS = [Transpose(where=("lm_head.weight",))]


@pytest.fixture
def done(moe: Path, tmp_path: Path) -> Path:
    apply(STEPS, moe, tmp_path / "done")
    return tmp_path / "done"


# --- what may be there -------------------------------------------------------------------------------------------


def test_an_empty_folder_and_one_that_does_not_exist_are_used(moe, tmp_path, done):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "new" / "deep"):
        apply(STEPS, moe, target)
        assert folder_bytes(target) == folder_bytes(done)


@pytest.mark.parametrize("options", [{}, {"resume": True}])
def test_a_folder_that_holds_anything_is_refused_and_left_alone(options, moe, tmp_path):
    target = tmp_path / "t"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(TargetError, match=r"not empty \(thesis.tex\).*overwrite=True"):
        apply(STEPS, moe, target, **options)
    assert folder_bytes(target) == {"thesis.tex": b"years of work"}


def test_overwriting_takes_neither_somebody_s_home_nor_another_checkpoint(moe, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(TargetError, match=r"no run of surgeon wrote, or that were changed since: thesis\.tex"):
        apply(STEPS, moe, home, overwrite=True)
    assert folder_bytes(home) == {"thesis.tex": b"years of work"}

    # Another tool's checkpoint is somebody's too.
    other = write_checkpoint(tmp_path / "other", {"a": np.zeros(3)}, shards=1)
    before = folder_bytes(other)
    with pytest.raises(TargetError, match=r"model\.safetensors"):
        apply(STEPS, moe, other, overwrite=True)
    assert folder_bytes(other) == before


@pytest.mark.parametrize("name", ["notes.txt", "sub/README.md", "model-of-mine.safetensors", "config.json", "README.md", "link"])
def test_overwriting_touches_nothing_that_a_run_did_not_write(name, moe, tmp_path):
    (moe / "README.md").write_text("a card")
    target = tmp_path / "t"
    apply(STEPS, moe, target, max_shard_bytes=3000)
    (target / name).parent.mkdir(exist_ok=True)
    if name == "link":
        (target / name).symlink_to(moe)
    else:
        (target / name).write_text("by hand")
    before = folder_bytes(target)
    with pytest.raises(TargetError, match=re.escape(f"changed since: {name};")):
        apply(STEPS[:1], moe, target, overwrite=True)
    assert folder_bytes(target) == before


def test_overwriting_replaces_every_file_of_the_run_before(moe, tmp_path):
    (moe / "sub").mkdir()
    (moe / "sub" / "code.py").write_text("x = 1")
    apply(STEPS, moe, tmp_path / "t", max_shard_bytes=3000)
    shutil.rmtree(moe / "sub")
    apply([], moe, tmp_path / "t", overwrite=True)
    apply([], moe, tmp_path / "fresh")
    assert folder_bytes(tmp_path / "t") == folder_bytes(tmp_path / "fresh")
    assert not (tmp_path / "t" / "sub").exists()


def test_an_overwrite_that_dies_while_it_clears_can_be_done_again(moe, tmp_path, monkeypatch):
    target = tmp_path / "t"
    apply(STEPS, moe, target, max_shard_bytes=3000)
    unlink, count = Path.unlink, []

    def dies(path, *args, **kwargs):
        if path.parent == target:
            count.append(path)
            if len(count) == 3:
                raise KeyboardInterrupt
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", dies)
    with pytest.raises(KeyboardInterrupt):
        apply([], moe, target, overwrite=True)
    monkeypatch.undo()
    assert not (target / INDEX).exists()
    apply([], moe, target, overwrite=True)
    apply([], moe, tmp_path / "fresh")
    assert folder_bytes(target) == folder_bytes(tmp_path / "fresh")


def test_overwriting_an_empty_or_new_folder_is_no_fault(moe, tmp_path, done):
    apply(STEPS, moe, tmp_path / "new", overwrite=True)
    assert folder_bytes(tmp_path / "new") == folder_bytes(done)


def test_a_file_and_a_broken_link_are_no_targets(moe, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TargetError, match="is a file"):
        apply(STEPS, moe, tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TargetError):
        apply(STEPS, moe, tmp_path / "link")
    with pytest.raises(TargetError, match="cannot be used"):
        apply(STEPS, moe, tmp_path / "file" / "below")


def test_resuming_what_is_complete_does_nothing_and_says_so(moe, done):
    before = folder_bytes(done)
    result = run_plan(make_plan(STEPS, open_checkpoint(moe)), done, resume=True)
    assert result.was_complete
    assert folder_bytes(done) == before


def test_resuming_the_finished_output_of_another_run_is_refused(moe, done):
    before = folder_bytes(done)
    with pytest.raises(JournalError, match="finished output of another run"):
        apply([], moe, done, resume=True)
    assert folder_bytes(done) == before


@pytest.mark.parametrize("what", ["lost", "cut", "flipped", "config", "tokenizer", "index"])
def test_resuming_what_was_complete_looks_whether_it_still_is(what, moe, tmp_path):
    (moe / "tokenizer.json").write_text("{}")
    target = tmp_path / "t"
    apply(STEPS, moe, target, max_shard_bytes=3000)
    shard = sorted(target.glob("*.safetensors"))[1]
    match what:
        case "lost":
            shard.unlink()
        case "cut":
            os.truncate(shard, 2000)
        case "flipped":
            data = bytearray(shard.read_bytes())
            data[-1] ^= 1
            shard.write_bytes(data)
        case "config":
            (target / "config.json").write_text("{}")
        case "tokenizer":
            (target / "tokenizer.json").unlink()
        case "index":
            (target / INDEX).write_text("{}")
    with pytest.raises(TargetError, match=r"there is no stopped run to resume.* since then .* was changed or removed"):
        apply(STEPS, moe, target, resume=True, max_shard_bytes=3000)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"digest": "md5", "shards": {}}', b'{"digest": "xxh3_64", "shards": 3}', b"\xff"]
)
def test_a_damaged_record_is_told_and_not_followed(content, moe, done):
    from tensorsurgeon.errors import CheckpointError

    (done / "surgeon.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"surgeon.json"):
        apply(STEPS, moe, done, resume=True)


# --- the source is never modified ---------------------------------------------------------------------------------


def refused(steps, source, target, **options):
    before = folder_bytes(source)
    with pytest.raises(TargetError, match="source"):
        apply(steps, source, target, **options)
    assert folder_bytes(source) == before


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_source_and_target_may_not_be_one_or_inside_another(options, moe, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(moe)
    (tmp_path / "parent_link").symlink_to(tmp_path)
    monkeypatch.chdir(moe)
    for target in (
        moe,
        moe / "out",
        moe / ".." / "moe",
        tmp_path,
        tmp_path / "link",
        tmp_path / "link" / "out",
        tmp_path / "parent_link" / "moe",
        Path(),
        Path("out"),
        Path(".."),
    ):
        refused(STEPS, moe, target, **options)


def test_a_source_named_by_a_link_is_still_the_source(moe, tmp_path):
    (tmp_path / "link").symlink_to(moe)
    with pytest.raises(TargetError, match="is the source"):
        apply(STEPS, tmp_path / "link", moe, overwrite=True)


@pytest.mark.parametrize("where", ["snapshot", "blobs", "cache", "snapshots"])
def test_the_blobs_of_a_snapshot_are_the_source_too(where, tmp_path):
    snapshot = write_snapshot(tmp_path / "cache", tiny_moe(), shards=2, config=moe_config())
    target = {
        "snapshot": snapshot,
        "blobs": tmp_path / "cache" / "blobs",
        "cache": tmp_path / "cache",
        "snapshots": snapshot.parent,
    }[where]
    before = folder_bytes(tmp_path / "cache")
    with pytest.raises(TargetError, match="source"):
        apply(STEPS, snapshot, target, overwrite=True)
    assert folder_bytes(tmp_path / "cache") == before


def test_a_folder_above_linked_shards_is_not_cleared(tmp_path):
    """The snapshot lies elsewhere, but what it links to lies in the target."""
    real = write_checkpoint(tmp_path / "data" / "real", tiny_moe())
    source = tmp_path / "view"
    source.mkdir()
    (source / "model.safetensors").symlink_to(real / "model.safetensors")
    (tmp_path / "data" / "old.safetensors").write_text("")
    refused(STEPS, source, tmp_path / "data", overwrite=True)


def test_beside_a_single_file_there_may_be_a_target(tmp_path):
    folder = write_checkpoint(tmp_path / "m", tiny_moe())
    apply(STEPS, folder / "model.safetensors", folder / "out")
    assert (folder / "out" / "model.safetensors").exists()
    with pytest.raises(TargetError, match="is the source"):
        apply(STEPS, folder / "model.safetensors", folder, overwrite=True)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to mount")
@pytest.mark.parametrize("deep", ["", "out"])
def test_a_second_path_to_the_source_by_a_mount_is_the_source(deep, moe, tmp_path):
    (tmp_path / "mnt").mkdir()
    if subprocess.run(["mount", "--bind", moe, tmp_path / "mnt"], capture_output=True).returncode:
        pytest.skip("no mounts here")
    try:
        refused(STEPS, moe, tmp_path / "mnt" / deep, overwrite=True)
    finally:
        subprocess.run(["umount", tmp_path / "mnt"], check=True)


def stopped_before_publishing(source, target, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("tensorsurgeon.running.run._publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            apply(STEPS, source, target)


def test_a_hard_link_to_the_source_in_a_stopped_target_is_not_written_through(moe, tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "s", tiny_moe(), config=moe_config())
    stopped_before_publishing(source, tmp_path / "t", monkeypatch)
    partial = tmp_path / "t" / "model.safetensors.partial"
    partial.unlink()
    os.link(source / "model.safetensors", partial)
    before = folder_bytes(source)
    apply(STEPS, source, tmp_path / "t", resume=True)
    apply(STEPS, source, tmp_path / "fresh")
    assert folder_bytes(source) == before
    assert folder_bytes(tmp_path / "t") == folder_bytes(tmp_path / "fresh")


@pytest.mark.parametrize("place", ["sub", ".surgeon", "tokenizer.json.partial"])
def test_a_link_in_a_stopped_target_leads_no_write_out_of_it(place, moe, tmp_path, monkeypatch):
    (moe / "sub").mkdir()
    (moe / "sub" / "a.txt").write_text("new")
    (moe / "tokenizer.json").write_text("{}")
    stopped_before_publishing(moe, tmp_path / "t", monkeypatch)
    home = tmp_path / "home"
    if place == ".surgeon":
        (tmp_path / "t" / place).rename(home)
    else:
        home.mkdir()
        (home / "a.txt").write_text("precious")
    (tmp_path / "t" / place).symlink_to(home / "a.txt" if "." in place[1:] else home)
    before = folder_bytes(home)
    if place == "tokenizer.json.partial":
        apply(STEPS, moe, tmp_path / "t", resume=True)
    else:
        with pytest.raises((TargetError, SinkError), match="is a link"):
            apply(STEPS, moe, tmp_path / "t", resume=True)
    assert folder_bytes(home) == before


def test_a_stranger_s_setuid_bit_does_not_become_ours(moe, tmp_path):
    (moe / "tool").write_text("#!/bin/sh")
    (moe / "tool").chmod(0o4755)
    (moe / "secret.json").write_text("{}")
    (moe / "secret.json").chmod(0o400)
    apply(STEPS, moe, tmp_path / "t")
    mask = os.umask(0)
    os.umask(mask)
    for name in ("tool", "secret.json"):
        assert (tmp_path / "t" / name).stat().st_mode & 0o7777 == 0o666 & ~mask
        assert (tmp_path / "t" / name).stat().st_mtime_ns == (moe / name).stat().st_mtime_ns


# --- a source that changes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["written", "replaced", "removed", "config", "side file"])
@pytest.mark.parametrize("when", ["before the run", "during the run"])
def test_a_source_that_changes_after_it_was_planned_is_found_out(when, how, moe, tmp_path, monkeypatch):
    (moe / "tokenizer.json").write_text("{}")
    plan = make_plan(STEPS, open_checkpoint(moe))
    shard = moe / "model-00001-of-00003.safetensors"

    def change():
        match how:
            case "written":
                with open(shard, "r+b") as file:
                    file.seek(-1, os.SEEK_END)
                    file.write(b"\x01")
            case "replaced":
                shutil.copy2(shard, tmp_path / "copy")
                os.replace(tmp_path / "copy", shard)
            case "removed":
                shard.unlink()
            case "config":
                (moe / "config.json").write_text("{}")
            case "side file":
                (moe / "tokenizer.json").write_text("[]")

    if when == "before the run":
        change()
        with pytest.raises(SourceError) as caught:
            run_plan(plan, tmp_path / "t")
        assert not (tmp_path / "t").exists()
    else:
        told = []
        with pytest.raises(SourceError) as caught:
            run_plan(plan, tmp_path / "t", progress=lambda part: told.append(part) or (len(told) == 1 and change()))
        assert not list((tmp_path / "t").glob("*.safetensors"))
        assert not (tmp_path / "t" / "surgeon.json").exists()
    assert not caught.value.can_resume
    if when == "during the run" and how != "removed":
        with pytest.raises(JournalError, match="source"):
            apply(STEPS, moe, tmp_path / "t", resume=True)


def test_more_shards_than_may_be_open_are_told_before_anything_is_written(moe, tmp_path, monkeypatch):
    monkeypatch.setattr("tensorsurgeon.running.run.open_files_limit", lambda: 43)
    with pytest.raises(TargetError, match=r"have 3 and 1 shards, all open at once, .*ulimit -n 44"):
        apply(STEPS, moe, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_link_planted_in_a_stopped_target_is_not_written_through(moe, tmp_path):
    plan = make_plan(STEPS, open_checkpoint(moe))
    from tensorsurgeon.running.journal import Journal
    from tensorsurgeon.running.target import identity_of

    Journal.start(tmp_path / "t", identity_of(plan)).close()
    victim = moe / "model-00001-of-00003.safetensors"
    before = victim.read_bytes()
    (tmp_path / "t" / "model.safetensors.partial").symlink_to(victim)
    with pytest.raises(SinkError):
        run_plan(plan, tmp_path / "t", resume=True)
    assert victim.read_bytes() == before


# --- disks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 24 MB, which only root can mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def larger(tmp_path: Path) -> Path:
    """4 MB of weights that go through arrays."""
    rng = np.random.default_rng(0)
    tensors = {f"w{i}.weight": rng.standard_normal((128, 128)).astype(np.float32) for i in range(64)}
    source = write_checkpoint(tmp_path / "larger", tensors, shards=2, config={"model_type": "x"})
    (source / "tokenizer.json").write_text("x" * 100_000)
    return source


def test_a_disk_too_small_is_noticed_before_anything_is_written(small_disk, larger):
    (small_disk / "ballast").write_bytes(b"\1" * (10 << 20))
    with pytest.raises(TargetError, match=r"the output needs 0\.02 GB and the disk has 0\.01 GB free"):
        apply([], larger, small_disk / "t")
    assert not (small_disk / "t").exists()


@pytest.mark.parametrize("resumed_with_more_than", [0, 1])
def test_a_disk_that_fills_up_when_files_are_reserved_is_told_and_resumed(
    resumed_with_more_than, small_disk, larger, tmp_path, monkeypatch
):
    """Somebody else took the room between the check and the writing."""
    steps = [Transpose(where=("{w}.weight",))]
    apply(steps, larger, tmp_path / "whole")
    monkeypatch.setattr("tensorsurgeon.running.target.check_room", lambda *_: None)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\1" * (22 << 20))
    for _ in range(1 + resumed_with_more_than):
        with pytest.raises(SinkError, match=r"the disk is full; free some space and run the same command with resume=True"):
            apply(steps, larger, small_disk / "t", resume=(small_disk / "t").exists())
        assert not list((small_disk / "t").glob("*.safetensors"))
    ballast.unlink()
    apply(steps, larger, small_disk / "t", resume=True)
    assert folder_bytes(small_disk / "t") == folder_bytes(tmp_path / "whole")


def test_a_disk_that_fills_up_during_the_run_keeps_what_is_done(small_disk, larger, tmp_path, monkeypatch):
    """A file system that cannot reserve (NFS, some FUSE) says so only when it is written."""
    monkeypatch.setattr("tensorsurgeon.running.target.check_room", lambda *_: None)
    monkeypatch.setattr("tensorsurgeon.checkpoint.sink.reserve", lambda fd, nbytes: os.ftruncate(fd, nbytes))
    steps = [Transpose(where=("{w}.weight",))]
    apply(steps, larger, tmp_path / "whole")
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\1" * (22 << 20))
    with pytest.raises(SinkError, match="the disk is full"):
        apply(steps, larger, small_disk / "t", workers=1)
    assert not list((small_disk / "t").glob("*.safetensors"))
    # What was done is journalled if the disk had room for the line; either way the bytes come out the same.
    ballast.unlink()
    result = run_plan(make_plan(steps, open_checkpoint(larger)), small_disk / "t", resume=True)
    assert result.resumed_units < result.units
    assert folder_bytes(small_disk / "t") == folder_bytes(tmp_path / "whole")


def test_a_disk_that_fills_up_while_side_files_are_copied_is_resumed(small_disk, larger, tmp_path, monkeypatch):
    monkeypatch.setattr("tensorsurgeon.running.target.check_room", lambda *_: None)
    (larger / "tokenizer.json").write_bytes(b"x" * (10 << 20))
    apply([], larger, tmp_path / "whole")
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\1" * (12 << 20))
    with pytest.raises(SinkError, match="the disk is full"):
        apply([], larger, small_disk / "t")
    assert not (small_disk / "t" / "model.safetensors").exists()
    assert not (small_disk / "t" / "tokenizer.json").exists()
    ballast.unlink()
    apply([], larger, small_disk / "t", resume=True)
    assert folder_bytes(small_disk / "t") == folder_bytes(tmp_path / "whole")


def test_a_read_only_disk_is_told_before_and_after_the_first_write(small_disk, larger, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(TargetError, match="cannot be used: Read-only file system"):
        apply([], larger, small_disk / "t")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    (small_disk / "t").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(TargetError, match="Read-only file system"):
        apply([], larger, small_disk / "t")


def test_another_file_system_gets_the_same_bytes(small_disk, moe, tmp_path):
    apply([], moe, small_disk / "t")
    assert_same(read_all(small_disk / "t"), tiny_moe())


def test_a_file_system_that_takes_little_at_a_time_changes_no_byte(moe, tmp_path, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, data[:100], offset))
    apply([], moe, tmp_path / "t")
    assert_same(read_all(tmp_path / "t"), tiny_moe())


@pytest.mark.parametrize(
    ("logs", "is_ours"), [(["quant_log.csv"], True), (["notes.txt"], False), ("quant_log.csv", False), (None, False)]
)
def test_a_log_is_ours_where_the_record_says_so_and_nothing_else_is(logs, is_ours, moe, tmp_path):
    run_plan(make_plan([], open_checkpoint(moe)), tmp_path / "t")
    record = json.loads((tmp_path / "t" / "surgeon.json").read_text()) | {"logs": logs}
    (tmp_path / "t" / "surgeon.json").write_text(json.dumps(record))
    for name in ("quant_log.csv", "notes.txt"):
        (tmp_path / "t" / name).write_text("x")
    assert ("quant_log.csv" in own_files(tmp_path / "t")) is is_ours
    assert "notes.txt" not in own_files(tmp_path / "t")
