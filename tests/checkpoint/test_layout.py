"""Shards, offsets and index are known before anything is written, and readers find what they promise."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize

from tensorsurgeon.checkpoint.layout import lay_out
from tensorsurgeon.tensors.dtypes import BF16, DTYPES, F32, I8
from tensorsurgeon.tensors.spec import TensorSpec

specs_of = st.lists(
    st.tuples(st.sampled_from(["F32", "BF16", "I8", "I64", "F8_E4M3", "BOOL"]), st.lists(st.integers(0, 5), max_size=3)),
    max_size=12,
).map(lambda found: [TensorSpec(f"t.{i}", DTYPES[d], tuple(shape)) for i, (d, shape) in enumerate(found)])


@given(specs_of, st.integers(1, 300))
def test_every_tensor_has_its_own_aligned_place_and_the_library_finds_it_there(specs, limit):
    layout = lay_out(specs, {"format": "pt"}, limit)
    found = {}
    for number, shard in enumerate(layout.shards):
        content = shard.header + bytes(range(256)) * (shard.file_bytes // 256 + 1)
        content = content[: shard.file_bytes]
        for name, entry in deserialize(content):
            found[name] = TensorSpec(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
            place = layout.placements[name]
            assert place.shard == number
            assert content[place.offset : place.offset + found[name].nbytes] == bytes(entry["data"])
            assert place.offset % found[name].dtype.itemsize == 0
        data = sum(spec.nbytes for spec in shard.specs)
        assert data <= limit or len([s for s in shard.specs if s.nbytes]) == 1
    assert found == {spec.name: spec for spec in specs}
    assert layout.total_bytes == sum(spec.nbytes for spec in specs)


def test_shards_are_named_as_the_hub_names_them_and_the_index_says_who_is_where():
    specs = [TensorSpec(f"a.{i}", F32, (5,)) for i in range(5)]
    layout = lay_out(specs, {}, 40)
    assert [shard.name for shard in layout.shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads(layout.index_json)
    assert index["metadata"] == {"total_size": 100}
    assert list(index["weight_map"]) == [spec.name for spec in specs]
    assert index["weight_map"]["a.4"] == "model-00003-of-00003.safetensors"


def test_one_shard_needs_no_index():
    layout = lay_out([TensorSpec("a", BF16, (5,))], {}, 10)
    assert [shard.name for shard in layout.shards] == ["model.safetensors"]
    assert layout.index_json is None


def test_a_tensor_larger_than_the_limit_has_a_shard_of_its_own():
    specs = [TensorSpec("a", I8, (5,)), TensorSpec("b", I8, (50,)), TensorSpec("c", I8, (5,))]
    assert [[s.name for s in shard.specs] for shard in lay_out(specs, {}, 10).shards] == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("name", ['a"b', "a\\b", "ü日本", "a\nb", "\u2028"])
def test_any_name_survives_header_and_index(name):
    layout = lay_out([TensorSpec(name, I8, (5,)), TensorSpec("x", I8, (5,))], {}, 5)
    assert list(json.loads(layout.index_json)["weight_map"]) == [name, "x"]
    assert deserialize(layout.shards[0].header + b"12345")[0][0] == name


def test_where_one_header_would_be_too_large_there_are_more_shards(monkeypatch):
    """Half a million small tensors fit 5 GB, and no reader takes a header of more than 100 MB."""
    specs = [TensorSpec(f'model.layers.{n}.\u00fc"\n.weight', F32, (2, 3)) for n in range(200)]
    whole = lay_out(specs, {"format": "pt"}, 1 << 30)
    assert [shard.name for shard in whole.shards] == ["model.safetensors"]
    monkeypatch.setattr("tensorsurgeon.checkpoint.header.MAX_HEADER_BYTES", 5000)
    monkeypatch.setattr("tensorsurgeon.checkpoint.layout.MAX_HEADER_BYTES", 5000)
    cut = lay_out(specs, {"format": "pt"}, 1 << 30)
    assert len(cut.shards) > 1
    assert all(len(shard.header) <= 5008 for shard in cut.shards)
    assert [spec for shard in cut.shards for spec in shard.specs] == specs
