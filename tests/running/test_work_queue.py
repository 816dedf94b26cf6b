"""In which order units start: copies while the code is loaded, then spread among those that compute."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.ops.cast import Cast
from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.planning.plan import Plan, make_plan
from tensorsurgeon.running import work_queue
from tensorsurgeon.running.run import run_plan
from tensorsurgeon.running.work_queue import WorkQueue
from tests.checkpoints import read_all, write_checkpoint


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Plan:
    """Thirty units that compute and eight copies."""
    folder = tmp_path_factory.mktemp("queue")
    tensors = {f"a.{i:02}": np.full((4, 8), i, np.float32) for i in range(30)}
    tensors |= {f"b.{i:02}": np.full((4, 8), i, np.float32) for i in range(8)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tensorsurgeon.planning.work.COPY_BYTES", 128)
        source = write_checkpoint(folder / "s", tensors)
        plan = make_plan([Cast(where=("a.{n}",), dtype="BF16")], open_checkpoint(source))
        assert [sum(bool(u.tasks) is kind for u in plan.units) for kind in (True, False)] == [30, 8]
    return plan


def drained(queue: WorkQueue) -> list[int]:
    taken = []
    while (number := queue.peek()) is not None:
        assert queue.peek() == number, "what comes next changed though nobody took it"
        queue.take()
        taken.append(number)
    return taken


@given(data=st.data())
def test_every_unit_is_taken_once_whatever_is_asked_and_whenever_the_code_is_loaded(plan, data):
    numbers = data.draw(st.lists(st.sampled_from(range(len(plan.units))), unique=True))
    answers = iter(data.draw(st.lists(st.booleans(), max_size=60)))
    taken = drained(WorkQueue(plan, numbers, lambda: next(answers, True)))
    assert sorted(taken) == sorted(numbers)
    for is_copy in (True, False):
        kind = [n for n in numbers if is_copy is not bool(plan.units[n].tasks)]
        assert [n for n in taken if n in kind] == kind, "units of one kind go in the order given"


def test_copies_alone_until_the_code_is_loaded(plan):
    loaded_after = 5
    queue = WorkQueue(plan, range(len(plan.units)), lambda: len(taken) >= loaded_after)
    taken: list[int] = []
    while (number := queue.peek()) is not None:
        queue.take()
        taken.append(number)
    kinds = ["copy" if not plan.units[n].tasks else "compute" for n in taken]
    assert kinds[:loaded_after] == ["copy"] * loaded_after
    assert "copy" in kinds[loaded_after + 2 :], "the rest of the copies is spread"


def test_copies_are_spread_evenly_once_the_code_is_loaded(plan):
    kinds = [bool(plan.units[n].tasks) for n in drained(WorkQueue(plan, range(len(plan.units)), lambda: True))]
    gaps = np.diff([i for i, computes in enumerate(kinds) if not computes])
    assert kinds[0] is False
    assert gaps.max() - gaps.min() <= 1


def test_what_goes_wrong_while_warming_up_is_left_to_the_steps_themselves(tmp_path, monkeypatch, capfd):
    """A thread that dies prints a traceback; whether the fault matters shows when the step is applied."""
    source = write_checkpoint(tmp_path / "s", {"a.weight": np.ones((8, 32), np.float32)})
    plan = make_plan([Quantize(where=("a.weight",), format="ct-int")], open_checkpoint(source))
    asked = []

    def failing(*kind):
        asked.append(kind)
        raise OSError("no room for compiled code")

    monkeypatch.setattr(work_queue, "_quantize_small", failing)
    run_plan(plan, tmp_path / "t")
    assert len(asked) == 1
    assert capfd.readouterr().err == ""
    assert set(read_all(tmp_path / "t")) == {"a.weight", "a.weight_scale"}
