"""A study: flags, order of play, what is played again, signals, failures; the children are a script, but for one test."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch
import yaml

from aot_fast.__main__ import main
from aot_fast.engine import Runtime
from aot_fast.evaluation.tables import read_edits, read_predictions
from aot_fast.settings import SettingsError, load
from aot_fast.study import plan, play, summary
from aot_fast.study.plan import Study, parse_arms, parse_flags, parse_jobs, parse_seeds
from tests.conftest import ROOT, environment

CHILD = """
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
value = {key[2:]: word for key, word in zip(words, words[1:]) if key.startswith("--")}
study, name = pathlib.Path(value["run.folder"]), value["run.name"]
folder = study / name
folder.mkdir(exist_ok=True)

def note(what):
    with (study / "events.txt").open("a") as file:
        file.write(f"{what} {name}\\n")

def save(number, frame):
    note("saved")
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
note("start")
(folder / "started.json").write_text(json.dumps({"words": words, "rank": os.environ.get("RANK")}))
behaviour = json.loads(os.environ["BEHAVIOUR"]).get(name)
if behaviour == "fail":
    print("first line\\nthe camera is on fire")
    sys.exit(3)
if behaviour == "hang":
    while True:
        time.sleep(0.05)
note("end")
(folder / "FINISHED").write_text("")
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Words of `aot-fast run` for a study of the stand-in child; `behave` says what single runs do."""
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD))
    monkeypatch.setattr(play, "COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(play, "POLL_S", 0.02)
    monkeypatch.setattr(play, "visible_gpus", list)
    monkeypatch.setattr(play, "publish_study", lambda folder, say=False: None)
    behave(monkeypatch)
    return ["run", "tiny_study", "--run.folder", str(tmp_path), "--run.name", "s"]


def behave(monkeypatch, **of_run):
    monkeypatch.setenv("BEHAVIOUR", json.dumps(of_run))


def events(tmp_path):
    return [tuple(line.split()) for line in (tmp_path / "s" / "events.txt").read_text().splitlines()]


def study_of(folder="runs", arms=plan.ARMS, seeds=(0, 1)):
    config = load("tiny_study")
    return Study(replace(config, run=replace(config.run, folder=str(folder), name="s")), arms, seeds)


# Flags


def test_arms_and_seeds_are_parsed_and_the_game_comes_first():
    assert parse_arms("clean, coevolution") == ("coevolution", "clean")
    assert parse_seeds("3,0,12") == (3, 0, 12)
    assert parse_flags(None, "4", "3") == ((), (4,), 3)


@pytest.mark.parametrize(
    ("read", "text", "says"),
    [
        (parse_arms, "coevolution,clear", ["--arms", "'clear'", "random_edit", "did you mean 'clean'"]),
        (parse_arms, "clean,clean", ["--arms", "once", "'clean'"]),
        (parse_seeds, "0-2", ["--seeds", "'0-2'", "whole numbers", "'0,1,2'"]),
        (parse_seeds, "1,-2", ["--seeds", "whole numbers", "'1,2'"]),
        (parse_seeds, "", ["--seeds", "whole numbers", "'0,1,2'"]),
        (parse_seeds, "1,1", ["--seeds", "once", "'1'"]),
        (parse_jobs, "0", ["--jobs", "'0'", "at least 1", "--jobs 1"]),
    ],
)
def test_wrong_flags_are_named_with_rule_and_nearest(read, text, says):
    with pytest.raises(SettingsError) as error:
        read(text)
    for part in says:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--arms", "coevolutoin"], "did you mean 'coevolution'"),
        (["--jobs", "2"], "give --seeds or --arms"),
        (["--seeds", "0", "--run.seed", "3"], "--run.seed = 3"),
        (["--seeds", "0", "--evaluation.attacks_from=x"], "--evaluation.attacks_from"),
        (["--seeds", "0", "--game.rouns", "3"], "did you mean 'game.rounds'"),
    ],
)
def test_wrong_command_lines_exit_2_and_leave_nothing(words, says, child, tmp_path, capsys):
    assert main([*child, *words]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_flags_are_refused_under_torchrun(child, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*child, "--seeds", "0"]) == 2
    assert "refused under torchrun (WORLD_SIZE = 2)" in capsys.readouterr().err


# Order


def test_every_coevolution_is_queued_before_the_controls_of_any_seed():
    names = [run.name for run in study_of().runs()]
    assert names == ["coevolution_seed0", "coevolution_seed1"] + [
        f"{arm}_seed{seed}" for seed in (0, 1) for arm in ("clean", "roundtrip", "random_edit")
    ]


def test_the_next_run_is_the_first_whose_coevolution_is_finished(tmp_path):
    runs = study_of(tmp_path, seeds=(0, 1, 2)).runs()
    course = play.Course(list(runs), len(runs))
    taken = [course.take_ready().name for _ in range(3)]
    assert taken == ["coevolution_seed0", "coevolution_seed1", "coevolution_seed2"] and course.take_ready() is None
    runs[1].folder.mkdir(parents=True)
    (runs[1].folder / "FINISHED").touch()
    assert [course.take_ready().name for _ in range(3)] == ["clean_seed1", "roundtrip_seed1", "random_edit_seed1"]
    assert course.take_ready() is None


def test_controls_without_the_game_wait_for_nothing():
    runs = study_of(arms=("clean", "roundtrip")).runs()
    assert all(run.waits_for is None and "evaluation.attacks_from" not in run.settings for run in runs)


def test_controls_answer_the_edits_of_the_game_of_their_seed(tmp_path):
    run = study_of(tmp_path / "it's: odd").runs()[2]
    config = run.config(load("tiny_study"))
    assert config.evaluation.attacks_from == str(tmp_path / "it's: odd" / "s" / "coevolution_seed0")
    assert (config.game.arm, config.run.seed, config.evaluation.rounds) == ("clean", 0, "last")
    assert load("tiny_study", run.words()) == config  # the words of its command line say the same, whatever the path


# Playing


def test_all_runs_are_played_and_controls_only_after_their_game(child, tmp_path, capsys):
    assert main([*child, "--seeds", "0,1", "--arms", ",".join(plan.ARMS), "--jobs", "2"]) == 0
    seen = events(tmp_path)
    assert len(seen) == 16 and len(set(seen)) == 16
    for what, name in seen:
        if what == "start" and not name.startswith("coevolution"):
            assert seen.index(("end", f"coevolution_seed{name[-1]}")) < seen.index((what, name))
    out = capsys.readouterr().out
    assert out.count(" finished after ") == 8 and out.count(" starts (log: ") == 8 and "[8/8]" in out


def test_each_run_has_its_own_settings_threads_and_log(child, tmp_path, monkeypatch):
    monkeypatch.setattr(play, "_cores", lambda: 8)
    monkeypatch.setenv("RANK", "0")  # of `torchrun --nproc_per_node 1`: the children must not join its group
    assert main([*child, "--seeds", "7", "--jobs", "2", "--attacker.eta", "0.5"]) == 0
    started = json.loads((tmp_path / "s" / "coevolution_seed7" / "started.json").read_text())
    config = load(started["words"][0], started["words"][1:])
    assert (config.run.name, config.run.seed, config.run.threads, config.attacker.eta) == ("coevolution_seed7", 7, 4, 0.5)
    assert started["rank"] is None and (tmp_path / "s" / "coevolution_seed7.log").is_file()


def test_each_slot_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [play._environment(["4", "6"], slot, 1)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "6", "4"]


def test_finished_runs_are_not_played_again_and_more_seeds_widen_the_study(child, tmp_path, capsys):
    words = [*child, "--arms", "coevolution,clean"]
    assert main([*words, "--seeds", "0"]) == 0
    first = events(tmp_path)
    assert main([*words, "--seeds", "0"]) == 0 and events(tmp_path) == first
    assert "2 runs, 2 finished" in capsys.readouterr().out
    assert main([*words, "--seeds", "1"]) == 0
    assert [name for what, name in events(tmp_path)[len(first) :] if what == "start"] == ["coevolution_seed1", "clean_seed1"]
    assert plan.read_study(tmp_path / "s").seeds == (0, 1)


def test_dry_run_lists_the_runs_and_writes_nothing(child, tmp_path, capsys):
    assert main([*child, "--seeds", "0", "--arms", "coevolution,clean", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "coevolution_seed0: new" in out and "--evaluation.attacks_from" in out and not (tmp_path / "s").exists()
    assert main([*child, "--seeds", "0"]) == 0 and main([*child, "--seeds", "0", "--arms", "coevolution,clean", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "coevolution_seed0: finished" in out and "clean_seed0: new" in out


def test_other_settings_are_refused_and_fresh_moves_the_study_aside(child, tmp_path, capsys):
    assert main([*child, "--seeds", "0"]) == 0
    assert main([*child, "--seeds", "0", "--attacker.eta", "0.5"]) == 2
    assert "attacker.eta: 1.0 -> 0.5" in capsys.readouterr().err
    assert main([*child, "--seeds", "0", "--attacker.eta", "0.5", "--fresh"]) == 0
    assert len(list(tmp_path.glob("s.*/coevolution_seed0"))) == 1
    assert yaml.safe_load((tmp_path / "s" / "study.yaml").read_text())["config"]["attacker"]["eta"] == 0.5


def test_a_run_that_answered_other_edits_is_refused(child, tmp_path, capsys):
    from aot_fast.settings import to_yaml

    alone = study_of(tmp_path, ("clean",), (0,)).runs()[0]
    alone.folder.mkdir(parents=True)
    (alone.folder / "config.yaml").write_text(to_yaml(alone.config(study_of(tmp_path).config)))
    assert main([*child, "--seeds", "0", "--arms", "coevolution,clean"]) == 2
    assert "evaluation.attacks_from: ''" in capsys.readouterr().err


def test_a_single_run_and_a_study_do_not_share_a_folder(child, tmp_path, capsys):
    assert main([*child, "--seeds", "0"]) == 0
    assert main([*child, "--dry-run"]) == 2 and "holds a study" in capsys.readouterr().err
    (tmp_path / "s" / "study.yaml").rename(tmp_path / "s" / "config.yaml")
    assert main([*child, "--seeds", "0"]) == 2 and "single run" in capsys.readouterr().err


def test_a_failing_run_is_named_with_its_log_and_the_others_go_on(child, tmp_path, monkeypatch, capsys):
    behave(monkeypatch, coevolution_seed0="fail")
    assert main([*child, "--seeds", "0,1", "--arms", "coevolution,clean"]) == 1
    err = capsys.readouterr().err
    assert "coevolution_seed0 failed: exit code 3" in err and "the camera is on fire" in err
    assert "clean_seed0 was not played" in err and "coevolution_seed1" not in err
    assert [name for what, name in events(tmp_path) if what == "end"] == ["coevolution_seed1", "clean_seed1"]
    behave(monkeypatch)
    assert main([*child, "--seeds", "0,1", "--arms", "coevolution,clean"]) == 0


# Signals


def launch_hanging(child, tmp_path):
    """A study in a process of its own, both of whose first runs hang; returns when both have begun."""
    script = f"import sys; from aot_fast.study import play; play.COMMAND = {play.COMMAND!r}; play.visible_gpus = list; play.POLL_S = 0.02; "
    script += "from aot_fast.__main__ import main; sys.exit(main(sys.argv[1:]))"
    hanging = json.dumps({f"coevolution_seed{seed}": "hang" for seed in (0, 1)})
    command = [sys.executable, "-c", script, *child, "--seeds", "0,1", "--arms", "coevolution,clean", "--jobs", "2"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment({"BEHAVIOUR": hanging}), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert until(lambda: len(list((tmp_path / "s").glob("*/started.json"))) == 2), process.communicate(timeout=1)
    return process


def until(holds, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_nothing_more_starts(child, tmp_path, number):
    process = launch_hanging(child, tmp_path)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, (out, err)
    assert b"the same command continues" in err and out.count(b" stopped after ") == 2
    assert sorted(events(tmp_path)[2:]) == [("saved", "coevolution_seed0"), ("saved", "coevolution_seed1")]


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_runs_end_when_the_study_is_killed(child, tmp_path):
    process = launch_hanging(child, tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert until(lambda: sum(what == "saved" for what, _ in events(tmp_path)) == 2)


# Equal work


def test_every_step_of_tiny_study_draws_the_same_number_of_groups(monkeypatch):
    """Whatever share of the groups carries a gradient, and whatever the step before has left over."""
    from aot_fast.defender import groups as groups_of

    config = load("tiny_study").defender
    assert config.prompts_per_try > 0 and config.max_generation_batches == 1 and config.max_staleness == 0
    shares = iter((0, 3, config.prompts_per_try, 8, config.prompts_per_try))

    class Unasked(list):
        def prefetch(self, indices):
            pass

    def roll(defender, prompts, seed, drawn):
        mixed = next(shares)
        return [groups_of.Group(i, "k", (), (), (i < mixed, False), defender.version) for i in range(len(drawn))]

    monkeypatch.setattr(groups_of, "_roll", roll)
    monkeypatch.setattr(groups_of, "_rollout_metrics", lambda groups: {})
    monkeypatch.setattr(groups_of, "rollout_counters", lambda defender, groups, seconds: {})
    defender, stream = Untrained(config), groups_of.Stream(0)
    for _ in range(5):
        assert groups_of.collect(defender, Unasked(range(100)), stream).metrics["groups/drawn"] == config.prompts_per_try
        defender.version += 1


class Untrained:
    """What `collect` needs of a Defender besides its answers."""

    runtime = Runtime(0, 1, torch.device("cpu"), torch.float32)

    def __init__(self, config):
        self.config, self.version = config, 0

    def whole(self):
        from contextlib import nullcontext

        return nullcontext()


GROUP = load("tiny_study").defender.group_size


def write_rows(run, drawn):
    run.folder.mkdir(parents=True, exist_ok=True)
    rows = [{"phase": "defend", "round": 1, "step": i + 1, "seconds": 1.0, "groups/drawn": float(n)} for i, n in enumerate(drawn)]
    rows.append({"phase": "attack", "round": 1, "step": 1, "seconds": 5.0})
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.folder / "FINISHED").touch()


def test_answers_are_counted_and_unequal_work_is_warned_of(tmp_path):
    study = study_of(tmp_path, ("coevolution", "clean"), (0,))
    plan.open_study(study)
    game, clean = study.runs()
    write_rows(game, [32, 32]), write_rows(clean, [32, 32])
    found = summary.summarise_study(study.folder)
    assert [found["runs"][arm]["0"]["answers_generated"] for arm in study.arms] == [64 * GROUP, 64 * GROUP] and found["warnings"] == []
    assert found["runs"]["coevolution"]["0"] | {"folder": ""} == {
        "folder": "",
        "finished": True,
        "seconds": 7.0,
        "seconds_by_phase": {"attack": 5.0, "defend": 2.0},
        "answers_generated": 64 * GROUP,
        "optimizer_steps": 2,
    }
    write_rows(clean, [32, 64, 32])
    found = summary.summarise_study(study.folder)
    assert "answers_generated" in found["warnings"][0] and f"clean_seed0 {128 * GROUP}" in found["warnings"][0]
    assert "optimizer_steps" in found["warnings"][1] and "clean_seed0 3" in found["warnings"][1]


def test_answers_of_a_rollout_of_several_steps_count_once_and_unlogged_ones_are_unknown():
    rows = [{"phase": "defend", "round": 1, "step": step, "seconds": 1.0, "groups/drawn": 10.0} for step in (1, 2, 3, 4)]
    for override, count in (("--defender.steps_per_rollout", 20 * GROUP), ("--metrics.every", None)):
        study = Study(load("tiny_study", [override, "2"]), (), ())
        assert summary.answers_generated(study, rows) == count


# The whole of it

SMALLEST = """
--data.num_train 8 --data.num_heldout 8 --game.rounds 1 --game.attacker_steps 1 --game.defender_steps 1
--attacker.prompts_per_step 1 --attacker.group_size 2 --attacker.num_steps 3 --attacker.window 1 --attacker.window_range [0,2]
--curation.num_questions 2 --curation.edits_per_question 1 --defender.prompts_per_step 2 --defender.prompts_per_try 4
--reward.trials 1 --reward.solvable_trials 1 --metrics.trackers [] --engine.timeout_s 60
""".split()


def test_a_game_and_a_control_are_played_and_compared(tmp_path):
    command = [sys.executable, "-m", "aot_fast", "run", "tiny_study", "--run.folder", str(tmp_path), "--run.name", "s", *SMALLEST]
    command += ["--seeds", "0", "--arms", "coevolution,clean", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    game, clean = (tmp_path / "s" / f"{arm}_seed0" / "evaluation" for arm in ("coevolution", "clean"))
    for on in ("roundtrip", "attacker_0", "attacker_1"):
        assert (clean / f"edits_{on}.jsonl").read_text() == (game / f"edits_{on}.jsonl").read_text()
        for id, edit in read_edits(clean / f"edits_{on}.jsonl").items():
            assert (clean / edit.image).read_bytes() == (game / edit.image).read_bytes(), id
        first, last = (f"predictions_defender_{j}_{on}.jsonl" for j in (0, 1))
        assert (clean / first).read_text() == (game / first).read_text()
        assert read_predictions(clean / last).keys() == read_predictions(game / last).keys()
    found = json.loads((tmp_path / "s" / "summary.json").read_text())
    work = [found["runs"][arm]["0"] for arm in ("coevolution", "clean")]
    assert [run["answers_generated"] for run in work] == [4 * GROUP, 4 * GROUP] and [run["optimizer_steps"] for run in work] == [1, 1]
    assert {"attacker_learns", "defender_1_adapts", "hardened_vs_clean"} <= {row["key"] for row in found["comparisons"]}
    assert found["figures"]["clean"]["0"]["attack_success"]["attacker_1"].keys() == {"defender_0", "defender_1"}
    (tmp_path / "s" / "report.html").unlink()
    assert main(["report", str(tmp_path / "s")]) == 0
    assert (tmp_path / "s" / "report.html").stat().st_size > 0 and json.loads((tmp_path / "s" / "summary.json").read_text()) == found
