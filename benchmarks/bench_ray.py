"""What the nodes of a Ray cluster do in parallel, and what that says of more of them: docs/scale.md.

    python benchmarks/bench_ray.py [--nodes 1 2 4] [--layers 2] [--experts 8] [--tokens 8192] [--work FOLDER] [--json FILE]

Makes a random model of the real one's shapes with few layers and experts, converts it (RTN) and calibrates it (int4 in groups
of 128, polished) on local clusters of one-core nodes, compares every byte with one process, and prints the CPU seconds of each
phase on each node. Speed-up is reckoned in these: a phase takes as long as its busiest node, and what this machine does alone is
added. Wall time is printed beside it; it says nothing where nodes have to share cores, with each other or with other programs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from tensorsurgeon.calibrate.log import LOG_NAME, read_log  # noqa: E402
from tensorsurgeon.calibrate.options import CalibrationOptions, DataSource  # noqa: E402
from tensorsurgeon.calibrate.run import run_calibrated  # noqa: E402
from tensorsurgeon.checkpoint.folder import open_checkpoint  # noqa: E402
from tensorsurgeon.ops.quantize import Quantize  # noqa: E402
from tensorsurgeon.planning.plan import Plan, make_plan  # noqa: E402
from tensorsurgeon.planning.rewriting import steps_of  # noqa: E402
from tensorsurgeon.recipes.library import load_transform  # noqa: E402
from tensorsurgeon.running.cluster.crew import Crew  # noqa: E402
from tensorsurgeon.running.cluster.member import Session  # noqa: E402
from tensorsurgeon.running.cluster.units import RayMachines  # noqa: E402
from tensorsurgeon.running.run import run_plan  # noqa: E402
from tests.running.clusters import cluster_of, hands_of  # noqa: E402

_LENGTH = 512
_TICKS = os.sysconf("SC_CLK_TCK")


class Open:
    """An item that does nothing: what a node needs before its first."""

    def do(self, desk: Any) -> None:
        return None


class Timed(Crew):
    """A crew that notes what each phase costs: CPU seconds of every hand, of this process, and wall time."""

    def __init__(self, cluster: Any) -> None:
        super().__init__(None, None)
        self._nodes = cluster.list_all_nodes()
        self.phases: list[tuple[str, list[float], float, float]] = []
        self._last = (time.process_time(), time.monotonic())

    def _cpu(self) -> dict[int, float]:
        """CPU seconds of every process that works for us on a node, by its number."""
        found = {}
        for pid in (pid for node in self._nodes for pid in hands_of(node)):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[pid] = (int(fields[11]) + int(fields[12])) / _TICKS
        return found

    def _since(self, phase: str, before: dict[int, float]) -> None:
        now = self._cpu()
        here, wall = time.process_time(), time.monotonic()
        self.phases.append((phase, [now[pid] - before.get(pid, 0.0) for pid in now], here - self._last[0], wall - self._last[1]))
        self._last = here, wall

    @contextmanager
    def session(self, job: Any) -> Iterator[Session]:
        import ray

        with super().session(job) as session:
            if hasattr(job, "options"):
                self._since("alone", self._cpu())
                before = self._cpu()
                ray.get([member.hand.do.remote(*session, Open()) for member in self.members.values()])
                self._since("open", before)
            yield session

    def run(self, session: Session, items: Any, **given: Any) -> None:
        before = self._cpu()
        self._since("alone", before)
        super().run(session, items, **given)
        kind = type(items[0]).__name__ if items else "nothing"
        self._since("units" if kind == "list" else kind, before)


def plan_of(source: Path, method: str) -> Plan:
    steps = steps_of(load_transform("quantize-linears", {"format": "ct-packed", "num_bits": 4, "group_size": 128}))
    from dataclasses import replace

    return make_plan([replace(s, method=method) if isinstance(s, Quantize) else s for s in steps], open_checkpoint(source))


def on_nodes(count: int, source: Path, work: Path, options: CalibrationOptions) -> dict[str, Any]:
    """An RTN run and a calibrated one on so many nodes, and what each phase cost."""
    import ray

    os.environ["PYTHONPATH"] = str(ROOT)
    found: dict[str, Any] = {"nodes": count}
    with cluster_of(count) as cluster:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="critical")
        try:
            for name in ("rtn", "gptq"):
                began = time.monotonic()
                with Timed(cluster) as crew:
                    machines = RayMachines(crew)
                    target = work / f"{name}-{count}"
                    if name == "rtn":
                        run_plan(plan_of(source, name), target, machines=machines)
                    else:
                        run_calibrated(plan_of(source, name), target, options, machines=machines)
                found[name] = {"wall": time.monotonic() - began, **summed(crew.phases)}
        finally:
            ray.shutdown()
    return found


def summed(phases: list[tuple[str, list[float], float, float]]) -> dict[str, Any]:
    """By phase: CPU seconds of all nodes, of the busiest one time after time, of this process, and wall time."""
    made: dict[str, dict[str, float]] = defaultdict(lambda: {"all": 0.0, "busiest": 0.0, "here": 0.0, "wall": 0.0})
    for phase, hands, here, wall in phases:
        one = made[phase]
        one["all"] += sum(hands)
        one["busiest"] += max(hands, default=0.0)
        one["here"] += here
        one["wall"] += wall
    return {"phases": dict(made)}


def path_seconds(found: dict[str, Any]) -> float:
    """What the run would take on nodes with a core each: the busiest node of each phase, and what is done here alone.

    ``open`` is left out: it is done once, whatever the size of the run.
    """
    return sum(
        phase["busiest"] + (phase["here"] if name == "alone" else 0.0)
        for name, phase in found["phases"].items()
        if name != "open"
    )


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--work", type=Path, help="where model and outputs go for a while")
    parser.add_argument("--among", action="store_true", help="compare bytes among the clusters alone, which saves a run")
    parser.add_argument("--json", type=Path, help="where to keep the figures, for benchmarks/scale.py")
    given = parser.parse_args()
    from make_bench_model import write_bench_model

    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        work = Path(folder)
        total = write_bench_model(work / "model", layers=given.layers, experts=given.experts, shards=2)
        samples = given.tokens // _LENGTH
        np.save(work / "tokens.npy", np.random.default_rng(0).integers(0, 50_000, (samples, _LENGTH)))
        options = CalibrationOptions(sources=(DataSource(str(work / "tokens.npy")),), samples=samples, sequence_length=_LENGTH)
        run_plan(plan_of(work / "model", "rtn"), work / "rtn")
        first = given.nodes[0] if given.among else None
        if first is None:
            run_calibrated(plan_of(work / "model", "gptq"), work / "gptq", options)
        measured = []
        for count in given.nodes:
            found = on_nodes(count, work / "model", work, options)
            for name in ("rtn", "gptq"):
                wanted = work / (f"gptq-{first}" if name == "gptq" and first is not None else name)
                if weights(work / f"{name}-{count}") != weights(wanted):
                    raise SystemExit(f"{name} on {count} nodes: other bytes than in {wanted.name}")
                found[name]["path"] = path_seconds(found[name])
            measured.append(found)
            rows = read_log(work / f"gptq-{count}" / LOG_NAME)
            found["expert_share"] = sum(row.seconds for row in rows if row.expert is not None) / sum(row.seconds for row in rows)
            report(found, measured[0])
        if given.json:
            given.json.write_text(
                json.dumps(
                    {
                        "source_bytes": total, "tokens": samples * _LENGTH, "layers": given.layers, "experts": given.experts,
                        "measured": measured,
                    },
                    indent=1,
                )
            )  # fmt: skip


def report(found: dict[str, Any], first: dict[str, Any]) -> None:
    for name in ("rtn", "gptq"):
        one = found[name]
        print(
            f"{name}, {found['nodes']} nodes: same bytes; {one['path']:.1f} CPU s on the longest way, speed-up "
            f"{first[name]['path'] / one['path']:.2f} over {first['nodes']} (wall {one['wall']:.0f} s)"
        )
        for phase, cost in one["phases"].items():
            print(
                f"    {phase:10} nodes {cost['all']:7.1f} CPU s, busiest {cost['busiest']:7.1f}; here {cost['here']:5.1f}; "
                f"wall {cost['wall']:6.1f}"
            )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
