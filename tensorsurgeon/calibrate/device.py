"""Which device a calibrated run works on, by name."""

from __future__ import annotations

import torch

from tensorsurgeon.errors import RecipeError


def device_named(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:N``; RecipeError for anything that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device {name}: is no device; cpu, cuda and cuda:0, cuda:1 ... are") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise RecipeError(f"device {name}: calibration runs on cpu or cuda, not on {device.type}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not 0 <= (device.index or 0) < count:
        raise RecipeError(f"device {name}: this torch sees no such device; torch {torch.__version__} sees {count} of CUDA")
    return torch.device("cuda", device.index or 0)


def identity_of(device: torch.device) -> str:
    """What the record says of a device: its kind, on which the bits depend, and no number of a card."""
    return "cpu" if device.type == "cpu" else f"cuda: {torch.cuda.get_device_name(device)}"


def works_on_card(device: torch.device) -> bool:
    """Whether everything is computed there, in batches, and not only by threads on the CPU."""
    return device.type == "cuda"
