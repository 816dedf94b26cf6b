"""What every conversion owes: the same bytes whatever the machine, and whatever happens to it on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.running.run import run_plan
from tests.checkpoints import Tensors, apply, assert_same, folder_bytes, read_all, write_checkpoint, write_snapshot

ROOT = Path(__file__).parents[2]


class EngineContract:
    """Inherit, and say what is converted by what.

    ``RECIPE`` is ``module:function`` (the killed process imports it); ``tensors`` makes the source and ``config`` its
    config.json; ``large_tensors`` the source of the runs that are killed, of some megabytes.
    """

    RECIPE: str
    KILLS = 20

    def transform(self) -> Any:
        module, _, name = self.RECIPE.partition(":")
        return getattr(__import__(module, fromlist=[name]), name)()

    def tensors(self) -> Tensors:
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        raise NotImplementedError

    def large_tensors(self) -> Tensors:
        raise NotImplementedError

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return write_checkpoint(tmp_path / "source", self.tensors(), shards=3, config=self.config())

    @pytest.mark.parametrize("workers", [1, 4])
    def test_workers_and_memory_cap_change_no_byte_of_any_file(
        self, workers: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Small units, so that there is something to divide among workers.
        monkeypatch.setattr("tensorsurgeon.planning.work.COPY_BYTES", 512)
        apply(self.transform(), source, tmp_path / "plain", workers=2, max_shard_bytes=2000)
        plan = make_plan(self.transform(), open_checkpoint(source), max_shard_bytes=2000)
        assert len(plan.units) > 8
        for cap in (max(plan.peak_unit_bytes, 1), plan.peak_unit_bytes * 3 + 1, None):
            target = tmp_path / f"cap-{cap}"
            run_plan(plan, target, workers=workers, max_ram_bytes=cap)
            assert folder_bytes(target) == folder_bytes(tmp_path / "plain")

    def test_the_sharding_of_the_source_changes_no_byte_but_the_name_of_the_run(self, tmp_path: Path) -> None:
        tensors, config = self.tensors(), self.config()
        sources = [
            write_checkpoint(tmp_path / "one", tensors, config=config),
            write_checkpoint(tmp_path / "one_with_index", tensors, config=config, index=True),
            write_checkpoint(tmp_path / "seven", tensors, shards=7, config=config, seed=1),
            write_checkpoint(tmp_path / "no_index", tensors, shards=7, config=config, index=False, seed=2),
            write_checkpoint(tmp_path / "single", tensors, config=config) / "model.safetensors",
            write_snapshot(tmp_path / "cache", tensors, shards=4, config=config),
        ]
        outputs = []
        for number, source in enumerate(sources):
            target = tmp_path / f"out-{number}"
            apply(self.transform(), source, target, max_shard_bytes=2000)
            # The record names the source, whose headers and time stamps differ.
            outputs.append({name: content for name, content in folder_bytes(target).items() if name != "surgeon.json"})
        assert outputs[0]
        assert all(output == outputs[0] for output in outputs[1:])

    @pytest.mark.parametrize("limit", [1, 700, 5000, 1 << 40])
    def test_the_shard_size_changes_no_tensor(self, limit: int, source: Path, tmp_path: Path) -> None:
        apply(self.transform(), source, tmp_path / "plain")
        apply(self.transform(), source, tmp_path / "cut", max_shard_bytes=limit)
        assert_same(read_all(tmp_path / "cut"), read_all(tmp_path / "plain"))
        index = tmp_path / "cut" / "model.safetensors.index.json"
        if index.exists():
            document = json.loads(index.read_text())
            assert document["weight_map"].keys() == read_all(tmp_path / "plain").keys()
            assert document["metadata"]["total_size"] == sum(a.nbytes for a in read_all(tmp_path / "plain").values())

    def test_planned_specs_are_what_the_files_hold(self, source: Path, tmp_path: Path) -> None:
        plan = make_plan(self.transform(), open_checkpoint(source), max_shard_bytes=2000)
        run_plan(plan, tmp_path / "out")
        found = open_checkpoint(tmp_path / "out")
        assert dict(found.specs) == {name: plan.specs[name] for name in found.specs}
        assert found.oddities == ()
        assert [s.file_bytes for s in found.shards] == [s.file_bytes for s in plan.layout.shards]
        assert found.weight_bytes == plan.output_bytes

    def test_killed_at_many_points_and_resumed_it_writes_the_same_bytes(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "source", self.large_tensors(), shards=3, config=self.config())
        (source / "tokenizer.json").write_text("{}")
        (source / "sub").mkdir()
        (source / "sub" / "note.txt").write_text("a side file in a folder")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.contract.killing", str(source), str(tmp_path), self.RECIPE, "0", str(self.KILLS)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        points = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(points) == self.KILLS
        assert all(point["same"] for point in points), points
        assert not any(point["index_over_unfinished_state"] for point in points), points
        # The test must have tested something: runs that were cut short, and work that was not done twice.
        assert sum(point["killed"] for point in points) >= self.KILLS * 3 // 4, points
        assert sum(0 < point["resumed_units"] < point["units"] for point in points) > self.KILLS // 5, points
