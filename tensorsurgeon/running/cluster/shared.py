"""Whether nodes see the files that this machine sees: known before anything is written that anybody would miss.

This machine writes a token into the folder of the target's state, and each node reads it and answers with one of its own, which
this machine reads. The source's files have to be there with the size and time that they have here.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tensorsurgeon.checkpoint.small_files import Stamp
from tensorsurgeon.errors import BudgetError, PlanError, TargetError
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.running.cluster.connect import Node
from tensorsurgeon.running.cluster.hand import PROCESSOR, Sight, versions
from tensorsurgeon.running.journal import refuse_link, state_folder


class SharedFolders:
    """The gate that a node has to pass for a plan and its target; ``least_bytes`` is the memory that it has to have."""

    def __init__(self, plan: Plan, target: Path, least_bytes: int) -> None:
        self._plan = plan
        self._least_bytes = least_bytes
        self._target = target.absolute()
        self._root = plan.source.root.absolute()
        self._state = state_folder(self._target)
        self._ours = versions()
        self._tokens: dict[str, Path] = {}

    def view(self, node: Node) -> tuple[Sequence[tuple[str, Stamp]], str, str]:
        """The source's files, a token that is written now, and the answer that is expected."""
        refuse_link(self._state)
        self._state.mkdir(parents=True, exist_ok=True)
        token = self._tokens[node.id] = self._state / f"ray-{uuid.uuid4().hex}"
        token.write_text(token.name)
        files = [(str(self._root / name), stamp) for name, stamp in self._plan.source.stamps.items()]
        return files, str(token), str(_answer(token))

    def check(self, node: Node, budget: int, sight: Sight) -> None:
        """PlanError for other versions, TargetError for files that are not the same, BudgetError for too little memory."""
        token = self._tokens.pop(node.id)
        try:
            answered = _answer(token).read_text() == _answer(token).name
        except OSError:
            answered = False
        for path in (token, _answer(token)):
            path.unlink(missing_ok=True)
        # Of all that is computed, only what calibration does depends on the kind of processor.
        different = [
            name
            for name, version in self._ours.items()
            if sight.versions.get(name) != version and (name != PROCESSOR or self._plan.needs_codes)
        ]
        if different:
            name = different[0]
            raise PlanError(
                f"node {node}: has {name} {sight.versions.get(name)}, and this machine {self._ours[name]}; the bytes would not "
                "be the same, so install the same versions everywhere"
            )
        if sight.missing is not None and sight.missing != str(token):
            raise TargetError(
                f"node {node}: does not see {sight.missing} as this machine does; source and target have to lie on a file system "
                "that all nodes share, under the same paths",
                where=str(self._root),
            )
        if sight.missing is not None or not answered:
            what = (
                "see what this machine writes there" if sight.missing is not None else "write there what this machine would see"
            )
            raise TargetError(
                f"node {node}: does not {what}; the target has to lie on a file system that all nodes share, under the same path",
                where=str(self._target),
            )
        if self._least_bytes > budget:
            raise BudgetError(
                f"node {node}: may use {budget} bytes, and one piece of work needs {self._least_bytes}",
                remedy=f"; give a {{max_ram}} of at least {-(-self._least_bytes // 1_000_000)}MB, or use nodes with more memory",
            )

    def tidy(self, *, had_target: bool) -> None:
        """Take away what only the question needed: the folder of the state and, if it was not there, the target."""
        for token in self._tokens.values():
            for path in (token, _answer(token)):
                path.unlink(missing_ok=True)
        self._tokens = {}
        with suppress(OSError):
            os.rmdir(self._state)
            if not had_target:
                os.rmdir(self._target)


def _answer(token: Path) -> Path:
    return token.with_name(f"{token.name}-answer")
