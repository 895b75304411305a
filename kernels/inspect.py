"""What the compiler makes of every Triton kernel that ships, for sm_90a and without a GPU.

    python -m aot_fast.kernels.inspect [--json]

The gates: no stack, no spill, no fp64 instruction, at most 232,448 bytes of shared memory, 128-bit loads in kernels that read long rows.
Then, without --json, the bytes that they move against the floor (traffic.py).
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict

MODULES = (
    "logprob_triton",
    "group_advantage_triton",
    "policy_loss_triton",
    "philox_triton",
    "guidance_triton",
    "flow_step_triton",
    "flow_policy_loss_triton",
    "decode_attention_triton",
    "rotary_triton",
)
SHARED_BYTES = 232_448


def inspected() -> Iterator[dict]:
    """One dict for each build: its name, what `ahead_of_time.MachineCode` holds, and the gates it fails."""
    from .ahead_of_time import compile_build

    for module in MODULES:
        for build in importlib.import_module(f".{module}", __package__).builds():
            row = asdict(compile_build(build))
            yield {"name": build.name, **row, "broken": broken_gates(row, build.wide_loads)}


def broken_gates(row: dict, wide_loads: bool) -> list[str]:
    """The gates that a build fails, in words."""
    gates = {
        "stack": row["stack_bytes"] == 0,
        "spills": row["num_local"] == 0,
        "fp64": row["num_fp64"] == 0,
        "shared memory": row["shared_bytes"] <= SHARED_BYTES,
        "128-bit loads": not wide_loads or 128 in row["load_bits"],
    }
    return [name for name, good in gates.items() if not good]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET: given 1, expected unset: interpreted kernels cannot be compiled")
    columns = ("registers", "stack_bytes", "shared_bytes", "num_local", "num_fp64")
    if not args.json:
        print(f"{'kernel':52s}" + "".join(f"{name:>13s}" for name in columns) + "  loads, bits      gates")
    broken = 0
    for row in inspected():
        broken += bool(row["broken"])
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        loads = ", ".join(f"{row['load_bits'].count(bits)} x {bits}" for bits in (128, 64, 32, 16, 8) if bits in row["load_bits"])
        print(
            f"{row['name']:52s}" + "".join(f"{row[name]:13d}" for name in columns) + f"  {loads:16s} {', '.join(row['broken']) or 'good'}",
            flush=True,
        )
    if not args.json:
        print(flush=True)
        # A process of its own: a kernel is either compiled or interpreted.
        subprocess.run([sys.executable, "-m", f"{__package__}.traffic"], check=True)
    raise SystemExit(f"{broken} kernels break a gate" if broken else 0)


if __name__ == "__main__":
    main()
