"""The hands of a cluster and what each is given to do.

Items go to whoever is free, as many at once on a node as it has cores (or ``workers``), while their bytes fit its memory
cap. A node or a process that dies costs its items, which others do again; nodes that join are put to work.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Final, Self

from tensorsurgeon.errors import ExecutionError, PlanError, SurgeonError
from tensorsurgeon.running.cluster.connect import Node, nodes
from tensorsurgeon.running.cluster.hand import Failed, Hand, Job
from tensorsurgeon.running.cluster.member import Flight, Gate, Joining, Member, Round, Session

logger = logging.getLogger(__name__)

# An item that takes down whoever does it is not done for ever: it is most likely too large for its node.
_TRIES: Final = 6
_LOOK_SECONDS: Final = 2.0
# A node that is started anew takes a while to join.
_WAIT_FOR_NODES: Final = 60.0
_WAIT_FOR_HAND: Final = 60.0


class Crew:
    """The nodes of the connected cluster, each with a process of ours; ``workers`` and ``max_ram_bytes`` are of each node."""

    def __init__(self, workers: int | None, max_ram_bytes: int | None) -> None:
        self._workers = workers
        self._max_ram_bytes = max_ram_bytes
        self.members: dict[str, Member] = {}
        self._joining: list[Joining] = []
        self._refused: set[str] = set()
        self._looked = 0.0
        self._gate: Gate | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Nobody writes on once the block is left."""
        self._dismiss()

    def _dismiss(self) -> None:
        import ray

        for member in (*self.members.values(), *(joining.member for joining in self._joining)):
            ray.kill(member.hand)
        self.members, self._joining = {}, []

    def gather(self, gate: Gate) -> None:
        """Put every node to work, all of which have to pass ``gate``. Nodes that come later and do not pass stay out."""
        self._gate = gate
        for member in self.members.values():
            # Of the run before: it has not seen these files yet.
            self._joining.append(Joining(member, member.hand.look.remote(*gate.view(member.node)), time.monotonic()))
        known, self.members = set(self.members), {}
        for node in nodes():
            if node.id not in known:
                self._invite(node)
        for joining in list(self._joining):
            self._welcome(joining, wait=True)
        if not self.members:
            raise PlanError("no node of the Ray cluster has a CPU to work with; start one with: ray start --address=HOST:PORT")

    @contextmanager
    def session(self, job: Job) -> Iterator[Session]:
        """A job whose desks stay open on their nodes for the length of the block."""
        import ray

        session = Session(uuid.uuid4().hex, [ray.put(job)])
        try:
            yield session
        finally:
            for member in self.members.values():
                member.hand.leave.remote(session.name)

    def run(
        self,
        session: Session,
        items: Sequence[Any],
        *,
        nbytes: Sequence[int],
        stop: threading.Event,
        take: Callable[[int, Any], None],
    ) -> None:
        """Do every item at a desk of the session's job; ``take`` gets number and result of each as it is done, in this thread.

        ``nbytes`` is what each holds while it is done. The first error, in the order of items, is raised when all that is
        under way has ended; ``stop`` ends it the same way without one.
        """
        round_ = Round(session, deque(range(len(items))))
        try:
            self._carry_out(round_, items, nbytes, stop, take)
        except BaseException:
            # Whoever works on may not: nobody takes what comes of it, and another run may begin.
            self._dismiss()
            raise
        if round_.errors:
            raise round_.errors[min(round_.errors)]

    def _carry_out(
        self,
        round_: Round,
        items: Sequence[Any],
        nbytes: Sequence[int],
        stop: threading.Event,
        take: Callable[[int, Any], None],
    ) -> None:
        import ray

        alone_since: float | None = None
        while round_.flying or (round_.waiting and not (stop.is_set() or round_.errors)):
            self._look_around()
            if not (stop.is_set() or round_.errors):
                self._hand_out(round_, items, nbytes)
            if round_.flying:
                alone_since = None
                ready, _ = ray.wait(list(round_.flying), num_returns=1, timeout=0.2)
                for reference in ready:
                    self._land(round_, reference, take)
                continue
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since > _WAIT_FOR_NODES:
                raise ExecutionError("every node of the Ray cluster is gone", remedy="; start some and continue with {resume}")
            time.sleep(0.2)

    def _hand_out(self, round_: Round, items: Sequence[Any], nbytes: Sequence[int]) -> None:
        """Give the next items to whoever has room, the least busy first."""
        while round_.waiting:
            number = round_.waiting[0]
            free = [m for m in self.members.values() if m.busy < m.slots and (not m.busy or m.held + nbytes[number] <= m.budget)]
            if not free:
                return
            member = min(free, key=lambda m: m.busy / m.slots)
            round_.waiting.popleft()
            member.busy += 1
            member.held += nbytes[number]
            reference = member.hand.do.remote(*round_.session, items[number])
            round_.flying[reference] = Flight(number, member, nbytes[number])

    def _land(self, round_: Round, reference: Any, take: Callable[[int, Any], None]) -> None:
        import ray
        from ray.exceptions import RayError, RayTaskError

        flight = round_.flying.pop(reference)
        flight.member.busy -= 1
        flight.member.held -= flight.nbytes
        try:
            answer = ray.get(reference)
        except RayTaskError as error:
            round_.errors[flight.item] = error.cause if isinstance(error.cause, Exception) else error
            return
        except RayError as error:
            self._lose(flight.member, error)
            tries = round_.tries[flight.item] = round_.tries.get(flight.item, 0) + 1
            if tries < _TRIES:
                round_.waiting.appendleft(flight.item)
            else:
                round_.errors[flight.item] = ExecutionError(
                    f"a piece of work took down {tries} processes one after another, the last on node {flight.member.node}; "
                    "most likely it needs more memory than is there",
                    remedy=": give fewer {workers} or a smaller {max_ram}",
                )
            return
        if isinstance(answer, Failed):
            round_.errors[flight.item] = answer.error
        else:
            take(flight.item, answer.value)

    def _lose(self, member: Member, error: Exception) -> None:
        if self.members.get(member.node.id) is not member:
            return
        import ray

        logger.warning("node %s is lost (%s); others do its work", member.node, type(error).__name__)
        del self.members[member.node.id]
        # One that is only out of reach must not do what others are asked to do now.
        ray.kill(member.hand)

    def _look_around(self) -> None:
        """Put nodes to work that have joined, or whose process died; nobody waits for them."""
        for joining in list(self._joining):
            self._welcome(joining, wait=False)
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        known = {*self.members, *self._refused, *(joining.member.node.id for joining in self._joining)}
        for node in nodes():
            if node.id not in known:
                # Where no token can be written for it now, it is asked later.
                with suppress(OSError):
                    self._invite(node)

    def _invite(self, node: Node) -> None:
        """Start a process on a node and have it look around."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        assert self._gate is not None
        slots = min(node.cores, self._workers or node.cores)
        there = NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)
        hand = ray.remote(Hand).options(num_cpus=slots, max_concurrency=slots + 1, scheduling_strategy=there).remote()
        sight = hand.look.remote(*self._gate.view(node))
        self._joining.append(Joining(Member(node, hand, slots, 0), sight, time.monotonic()))

    def _welcome(self, joining: Joining, *, wait: bool) -> None:
        """Take on who has answered; who does not, or does not pass, is an error where it is waited for."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        assert self._gate is not None
        member = joining.member
        left = max(0.0, joining.since + _WAIT_FOR_HAND - time.monotonic())
        if not wait and left and not ray.wait([joining.sight], timeout=0)[0]:
            return
        self._joining.remove(joining)
        try:
            sight = ray.get(joining.sight, timeout=left)
            # Ray knows what a container may use; what is free is asked of the machine.
            member.budget = min(self._max_ram_bytes or sight.free_bytes // 2, member.node.memory_bytes or sight.free_bytes)
            self._gate.check(member.node, member.budget, sight)
            self.members[member.node.id] = member
        except (SurgeonError, RayError) as error:
            ray.kill(member.hand)
            # A node that is gone is listed for a while.
            if wait and (isinstance(error, SurgeonError) or member.node in nodes()):
                if isinstance(error, SurgeonError):
                    raise
                why = "it has not so many CPUs free" if isinstance(error, GetTimeoutError) else _first_words(error)
                raise PlanError(
                    f"node {member.node}: no process with {member.slots} CPUs could be started there: {why}; it needs "
                    "tensorsurgeon in the environment that Ray was started in",
                    remedy=", and {workers} no more than it has free",
                ) from error
            if isinstance(error, SurgeonError):
                logger.warning("%s", error)
                self._refused.add(member.node.id)


def _first_words(error: Exception) -> str:
    return " ".join(str(getattr(error, "cause", None) or error).split())[-300:]
