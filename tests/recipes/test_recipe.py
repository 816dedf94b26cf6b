"""Transforms in YAML: strict, typed, and every fault with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorsurgeon.errors import RecipeError, SurgeonError
from tensorsurgeon.ops.cast import Cast
from tensorsurgeon.ops.registry import OPS, op_named
from tensorsurgeon.ops.reshape import Reshape
from tensorsurgeon.ops.split import Split
from tensorsurgeon.planning.rewriting import steps_of
from tensorsurgeon.recipes.library import builtin_names, find_recipe, load_transform
from tensorsurgeon.recipes.recipe import make_op

HEAD = "description: for a test\n"


def write(folder: Path, text: str, name: str = "my.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def steps(folder: Path, text: str, **parameters):
    return steps_of(load_transform(write(folder, HEAD + text), parameters))


def test_a_step_is_an_op_with_its_fields(tmp_path):
    (step,) = steps(tmp_path, "steps:\n  - split: {where: qkv, into: [q, k], axis: -1, sizes: [1, 2]}\n")
    assert step == Split(where=("qkv",), into=("q", "k"), axis=-1, sizes=(1, 2))


FAULTS = {
    "no_mapping": ("- a\n", "a transform is a mapping"),
    "empty": ("", "a transform is a mapping"),
    "yaml": ("description: [\n", "my.yaml:2: not valid YAML"),
    "tab": ("description:\n\t- a\n", "not valid YAML"),
    "two_documents": ("a: 1\n---\nb: 2\n", "not valid YAML"),
    "python_object": (HEAD + "steps:\n  - cast: !!python/object:os.system {}\n", "my.yaml:3: unknown tag"),
    "python_scalar": (HEAD + "steps:\n  - keep: {where: !!python/name:os.system ''}\n", "not valid YAML"),
    "unknown_key": (HEAD + "stpes: []\n", r"my.yaml:2: unknown key 'stpes'; did you mean 'steps'\?"),
    "key_twice": (HEAD + "steps: []\nsteps: []\n", "my.yaml:3: key 'steps' occurs twice"),
    "key_twice_deep": (HEAD + "steps:\n  - cast:\n      where: a\n      where: b\n", "my.yaml:5: key 'where' occurs twice"),
    "no_description": ("steps:\n  - keep: {where: a}\n", "description is missing"),
    "no_steps": (HEAD, "steps must be a list"),
    "empty_steps": (HEAD + "steps: []\n", "steps must be a list"),
    "steps_of_words": (HEAD + "steps: [cast]\n", "steps must be a list of ops"),
    "unknown_op": (
        HEAD + "steps:\n  - renmae: {where: a, to: b}\n",
        r"my.yaml:3: step 1: unknown op 'renmae'; did you mean 'rename'",
    ),
    "two_ops_in_a_step": (
        HEAD + "steps:\n  - cast: {where: a, dtype: F32}\n    drop: {where: a}\n",
        "my.yaml:3: step 1: a step names one op",
    ),
    "no_op": (HEAD + "steps:\n  - when: true\n", "found none"),
    "with_without_use": (HEAD + "steps:\n  - cast: {where: a, dtype: F32}\n    with: {}\n", "'with' goes with 'use' only"),
    "op_without_mapping": (HEAD + "steps:\n  - cast: F32\n", "cast needs a mapping of its fields"),
    "unknown_field": (
        HEAD + "steps:\n  - cast: {were: a, dtype: F32}\n",
        r"step 1 \(cast\): cast has no field 'were'; did you mean 'where'",
    ),
    "missing_field": (HEAD + "steps:\n  - cast: {where: a}\n", "cast needs dtype"),
    "field_type": (
        HEAD + "steps:\n  - split: {where: a, into: [b, c], axis: one}\n",
        "split: axis must be a whole number, found 'one'",
    ),
    "bool_is_no_number": (
        HEAD + "steps:\n  - split: {where: a, into: [b, c], axis: true}\n",
        "axis must be a whole number, found True",
    ),
    "number_is_no_bool": (HEAD + "steps:\n  - squeeze: {where: a, if_unit: 1}\n", "if_unit must be true or false, found 1"),
    "list_entry_type": (HEAD + "steps:\n  - reshape: {where: a, shape: [1, x]}\n", "shape must be a whole number, found 'x'"),
    "literal": (HEAD + "steps:\n  - drop: {where: a, only_if: zeros}\n", "only_if must be one of always, zero, found 'zeros'"),
    "op_refuses": (HEAD + "steps:\n  - cast: {where: a, dtype: BF61}\n", r"my.yaml:3: step 1 \(cast\): .*did you mean 'BF16'"),
    "hidden_field": (
        HEAD + "steps:\n  - quantize: {where: a, format: ct-int, backend: fast}\n",
        "quantize has no field 'backend'",
    ),
    "parameters_list": (HEAD + "parameters: [a]\nsteps:\n  - keep: {where: a}\n", "parameters must be a mapping"),
    "parameter_without_default": (
        HEAD + "parameters:\n  a: {description: x}\nsteps:\n  - keep: {where: '${a}'}\n",
        "my.yaml:3: parameter 'a' needs a default",
    ),
    "parameter_unknown_key": (
        HEAD + "parameters:\n  a: {default: 1, description: x, choice: [1]}\nsteps:\n  - keep: {where: a}\n",
        "unknown key 'choice'; did you mean 'choices'",
    ),
    "parameter_unused": (
        HEAD + "parameters:\n  a: {default: 1, description: x}\nsteps:\n  - keep: {where: a}\n",
        "my.yaml:3: parameter 'a' is not used",
    ),
    "unknown_reference": (
        HEAD + "parameters:\n  dtype: {default: F32, description: x}\nsteps:\n  - cast: {where: a, dtype: '${dtpye}'}\n",
        r"my.yaml:5: \$\{dtpye\} is no parameter; did you mean 'dtype'",
    ),
    "unknown_reference_in_a_skipped_step": (
        HEAD + "steps:\n  - cast: {where: a, dtype: '${b}'}\n    when: false\n  - keep: {where: a}\n",
        r"my.yaml:3: \$\{b\} is no parameter",
    ),
    "when_a_word": (HEAD + "steps:\n  - keep: {where: a}\n    when: maybe\n", "when must be true"),
    "use_a_list": (HEAD + "steps:\n  - use: [a]\n", "'use' names a transform"),
    "with_a_list": (HEAD + "steps:\n  - use: split-experts\n    with: [a]\n", "'with' maps"),
    "use_unknown": (
        HEAD + "steps:\n  - use: split-expert\n",
        r"my.yaml:3: step 1 \(use split-expert\): unknown transform 'split-expert'; did you mean 'split-experts'",
    ),
    "use_unknown_parameter": (
        HEAD + "steps:\n  - use: split-experts\n    with: {excludee: a}\n",
        r"my.yaml:3: step 1 \(use split-experts\): split-experts has no parameter 'excludee'; did you mean 'exclude'",
    ),
    "a_circle": (HEAD + "steps:\n  - use: my.yaml\n", "in a circle"),
}


@pytest.mark.parametrize("label", FAULTS)
def test_a_fault_is_told_with_its_line(label, tmp_path):
    text, message = FAULTS[label]
    with pytest.raises(RecipeError, match=message):
        load_transform(write(tmp_path, text))


def test_a_file_that_is_no_text_or_not_there_is_told(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"bad.yaml: cannot be read"):
        load_transform(str(tmp_path / "bad.yaml"))
    with pytest.raises(RecipeError, match="no such transform file"):
        load_transform(str(tmp_path / "none.yaml"))
    with pytest.raises(RecipeError, match=r"unknown transform 'split-expert'; did you mean 'split-experts'"):
        load_transform("split-expert")


TYPED = """
parameters:
  flag: {default: false, description: a switch}
  count: {default: 3, description: a number}
  names: {default: [a], description: a list}
  word: {default: F32, description: a word, choices: [F32, BF16]}
  any: {default: null, description: whatever the op takes}
