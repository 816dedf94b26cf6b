"""Real Ray nodes on this machine, each with processes of its own, for tests."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import moe_config, write_checkpoint

_NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}


@contextmanager
def cluster_of(count: int) -> Iterator[Any]:
    """A cluster of so many nodes with one core each; ``address`` is where it is joined."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=_NODE)
    try:
        for _ in range(count - 1):
            add_node(cluster)
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster: Any) -> Any:
    """One more node, which has joined when this returns."""
    return cluster.add_node(**_NODE)


def kill_node(cluster: Any, node: Any) -> None:
    """As if its plug were pulled: Ray's process of the node and, moments later, all that it started."""
    workers = _below(raylet_of(node))
    cluster.remove_node(node, allow_graceful=False)
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_worker(node: Any) -> bool:
    """Kill the process that works for us on a node, and nothing else; False if there is none now."""
    for pid in hands_of(node):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def hands_of(node: Any) -> list[int]:
    """The processes that work for us on a node."""
    return [pid for pid in _below(raylet_of(node)) if "ray::Hand" in _command(pid)]


def wait_for_nodes(count: int) -> None:
    """Until the connected cluster has so many nodes that live."""
    import ray

    deadline = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) != count:
        assert time.monotonic() < deadline, "nodes do not come and go as they should"
        time.sleep(0.1)


def raylet_of(node: Any) -> int:
    """The number of a node's own process."""
    return int(node.all_processes["raylet"][0].process.pid)


def _below(pid: int) -> list[int]:
    """The processes that a process started."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                found.append(int(entry.name))
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def large(folder: Path, megabytes: int) -> Path:
    """A checkpoint that takes a while."""
    rng = np.random.default_rng(0)
    rows = 1024
    tensors = {
        f"model.layers.{n}.self_attn.q_proj.weight": rng.standard_normal((rows, 1024), np.float32).astype(np.float16)
        for n in range(megabytes // 2)
    }
    return write_checkpoint(folder, tensors, shards=3, config=moe_config())
