"""What a crew is made of: its nodes, what each is doing, a job under way, and who may join."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from tensorsurgeon.checkpoint.small_files import Stamp
from tensorsurgeon.running.cluster.connect import Node
from tensorsurgeon.running.cluster.hand import Sight


@dataclass
class Member:
    """A node at work: how much it may do at once, and how much it does."""

    node: Node
    hand: Any
    slots: int
    budget: int
    busy: int = 0
    held: int = 0


class Flight(NamedTuple):
    """An item that a node is doing."""

    item: int
    member: Member
    nbytes: int


class Session(NamedTuple):
    """A job that is open: its name, and a reference to it, in a list, so that only who asks for it gets it."""

    name: str
    job: list[Any]


class Joining(NamedTuple):
    """A node that was asked to look around, and when."""

    member: Member
    sight: Any
    since: float


@dataclass
class Round:
    """One job under way."""

    session: Session
    waiting: deque[int]
    flying: dict[Any, Flight] = field(default_factory=dict)
    tries: dict[int, int] = field(default_factory=dict)
    errors: dict[int, BaseException] = field(default_factory=dict)


class Gate(Protocol):
    """Who may join."""

    def view(self, node: Node) -> tuple[Sequence[tuple[str, Stamp]], str, str]:
        """What a node is to look at: files as they are, one to read, and one to write."""
        ...

    def check(self, node: Node, budget: int, sight: Sight) -> None:
        """Raise PlanError and its kin where what it sees, or the memory it may use, will not do."""
        ...
