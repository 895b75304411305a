"""bench/defender.py runs, finds what it compares to be the same, and writes what its readers look for."""

import json

from tests.conftest import ROOT, launch

SMALL = "--group 2 --response 3 --prompts 1 --side 64x64 --repeats 1 --threads 1 --commit none".split()


def test_ratios_are_written_beside_what_is_expected(tmp_path):
    out = tmp_path / "defender.json"
    done = launch(1, str(ROOT / "bench" / "defender.py"), *SMALL, "--json", str(out), timeout_s=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(out.read_text())
    assert result["update_speedup"] > 0 and result["rollout_speedup"] > 0 and result["update_gradient_difference"] < 1e-5
    assert 0 < result["update_memory_ratio"] and 1 < result["update_expected_by_flops"] < 2
    assert "trl_step_speedup" in result and len(result["update"]["seconds"]["shared"]) == 1
    assert result["command"].startswith("python bench/defender.py") and result["machine"]
