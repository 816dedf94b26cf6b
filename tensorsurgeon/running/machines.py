"""Who runs the units of a plan: threads of this process, or the nodes of a cluster."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from tensorsurgeon.checkpoint.sink import Sink
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.running.cluster.crew import Crew
from tensorsurgeon.running.executor import Progress, run_units
from tensorsurgeon.running.journal import Journal
from tensorsurgeon.running.unit import CodesProvider


class Machines(Protocol):
    """Runs units somewhere; where decides no byte."""

    @property
    def crew(self) -> Crew | None:
        """Who does other work as well; None where threads of this process do it."""
        ...

    def check(self, plan: Plan, target: Path, least_bytes: int) -> None:
        """Raise PlanError and its kin where these machines cannot run this plan, or one may use less than ``least_bytes``.

        Nothing has been written to ``target`` yet, and nothing is there afterwards.
        """
        ...

    def run_units(
        self,
        plan: Plan,
        source: Source,
        sink: Sink,
        journal: Journal,
        *,
        done: dict[int, list[str]],
        workers: int,
        max_ram_bytes: int,
        stop: threading.Event,
        progress: Callable[[Progress], None],
        only: Iterable[int] | None = None,
        codes: CodesProvider | None = None,
    ) -> dict[int, list[str]]:
        """What ``executor.run_units`` does."""
        ...


class ThisMachine:
    """Threads of this process."""

    crew: Crew | None = None

    def check(self, plan: Plan, target: Path, least_bytes: int) -> None:
        """Nothing: what a run needs of this machine is looked at anyway."""

    run_units = staticmethod(run_units)


HERE: Final = ThisMachine()
# For a run that goes on without the cluster that it was begun on.
NO_RAY: Final = "none"


@contextmanager
def machines_at(ray: str | None, workers: int | None, max_ram_bytes: int | None) -> Iterator[Machines]:
    """This machine, or the nodes of the Ray cluster at an address (``auto`` starts one here) while the block lasts.

    ``workers`` and ``max_ram_bytes`` are those of each node. RecipeError where there is no Ray, or no such cluster.
    """
    if ray in (None, NO_RAY):
        yield HERE
        return
    assert ray is not None
    from tensorsurgeon.running.cluster.connect import connected
    from tensorsurgeon.running.cluster.units import RayMachines

    with connected(ray), Crew(workers, max_ram_bytes) as crew:
        yield RayMachines(crew)