steps:
  - cast: {where: "${names}", dtype: "${word}"}
    when: "${flag}"
  - split: {where: ["x", "${names}", "y.${word}"], into: [p, q], axis: "${count}", sizes: "${any}"}
"""


def test_parameters_keep_their_type_and_lists_are_spliced(tmp_path):
    (split,) = steps(tmp_path, TYPED)
    assert split == Split(where=("x", "a", "y.F32"), into=("p", "q"), axis=3)
    cast, split = steps(tmp_path, TYPED, flag=True, names=["b", "c"], word="BF16", count=1)
    assert cast == Cast(where=("b", "c"), dtype="BF16")
    assert split.where == ("x", "b", "c", "y.BF16")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("flag", "true", True),
        ("flag", "No", False),
        ("count", "-1", -1),
        ("names", "a, b", ["a", "b"]),
        ("names", "", []),
        ("word", "BF16", "BF16"),
        ("any", "null", None),
    ],
)
def test_text_from_the_command_line_takes_the_type_of_the_default(key, text, value, tmp_path):
    from tensorsurgeon.recipes.recipe import parameter_values

    assert parameter_values(find_recipe(write(tmp_path, HEAD + TYPED)), {key: text})[key] == value


@pytest.mark.parametrize(("given", "count"), [("true", 1), ("false", 0)])
def test_a_flag_is_compared_as_it_is_written(given, count, tmp_path):
    """Python's own ``True`` never equals ``true``: the step would be left out without a word."""
    text = "parameters:\n  flag: {default: true, description: d}\nsteps:\n  - drop: {where: a}\n"
    text += '  - drop: {where: b}\n    when: "${flag} == true"\n'
    assert len(steps(tmp_path, text, flag=given)) == 1 + count


