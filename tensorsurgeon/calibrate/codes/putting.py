"""Quantized weights put in the place of a layer's own, so that what comes next sees what a reader of the output will see."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from tensorsurgeon.calibrate.codes.linears import Part
from tensorsurgeon.calibrate.walk.lines import lines_of
from tensorsurgeon.calibrate.walk.workers import run_parallel
from tensorsurgeon.machine.files import make_durable
from tensorsurgeon.quant.gptq.scale_search import dequantize
from tensorsurgeon.quant.rtn.plain_torch import tensor_of
from tensorsurgeon.quant.scheme import Quantized


def put_back(
    model: nn.Module, parts: Sequence[Part], codes: Mapping[int, Quantized], *, workers: int, stop: threading.Event
) -> None:
    """Overwrite the layer's weights by what a reader of the output will compute with; ``codes`` by the linear's number."""

    def put(number: int) -> None:
        part = parts[number]
        found = codes[part.linear]
        rows = slice(part.start, part.stop)
        zero_point = None if found.zero_point is None else tensor_of(found.zero_point[rows])
        weight = dequantize(tensor_of(found.codes[rows]), tensor_of(found.scale[rows]), zero_point)
        parameter = model.get_parameter(part.lines.name)
        lines_of(parameter, part.lines).copy_(weight)

    run_parallel(len(parts), put, workers=workers, stop=stop)


def write_codes(path: Path, codes: Mapping[int, Quantized]) -> None:
    """Codes for other processes to put back; they see all of it when this returns."""
    found = {
        number: tuple(None if array is None else tensor_of(array) for array in (one.codes, one.scale, one.zero_point))
        for number, one in codes.items()
    }
    with open(path, "wb") as file:
        torch.save(found, file)
        file.flush()
        make_durable(file.fileno())


def read_codes(path: Path) -> dict[int, Quantized]:
    """What ``write_codes`` wrote; the file is mapped, and has to stay as long as the codes are used."""
    found = torch.load(path, mmap=True, weights_only=True)
    return {
        number: Quantized(codes.numpy(), scale.numpy(), None if zero_point is None else zero_point.numpy())
        for number, (codes, scale, zero_point) in found.items()
    }
