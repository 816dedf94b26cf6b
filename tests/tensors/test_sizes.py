import pytest

from tensorsurgeon.errors import RecipeError
from tensorsurgeon.tensors.sizes import parse_size, show_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("4GiB", 4 << 30), ("1.5 kb", 1500), ("700", 700), (" 2M ", 2_000_000), ("9007199254740993", 2**53 + 1)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text, "--max-ram") == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", "0", "0.1B", "1e9", "5 G B", "5,0GB", "9" * 400 + "GB", "8EiB", "nan"])
def test_what_is_no_size_is_refused_by_its_name(text):
    with pytest.raises(RecipeError, match="--max-ram must be"):
        parse_size(text, "--max-ram")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (36_700_000_000, "36.70 GB"), (10**12, "1.00 TB")]
)
def test_sizes_are_shown_in_decimal_units(size, text):
    assert show_size(size) == text