def test_nothing_given_is_the_word_null_in_a_comparison(tmp_path):
    text = "parameters:\n  size: {default: null, description: d}\nsteps:\n  - drop: {where: a}\n"
    text += '  - drop: {where: b}\n    when: "${size} != null"\n'
    assert len(steps(tmp_path, text)) == 1
    assert len(steps(tmp_path, text, size="7")) == 2


def test_a_list_inside_a_longer_text_is_refused(tmp_path):
    text = 'parameters:\n  names: {default: [a], description: d}\nsteps:\n  - drop: {where: "x.${names}"}\n'
    with pytest.raises(RecipeError, match=r"my.yaml:5.*\$\{names\} is a list"):
        steps(tmp_path, text)


def test_a_parameter_without_a_type_takes_what_the_text_looks_like():
    *_, step, _ = steps_of(
        load_transform("quantize-linears", {"num_bits": "4", "group_size": "32", "split_experts": "false", "format": "ct-packed"})
    )
    assert (step.num_bits, step.group_size) == (4, 32)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("flag", "maybe", "flag must be true or false, found 'maybe'"),
        ("flag", 1, "flag must be true or false"),
        ("count", "three", "count must be a whole number"),
        ("count", "1.5", "count must be a whole number"),
        ("count", True, "count must be a whole number"),
        ("names", 7, "names must be a list"),
        ("word", "BF61", r"word must be one of F32, BF16, found 'BF61'; did you mean 'BF16'"),
        ("wrod", "x", r"my has no parameter 'wrod'; did you mean 'word'"),
    ],
)
def test_a_parameter_of_the_wrong_type_or_name_is_refused(key, value, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        steps(tmp_path, TYPED, **{key: value})


def test_a_file_uses_a_file_beside_it_also_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", HEAD + "steps:\n  - use: inner.yaml\n", "middle.yaml")
    write(tmp_path / "deep", HEAD + "steps:\n  - keep: {where: inner}\n", "inner.yaml")
    write(tmp_path, HEAD + "steps:\n  - keep: {where: wrong}\n", "inner.yaml")
    monkeypatch.chdir("/")
    (step,) = steps(tmp_path, "steps:\n  - use: deep/middle.yaml\n")
    assert step.where == ("inner",)


def test_one_pattern_with_a_comma_stays_one_pattern_in_yaml(tmp_path):
    write(tmp_path, HEAD + "parameters:\n  w: {default: [], description: x}\nsteps:\n  - keep: {where: '${w}'}\n", "inner.yaml")
    (step,) = steps(tmp_path, "steps:\n  - use: inner.yaml\n    with: {w: 're:a{1,2}'}\n")
    assert step.where == ("re:a{1,2}",)


def test_the_innermost_file_of_a_fault_is_named(tmp_path):
    write(tmp_path, HEAD + "steps:\n  - keep: {wheer: a}\n", "inner.yaml")
    with pytest.raises(RecipeError, match=r"inner.yaml:3: step 1 \(keep\)"):
        steps(tmp_path, "steps:\n  - use: inner.yaml\n")


def test_a_scalar_shape_is_an_empty_list(tmp_path):
    assert steps(tmp_path, "steps:\n  - reshape: {where: a, shape: []}\n") == (Reshape(where=("a",), shape=()),)


@pytest.mark.parametrize("name", builtin_names())
def test_every_builtin_is_described_and_builds(name):
    recipe = find_recipe(name)
    assert len(recipe.description) > 40
    assert all(len(p.description) > 5 for p in recipe.parameters.values())
    assert steps_of(load_transform(name))


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_found_documented_and_strict(name):
    cls = op_named(name)
    assert cls.__doc__
    with pytest.raises(SurgeonError):
        make_op(name, {"zzz": 1})


def test_an_unknown_op_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'transpose'"):
        op_named("transpos")
