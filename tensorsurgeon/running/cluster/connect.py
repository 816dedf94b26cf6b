"""A connection to a Ray cluster, and the nodes that it has."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Final, NamedTuple

from tensorsurgeon.errors import RecipeError
from tensorsurgeon.machine.limits import usable_cores

_SECONDS_TO_ANSWER: Final = 10.0


class Node(NamedTuple):
    """A machine of the cluster: its cores and memory as Ray reckons with them."""

    id: str
    host: str
    cores: int
    memory_bytes: int

    def __str__(self) -> str:
        """As ``ray list nodes`` shows it, for a person may run two on one machine."""
        return f"{self.host} ({self.id[:8]})"


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Ray, while the block lasts: ``auto`` starts it on this machine alone, else ``HOST:PORT`` of a running cluster.

    A connection that this process has already is used and stays. RecipeError where none can be had.
    """
    if find_spec("ray") is None:
        raise RecipeError("several machines work together through Ray: pip install 'tensorsurgeon[ray]'")
    if address != "auto":
        _knock(address)
    # Whoever converts a checkpoint has not agreed to tell Ray's makers about it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    where: dict[str, Any] = {"address": address}
    if address == "auto":
        where = {"address": "local", "num_cpus": usable_cores(), "include_dashboard": False}
    try:
        ray.init(**where, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"ray {address}: cannot be joined ({said}); start Ray on this machine with: ray start --address=HOST:PORT, or give "
            "auto for this machine alone"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise RecipeError where nobody listens: Ray itself tries for minutes."""
    if "://" in address:
        raise RecipeError(f"ray {address}: clients of a cluster are not served; run this on a machine that has joined it")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise RecipeError(f"ray {address}: give HOST:PORT of a cluster, or auto to start Ray on this machine alone")
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise RecipeError(
            f"ray {address}: nobody answers there ({error}); start a cluster with: ray start --head, or give auto to start one "
            "on this machine alone"
        ) from error


def nodes() -> list[Node]:
    """The nodes that live now and have a core to work with, in a fixed order."""
    import ray

    found = []
    for known in ray.nodes():
        cores = int(known["Resources"].get("CPU", 0)) if known["Alive"] else 0
        if cores:
            host, memory = str(known["NodeManagerHostname"]), int(known["Resources"].get("memory", 0))
            found.append(Node(str(known["NodeID"]), host, cores, memory))
    return sorted(found)
