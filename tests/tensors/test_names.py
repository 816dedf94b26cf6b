"""Patterns: what they match, what they refuse, and what is said of a typo."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorsurgeon.errors import NoMatchError, RecipeError
from tensorsurgeon.tensors.names import Pattern, Selector, fill, natural_key

NAMES = ["model.layers.0.mlp.up_proj.weight", "model.layers.10.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    ("pattern", "name", "fields"),
    [
        ("a.b", "a.b", {}),
        ("a.b", "axb", None),
        ("a.b", "a.b.c", None),
        ("{x}.b", "a.b", {"x": "a"}),
        ("{x}.b", "a.a.b", None),
        ("{x*}.b", "a.a.b", {"x": "a.a"}),
        ("{x*}.b", ".b", None),
        ("{p*}.{n}.w{q}", "m.l.3.w12", {"p": "m.l", "n": "3", "q": "12"}),
        ("{x}.{x}", "a.a", {"x": "a"}),
        ("{x}.{x}", "a.b", None),
        ("{x*}_quantizer.scale", "m.weight_quantizer.scale", {"x": "m.weight"}),
        ("a+b(c)[d]", "a+b(c)[d]", {}),
        (r"re:a\.(?P<n>\d+)", "a.12", {"n": "12"}),
        (r"re:a\.(?P<n>\d+)", "a.12.b", None),
        (r"re:(?P<p>x)?a", "a", {}),
        (r"maybe:{x}", "a", {"x": "a"}),
        (r"maybe:re:.", "a", {}),
    ],
)
def test_a_pattern_matches_the_whole_name_or_nothing(pattern, name, fields):
    assert Pattern.parse(pattern).match(name) == fields


@pytest.mark.parametrize(
    "text", ["", "maybe:", "re:", "maybe:re:", "re:(", "re:[", "{", "a.{x", "x}", "{1}", "{x-y}", "{x*y}", "{}"]
)
def test_a_pattern_that_means_nothing_is_refused(text):
    with pytest.raises(RecipeError, match="pattern"):
        Pattern.parse(text)


def test_a_string_in_the_place_of_patterns_is_not_taken_letter_by_letter():
    with pytest.raises(RecipeError, match="tuple"):
        Selector("abc")
    with pytest.raises(RecipeError, match="tuple"):
        Selector(("abc",), "d")


def test_a_selector_keeps_the_order_of_the_names_and_the_fields_of_the_first_pattern():
    selected = Selector(("model.{p*}.{m}.weight", "{all*}")).select(NAMES)
    assert list(selected) == NAMES
    assert selected[NAMES[0]] == {"p": "layers.0.mlp", "m": "up_proj"}
    assert selected["lm_head.weight"] == {"all": "lm_head.weight"}
    assert Selector(("{all*}",)).names(NAMES) == NAMES


def test_excluded_names_are_left_out():
    assert Selector(("{all*}",), ("model.{p*}",)).names(NAMES) == ["lm_head.weight"]


@pytest.mark.parametrize(("where", "exclude"), [(("lm_haed.weight",), ()), (("{a*}",), ("lm_haed.weight",))])
def test_a_pattern_that_matches_nothing_names_the_nearest(where, exclude):
    with pytest.raises(NoMatchError, match=r"lm_haed.weight.*lm_head\.weight.*maybe:lm_haed"):
        Selector(where, exclude).select(NAMES)


def test_of_a_thousand_layers_the_nearest_names_are_not_all_the_same():
    names = [f"model.layers.{i}.{part}.weight" for i in range(1000) for part in ("q_proj", "k_proj")]
    with pytest.raises(NoMatchError) as caught:
        Selector(("model.layers.{i}.q_porj.weight",)).select(names)
    assert str(caught.value).count("q_proj") == 1


def test_maybe_allows_nothing_but_excluding_everything_is_an_error():
    assert Selector(("maybe:zzz",)).select(NAMES) == {}
    with pytest.raises(NoMatchError, match="also excluded"):
        Selector(("lm_head.weight",), ("{a*}",)).select(NAMES)
    assert Selector(("maybe:lm_head.weight",), ("{a*}",)).select(NAMES) == {}


@pytest.mark.parametrize(
    "exclude",
    [
        (r"re:(a)\1", r"re:(b)\1"),  # numbered references would point to another group when joined
        ("re:(?i)AA", "{x}b{x}"),  # a flag may stand at the start only
        ("{x}{x}", "re:(?P<x>b)(?P=x)"),
        (r"re:(?P<y>a)?(?(y)a|b)", "re:bb"),
        ("re:a|aa", "re:b|bb"),
    ],
)
def test_many_exclusions_mean_the_same_together_as_alone(exclude):
    names = ["aa", "bb", "ab", "cc"]
    alone = [n for n in names if not any(Pattern.parse(e).match(n) is not None for e in exclude)]
    assert Selector(("{n}",), tuple(f"maybe:{e}" for e in exclude)).names(names) == alone


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{b}", r"uses \{b\}, which the pattern does not define \(fields: \{a\}\)"),
        ("{a", "braces"),
        ("a}", "braces"),
        ("{a}{", "braces"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template, message):
    with pytest.raises(RecipeError, match=message):
        fill(template, {"a": "1"})


@given(st.text(min_size=1), st.text(min_size=1))
def test_filling_puts_any_text_in_as_it_is(a, b):
    assert fill("{a}.x.{b*}", {"a": a, "b": b, "c": "unused"}) == f"{a}.x.{b}"


@given(st.lists(st.text(st.sampled_from("ab.01239²٣é"), max_size=6), unique=True))
def test_natural_order_is_total_and_does_not_depend_on_the_order_before(names):
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)


def test_layer_2_comes_before_layer_10_and_endless_numbers_are_no_fault():
    names = ["l.10.w", "l.2.w", "l.02.w", "l." + "9" * 10_000, "l"]
    assert sorted(names, key=natural_key)[:4] == ["l", "l.02.w", "l.2.w", "l.10.w"]
