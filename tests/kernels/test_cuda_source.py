"""csrc/cuda compiled for sm_90a where nvcc is: no stack, no spill, bulk copies. It runs, and is compared, in the tests marked gpu."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "row_loss.cu"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[str, str]:
    """What the assembler said, and the machine code."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    ahead_of_time = pytest.importorskip("aot_fast.kernels.ahead_of_time")
    cubin = tmp_path_factory.mktemp("cuda") / "row_loss.cubin"
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    # torch's own flags, which take the conversions of bf16 away
    flags = ["-O3", "-std=c++20", *cpp_extension.COMMON_NVCC_FLAGS, *target]
    done = subprocess.run(["nvcc", *flags, "-cubin", "-o", cubin, SOURCE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr, subprocess.run([ahead_of_time._tool(), "-sass", cubin], capture_output=True, text=True, check=True).stdout


def test_no_stack_no_spill_no_warning(compiled):
    said, _ = compiled
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert found == [("0", "0", "0")] * 3  # the types of logits and gradient that ship
    assert "warning" not in said
    assert all(
        int(registers) <= 64 for registers in re.findall(r"Used (\d+) registers", said)
    )  # 512 threads, 65,536 registers, and half to spare


def test_rows_come_in_bulk_and_go_in_whole_words(compiled):
    for code in compiled[1].split("Function :")[1:]:
        operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code)
        assert sum(op.startswith("UBLKCP") for op in operations) >= 1  # cp.async.bulk
        assert any(op.startswith("LDS.128") for op in operations)
        assert any(op.startswith(("STG.E.128", "STG.E.64")) for op in operations)
        assert not any(op.startswith(("LDL", "STL", "DADD", "DMUL", "DFMA")) for op in operations)
        assert any(op.startswith("UCGABAR") for op in operations)  # the cluster's barrier
