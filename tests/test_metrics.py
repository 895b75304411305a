"""Promises of the tracker, the span timer and the combination of metrics."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from rich.console import Console

from aot_fast.metrics import Spans, Tracker, atomic_write_text, format_line, read_rows, reduce_over_ranks, write_json


def quiet(folder, **settings) -> Tracker:
    return Tracker(folder, **{"trackers": (), "console": Console(quiet=True), **settings})


def test_rows_are_numbered_and_carry_the_values(tmp_path):
    with quiet(tmp_path) as tracker:
        tracker.log("attack", 1, 1, {"reward": 0.25})
        tracker.log("attack", 1, 2, {"reward": torch.tensor(0.5)})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["index"], row["phase"], row["round"], row["step"], row["reward"]) for row in rows] == [
        (0, "attack", 1, 1, 0.25),
        (1, "attack", 1, 2, 0.5),
    ]
    assert all(row["seconds"] >= 0 and row["wall_time"] > 1.7e9 for row in rows)


def test_a_row_is_on_disk_when_log_returns(tmp_path):
    tracker = quiet(tmp_path)
    tracker.log("attack", 1, 1, {"reward": 0.25})
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_non_finite_values_stay_valid_json(tmp_path):
    with quiet(tmp_path) as tracker:
        tracker.log("attack", 1, 1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert math.isnan(float(row["a"])) and float(row["b"]) == math.inf and float(row["c"]) == -math.inf


def test_a_resumed_run_cuts_back_and_goes_on_with_the_same_index(tmp_path):
    with quiet(tmp_path) as tracker:
        for step in range(1, 6):
            tracker.log("attack", 1, step, {"reward": step})
    with quiet(tmp_path) as tracker:
        tracker.cut_back(3)
        tracker.log("attack", 1, 4, {"reward": 40})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [row["reward"] for row in rows] == [1, 2, 3, 40]


def test_a_line_torn_by_a_kill_is_dropped_before_the_next_is_written(tmp_path):
    with quiet(tmp_path) as tracker:
        tracker.log("attack", 1, 1, {"reward": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"index": 1, "pha')
    with quiet(tmp_path) as tracker:
        tracker.log("attack", 1, 2, {"reward": 2})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["reward"] for line in lines] == [1, 2]


def test_the_null_tracker_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Tracker(None) as tracker:
        tracker.cut_back(3)
        tracker.begin("attack", 1)
        tracker.log("attack", 1, 1, {"reward": 1})
        tracker.say("hello")
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_rows_not_the_run(tmp_path, capsys):
    tracker = Tracker(tmp_path, trackers=())
    tracker.log("attack", 1, 1, {"reward": 1})
    tracker._file.close()
    tracker._file = open("/dev/full", "a")
    tracker.log("attack", 1, 2, {"reward": 2})
    tracker.log("attack", 1, 3, {"reward": 3})
    assert tracker.lost_rows == 2
    assert capsys.readouterr().out.count("warning: metrics could not be written") == 1
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_an_uninstalled_tracker_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="metrics.trackers: wandb is not installed; run `pip install wandb`"):
        Tracker(tmp_path, trackers=("wandb",))


def test_tensorboard_gets_the_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with quiet(tmp_path, trackers=("tensorboard",)) as tracker:
        tracker.log("attack", 1, 1, {"reward": 0.25})
        tracker.log("attack", 1, 2, {"reward": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("attack/reward")] == [(0, 0.25), (1, 0.5)]


ROW = {
    "round": 1,
    "phase": "attack",
    "step": 12,
    "grad_norm": 0.8,
    "kl": 0.0,
    "ratio": 1.0,
    "q": 0.92,
    "reward": 0.31,
    "e": 0.44,
    "other": 3,
}


def test_the_log_line_has_a_fixed_order():
    line = "r1 attack 12/40 | reward 0.31 q 0.92 e 0.44 | ratio 1.000 kl 0.0e+00 | gnorm 0.8 | 1.9 s | ETA 0:53"
    assert format_line(ROW, 40, 1.9) == line
    assert format_line(dict(reversed(ROW.items())), 40, 1.9) == line


def test_a_skipped_step_says_so():
    assert "| step skipped |" in format_line({**ROW, "applied": 0.0}, 40, 1.9)
    assert "skipped" not in format_line({**ROW, "applied": 1.0}, 40, 1.9)


def test_the_eta_counts_hours_and_needs_a_total():
    assert format_line(ROW, 4012, 1.0).endswith("ETA 1:06:40")
    assert "ETA" not in format_line(ROW, 0, 1.0)


def test_long_lines_are_not_broken_off_a_terminal(tmp_path, capsys):
    Tracker(tmp_path, trackers=(), phase_steps={"attack": 40}).log(
        "attack", 1, 1, {name: 1 for name in ROW if name not in ("round", "phase", "step")}
    )
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_terminal_gets_a_progress_bar(tmp_path):
    console = Console(force_terminal=True, width=120, record=True, file=open("/dev/null", "w"))
    with Tracker(tmp_path, trackers=(), phase_steps={"attack": 4}, total_steps=8, console=console) as tracker:
        tracker.log("attack", 1, 1, {"reward": 1})
        game, phase = tracker._progress.tasks
        assert (game.completed, game.total, phase.completed, phase.total) == (1, 8, 1, 4)
    assert "r1 attack 1/4" in console.export_text()


def test_seconds_of_a_step_are_those_of_one_step_when_only_every_nth_is_logged(tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    tracker = Tracker(tmp_path, trackers=(), phase_steps={"attack": 20})
    tracker.log("attack", 1, 5, {})
    tracker.log("attack", 1, 10, {})
    assert capsys.readouterr().out.splitlines()[1] == "r1 attack 10/20 | 2.0 s | ETA 0:20"


def test_spans_nest_add_up_and_survive_a_resume(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    spans = Spans()
    with spans("attack"), spans("attack/rollout"):
        assert spans.last == "attack/rollout"
    assert spans.totals() == {"attack/rollout": 2.0, "attack": 6.0}
    resumed = Spans()
    resumed.restore(json.loads(json.dumps(spans.state())))
    with pytest.raises(KeyError), resumed("attack"):
        raise KeyError
    assert resumed.totals() == {"attack/rollout": 2.0, "attack": 11.0}


def test_spans_synchronise_the_gpu_only_if_asked(monkeypatch):
    calls = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: calls.append(1))
    with Spans()("a"):
        pass
    assert calls == []
    with Spans(synchronize=True)("a"):
        pass
    assert len(calls) == 2


def scalars(**values: float) -> dict[str, torch.Tensor]:
    return {name.replace("_", "/", 1): torch.tensor(float(value)) for name, value in values.items()}


@dataclass
class TwoRanks:
    """Stands for a runtime whose other rank has the same values, times ten."""

    device = torch.device("cpu")

    def all_reduce(self, x: torch.Tensor, op: str) -> torch.Tensor:
        return x + 10 * x if op == "sum" else torch.maximum(x, 10 * x)


def test_metrics_reduce_over_ranks():
    totals = reduce_over_ranks(TwoRanks(), scalars(sum_ratio=4, count_tokens=2, max_ratio=5))
    assert totals == {"sum/ratio": 44.0, "count/tokens": 22.0, "max/ratio": 50.0}


def test_a_count_beyond_fp32_stays_exact():
    many = {"count/tokens": torch.tensor(2**24 + 1, dtype=torch.int64)}
    assert reduce_over_ranks(TwoRanks(), many) == {"count/tokens": 11 * (2**24 + 1)}


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError):
        write_json(path, {"new": math.nan})
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        atomic_write_text(path, "new")
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]
