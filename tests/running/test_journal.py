"""The journal of a stopped run: what it claims is believed only as far as the bytes bear it out."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import Interrupted, JournalError, TargetError
from tensorsurgeon.ops.transpose import Transpose
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.journal import Journal
from tensorsurgeon.running.run import run_plan
from tensorsurgeon.running.target import identity_of
from tests.checkpoints import INDEX, folder_bytes, moe_config

STEPS = [load_transform("split-experts"), Transpose(where=("{p*}.{m}_proj.weight",))]


@pytest.fixture
def plan(moe, monkeypatch):
    monkeypatch.setattr("tensorsurgeon.planning.work.COPY_BYTES", 256)
    return make_plan(STEPS, open_checkpoint(moe), max_shard_bytes=3000)


def stop_after(plan, target, units):
    stop, told = threading.Event(), []

    def progress(part):
        told.append(part)
        if len(told) == units:
            stop.set()

    with pytest.raises(Interrupted):
        run_plan(plan, target, workers=1, stop=stop, progress=progress)
    return target


@pytest.fixture
def stopped(plan, tmp_path):
    return stop_after(plan, tmp_path / "stopped", 10)


@pytest.fixture
def whole(plan, tmp_path):
    run_plan(plan, tmp_path / "whole")
    return folder_bytes(tmp_path / "whole")


def lines(target):
    return (target / ".surgeon" / "journal.jsonl").read_text().splitlines()


def test_a_stopped_run_leaves_its_name_its_lines_and_no_visible_file(stopped):
    assert len(lines(stopped)) == 10
    assert not [p for p in stopped.iterdir() if p.name != ".surgeon" and not p.name.endswith(".partial")]
    assert set(json.loads((stopped / ".surgeon" / "run.json").read_text())) >= {"fingerprint", "recipe"}


def test_a_torn_last_line_does_not_count(plan, stopped, whole):
    path = stopped / ".surgeon" / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    result = run_plan(plan, stopped, resume=True)
    assert result.resumed_units == 9
    assert folder_bytes(stopped) == whole


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\0\0\0\0",
        b"{}",
        b"[1]",
        b'{"unit": "x", "digests": []}',
        b'{"unit": 3}',
        b'{"unit": 99999, "digests": ["a"]}',
        b'{"unit": -1, "digests": ["a"]}',
        b'{"unit": 3, "digests": 7}',
        b"\xff\xfe",
        b'{"unit": 1e400, "digests": []}',
    ],
)
def test_a_damaged_line_only_means_work_done_again(line, plan, stopped, whole):
    path = stopped / ".surgeon" / "journal.jsonl"
    content = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*content[:4], line, *content[5:]]) + b"\n")
    assert run_plan(plan, stopped, resume=True).resumed_units == 9
    assert folder_bytes(stopped) == whole


def test_units_whose_bytes_were_damaged_are_done_again(plan, stopped, whole):
    """The machine lost power, or somebody wrote there: the digests tell."""
    claimed = [json.loads(line)["unit"] for line in lines(stopped)]
    damaged = set()
    for number in claimed[::3]:
        unit = plan.units[number]
        places = [(w.shard, w.offset) for w in unit.writes] + [(c.shard, c.offset) for c in unit.copies]
        shard, offset = places[-1]
        with open(stopped / f"{plan.layout.shards[shard].name}.partial", "r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
        damaged.add(number)
    assert len(damaged) == 4
    assert run_plan(plan, stopped, resume=True).resumed_units == len(claimed) - len(damaged)
    assert folder_bytes(stopped) == whole


@pytest.mark.parametrize("damage", ["removed", "shorter", "longer", "header"])
def test_a_shard_that_was_damaged_as_a_file_is_mended(damage, plan, stopped, whole):
    path = stopped / f"{plan.layout.shards[0].name}.partial"
    match damage:
        case "removed":
            path.unlink()
        case "shorter":
            os.truncate(path, path.stat().st_size // 2)
        case "longer":
            with open(path, "ab") as file:
                file.write(b"x" * 1000)
        case "header":
            with open(path, "r+b") as file:
                file.write(b"\xff" * 20)
    run_plan(plan, stopped, resume=True)
    assert folder_bytes(stopped) == whole


def test_without_its_lines_a_run_starts_from_the_first_unit(plan, stopped, whole):
    (stopped / ".surgeon" / "journal.jsonl").unlink()
    assert run_plan(plan, stopped, resume=True).resumed_units == 0
    assert folder_bytes(stopped) == whole


@pytest.mark.parametrize("change", ["source", "recipe", "version", "shard_size", "config"])
def test_another_run_is_refused_and_nothing_is_lost(change, moe, stopped, monkeypatch):
    before = folder_bytes(stopped)
    steps, size = STEPS, 3000
    match change:
        case "source":
            (moe / "tokenizer.json").write_text("{}")
        case "recipe":
            steps = STEPS[:1]
        case "version":
            monkeypatch.setattr("tensorsurgeon.planning.plan.__version__", "9.9.9")
        case "shard_size":
            size = 4000
        case "config":
            (moe / "config.json").write_text(json.dumps({**moe_config(), "changed": 1}))
    other = make_plan(steps, open_checkpoint(moe), max_shard_bytes=size)
    with pytest.raises(JournalError, match=r"another source, recipe, package version or shard size.*overwrite=True"):
        run_plan(other, stopped, resume=True)
    assert folder_bytes(stopped) == before


def test_a_source_that_was_written_since_is_refused_though_its_headers_are_the_same(moe, stopped):
    before = folder_bytes(stopped)
    os.utime(moe / "model-00001-of-00003.safetensors", ns=(5, 5))
    with pytest.raises(JournalError, match=r"model-00001-of-00003.safetensors of the source was written .*overwrite=True"):
        run_plan(make_plan(STEPS, open_checkpoint(moe), max_shard_bytes=3000), stopped, resume=True)
    assert folder_bytes(stopped) == before


@pytest.mark.parametrize("content", [b'{"a":' * 20_000, b"", b"[]", b"{", b"\xff"])
def test_a_run_without_a_readable_name_is_refused(content, plan, stopped):
    (stopped / ".surgeon" / "run.json").write_bytes(content)
    with pytest.raises(JournalError, match=r"run.json .*overwrite=True"):
        run_plan(plan, stopped, resume=True)


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}, {}])
def test_two_runs_in_one_target_are_refused(options, plan, stopped, whole):
    first, _ = Journal.resume(stopped, identity_of(plan))
    before = folder_bytes(stopped)
    with pytest.raises(TargetError, match="another surgeon is writing here" if options else "was stopped"):
        run_plan(plan, stopped, **options)
    assert folder_bytes(stopped) == before
    first.close()
    run_plan(plan, stopped, resume=True)
    assert folder_bytes(stopped) == whole


def test_a_run_that_starts_while_another_runs_is_refused(plan, tmp_path):
    """Both find an empty folder; only one may have it."""
    began, go_on, failures = threading.Event(), threading.Event(), []

    def progress(part):
        began.set()
        go_on.wait(20)

    thread = threading.Thread(target=lambda: run_plan(plan, tmp_path / "t", progress=progress))
    thread.start()
    assert began.wait(20)
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(TargetError) as caught:
            run_plan(plan, tmp_path / "t", **options)
        failures.append(str(caught.value))
    go_on.set()
    thread.join()
    assert "another surgeon is writing here" in failures[1]
    assert "another surgeon is writing here" in failures[2]
    assert (tmp_path / "t" / "model.safetensors.index.json").exists()
    assert not (tmp_path / "t" / ".surgeon").exists()


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "run.json.partial"]])
def test_traces_of_a_run_that_died_before_it_had_a_name_do_not_stand_in_the_way(left, plan, tmp_path, whole):
    target = tmp_path / "t"
    (target / ".surgeon").mkdir(parents=True)
    for name in left:
        (target / ".surgeon" / name).write_text("")
    run_plan(plan, target)
    assert folder_bytes(target) == whole


def test_a_run_that_died_while_it_removed_its_journal_is_complete(plan, tmp_path, whole):
    target = tmp_path / "whole"
    (target / ".surgeon").mkdir()
    assert run_plan(plan, target, resume=True).was_complete
    assert folder_bytes(target) == whole


def test_at_every_step_of_removing_its_journal_a_run_is_unfinished_and_whole_or_finished(plan, tmp_path, whole, monkeypatch):
    """Killed after each removal: never a named run without its journal, and the lock is the last file to go."""
    target = tmp_path / "t"
    left = []
    unlink = Path.unlink

    def watched(path, missing_ok=False):
        unlink(path, missing_ok=missing_ok)
        if path.parent.name == ".surgeon" and (target / INDEX).exists():
            left.append({p.name for p in path.parent.iterdir()})

    monkeypatch.setattr(Path, "unlink", watched)
    run_plan(plan, target)
    assert left[-1] == set()
    assert left[-2] == {"lock"}
    assert all("run.json" not in names for names in left)
    assert folder_bytes(target) == whole


def test_no_index_leads_to_shards_that_are_opened_again(plan, tmp_path, whole, monkeypatch):
    """A run that died after its last file but before its journal was gone is checked again, shard by shard."""
    from tensorsurgeon.checkpoint.sink import Sink

    target = tmp_path / "t"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda _: None)
        run_plan(plan, target)
    assert (target / INDEX).exists()
    seen = []
    opened = Sink.open
    monkeypatch.setattr(Sink, "open", lambda sink: seen.append((target / INDEX).exists()) or opened(sink))
    assert run_plan(plan, target, resume=True).resumed_units == len(plan.units)
    assert seen == [False]
    assert folder_bytes(target) == whole


def test_lines_of_an_earlier_run_never_count_for_a_new_one(plan, stopped, tmp_path, moe):
    other = make_plan(STEPS[:1], open_checkpoint(moe))
    run_plan(other, tmp_path / "other")
    Journal.start(stopped, identity_of(other)).close()
    assert lines(stopped) == []
    result = run_plan(other, stopped, overwrite=True)
    assert result.resumed_units == 0
    assert folder_bytes(stopped) == folder_bytes(tmp_path / "other")
