"""Statistics: one Hessian per distinct input, summed in one order, fed to experts as asked, kept in files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tensorsurgeon.calibrate.codes.rules import damping_for, store_scale_of
from tensorsurgeon.calibrate.walk.experts import ExpertInputs, ExpertStatistics
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.model import StreamedModel, read_weights
from tensorsurgeon.calibrate.walk.stacks import find_stacks
from tensorsurgeon.calibrate.walk.statistics import (
    LayerObserver,
    StoredStatistics,
    WalkedStatistics,
    layer_path,
    write_layer,
)
from tensorsurgeon.calibrate.walk.walk import Walk
from tensorsurgeon.calibrate.walk.workers import Turns, run_parallel
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.errors import Interrupted, RecipeError
from tensorsurgeon.quant.gptq.gptq import GptqOptions, gptq, output_energy
from tensorsurgeon.quant.gptq.hessian import flipped_cholesky
from tensorsurgeon.quant.gptq.polish import Polish
from tensorsurgeon.quant.gptq.scale_search import dequantize, round_to_nearest
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import BF16
from tests.calibrate.models import options_of
from tests.checkpoints import FIXTURE


class Observed:
    """The first layer of the fixture, walked with every linear watched."""

    def __init__(self, work: Path, scratch: ExitStack, *, workers: int = 2, **fields: Any) -> None:
        checkpoint = open_checkpoint(FIXTURE)
        model = StreamedModel(checkpoint)
        self.name = model.layer_names[0]
        tokens = np.random.default_rng(5).integers(0, 2000, (24, 128))
        reader = TensorReader(checkpoint, scratch.enter_context(Source(checkpoint)))
        walk = Walk(model, read_weights(reader), tokens)
        hidden = scratch.enter_context(HiddenStates(work / "h", walk.shape, model.dtype, create=True))
        walk.embed(hidden.write)
        self.layer = scratch.enter_context(model.layer(0, read_weights(reader)))
        linears = {f"{self.name}.{n}": m for n, m in self.layer.named_modules() if isinstance(m, nn.Linear)}
        (self.stack,) = find_stacks(self.name, self.layer)
        self.inputs = ExpertInputs(work / f"x{workers}", tokens.size, 256, model.dtype)
        scratch.callback(self.inputs.close)
        turns = Turns()
        observer = LayerObserver(linears, [self.stack], {self.stack.name: self.inputs}, turns)
        with observer.watching():
            walk.run_layer(
                0, self.layer, hidden, None, workers=workers, stop=threading.Event(), observer=observer.observe, turns=turns
            )
        self.seen: dict[str, torch.Tensor] = {}
        self._run_again(walk, hidden, linears)
        options = options_of(**fields)
        experts = ExpertStatistics(self.stack, self.inputs, options)
        assert self.stack.router == "mlp.gate"
        self.router = self.layer.get_submodule("mlp.gate").weight
        experts.choose(self.router)
        self.experts = experts
        self.statistics: WalkedStatistics = observer.result({self.stack.name: experts})

    def _run_again(self, walk: Walk, hidden: HiddenStates, linears: dict[str, nn.Module]) -> None:
        """What each linear sees, whole and in order."""
        parts: dict[str, list[torch.Tensor]] = {}

        def note(name: str) -> Any:
            return lambda module, args: parts.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).clone())

        handles = [m.register_forward_pre_hook(note(n)) for n, m in linears.items()]
        walk.run_layer(0, self.layer, hidden, None, workers=1, stop=threading.Event())
        for handle in handles:
            handle.remove()
        self.seen = {name: torch.cat(found) for name, found in parts.items()}


@contextmanager
def observed(work: Path, **fields: Any) -> Iterator[Observed]:
    with ExitStack() as scratch, torch.no_grad():
        yield Observed(work, scratch, **fields)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def test_the_hessian_of_every_linear_is_the_sum_over_what_it_saw(tmp_path: Path) -> None:
    with observed(tmp_path) as made:
        assert len(made.seen) >= 8
        for name, inputs in made.seen.items():
            found = made.statistics.of(name)
            assert found is not None
            assert found.hessian is not None
            wanted = inputs.double().T @ inputs.double()
            assert relative(found.hessian, wanted) < 1e-6, name
            assert found.tokens == len(inputs) == 24 * 128
            assert torch.equal(found.diagonal, found.hessian.diagonal())


def test_linears_called_with_one_tensor_share_one_hessian(tmp_path: Path) -> None:
    with observed(tmp_path) as made:
        key = made.statistics.shared_key
        mixer = {key(f"{made.name}.linear_attn.in_proj_{part}") for part in ("qkv", "z", "a", "b")}
        moe = {key(f"{made.name}.mlp.shared_expert.{part}_proj") for part in ("gate", "up")} | {key(made.stack.first_name)}
        assert len(mixer) == len(moe) == 1
        assert mixer != moe
        assert key(f"{made.name}.linear_attn.out_proj") not in mixer | moe


def test_workers_change_no_bit_of_a_sum(tmp_path: Path) -> None:
    with observed(tmp_path, workers=1) as one, observed(tmp_path, workers=3) as three:
        for name in one.seen:
            a, b = one.statistics.of(name), three.statistics.of(name)
            assert a is not None
            assert b is not None
            assert torch.equal(a.hessian, b.hessian)
        for expert in range(8):
            key = f"{one.stack.down_name}.{expert}"
            assert torch.equal(one.statistics.of(key).hessian, three.statistics.of(key).hessian)  # type: ignore[union-attr]


def expected_down(made: Observed, expert: int, tokens: np.ndarray) -> torch.Tensor:
    inputs = made.seen[f"{made.name}.mlp.shared_expert.gate_proj"][torch.from_numpy(tokens)]
    gate, up = nn.functional.linear(inputs, made.stack.module.gate_up_proj[expert]).chunk(2, -1)
    after = (nn.functional.silu(gate) * up).double()
    return after.T @ after


@pytest.mark.parametrize("feeding", ["routed", "all", "balanced"])
def test_an_expert_is_fed_the_tokens_that_the_mode_says(feeding: str, tmp_path: Path) -> None:
    with observed(tmp_path, experts=feeding, minimum_tokens=700) as made:
        inputs = made.seen[f"{made.name}.mlp.shared_expert.gate_proj"]
        logits = nn.functional.linear(inputs, made.router)
        chosen = logits.float().softmax(-1).topk(2).indices
        topped_up = 0
        for expert in range(8):
            routed = np.flatnonzero((chosen == expert).any(1).numpy())
            fed = made.experts.tokens_of(expert)
            if feeding == "all":
                assert len(fed) == len(inputs)
            elif feeding == "routed" or len(routed) >= 700:
                assert np.array_equal(fed, routed)
            else:
                topped_up += 1
                assert len(fed) == 700
                assert set(routed) <= set(fed)
                extra = np.array(sorted(set(fed) - set(routed)))
                left = np.array(sorted(set(range(len(inputs))) - set(fed)))
                exact = (inputs.float() @ made.router[expert].float()).numpy()
                assert exact[extra].min() >= exact[left].max()
            found = made.statistics.of(f"{made.stack.down_name}.{expert}")
            assert found is not None
            assert found.tokens == len(fed)
            assert relative(found.hessian, expected_down(made, expert, fed)) < 1e-5  # type: ignore[arg-type]
        assert topped_up > 0 or feeding != "balanced"


def test_topping_up_gives_no_expert_more_than_an_even_router_would(tmp_path: Path) -> None:
    with observed(tmp_path, minimum_tokens=10_000) as made:
        even = 24 * 128 * 2 // 8
        fed = [len(made.experts.tokens_of(expert)) for expert in range(8)]
        assert min(fed) == even
        assert fed == [max(even, len(made.inputs.routed(expert))) for expert in range(8)]


def test_an_own_hessian_of_a_first_projection_sums_over_its_experts_tokens(tmp_path: Path) -> None:
    with observed(tmp_path, experts="routed") as made:
        found = made.statistics.of(f"{made.stack.first_name}.3")
        inputs = made.seen[f"{made.name}.mlp.shared_expert.gate_proj"][torch.from_numpy(made.inputs.routed(3))].double()
        assert found is not None
        assert relative(found.hessian, inputs.T @ inputs) < 1e-6  # type: ignore[arg-type]


def test_statistics_come_back_from_their_file(tmp_path: Path) -> None:
    with observed(tmp_path) as made:
        names = sorted(made.seen)
        kept = {made.statistics.shared_key(name): made.statistics.of(name) for name in names}
        write_layer(tmp_path / "s", 0, kept, {name: made.statistics.shared_key(name) for name in names})  # type: ignore[arg-type]
        stored = StoredStatistics(layer_path(tmp_path / "s", 0))
        for name in names:
            ours, theirs = stored.of(name), made.statistics.of(name)
            assert ours is not None
            assert theirs is not None
            assert ours.tokens == theirs.tokens
            assert torch.equal(ours.hessian, theirs.hessian)
        assert len(stored.tokens) == len(kept) < len(names)
        assert stored.of("nobody") is None


def test_files_that_hold_no_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        StoredStatistics(layer_path(tmp_path, 3))
    layer_path(tmp_path, 0).write_bytes(b"no")
    with pytest.raises(RecipeError, match="is not a file of statistics"):
        StoredStatistics(layer_path(tmp_path, 0))


def test_a_failing_worker_releases_those_that_wait_for_their_turn() -> None:
    turns = Turns()

    def work(item: int) -> None:
        if item == 0:
            raise ValueError("broken")
        with turns.turn("sum", item):
            pytest.fail("item 0 never passed")

    with pytest.raises(ValueError, match="broken"):
        run_parallel(8, work, workers=4, stop=threading.Event(), turns=turns)


def test_a_stop_ends_the_work_between_items() -> None:
    stop = threading.Event()
    done: list[int] = []

    def work(item: int) -> None:
        done.append(item)
        if item == 3:
            stop.set()

    with pytest.raises(Interrupted):
        run_parallel(100, work, workers=1, stop=stop)
    assert done == [0, 1, 2, 3]


def test_damping_grows_where_tokens_are_few_and_ends_at_what_was_asked_for() -> None:
    assert damping_for(0.01, 100_000, 512) == pytest.approx(2 * 512 / 100_000)
    assert damping_for(0.01, 10_000_000, 512) == 0.01
    assert damping_for(0.01, 3, 512) == 2.0
    assert damping_for(5.0, 3, 512) == 5.0


@pytest.mark.parametrize("kept", [48, 256])
def test_few_tokens_do_not_make_an_expert_worse_than_rounding_on_held_out_tokens(kept: int, tmp_path: Path) -> None:
    """Plain GPTQ's damping does: 1.5 to 2 times the error of rounding, from up to four tokens per input feature."""
    store = store_scale_of(Scheme(num_bits=4, group_size=128, scale_dtype=BF16))
    ratios: dict[str, list[float]] = {"few": [], "plain": []}
    with observed(tmp_path, experts="all") as made:
        for expert in range(8):
            routed = made.inputs.routed(expert)
            fitted, held_out = (expected_down(made, expert, part).float() for part in (routed[:kept], routed[len(routed) // 2 :]))
            weight = made.stack.module.down_proj[expert].float()
            scale = weight.abs().amax(1, keepdim=True) / 7.5
            rounded = weight - dequantize(round_to_nearest(weight, store(scale), None, qmin=-8, qmax=7), store(scale), None)
            for name, damping in (("few", damping_for(0.01, kept, 128)), ("plain", 0.01)):
                chosen = gptq(
                    weight, fitted, scale=scale, qmin=-8, qmax=7, group_size=128, options=GptqOptions(polish=Polish()),
                    store_scale=store, factor=flipped_cholesky(fitted, damping),
                )  # fmt: skip
                change = weight - chosen.dequantize()
                ratios[name].append(float(output_energy(change, held_out).sum() / output_energy(rounded, held_out).sum()))
    assert np.mean(ratios["few"]) < 0.95, ratios
    assert np.mean(ratios["few"]) < 0.8 * np.mean(ratios["plain"])
