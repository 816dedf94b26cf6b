import re
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorsurgeon.errors import ConfigError
from tensorsurgeon.tensors.expressions import Expression

USED = (
    r".*lm_head",
    r"(model\.)?(language_model\.)?layers\.\d+\.mlp\.(gate|up)_proj$",
    r"^(?!.*experts).*gate.*",
    r".*\.mlp\.gate$",
    r"model\.layers\.(0|1|2[0-9])\..*",
    r"[^.]+\.visual\..*",
    r".*self_attn.*",
    "lm_head",
    r".*mlp\.experts\.\d+\.(?P<proj>w[123])\.weight$",
)
NAMES = ("lm_head", "model.layers.3.mlp.gate_proj", "model.layers.3.mlp.gate", "a.visual.b", "layers.3.mlp.experts.7.w2.weight")


@pytest.mark.parametrize("text", USED)
def test_what_configs_use_matches_as_it_does_in_python(text: str) -> None:
    for name in NAMES:
        for how in ("match", "search", "fullmatch"):
            wanted = getattr(re, how)(text, name)
            found = getattr(Expression(text), how)(name)
            assert (found and found.span()) == (wanted and wanted.span()), (how, name)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@given(st.from_regex(r"[ab.|()?*+\[\]^$\\d{}0-2]{1,12}", fullmatch=True), st.text("ab1.", max_size=8))
def test_anything_matches_as_it_does_in_python_or_is_refused_there_too(text: str, name: str) -> None:
    try:
        compiled = re.compile(text)
    except re.error:
        with pytest.raises(re.error):
            Expression(text)
        return
    try:
        expression = Expression(text)
    except re.error:
        return  # possessive repeats, which one of the two reads as nested ones
    assert bool(expression.fullmatch(name)) == bool(compiled.fullmatch(name))


def longer_and_longer(expression: Expression) -> None:
    for length in range(20, 1500):
        expression.match("a" * length + "!")


@pytest.mark.parametrize("text", ["(a+)+$", "(a|a)*b", "(a|aa)+$", "(.*a){25}x", "((a*)*)*b"])
def test_what_would_run_for_ever_is_answered_or_refused_in_seconds(text: str) -> None:
    began = time.process_time()
    with suppress(ConfigError):
        longer_and_longer(Expression(text))
    assert time.process_time() - began < 10


def test_the_refusal_names_the_expression() -> None:
    with pytest.raises(ConfigError, match=r"the expression '\(a\|aa\)\+\$' takes too long on 'aaa"):
        longer_and_longer(Expression("(a|aa)+$"))


@pytest.mark.parametrize("text", ["(", "a" * 10_001, "(?P<x>a)(?P<x>b)", "*"])
def test_what_is_no_expression(text: str) -> None:
    with pytest.raises(re.error):
        Expression(text)
