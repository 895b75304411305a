"""Measures every operator and writes one JSON file.

    python bench/run.py --device cuda --out bench/results/h100     all GPU tests, all operators; one table at the end
    python bench/run.py --device cpu --only logprob                on a CPU, small sizes

A provider whose outputs differ from the others' is reported without a time. Times are medians with a cold L2 cache; order rotates.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
from cases import Case, Provider, all_cases  # noqa: E402
from timing import graph_ms, median_ms, peak_bytes, synchronize  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder for operators.json and tests.txt")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--no-tests", action="store_true", help="leave the GPU tests out")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--commit", default="", help="written into the result; default: git's word, where there is a checkout")
    args = parser.parse_args()
    tests = _gpu_tests() if args.device == "cuda" and not args.no_tests else ""
    print(tests, flush=True)
    speed = speed_of_light() if args.device == "cuda" else {}
    print(speed, flush=True)
    rows = []
    for case in all_cases(args.device):
        if args.only in case.name:
            rows += measure(case, args.device, speed, compiled=not args.no_compile)
            if args.device == "cuda":
                torch.cuda.empty_cache()
    command = shlex.join(["python", "bench/run.py", *sys.argv[1:]])
    result = {
        "command": command,
        "machine": machine(args.device, args.commit),
        "speed_of_light": speed,
        "tests": tests.splitlines()[-1:],
        "rows": rows,
    }
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "operators.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / "tests.txt").write_text(tests)
    print(table(rows))


def measure(case: Case, device: str, speed: dict[str, float], compiled: bool) -> list[dict]:
    """A row for each provider."""
    print(case.name, flush=True)
    torch._dynamo.reset()
    inputs, providers = case.inputs(device), dict(case.providers)
    if compiled:
        providers |= {f"{name}, compiled": torch.compile(case.providers[name]) for name in case.compiled}
    try:
        truth = tuple(t.clone() for t in (case.exact or case.providers["eager"])(inputs))
    except torch.OutOfMemoryError:
        truth = None
    rows = []
    for name in _rotated(list(providers), case.name):
        row = {"case": case.name, "provider": name}
        try:
            row |= _measure_one(case, providers[name], inputs, truth, device, speed)
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
        except Exception as error:  # a peer or a compiler that fails must not take the others' figures with it
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
        print("   ", {key: value for key, value in row.items() if key != "case"}, flush=True)
    return rows


def _measure_one(case: Case, provider: Provider, inputs: dict, truth: tuple | None, device: str, speed: dict[str, float]) -> dict:
    out = provider(inputs)
    errors = None if truth is None else [_error(a, b) for a, b in zip(out, truth, strict=True)]
    row = {"errors": errors, "hash": _hash(out)}
    del out
    if errors and not max(errors) <= case.tolerance:
        return row | {"failed": f"differs from the others: {max(errors):.2g}"}
    row["peak_bytes"] = peak_bytes(lambda: provider(inputs), device)
    row["ms"] = median_ms(lambda: provider(inputs), device)
    if device == "cuda":
        row["ms_warm"] = median_ms(lambda: provider(inputs), device, cold=False)
        if row["ms"] < 10:  # longer ones hide the host
            row["ms_graph"] = graph_ms(lambda: provider(inputs))
        floor_s = case.floor_bytes / speed["copy_bytes_per_s"] + case.floor_flops / speed["bf16_flops_per_s"]
        row["of_floor"] = 1e3 * floor_s / min(row["ms"], row.get("ms_graph") or row["ms"])
    synchronize(device)
    return row


def _rotated(names: list[str], key: str) -> list[str]:
    """An order that differs from case to case, so that no provider always runs on a cool chip."""
    shift = int(hashlib.sha256(key.encode()).hexdigest(), 16) % len(names)
    return names[shift:] + names[:shift]


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm-relative, in slices: an fp64 copy of 1.2e9 logits would not fit beside them."""
    over = under = 0.0
    for x, y in zip(a.flatten().split(1 << 26), b.flatten().split(1 << 26), strict=True):
        over += (x.double() - y.double()).square().sum().item()
        under += y.double().square().sum().item()
    return (over / under if under else over) ** 0.5


def _hash(out: tuple[torch.Tensor, ...]) -> str:
    """Of the bits: two runs of a deterministic provider agree."""
    digest = hashlib.sha256()
    for t in out:
        bits = t.detach().flatten().view(torch.uint8)
        digest.update(bits[:: max(1, len(bits) >> 20)].cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def speed_of_light() -> dict[str, float]:
    """Copy bandwidth (read + written) and bf16 GEMM rate of this card, now."""
    source = torch.empty(1 << 31, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), "cuda")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gemm_ms = median_ms(lambda: a @ b, "cuda")
    return {"copy_bytes_per_s": 2 * len(source) / copy_ms * 1e3, "bf16_flops_per_s": 2 * 8192**3 / gemm_ms * 1e3}


def _gpu_tests() -> str:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/kernels"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout[-6000:]


def machine(device: str, commit: str) -> dict[str, str]:
    import triton

    if not commit:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    now = datetime.date.today().isoformat()
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__, "commit": commit or "unknown", "date": now}


def table(rows: list[dict]) -> str:
    """One line a provider."""
    lines = [f"{'case':72s} {'provider':16s} {'ms':>9s} {'warm':>9s} {'graph':>9s} {'of floor':>8s} {'peak MiB':>9s} {'error':>8s}"]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['case']:72.72s} {row['provider']:16.16s} {row['failed']}")
            continue
        peak = f"{row['peak_bytes'] / 2**20:.0f}"
        share, warm = (f"{row[key]:{form}}" if key in row else "" for key, form in (("of_floor", ".0%"), ("ms_warm", ".3f")))
        graph = f"{row['ms_graph']:.3f}" if row.get("ms_graph") else ""
        error = "" if row["errors"] is None else f"{max(row['errors']):.1e}"
        lines.append(
            f"{row['case']:72.72s} {row['provider']:16.16s} {row['ms']:9.3f} {warm:>9s} {graph:>9s} {share:>8s} {peak:>9s} {error:>8s}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
