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


def test_the_true_shapes_mode_states_time_work_and_memory_of_both_recipes(tmp_path):
    out = tmp_path / "true_shape.json"
    work = "--model tiny --layers 1 --side 32 --lora 4 --group 2 --repeats 1 --published --threads 1 --commit none".split()
    done = launch(1, str(ROOT / "bench" / "attacker.py"), *work, "--json", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(out.read_text())
    assert result["model"]["name"] == "tiny, 1 of 2 layers, random weights" and result["load_seconds"] > 0 and result["machine"]
    for name, steps in (("ours", 2), ("published", 1)):  # only ours has a warm-up
        part = result[name]
        assert set(part["seconds"]) == {"encode", "denoise", "decode", "update"} and min(part["seconds"].values()) > 0
        assert part["images"] == 2 and min(part["images_per_s"], part["rollout_images_per_s_with_encode"], *part["tflop"].values()) > 0
        assert part["mfu"] == {"denoise": None, "update": None} and part["peak_bytes"]["update"] == {"allocated": None, "reserved": None}
        assert part["max_logp_mismatch"] < 1e-5 and [turn["applied"] for turn in result["raw"][name]] == [1.0] * steps
    ours, theirs = result["settings"]["ours"], result["settings"]["published"]
    assert theirs["reference_pixels"] == 4 * ours["reference_pixels"] and theirs["guidance"] == 4 and theirs["window"] == 9
    assert result["two_recipes_images_per_s_ratio"] > 0 and "not a speed-up" in result["two_recipes_note"]
