from tensorsurgeon.errors import SpecError
from tensorsurgeon.ops.reshape import Reshape
from tests.contract.ops import Case, OpContract, Refusal
from tests.ops.arrays import DTYPES, bits

X = bits((4, 6))


class TestReshape(OpContract):
    CASES = (
        *(
            Case(f"rows_{d}", Reshape(where=("x",), shape=(3, 8)), {"x": bits((4, 6), d)}, {"x": bits((4, 6), d).reshape(3, 8)})
            for d in DTYPES
        ),
        Case("free_size", Reshape(where=("x",), shape=(2, -1, 3)), {"x": X}, {"x": X.reshape(2, 4, 3)}),
        Case("to_vector", Reshape(where=("x",), shape=(-1,)), {"x": X}, {"x": X.reshape(-1)}),
        Case("to_scalar", Reshape(where=("x",), shape=()), {"x": bits((1, 1))}, {"x": bits((1, 1)).reshape(())}),
        Case("from_scalar", Reshape(where=("x",), shape=(1,)), {"x": bits(())}, {"x": bits(()).reshape(1)}),
        Case("empty", Reshape(where=("x",), shape=(-1, 5)), {"x": bits((0, 3))}, {"x": bits((0, 5))}),
    )
    REFUSALS = tuple(
        Refusal(f"{shape}".replace(" ", ""), Reshape(where=("x",), shape=shape), {"x": X}, SpecError, "24 elements")
        for shape in ((5, 5), (-1, -1), (-2, 12), (5, -1), (0, -1))
    )


def test_a_reshape_between_cuts_is_followed_to_the_byte(tmp_path):
    from tensorsurgeon.ops.split import Split
    from tests.checkpoints import apply, assert_same, read_all, write_checkpoint

    source = write_checkpoint(tmp_path / "s", {"x": X})
    chain = [
        Split(where=("x",), into=("a", "b"), axis=0),
        Reshape(where=("{k}",), shape=(3, 4)),
        Split(where=("b",), into=("c", "d", "e")),
    ]
    apply(chain, source, tmp_path / "t")
    b = X[2:].reshape(3, 4)
    assert_same(read_all(tmp_path / "t"), {"a": X[:2].reshape(3, 4), "c": b[:1], "d": b[1:2], "e": b[2:]})
