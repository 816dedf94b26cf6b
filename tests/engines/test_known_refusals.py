"""The table of known refusals: only the known text on the known kind of CPU is let through, and others judge what it lists."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import FIXTURE
from tests.engines import known_refusals
from tests.engines.judging import DENSE, ROOT, Engine, Row, conversion, in_format
from tests.engines.known_refusals import AMX, KNOWN, OTHER, ZEN, ask_again_with_settings, kind_of, known_refusal, served

VLLM = Engine("vLLM", Path("python"))
QUARK = conversion("quark-w8a8-int8")
FOLDER = Path("out", "quark")
# As vLLM 0.32 said it on a CPU with AMX.
REFUSED = (
    "RuntimeError: CHECK_EQ(packed_w1.size(2), packed_K / (moe_comp_method == CPUQuantMethod::INT4_W4A8 ? 2 : 1)) failed. "
    "256 vs 260 (_ops.py:1279: return self._op(*args, **kwargs))"
)
ASSERTED = "AssertionError:  (cpu.py:103: assert self.w_zp_name)"


@pytest.fixture(autouse=True)
def own_answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What these tests record is not what an engine said in this run."""
    answers: list[str] = []
    monkeypatch.setattr(known_refusals, "answers", answers)
    return answers


def judged(row: Row, cpu: str) -> tuple[Row, str]:
    return served(VLLM, {FOLDER.name: row}, FOLDER, FIXTURE, QUARK, cpu)


def test_kinds_of_cpu() -> None:
    assert kind_of("vendor_id : GenuineIntel\nflags : sse avx512f amx_bf16 amx_tile amx_int8\n") == AMX
    assert kind_of("vendor_id : AuthenticAMD\nflags : sse avx512f avx512_vnni\n") == ZEN
    assert kind_of("vendor_id : GenuineIntel\nflags : sse avx512f\n") == OTHER
    assert kind_of("vendor_id : AuthenticAMD\nflags : sse avx2\n") == OTHER
    assert kind_of("") == OTHER


def test_the_known_refusal_is_skipped_with_its_text_and_kept_for_the_end(own_answers: list[str]) -> None:
    with pytest.raises(pytest.skip.Exception, match="256 vs 260") as skipped:
        judged({"error": REFUSED}, AMX)
    assert "quark_moe.py:1220" in str(skipped.value)
    assert own_answers == [f"{FIXTURE.name}, quark-w8a8-int8: REFUSED: {REFUSED}"]


@pytest.mark.parametrize("error", ["RuntimeError: something else", "no result after 600 s", ASSERTED])
def test_another_text_fails(error: str) -> None:
    with pytest.raises(pytest.fail.Exception, match="its known refusal says 'CHECK_EQ"):
        judged({"error": error}, AMX)
    with pytest.raises(pytest.fail.Exception, match="no answer"):
        served(VLLM, {}, FOLDER, FIXTURE, QUARK, AMX)


@pytest.mark.parametrize("cpu", [ZEN, OTHER])
def test_the_same_text_on_another_cpu_fails(cpu: str) -> None:
    with pytest.raises(pytest.fail.Exception, match="no refusal of it is known"):
        judged({"error": REFUSED}, cpu)


def test_the_same_text_for_another_layout_or_model_fails() -> None:
    for model, made in ((FIXTURE, conversion("ct-w8a8-int8")), (DENSE, QUARK)):
        with pytest.raises(pytest.fail.Exception, match="no refusal of it is known"):
            served(VLLM, {FOLDER.name: {"error": REFUSED}}, FOLDER, model, made, AMX)


def test_what_is_served_is_returned_and_a_surprise_is_said() -> None:
    row: Row = {"perplexity": 20.9}
    assert judged(row, ZEN) == (row, "")
    assert judged(row, AMX)[0] == row
    assert "SERVED AGAINST the known refusal" in judged(row, AMX)[1]


def test_a_setting_is_tried_where_the_plain_answer_is_the_known_refusal_and_must_serve() -> None:
    made = {name: in_format(name) for name in ("quark-int4", "quark-int4-reorder", "quark-fp8")}
    folders = {layout: Path("out", name) for name, layout in made.items()}
    asked: list[tuple[tuple[Path, ...], tuple[str, ...]]] = []

    def ask(*checkpoints: Path, settings: tuple[str, ...] = ()) -> dict[str, Row]:
        asked.append((checkpoints, settings))
        return {"quark-int4": {"nll": 3.0}, "quark-int4-reorder": {"error": "RuntimeError: no"}}

    def judge(name: str, rows: dict[str, Row], cpu: str) -> tuple[Row, str]:
        return served(VLLM, rows, folders[made[name]], DENSE, made[name], cpu)

    plain: dict[str, Row] = {name: {"error": ASSERTED} for name in made}
    rows = dict(plain)
    ask_again_with_settings(ask, rows, DENSE, folders, ZEN)
    assert rows == plain
    assert asked == []
    with pytest.raises(pytest.fail.Exception, match="no refusal of it is known"):
        judge("quark-int4", rows, ZEN)
    with pytest.raises(pytest.fail.Exception, match="was not asked for"):
        judge("quark-int4", rows, AMX)
    ask_again_with_settings(ask, rows, DENSE, folders, AMX)
    assert asked == [((Path("out", "quark-int4"), Path("out", "quark-int4-reorder")), ("VLLM_CPU_INT4_W4A8=0",))]
    row, how = judge("quark-int4", rows, AMX)
    assert row["nll"] == 3.0
    assert how == f"; with VLLM_CPU_INT4_W4A8=0, without it REFUSED: {ASSERTED}"
    with pytest.raises(pytest.fail.Exception, match="with VLLM_CPU_INT4_W4A8=0 too: RuntimeError: no"):
        judge("quark-int4-reorder", rows, AMX)
    with pytest.raises(pytest.fail.Exception, match="no refusal of it is known"):
        judge("quark-fp8", rows, AMX)

    other: dict[str, Row] = {name: {"error": "RuntimeError: else"} for name in made}
    ask_again_with_settings(ask, other, DENSE, folders, AMX)
    assert len(asked) == 1
    with pytest.raises(pytest.fail.Exception, match=r"its known refusal says 'assert self\.w_zp_name'"):
        judge("quark-int4", other, AMX)


def test_each_layout_of_the_table_is_asked_for_once_and_has_another_judge_or_a_setting() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-m", "engine", "tests/engines"]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    collected = set(run.stdout.splitlines())
    places = [(known.model, known.made, known.cpu) for known in KNOWN]
    assert len(set(places)) == len(places)
    for known in KNOWN:
        test = known_refusals.VLLM_MOE if known.model == FIXTURE else known_refusals.VLLM_DENSE
        assert f"{test}[{known.made}]" in collected
        assert known_refusal(known.model, known.made, known.cpu) is known
        assert known.judges or known.setting
        assert set(known.judges) <= collected, f"{known.made}: {set(known.judges) - collected} are no tests"
        # A judge that the table lets off on the same CPU would be none.
        let_off = {f"{test}[{other.made}]" for other in KNOWN if other.cpu == known.cpu and not other.setting}
        assert not let_off & set(known.judges)
