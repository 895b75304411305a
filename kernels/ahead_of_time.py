"""Compiles Triton kernels for sm_90a without a GPU and reads the machine code: registers, stack, spills, fp64, load widths, bytes moved.

A kernel module lists what it ships as `builds() -> list[Build]`, from the table that its launcher uses.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Build:
    """One specialisation of a kernel, as the launcher asks for it."""

    name: str
    kernel: Any
    """The @triton.jit function."""
    arguments: Mapping[str, str]
    """Triton type of each run-time argument: "*bf16", "*fp32", "i64", "i32", "fp32", ... A pointer's alignment is that of an allocation."""
    constants: Mapping[str, Any]
    """Values of the tl.constexpr arguments (None for an absent pointer)."""
    num_warps: int
    num_stages: int = 1
    divisible: frozenset[str] = field(default_factory=frozenset)
    """Integer arguments that are multiples of 16 in the common case: strides and sizes."""
    wide_loads: bool = True
    """Whether it reads long rows, and so must load 128 bits at a time."""


@dataclass(frozen=True)
class MachineCode:
    """What the assembler said and what the code holds."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    num_local: int
    """LDL and STL instructions: spills."""
    num_fp64: int
    """Instructions that compute in fp64."""
    load_bits: tuple[int, ...]
    """Widths of the global loads, the widest first."""
    store_bits: tuple[int, ...]
    num_matrix: int
    """HGMMA instructions."""


def compile_build(build: Build) -> MachineCode:
    """Compiles for sm_90a; needs the disassembler that comes with triton."""
    names = build.kernel.arg_names
    signature = {name: build.arguments.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in build.constants.items()}
    aligned = {name for name, kind in build.arguments.items() if kind.startswith("*")} | build.divisible
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(build.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGET, options={"num_warps": build.num_warps, "num_stages": build.num_stages})
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


def _read(cubin: bytes, shared_bytes: int) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run([_tool(), flag, path], capture_output=True, text=True, check=True).stdout for flag in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass)
    return MachineCode(
        registers,
        stack,
        shared_bytes,
        sum(op.startswith(("LDL", "STL")) for op in operations),
        sum(bool(re.match(r"D(ADD|MUL|FMA|MMA|SETP)\b", op) or ".F64" in op or re.match(r"MUFU\.\w*64", op)) for op in operations),
        _widths(operations, ("LDG", "LDGSTS")),
        _widths(operations, ("STG",)),
        sum(op.startswith("HGMMA") for op in operations),
    )


def _widths(operations: list[str], names: tuple[str, ...]) -> tuple[int, ...]:
    found = (op.split(".") for op in operations if op.split(".")[0] in names)
    bits = {"64": 64, "128": 128, "U8": 8, "S8": 8, "U16": 16, "S16": 16}
    return tuple(sorted((next((bits[part] for part in op if part in bits), 32) for op in found), reverse=True))


def _tool() -> str:
    """cuobjdump, from triton or the path."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return os.environ.get("CUOBJDUMP") or (str(bundled) if bundled.is_file() else "cuobjdump")
