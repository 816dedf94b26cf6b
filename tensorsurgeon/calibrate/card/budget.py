"""What of a calibrated run lies on the card, planned before it starts and held to by the allocator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from tensorsurgeon.calibrate.card.states import Place
from tensorsurgeon.calibrate.codes.tuned import HELD, HELD_BY_WORKER
from tensorsurgeon.calibrate.walk.model import StreamedModel
from tensorsurgeon.errors import BudgetError
from tensorsurgeon.machine.limits import available_bytes
from tensorsurgeon.tensors.sizes import show_size

# Tokens per forward call on a card: fewer leave it idle between launches. Part of the result's bits.
BATCH_TOKENS: Final = 16_384
# What a forward holds per token, in hidden states: measured, see docs/calibration.md.
_FORWARD_STATES: Final = 64
# What choosing codes holds at most beside the layer: eight arrays of a batch, and its Hessians three times.
_BATCH_BYTES: Final = 8 * (64 << 20) * 4 + 3 * (128 << 20) * 4
# And with cross products: them, and what turns them into a correction.
_CROSS_BYTES: Final = 4 * (128 << 20) * 4
# Of a forward whose gradient is wanted, in those: reckoned, not measured.
_GRADIENT_STATES: Final = 4
# Share of a card that is used where nothing is said.
_DEFAULT_SHARE: Final = 0.9


@dataclass(frozen=True, slots=True)
class CardPlan:
    """Where hidden states and experts' inputs lie, and how many bytes of the card the run takes at most."""

    states: Place
    inputs: Place
    nbytes: int


def plan_card(
    model: StreamedModel,
    shape: tuple[int, int, int],
    device: torch.device,
    max_gpu_ram_bytes: int | None,
    asymmetric: bool = False,
    tuned: bool = False,
) -> CardPlan:
    """Lay out a run over states of ``shape``; BudgetError with the number to give where the least does not fit.

    ``asymmetric``: original states are carried beside the others, and cross products beside Hessians. ``tuned``: SignRound
    holds offsets and slopes beside a layer, and what a batch leaves behind for its gradient.
    """
    cap = card_bytes(device) if max_gpu_ram_bytes is None else max_gpu_ram_bytes
    specs = model.weights.specs
    width = model.dtype.itemsize
    layers = [sum(specs[name].numel for name in model.source_names(n)) * width for n in range(len(model.layers))]
    token = shape[2] * width
    states = shape[0] * shape[1] * token * (2 if asymmetric else 1)
    embedding = int(model.model.get_input_embeddings().weight.numel()) * width
    batch = max(BATCH_TOKENS, shape[1])
    codes = _BATCH_BYTES + (_CROSS_BYTES if asymmetric else 0)
    largest, forward = max(layers, default=0), batch * token * _FORWARD_STATES
    working = max(largest + max(codes, forward), embedding)
    if tuned:
        working = max(working, largest * (1 + HELD + HELD_BY_WORKER) + forward * _GRADIENT_STATES)
    if working > cap:
        raise BudgetError(
            f"calibration holds a decoder layer and a batch of codes on the card, {show_size(working)}",
            remedy=f", more than {{max_gpu_ram}} {show_size(cap)}; give at least {-(-working // 1_000_000)}MB",
        )
    # The states before and after a layer, and one more of what its experts are fed.
    room = cap - working
    elsewhere: Place = "pinned" if device.type == "cpu" or 3 * states < available_bytes() // 2 else "disk"
    if 3 * states <= room:
        return CardPlan("card", "card", working + 3 * states)
    if states <= room:
        return CardPlan(elsewhere, "card", working + states)
    return CardPlan(elsewhere, elsewhere, working)


def card_bytes(device: torch.device) -> int:
    """What may be used of a card where nothing is said: most of what is free now."""
    if device.type != "cuda":
        return available_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * _DEFAULT_SHARE)


@contextmanager
def capped(device: torch.device, plan: CardPlan, max_gpu_ram_bytes: int | None) -> Iterator[None]:
    """Hold the allocator to the cap, and say what to do where the plan was too small for this model."""
    if device.type != "cuda":
        yield
        return
    # The first call of CUDA's linear algebra loads a library, which only one thread may do.
    torch.linalg.inv(torch.eye(2, device=device))
    total = torch.cuda.get_device_properties(device).total_memory
    if max_gpu_ram_bytes is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, max_gpu_ram_bytes / total), device)
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        cap = total if max_gpu_ram_bytes is None else max_gpu_ram_bytes
        raise BudgetError(
            f"calibration was planned to hold {show_size(plan.nbytes)} of the card and needs more than {show_size(cap)}",
            remedy="; give a larger {max_gpu_ram}, or a shorter {sequence_length}",
        ) from error
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()
