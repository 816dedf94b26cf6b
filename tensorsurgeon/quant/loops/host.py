"""The CPU of this machine, as LLVM sees it: what code is made for, and how made code is loaded."""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from tensorsurgeon.quant.loops.block import ENTRY


def target_machine() -> Any:
    """A target machine of LLVM's for this CPU with all it can do; the settings are numba's defaults.

    A new one each time (0.4 ms): an engine takes it over, and takes it along when it goes.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=_features(),
        opt=3,
        reloc="static" if target.name.startswith("x86") else "default",
        codemodel="jitdefault",
        jit=True,
    )


@cache
def identity() -> str:
    """What machine code made here depends on: code made under another identity may not run, or run differently."""
    return "\n".join((llvmlite.__version__, llvm.get_default_triple(), llvm.get_host_cpu_name(), _features()))


def load(code: bytes) -> tuple[int, object]:
    """The address of an object file's ``ENTRY``, and what must stay alive for as long as that may be called.

    An engine of its own for each, so that no file sees another's symbols.
    """
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine.get_function_address(ENTRY), engine


def _features() -> str:
    return str(llvm.get_host_cpu_features().flatten())
