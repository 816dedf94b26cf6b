"""Runs: the engine's contract for surgery and for quantization, and what stops a run."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.checkpoint.sink import Sink
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.errors import BudgetError, Interrupted, PlanViolationError, SinkError, SourceError
from tensorsurgeon.ops.cast import Cast
from tensorsurgeon.ops.rename import Rename
from tensorsurgeon.ops.transpose import Transpose
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.planning.rewriting import Rewrite
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running import executor
from tensorsurgeon.running.record import read_record, recorded_ranges
from tensorsurgeon.running.run import run_plan
from tensorsurgeon.tensors.spec import Region
from tests.checkpoints import apply, assert_same, folder_bytes, moe_config, read_all, tiny_moe, write_checkpoint
from tests.contract.engine import EngineContract
from tests.planning.test_resolving import lengths, random_chain, seeds


def surgery():
    """Copies, arrays, several steps of them, and tensors that nothing touches."""
    return [
        load_transform("split-experts"),
        Transpose(where=("{p*}.experts.{e}.down_proj.weight",)),
        Cast(where=("{p*}.self_attn.{m}.weight", "lm_head.weight"), dtype="F32"),
        Rename(where=("model.layers.{rest*}",), to="blk.{rest}"),
        Transpose(where=("lm_head.weight",)),
    ]


def quantization():
    return load_transform("quark-w8a8-int8")


class TestSurgery(EngineContract):
    RECIPE = "tests.running.test_executor:surgery"

    def tensors(self):
        return tiny_moe()

    def config(self):
        return moe_config()

    def large_tensors(self):
        # 10 MB, beside experts that config.json must describe.
        big = tiny_moe(experts=4)
        rng = np.random.default_rng(1)
        for number in range(30):
            big[f"model.layers.{number}.self_attn.o_proj.weight"] = rng.standard_normal((100, 400)).astype(ml_dtypes.bfloat16)
            big[f"model.layers.{number}.other"] = rng.integers(0, 256, 100_000, np.uint8)
        return big


class TestQuantization(EngineContract):
    RECIPE = "tests.running.test_executor:quantization"
    KILLS = 10

    def tensors(self):
        return tiny_moe(hidden=32, inner=16)

    def config(self):
        return moe_config(hidden=32, inner=16)

    def large_tensors(self):
        big = self.tensors()
        rng = np.random.default_rng(1)
        for number in range(30):
            big[f"model.layers.{number}.self_attn.o_proj.weight"] = rng.standard_normal((128, 512)).astype(ml_dtypes.bfloat16)
            big[f"model.layers.{number}.other"] = rng.integers(0, 256, 100_000, np.uint8)
        return big


def test_nothing_to_do_copies_everything_and_keeps_metadata_and_side_files(tmp_path):
    source = write_checkpoint(
        tmp_path / "s", tiny_moe(), shards=3, config=moe_config(), metadata={"format": "pt", "note": "kept"}
    )
    (source / "tokenizer.json").write_text('{"a": 1}')
    apply([], source, tmp_path / "t")
    assert_same(read_all(tmp_path / "t"), tiny_moe())
    found = open_checkpoint(tmp_path / "t")
    assert found.metadata == {"format": "pt", "note": "kept"}
    assert (tmp_path / "t" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (tmp_path / "t" / "tokenizer.json").read_text() == '{"a": 1}'


@settings(max_examples=60)
@given(seeds, lengths, st.integers(1, 4), st.sampled_from([7, 64, 1 << 20]), st.sampled_from([1, 50, 1 << 20]), st.integers(1, 5))
def test_any_chain_of_ops_is_written_as_numpy_says_it(seed, length, workers, copy_bytes, max_shard_bytes, shards):
    start, ops, wanted = random_chain(seed, length)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tensorsurgeon.planning.work.COPY_BYTES", copy_bytes)
        source = write_checkpoint(Path(place) / "s", start, shards=min(shards, len(start)), seed=seed % 7)
        apply(ops, source, Path(place) / "t", workers=workers, max_shard_bytes=max_shard_bytes)
        assert_same(read_all(Path(place) / "t"), wanted)


def test_the_source_is_not_changed_by_a_byte(tmp_path):
    source = write_checkpoint(tmp_path / "s", tiny_moe(), shards=3, config=moe_config())
    before = folder_bytes(source), [p.stat().st_mtime_ns for p in sorted(source.iterdir())]
    apply(surgery(), source, tmp_path / "t", workers=4)
    assert (folder_bytes(source), [p.stat().st_mtime_ns for p in sorted(source.iterdir())]) == before


def test_a_cap_below_one_unit_is_refused_before_anything_is_written(tmp_path):
    source = write_checkpoint(tmp_path / "s", {"big.weight": np.zeros((1000, 100), np.float32)})
    with pytest.raises(BudgetError, match=r"big.weight: needs 800000 bytes at once, more than max_ram 1000; give at least 1MB"):
        apply(Transpose(where=("big.weight",)), source, tmp_path / "t", max_ram_bytes=1000)
    assert not (tmp_path / "t").exists()


def test_units_in_flight_stay_below_the_cap(tmp_path):
    """Counted where the work is done: no more units at once than the cap admits, and several where it does."""
    tensors = {f"w{i}.weight": np.zeros((64, 64), np.float32) for i in range(12)}
    source = write_checkpoint(tmp_path / "s", tensors)
    lock, at_once, most = threading.Lock(), [0], [0]
    meet = threading.Event()

    @dataclass(frozen=True)
    class Counting:
        def plan(self, specs):
            return Transpose(where=("{w*}",)).plan(specs)

        def apply(self, rewrite, inputs):
            with lock:
                at_once[0] += 1
                most[0] = max(most[0], at_once[0])
            meet.wait(0.02)
            made = Transpose(where=("{w*}",)).apply(rewrite, inputs)
            with lock:
                at_once[0] -= 1
            return made

    plan = make_plan(Counting(), open_checkpoint(source))
    run_plan(plan, tmp_path / "t", workers=6, max_ram_bytes=plan.peak_unit_bytes * 2 + 5)
    assert most[0] == 2


@dataclass(frozen=True)
class Lying:
    """Plans a transposition and makes something else."""

    make: Callable

    def identity(self):
        return "lying"

    def plan(self, specs):
        spec = specs["x"]
        return (Rewrite((Region(spec),), (Region(spec._replace(shape=spec.shape[::-1])),)),)

    def apply(self, rewrite, inputs):
        return self.make(inputs[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: (x,), r"planned F32\[3, 2\], made float32\[2, 3\]"),
        (lambda x: (x.T.astype(np.float64),), r"made float64\[3, 2\]"),
        (lambda x: (x.T, x.T), "the plan has 1 outputs, the step made 2"),
        (lambda x: (), "the step made 0"),
    ],
)
def test_a_step_that_makes_other_tensors_than_it_planned_is_stopped(make, message, tmp_path):
    source = write_checkpoint(tmp_path / "s", {"x": np.zeros((2, 3), np.float32)})
    with pytest.raises(PlanViolationError, match=message):
        apply(Lying(make), source, tmp_path / "t")
    assert not list((tmp_path / "t").glob("*.safetensors"))


@pytest.mark.parametrize("chained", [False, True])
def test_no_step_can_write_into_its_input(chained, tmp_path):
    def scribble(x):
        x[...] = 1
        return (x.T,)

    source = write_checkpoint(tmp_path / "s", {"x": np.zeros((2, 3), np.float32)})
    steps = [Transpose(where=("x",)), Transpose(where=("x",)), Lying(scribble)] if chained else [Lying(scribble)]
    with pytest.raises(ValueError, match="read-only"):
        apply(steps, source, tmp_path / "t")


def test_a_source_that_becomes_shorter_during_the_run_is_named(tmp_path):
    source = write_checkpoint(tmp_path / "s", tiny_moe(), config=moe_config())
    path = source / "model.safetensors"
    size = path.stat().st_size
    with Source(open_checkpoint(source)) as opened:
        os.truncate(path, size // 2)
        with pytest.raises(SourceError, match=r"model.safetensors: ends at byte .*the file changed during the run"):
            opened.read_into(0, size - 8, memoryview(bytearray(8)))


def test_a_stop_ends_in_order_and_the_same_call_with_resume_completes(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorsurgeon.planning.work.COPY_BYTES", 256)
    source = write_checkpoint(tmp_path / "s", tiny_moe(), shards=3, config=moe_config())
    plan = make_plan(surgery(), open_checkpoint(source))
    run_plan(plan, tmp_path / "whole")
    stop, told = threading.Event(), []

    def progress(part):
        told.append(part.nbytes)
        if len(told) == 5:
            stop.set()

    with pytest.raises(Interrupted, match=rf"stopped after \d+ of {len(plan.units)} units"):
        run_plan(plan, tmp_path / "t", workers=2, stop=stop, progress=progress)
    result = run_plan(plan, tmp_path / "t", resume=True)
    assert 5 <= result.resumed_units <= 6
    assert folder_bytes(tmp_path / "t") == folder_bytes(tmp_path / "whole")


def test_no_line_of_the_journal_claims_bytes_that_a_power_cut_could_take(tmp_path, monkeypatch):
    """What the disk surely holds is what was written before the last sync began; every claim must rest on that."""
    from tensorsurgeon.running.journal import Journal

    monkeypatch.setattr("tensorsurgeon.planning.work.COPY_BYTES", 256)
    monkeypatch.setattr("tensorsurgeon.running.executor.COMMIT_BYTES", 700)
    source = write_checkpoint(tmp_path / "s", tiny_moe(), shards=3, config=moe_config())
    plan = make_plan(surgery(), open_checkpoint(source), max_shard_bytes=3000)
    durable, claims = {}, []
    sync, append = Sink.sync, Journal.append

    def syncing(sink):
        seen = {p.name.removesuffix(".partial"): p.read_bytes() for p in sink.target.glob("*.partial")}
        sync(sink)
        durable.update(seen)

    def appending(journal, units):
        units = list(units)
        for number, digests in units:
            unit = plan.units[number]
            places = [(w.shard, w.offset, w.nbytes) for w in unit.writes] + [(c.shard, c.offset, c.nbytes) for c in unit.copies]
            for (shard, offset, nbytes), digest in zip(places, digests, strict=True):
                content = durable[plan.layout.shards[shard].name][offset : offset + nbytes]
                assert xxhash.xxh3_64_hexdigest(content) == digest
                claims.append(nbytes)
        append(journal, units)

    monkeypatch.setattr(Sink, "sync", syncing)
    monkeypatch.setattr(Journal, "append", appending)
    run_plan(plan, tmp_path / "t", workers=4)
    assert sum(claims) == plan.output_bytes


def test_a_disk_that_takes_no_sync_stops_the_other_workers_too(tmp_path, monkeypatch):
    """Hours of further work that no journal will know are not what a failing disk calls for."""
    monkeypatch.setattr("tensorsurgeon.planning.work.COPY_BYTES", 256)
    monkeypatch.setattr("tensorsurgeon.running.executor.COMMIT_BYTES", 1)
    source = write_checkpoint(tmp_path / "s", tiny_moe(layers=8), shards=3, config=moe_config())
    plan = make_plan(surgery(), open_checkpoint(source))
    run_plan(plan, tmp_path / "whole")
    done, calls = [], []
    sync = Sink.sync

    def failing_once(sink):
        calls.append(len(done))
        if len(calls) == 1:
            raise SinkError("cannot be made durable: Input/output error", where=str(sink.target))
        sync(sink)

    run_unit = executor.run_unit

    def slowly(*arguments):
        time.sleep(0.005)
        return run_unit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Sink, "sync", failing_once)
        patch.setattr(executor, "run_unit", slowly)
        with pytest.raises(SinkError, match="Input/output error"):
            run_plan(plan, tmp_path / "t", workers=2, progress=done.append)
    # What was under way when the fault was met, and little more.
    assert len(done) < len(plan.units) / 2
    run_plan(plan, tmp_path / "t", resume=True)
    assert folder_bytes(tmp_path / "t") == folder_bytes(tmp_path / "whole")


def test_the_record_has_a_digest_for_every_byte_of_every_shard(tmp_path):
    source = write_checkpoint(tmp_path / "s", tiny_moe(), shards=3, config=moe_config())
    apply(surgery(), source, tmp_path / "t", max_shard_bytes=2500)
    record = read_record(tmp_path / "t")
    shards = {p.name: p.read_bytes() for p in (tmp_path / "t").glob("*.safetensors")}
    assert record["shards"].keys() == shards.keys()
    ends = dict.fromkeys(shards, 0)
    for shard, offset, nbytes, digest in recorded_ranges(record):
        assert offset == ends[shard]
        assert xxhash.xxh3_64_hexdigest(shards[shard][offset : offset + nbytes]) == digest
        ends[shard] = offset + nbytes
    assert ends == {name: len(content) for name, content in shards.items()}
    others = {n: b for n, b in folder_bytes(tmp_path / "t").items() if n not in shards and n != "surgeon.json"}
    assert record["files"] == {n: [len(b), xxhash.xxh3_64_hexdigest(b)] for n, b in others.items()}
    # Nothing in it tells when or where: the same run writes the same record everywhere.
    assert str(tmp_path) not in (tmp_path / "t" / "surgeon.json").read_text()


def test_progress_adds_up_to_the_output_also_when_resumed(tmp_path):
    source = write_checkpoint(tmp_path / "s", tiny_moe(), shards=3, config=moe_config())
    plan = make_plan(surgery(), open_checkpoint(source))
    told = []
    run_plan(plan, tmp_path / "t", progress=lambda p: told.append(p.nbytes))
    assert sum(told) == plan.output_bytes


def test_thousands_of_short_copies_need_one_buffer(tmp_path, monkeypatch):
    """Each copy once took 64 KB of the worker's workspace for its digest: 4 GB for a checkpoint of many scalars."""
    from tensorsurgeon.tensors.arrays import empty

    asked = []
    monkeypatch.setattr("tensorsurgeon.running.unit.empty", lambda shape, dtype: asked.append(shape) or empty(shape, dtype))
    tensors = {f"s.{i}": np.asarray(i, np.float64) for i in range(2000)}
    tensors["pad"] = np.zeros(1, np.int8)
    source = write_checkpoint(tmp_path / "s", tensors)
    # Renaming in reverse order keeps neighbours in the source from being neighbours in the output.
    plan = make_plan([Rename(where=(r"re:s\.(?P<a>.*)(?P<b>.)",), to="{b}.{a}")], open_checkpoint(source))
    assert max(len(unit.copies) for unit in plan.units) > 1000
    run_plan(plan, tmp_path / "t")
    assert len(asked) <= len(plan.units)
    assert read_all(tmp_path / "t")["7.123"] == 1237
