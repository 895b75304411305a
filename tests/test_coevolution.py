"""The whole game with the bundled players: it plays, it stops anywhere, and it continues as if it had not."""

import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from aot_fast.game import Game
from aot_fast.metrics import read_rows
from aot_fast.models import ASSETS
from aot_fast.settings import load
from tests.conftest import ROOT, environment, launch

SHORT = """
--data.num_train 160 --data.num_heldout 24 --game.warmup_steps 1 --game.rounds 1 --game.attacker_steps 3 --game.defender_steps 2
--attacker.prompts_per_step 2 --attacker.group_size 4 --attacker.num_steps 5 --attacker.window 2 --attacker.window_range [0,3]
--curation.num_questions 12 --curation.edits_per_question 1 --defender.prompts_per_step 4 --defender.prompts_per_try 8
--reward.trials 2 --reward.solvable_trials 1 --checkpoint.every 2 --metrics.trackers [] --engine.timeout_s 60
--defender.temperature 2.0 --defender.max_generation_batches 8
""".split()
"""Hot sampling: at 1 the bundled Defender is so sure that a step may find no group with right and wrong answers, and be skipped."""
STEPS = 1 + 3 + 2


def play(folder, *more, ranks=2, name="run"):
    return launch(ranks, "-m", "aot_fast", "run", "tiny", "--run.folder", str(folder), "--run.name", name, *SHORT, *more, timeout_s=280)


def rows_of(folder, name="run"):
    """Rows of metrics.jsonl without what the clock decides."""
    clock = ("seconds", "wall_time", "tokens_per_s", "images_per_s", "mfu")
    return [{k: v for k, v in row.items() if k.split("/")[-1] not in clock} for row in read_rows(folder / name / "metrics.jsonl")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    done = play(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def test_game_plays_to_its_end_and_leaves_what_it_promises(unbroken):
    run = unbroken / "run"
    summary = json.loads((run / "summary.json").read_text())
    entry = summary["seeds"][0]
    assert set(entry["clean_accuracy"]) == {"defender_0", "defender_1"}
    assert set(entry["attack_success"]) == {"attacker_0", "attacker_1"}
    assert set(entry["attack_success"]["attacker_1"]) == {"defender_0", "defender_1"}
    assert entry["seconds"]["attack"] > 0
    for name in (
        "report.html",
        "config.yaml",
        "exit.json",
        "data/train.jsonl",
        "curated/round_001/edits.jsonl",
        "curated/round_001/set.jsonl",
    ):
        assert (run / name).stat().st_size > 0, name
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert len(rows_of(unbroken)) == STEPS


def test_the_attacker_trains_on_the_questions_whose_probes_differ_most(unbroken):
    folder = unbroken / "run" / "curated" / "round_001"
    attackable, promising = (json.loads((folder / name).read_text()) for name in ("attackable.json", "promising.json"))
    assert len(set(promising)) == len(promising) == math.ceil(0.35 * len(attackable))
    questions = [json.loads(line)["id"] for line in (unbroken / "run" / "data" / "train.jsonl").read_text().splitlines()[1:]]
    assert set(promising) < {questions[i] for i in attackable}


def test_rollout_and_trainer_agree_for_both_players(unbroken):
    rows = rows_of(unbroken)
    on_policy = [row["logp_mismatch"] for row in rows if "logp_mismatch" in row]
    assert len(on_policy) == STEPS and max(on_policy) <= 1e-5


def test_stopped_at_a_random_step_and_continued_gives_the_same_metrics(unbroken, tmp_path):
    stop = random.Random(20261123).randrange(1, STEPS)
    first = play(tmp_path, "--run.stop_after", str(stop))
    assert first.returncode == 0 and "the same command continues" in first.stdout, first.stderr[-6000:]
    assert len(rows_of(tmp_path)) == stop
    second = play(tmp_path)
    assert second.returncode == 0 and "continuing" in second.stdout, second.stderr[-6000:]
    assert rows_of(tmp_path) == rows_of(unbroken)
    for table in sorted((unbroken / "run" / "evaluation").glob("*.jsonl")):
        assert (tmp_path / "run" / "evaluation" / table.name).read_text() == table.read_text(), table.name


def test_finished_run_says_so_and_another_configuration_is_refused(unbroken):
    again = play(unbroken, ranks=1)
    assert again.returncode == 0 and "is finished" in again.stdout
    other = play(unbroken, "--attacker.eta", "0.5", ranks=1)
    assert other.returncode == 2 and "attacker.eta: 1.0 -> 0.5" in other.stderr and "--fresh" in other.stderr


def test_exported_players_load_in_plain_transformers_and_diffusers(unbroken):
    from diffusers import QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    from aot_fast.models import ASSETS

    players = unbroken / "run" / "players"
    _, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(players / "defender_1", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    editor = QwenImageTransformer2DModel.from_pretrained(ASSETS / "tiny" / "attacker" / "transformer")
    editor.load_lora_adapter(str(players / "attacker_1"), use_safetensors=True)
    assert any("lora" in name for name, _ in editor.named_parameters())


def test_sigterm_saves_and_exits_143_with_the_reason(tmp_path):
    command = [sys.executable, "-m", "aot_fast", "run", "tiny", "--run.folder", str(tmp_path), "--run.name", "run", *SHORT]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(read_rows(metrics)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, out + err[-4000:]
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 143
    assert list((tmp_path / "run" / "checkpoints").glob("round_*/MANIFEST.json"))


def test_two_ranks_give_the_figures_of_one(unbroken, tmp_path):
    """The same questions, groups and edits; sums in another order move the figures by rounding only."""
    done = play(tmp_path, "--run.stop_after", "2", ranks=1)
    assert done.returncode == 0, done.stderr[-6000:]
    for one, two in zip(rows_of(tmp_path), rows_of(unbroken)):
        assert one["phase"] == two["phase"]
        for name in ("reward", "loss", "grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5), (one["phase"], name)
    shutil.rmtree(tmp_path)


def test_two_attack_steps_train_on_one_rollout(tmp_path):
    """The third step has a rollout of its own; where the weights have moved, the ratio has."""
    more = ["--attacker.steps_per_rollout", "2", "--attacker.old_logp", "recompute", "--run.stop_after", "4"]
    done = play(tmp_path, *more, ranks=1)
    assert done.returncode == 0, done.stderr[-6000:]
    rows = [row for row in rows_of(tmp_path) if row["phase"] == "attack"]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["groups"] == 2 for row in rows)
    assert max(row["logp_mismatch"] for row in rows) <= 1e-5
    assert rows[0]["kl"] == rows[2]["kl"] == 0 < rows[1]["kl"]


def test_the_judge_counts_with_the_model_that_the_settings_name(runtime):
    game = SimpleNamespace(config=load("tiny", []), runtime=runtime, _judge=None, first_defender=lambda: "first")
    judge = Game.judging_defender(game)
    files = [load_file(ASSETS / "tiny" / name / "model.safetensors")["model.norm.weight"].float() for name in ("judge", "defender")]
    assert torch.equal(judge.model.model.language_model.norm.weight, files[0]) and not torch.equal(*files)
    assert Game.judging_defender(game) is judge
    game.config = load("tiny", ["--reward.judge_model", "", "--reward.judge_answers", "false"])
    assert Game.judging_defender(game) == "first"


def test_a_judge_that_is_not_there_is_named_before_the_game_begins(tmp_path):
    done = play(tmp_path, "--reward.judge_model", "nowhere", ranks=1)
    assert done.returncode and "reward.judge_model: 'nowhere' is not a folder" in done.stderr and "reward.judge_revision" in done.stderr
