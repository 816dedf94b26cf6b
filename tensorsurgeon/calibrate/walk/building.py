"""The module tree that a config.json asks for, built by classes of transformers alone.

A config is a stranger's: it may name Python that lies beside it or on the Hub, ask for a billion layers, or say what the
code that reads it never expected. None of the first is run, the second is refused, and the third is one clear error.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.errors import CheckpointError, PlanError, SurgeonError

_TORCH_DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_COUNTS: Final = re.compile(r"layers|depth|blocks|n_layer")
# Some keys that read like counts are none (``max_window_layers``); no model has so many layers, and so many build at once.
_ANY_MODEL: Final = 1000
# Keys by which transformers chooses code that computes a part; a name with a slash is fetched from the Hub and run.
_CODE: Final = re.compile(r"implementation|kernel")


def model_builder(checkpoint: Checkpoint, experts_implementation: str | None) -> Callable[[], Any]:
    """Builds the checkpoint's model without its weights, wherever tensors are made by then; CheckpointError if none can be."""
    import transformers

    if not checkpoint.config:
        raise CheckpointError("has no config.json; the layer walk needs it to build the model", where=str(checkpoint))
    _refuse_what_no_config_needs(checkpoint)
    with _a_config_of_a_stranger(checkpoint):
        # Said, for where nothing is said transformers asks on stdin whether to run the Python beside the config.
        config = transformers.AutoConfig.from_pretrained(str(checkpoint.root), trust_remote_code=False)
        for part in (config, config.get_text_config()):
            # The model is built for the float weights that codes stand for.
            vars(part).pop("quantization_config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise PlanError(f"{config.model_type}: encoder-decoder models cannot be walked; only decoder layers in a list can")
        named = getattr(transformers, str((config.architectures or [""])[0]), None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            make: Any = named._from_config
            if not named._can_set_experts_implementation():
                # Models without experts, or with experts of their own making, refuse any but the eager one.
                experts_implementation = None
        else:
            make = functools.partial(transformers.AutoModelForCausalLM.from_config, trust_remote_code=False)
    arguments: dict[str, Any] = {} if experts_implementation is None else {"experts_implementation": experts_implementation}

    def build() -> Any:
        with _a_config_of_a_stranger(checkpoint):
            return make(config, dtype=_dtype_of(config), **arguments).eval()

    return build


@contextmanager
def _a_config_of_a_stranger(checkpoint: Checkpoint) -> Iterator[None]:
    import transformers

    try:
        yield
    except SurgeonError:
        raise
    except Exception as error:  # what reads a config raises whatever it meets there, KeyError and ZeroDivisionError included
        why = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"transformers {transformers.__version__} does not know this model, or cannot build it from its config.json "
            f"({type(error).__name__}: {why}); without its forward there is no calibration, RTN needs none",
            where=str(checkpoint),
        ) from error


def _refuse_what_no_config_needs(checkpoint: Checkpoint) -> None:
    """More layers than the checkpoint has tensors, which take all memory to build, and code from elsewhere."""
    parts: list[tuple[str, Any]] = [("", checkpoint.config)]
    for path, part in parts:
        for key, value in part.items():
            where = f"config.json {path}{key}"
            if isinstance(value, dict):
                parts.append((f"{path}{key}.", value))
            elif isinstance(value, int) and value > max(len(checkpoint.specs), _ANY_MODEL) and _COUNTS.search(key):
                raise CheckpointError(
                    f"{where}: asks for {value}, and the checkpoint has {len(checkpoint.specs)} tensors",
                    where=str(checkpoint),
                )
            elif isinstance(value, str) and "/" in value and _CODE.search(key):
                raise CheckpointError(
                    f"{where}: names code of somebody else's to run ({value[:100]}); remove the key to calibrate",
                    where=str(checkpoint),
                )


def _dtype_of(config: Any) -> torch.dtype:
    for part in (config, config.get_text_config()):
        dtype = getattr(part, "dtype", None)
        if dtype is not None:
            return dtype if isinstance(dtype, torch.dtype) else _TORCH_DTYPES[str(dtype)]
    return torch.bfloat16
