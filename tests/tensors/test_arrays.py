import numpy as np
import pytest

from tensorsurgeon.tensors.arrays import Workspace, empty, workspace_of_thread

MB = 1 << 20


def test_a_buffer_is_used_again_after_a_reset_and_not_before():
    workspace = Workspace()
    first = workspace.empty((MB,), np.dtype(np.uint8))
    second = workspace.empty((MB,), np.dtype(np.uint8))
    assert not np.shares_memory(first, second)
    addresses = {first.ctypes.data, second.ctypes.data}
    workspace.reset()
    again = [workspace.empty((MB // 4, 1), np.dtype(np.float32)) for _ in range(2)]
    assert {a.ctypes.data for a in again} == addresses
    assert workspace.nbytes == 2 * MB


@pytest.mark.parametrize("sizes", [[(40, 1), (1, 40)], [(10, 10, 10), (30,), (10, 20)], [(50,), (1,), (50,)], [(7, 8, 9)] * 3])
def test_it_never_holds_more_than_what_a_unit_may_and_an_eighth(sizes):
    workspace = Workspace()
    for unit in sizes:
        workspace.reset(sum(unit) * MB)
        for size in unit:
            workspace.empty((size * MB,), np.dtype(np.uint8))
            assert workspace.nbytes <= max(4 * MB, sum(unit) * MB * 9 // 8) + len(unit) * 3 * (1 << 16)


def test_a_worker_that_waits_keeps_nothing():
    workspace = Workspace()
    workspace.empty((MB,), np.dtype(np.uint8))
    workspace.clear()
    assert workspace.nbytes == 0


def test_outside_a_workspace_it_is_numpy():
    assert empty((2, 3), np.float32).shape == (2, 3)
    with workspace_of_thread() as workspace:
        assert empty((2, 3), np.float32).base is not None
        assert workspace.nbytes
