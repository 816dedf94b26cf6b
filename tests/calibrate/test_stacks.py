"""Experts are calibrated however they are stacked: transposed, alternating, below each other, or handed every token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from tensorsurgeon.calibrate.codes.linears import find_linears, keys_of, parts_of
from tensorsurgeon.calibrate.walk.lines import Lines, Traced, lines_of
from tensorsurgeon.calibrate.walk.model import StreamedModel, read_weights
from tensorsurgeon.calibrate.walk.stacks import ExpertStack, find_stacks
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.planning.plan import Plan
from tests.calibrate.models import plan_of
from tests.families import build
from tests.families.table import FAMILIES

KINDS = {
    "gpt_oss": "transposed, gate and up alternate, with biases",
    "qwen3_vl_moe": "transposed on disk, as usual in the module",
    "llama4_text": "transposed; every token goes to every expert",
    "dbrx": "below each other, the down projection transposed",
    "granitemoe": "under other names",
    "longcat_flash": "more gates than down projections",
    "nemotron_h_moe": "without a gate, one by one on disk",
    "qwen3_moe": "one by one on disk",
}


class Made(NamedTuple):
    name: str
    plan: Plan
    model: StreamedModel
    source: Source


def write_family(name: str, folder: Path, **of_text: Any) -> Path:
    """A family built tiny, its text model with other sizes."""
    with pytest.MonkeyPatch.context() as patch:
        config = dict(FAMILIES[name].config)
        if "text_config" in config:
            config["text_config"] = {**config["text_config"], **of_text}
        else:
            config |= of_text
        patch.setitem(FAMILIES, name, FAMILIES[name]._replace(config=config))
        build.write(name, folder)
    return folder / "source"


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    # transformers leaves square experts as they lie, so that a published layout of those would be read transposed.
    sizes = {"moe_intermediate_size": 96} if request.param == "qwen3_vl_moe" else {}
    plan = plan_of(write_family(request.param, tmp_path_factory.mktemp(request.param), **sizes))
    with Source(plan.source) as source:
        yield Made(request.param, plan, StreamedModel(plan.source), source)


def experts_of(made: Made) -> tuple[int, nn.Module, list[ExpertStack]]:
    """The last layer that has stacked experts, without weights."""
    for number in reversed(range(len(made.model.layers))):
        if stacks := find_stacks(made.model.layer_names[number], made.model.layers[number]):
            return number, made.model.layers[number], stacks
    raise AssertionError("no layer has experts")


@pytest.mark.filterwarnings("ignore")
def test_every_row_of_every_linear_lies_where_the_model_computes_with_it(made: Made) -> None:
    linears = find_linears(made.plan, made.model)
    number, _, _ = experts_of(made)
    mine = [linear for linear in linears if linear.layer == number]
    reader = TensorReader(made.plan.source, made.source)
    with made.model.layer(number, read_weights(reader)) as layer:
        name = made.model.layer_names[number]
        stacks = find_stacks(name, layer)
        keys = keys_of(name, layer, stacks, {stack.first_name: True for stack in stacks})
        parts, without = parts_of(mine, made.model.traced(number), keys)
        assert not without
        for part in parts:
            rows = torch.from_numpy(mine[part.linear].read(made.plan, made.source).astype(np.float32))[part.start : part.stop]
            found = lines_of(made.model.model.get_parameter(part.lines.name), part.lines)
            assert torch.equal(found.float(), rows), mine[part.linear].module
    of_experts = [part for part in parts if part.expert is not None]
    stack = stacks[0]
    downs = [part for part in of_experts if part.key == f"{stack.down_name}.{part.expert}"]
    assert len(downs) == stack.experts == 8
    # A shape that fits transposed too would not show by itself.
    assert {mine[part.linear].weight.shape for part in downs} == {(stack.hidden, stack.inner)}


def formula(name: str, module: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What goes into an expert's down projection, written out."""
    if name == "gpt_oss":
        both = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        gate, up = both[:, 0::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    if name == "llama4_text":
        gate, up = (x @ module.gate_up_proj[expert]).chunk(2, -1)
    elif name == "dbrx":
        rows = slice(expert * 128, expert * 128 + 128)
        gate, up = x @ module.mlp.w1[rows].T, x @ module.mlp.v1[rows].T
    elif name == "nemotron_h_moe":
        return torch.relu(x @ module.up_proj[expert].T).square()
    else:
        gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, -1)
    return nn.functional.silu(gate) * up


@pytest.mark.filterwarnings("ignore")
def test_a_down_projection_sees_what_the_expert_makes_of_its_input(made: Made) -> None:
    number, _, _ = experts_of(made)
    reader = TensorReader(made.plan.source, made.source)
    with made.model.layer(number, read_weights(reader)) as layer, torch.no_grad():
        (stack,) = find_stacks(made.model.layer_names[number], layer)
        x = torch.randn(11, stack.hidden, generator=torch.Generator().manual_seed(3)).to(made.model.dtype)
        for expert in (0, 5):
            found = stack.down_inputs(expert, x).float()
            expected = formula(made.name, stack.module, expert, x).float()
            assert found.shape == expected.shape == (11, stack.inner)
            assert float((found - expected).norm() / expected.norm()) < 0.02
        assert stack.down_inputs(0, x[:0]).shape == (0, stack.inner)


def test_experts_that_get_every_token_are_fed_those_that_chose_them() -> None:
    from tensorsurgeon.calibrate.walk.stacks import _gathered

    x = torch.randn(5, 4)
    choice = torch.tensor([[1, 2], [0, 2], [2, 1], [0, 1], [1, 0]])
    rows = torch.zeros(3, 5, 4)
    for token, chosen in enumerate(choice.tolist()):
        for expert in chosen:
            rows[expert, token] = x[token] * (expert + 1)
    hidden, experts = _gathered(rows, 2)
    assert hidden.shape == (10, 4)
    for token in range(5):
        assert set(experts[2 * token : 2 * token + 2, 0].tolist()) == set(choice[token].tolist())
        for place in (2 * token, 2 * token + 1):
            assert torch.equal(hidden[place], x[token] * (int(experts[place, 0]) + 1))


def test_lines_are_followed_through_steps_and_matrices() -> None:
    traced = Traced({("w", 0): [(0, Lines("p", 6, 12)), (6, Lines("q", 0, 6))]}, {"w": 4})
    assert traced.became(Lines("w", 2, 9, 3)) == [Lines("p", 8, 12, 3), Lines("q", 2, 3, 3)]
    assert traced.became(Lines("w", 2, 13)) is None
    # Columns of matrices of three rows: the second matrix went to the head of another parameter.
    assert traced.became(Lines("w", 8, 12, turned=3)) == [Lines("q", 0, 4, turned=3)]
    assert traced.became(Lines("w", 5, 8, 2, turned=3)) == [Lines("p", 13, 16, 2, turned=3)]
    parameter = torch.arange(48).view(12, 4)
    assert lines_of(parameter, Lines("p", 13, 16, 2, turned=3)).tolist() == [[37, 41, 45], [39, 43, 47]]
