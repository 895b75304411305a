"""bench/attacker.py runs, finds what it compares to be the same, and writes what its readers look for."""

import json
import re

from tests.conftest import ROOT, launch

SMALL = "--group 2 --prompts 1 --steps 4 --window 1 --repeats 1 --threads 1 --commit none".split()


def test_ratios_are_written_with_each_levers_share(tmp_path):
    out = tmp_path / "attacker.json"
    done = launch(1, str(ROOT / "bench" / "attacker.py"), *SMALL, "--json", str(out), timeout_s=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(out.read_text())
    assert result["step_speedup"] > 0 and result["memory_ratio"] > 0 and result["gradient_difference"] < 1e-5
    assert set(result["levers"]) == {"encode_once", "shared_prefix", "batched_decode", "batched_replay"}
    assert result["recipe"]["operations_saved"] > 3 and len(result["raw"]["seconds"]["plain"]) == 1


def test_the_plan_needs_a_seventh_of_the_published_recipes_operations():
    done = launch(1, str(ROOT / "bench" / "attacker.py"), "--plan")
    assert done.returncode == 0, done.stderr[-4000:]
    times = [float(x) for x in re.findall(r"([\d.]+)x", done.stdout)]
    assert times[0] == 1 and times[1] >= 7 and times[2] >= 14
