"""YAML with line numbers and without surprises: every mapping knows the line of each key, and keys are unique."""

from __future__ import annotations

from typing import Any, Final

import yaml

from tensorsurgeon.errors import RecipeError

# A transform of a hundred steps has some thousand.
_MAX_VALUES: Final = 100_000
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Located(dict[str, Any]):
    """A mapping that remembers where it and its keys stood."""

    line: int = 0
    lines: dict[str, int]


def parse_yaml(text: str, where: str) -> Any:
    """The document as plain values, mappings as ``Located``; RecipeError names file and line of a fault."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _refuse_too_many(node, where)
        return None if node is None else _value(loader, node, where)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise RecipeError(f"not valid YAML: {error.problem}", where=f"{where}:{line}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"not valid YAML: {error}", where=where) from error
    finally:
        loader.dispose()


def _refuse_too_many(node: Any, where: str) -> None:
    """Count what aliases stand for before anything is made of them: a few lines can mean billions of values."""
    values: dict[int, int] = {}

    def count(node: Any) -> int:
        if id(node) not in values:
            values[id(node)] = _MAX_VALUES + 1  # while it is counted: an alias that holds itself has no end
            children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            below = 0 if isinstance(node, yaml.ScalarNode) else sum(map(count, children))
            values[id(node)] = 1 + below
        return values[id(node)]

    if node is not None and count(node) > _MAX_VALUES:
        raise RecipeError(f"stands for more than {_MAX_VALUES} values, by aliases of aliases; write them out", where=where)


def _value(loader: Any, node: Any, where: str) -> Any:
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.ScalarNode) and node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise RecipeError(f"unknown tag {node.tag!r}", where=f"{where}:{line}")
    if isinstance(node, yaml.MappingNode):
        result = Located()
        result.line = line
        result.lines = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or not isinstance(key, str):
                raise RecipeError("keys must be words", where=f"{where}:{key_node.start_mark.line + 1}")
            if key in result:
                raise RecipeError(f"key {key!r} occurs twice", where=f"{where}:{key_node.start_mark.line + 1}")
            result[key] = _value(loader, value_node, where)
            result.lines[key] = key_node.start_mark.line + 1
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, child, where) for child in node.value]
    return loader.construct_object(node)
