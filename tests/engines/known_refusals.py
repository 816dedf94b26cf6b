"""What vLLM 0.32 is known to refuse on a kind of CPU, in its own words, and who judges those layouts instead.

vLLM chooses its kernels by the CPU, and CI runs on two kinds. A layout is expected to be served; only where this table
says so may it be refused, and only with that text: another text, or another kind of CPU, fails the test. One that is
served against the table passes if its numbers hold, and the answer says so. Everything that was asked is printed at the
end of the run (conftest.py).
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from tests.checkpoints import FIXTURE
from tests.engines.judging import DENSE, Conversion, Engine, Row, calibrated, conversion, in_format

AMX = "with AMX"
ZEN = "AMD with AVX-512, without AMX"
OTHER = "without AMX, not AMD with AVX-512"


def kind_of(cpuinfo: str) -> str:
    """The kind of CPU that /proc/cpuinfo describes, as vLLM tells them apart: AMX tiles, or zentorch (`_is_amd_zen_cpu`)."""
    if re.search(r"\bamx_int8\b", cpuinfo):
        return AMX
    return ZEN if "AuthenticAMD" in cpuinfo and "avx512" in cpuinfo else OTHER


CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
THIS_CPU = kind_of(CPUINFO)


@dataclass(frozen=True)
class Refusal:
    """A layout of a model that vLLM refuses on one kind of CPU."""

    model: Path
    made: Conversion
    cpu: str
    said: str  # this is in the error
    why: str  # vLLM 0.32's own source
    judges: tuple[str, ...]  # the tests that hold the same layout on any CPU
    setting: str = ""  # NAME=VALUE of the environment with which vLLM does serve it, which is then demanded


VLLM_MOE, VLLM_DENSE = (
    f"tests/engines/test_vllm.py::{test}"
    for test in ("test_perplexity_on_held_out_text", "test_a_dense_model_scores_as_its_dequantized_weights")
)
VLLM_FAMILIES = "tests/engines/test_vllm_families.py::test_a_family_is_served_as_transformers_computes_it"
NO_BACKEND = "No WNA16 MoE backend supports the deployment configuration."
GROUPS_OF_32 = "fused_moe/experts/cpu_moe.py:862: CPUExpertsInt4 takes the key kInt4Static alone, and groups of 32 have another"
NO_ZERO_POINT = "assert self.w_zp_name"
MADE_UP_ZERO = (
    "kernels/linear/mixed_precision/cpu.py:103: the kernel that quantizes inputs to int8 wants a name for the zero points "
    "that it makes up, and symmetric Quark has none"
)

KNOWN = (
    Refusal(
        FIXTURE,
        conversion("quark-w8a8-int8"),
        AMX,
        "CHECK_EQ(packed_w1.size(2), packed_K",
        "quark_moe.py:1220: QuarkW8A8Int8MoEMethod never has CPUExpertsInt8 pack its weights, so no size of a model helps",
        (
            "tests/engines/test_vllm.py::test_experts_of_quark_int8_are_those_of_a_layout_that_is_served",
            f"{VLLM_MOE}[ct-w8a8-int8-rule-quark]",
            f"{VLLM_DENSE}[quark-w8a8-int8]",
        ),
    ),
    Refusal(
        FIXTURE,
        conversion("ct-w4a16-g32"),
        AMX,
        NO_BACKEND,
        GROUPS_OF_32,
        (
            "tests/engines/test_transformers.py::test_the_moe_model[ct-w4a16-g32]",
            f"{VLLM_MOE}[ct-w4a16-g32-group_size-64]",
        ),
    ),
    Refusal(
        FIXTURE,
        calibrated("ct-w4a16-g32"),
        AMX,
        NO_BACKEND,
        GROUPS_OF_32,
        ("tests/engines/test_calibrated.py::test_calibrated_codes_in_transformers[ct-w4a16-g32-calibrated]",),
    ),
    Refusal(
        FIXTURE,
        conversion("mixed", "experts=w4a16", "attention=w8a8", "mlp=w8a8"),
        AMX,
        NO_BACKEND,
        GROUPS_OF_32,
        (f"{VLLM_FAMILIES}[llama-mixed-attention-w8a8-mlp-w4a16]",),
    ),
    *(
        Refusal(DENSE, in_format(*how), AMX, NO_ZERO_POINT, MADE_UP_ZERO, (), setting="VLLM_CPU_INT4_W4A8=0")
        for how in (("quark-int4",), ("quark-int4-reorder",), ("quark-int4", "signed=true"))
    ),
)

# What was asked in this run, for the end of the output.
answers: list[str] = []


def known_refusal(model: Path, made: Conversion, cpu: str = THIS_CPU) -> Refusal | None:
    return next((known for known in KNOWN if (known.model, known.made, known.cpu) == (model, made, cpu)), None)


class Ask(Protocol):
    """Ask vLLM about checkpoints, with NAME=VALUE settings in its environment: rows by the name of the folder."""

    def __call__(self, *checkpoints: Path, settings: tuple[str, ...] = ()) -> dict[str, Row]: ...


def ask_again_with_settings(
    ask: Ask, rows: dict[str, Row], model: Path, checkpoints: Mapping[Conversion, Path], cpu: str = THIS_CPU
) -> None:
    """Put into ``rows`` the answers under the setting that serves a layout, where the plain one was the known refusal.

    Such a row has the setting, and the refusal as ``refused``.
    """
    by_setting: dict[str, list[Path]] = {}
    for made, checkpoint in checkpoints.items():
        known = known_refusal(model, made, cpu)
        if known is not None and known.setting and known.said in rows[checkpoint.name].get("error", ""):
            by_setting.setdefault(known.setting, []).append(checkpoint)
    for setting, refused in by_setting.items():
        again = ask(*refused, settings=(setting,))
        for checkpoint in refused:
            answer = again.get(checkpoint.name, {"error": "no answer"})
            rows[checkpoint.name] = answer | {"setting": setting, "refused": rows[checkpoint.name]["error"]}


def served(
    engine: Engine, rows: dict[str, Row], checkpoint: Path, model: Path, made: Conversion, cpu: str = THIS_CPU
) -> tuple[Row, str]:
    """The row of a layout that was served, and what to add to its figures; skips if its refusal is known, else fails."""
    known = known_refusal(model, made, cpu)
    row = rows.get(checkpoint.name, {"error": "no answer"})
    name = f"{model.name}, {made}"
    if "setting" in row:
        if "error" in row:
            pytest.fail(f"{engine.name} ({cpu}) refused {name} with {row['setting']} too: {row['error']}")
        return row, f"; with {row['setting']}, without it REFUSED: {row['refused']}"
    if "error" not in row:
        return row, f"; SERVED AGAINST the known refusal {known.said!r}: see {__name__}" if known else ""
    if known is None or known.said not in row["error"]:
        wanted = f"its known refusal says {known.said!r}" if known else "no refusal of it is known"
        pytest.fail(f"{engine.name} ({cpu}) refused {name}: {row['error']}; {wanted} ({__name__})")
    if known.setting:
        pytest.fail(f"{engine.name} was not asked for {name} with {known.setting}, which serves it on a CPU {cpu}")
    answers.append(f"{name}: REFUSED: {row['error']}")
    pytest.skip(f"{engine.name} ({cpu}) refuses {name}, as is known: {row['error']} [{known.why}]")


def answer(model: Path, made: Conversion, figures: str) -> None:
    """Keep what a served layout gave for the end of the run."""
    answers.append(f"{model.name}, {made}: {figures}")


def this_cpu() -> str:
    """The CPU's own name and its kind."""
    name = re.search(r"^model name\s*:\s*(.+)$", CPUINFO, re.MULTILINE)
    return f"{name[1] if name else platform.processor() or platform.machine()} ({THIS_CPU})"
