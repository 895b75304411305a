"""One tracker, one span timer, and how the metrics of all ranks become one row.

A row of `metrics.jsonl`: {"index", "phase", "round", "step", "seconds", "wall_time", then the values}; `seconds` is the time since the row
before, `wall_time` seconds since 1970. Non-finite values are written as the strings "NaN", "Infinity", "-Infinity": JSON has no such
numbers, and `float()` reads them back.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from torch import Tensor

    from aot_fast.engine import Runtime

LINE = (
    (
        ("reward", "reward", ".2f"),
        ("accuracy", "acc", ".2f"),
        ("q", "q", ".2f"),
        ("u", "u", ".2f"),
        ("e", "e", ".2f"),
        ("loss", "loss", ".3g"),
    ),
    (("ratio", "ratio", ".3f"), ("kl", "kl", ".1e"), ("kl_ref", "kl_ref", ".1e"), ("clip", "clip", ".2f"), ("entropy", "ent", ".2f")),
    (("grad_norm", "gnorm", ".2g"), ("lr", "lr", ".1e"), ("skipped", "skipped", ".0f")),
)
"""Order of the log line: groups of (name in the row, label, format); a value that a phase does not have is left out."""


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write a whole UTF-8 file or, under any fault, leave the old one: temporary file, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            os.fchmod(handle, 0o644)
            file.write(text)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: Path | str, value: Any) -> None:
    """`atomic_write_text` of indented JSON; ValueError for a non-finite number."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """Rows of a JSONL file of metrics; a last line torn by a kill is left out. Empty if there is no file."""
    path = Path(path)
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def reduce_over_ranks(runtime: Runtime, metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Totals over all ranks in two collectives and one read of the device; every rank must bring the same names.

    Names under `sum/` and `count/` are added, under `max/` the greatest is kept; values are 0-d tensors.
    """
    import torch

    totals: dict[str, float] = {}
    for op, prefixes in (("sum", ("sum/", "count/")), ("max", ("max/",))):
        names = sorted(name for name in metrics if name.startswith(prefixes))
        if names:
            # fp64: counts stay exact, and sums do not depend on how many ranks they come from.
            packed = torch.stack([metrics[name].detach().to(runtime.device, torch.float64).reshape(()) for name in names])
            totals.update(zip(names, runtime.all_reduce(packed, op=op).tolist(), strict=True))
    return totals


class Spans:
    """Seconds spent under each name: `with spans("attack/rollout"): ...`; spans nest, each name counts by itself."""

    def __init__(self, synchronize: bool = False):
        self.synchronize = synchronize
        """Wait for the GPU at both ends of a span: true figures of GPU work, at the price of a stalled queue."""
        self.last = ""
        """The span entered last, for the watchdog."""
        self._totals: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.last = name
        start = self._now()
        try:
            yield
        finally:
            self._totals[name] = self._totals.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self.synchronize:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
        return time.perf_counter()

    def totals(self) -> dict[str, float]:
        """Seconds by name, over all launches of the run."""
        return dict(self._totals)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return self.totals()

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from a checkpoint's totals."""
        self._totals = dict(state)


Sink = tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]
"""Log (index, values) and close."""


def _tensorboard(folder: Path, config: Mapping[str, Any], first_index: int) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what an interrupted launch wrote after the checkpoint that this one continues from.
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_index, flush_secs=10)

    def log(index: int, values: dict[str, float]) -> None:
        for label, value in values.items():
            writer.add_scalar(label, value, index)

    return log, writer.close


def _wandb(folder: Path, config: Mapping[str, Any], first_index: int) -> Sink:
    import wandb

    run = wandb.init(project="aot_fast", name=folder.name, id=_run_id(folder), dir=str(folder), config=dict(config), resume="allow")
    return (lambda index, values: run.log(values, step=index)), run.finish


def _trackio(folder: Path, config: Mapping[str, Any], first_index: int) -> Sink:
    import trackio

    trackio.init(project="aot_fast", name=_run_id(folder), config=dict(config), resume="allow")
    return (lambda index, values: trackio.log(values, step=index)), trackio.finish


def _run_id(folder: Path) -> str:
    """The same for every launch of a run, different for runs of one name in other folders."""
    return f"{folder.name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"


SINKS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


class Tracker:
    """Rank 0's record of a run: `metrics.jsonl`, one console line a step, a progress bar on a terminal, and the sinks of the config.

    `Tracker(None)` takes the same calls and does nothing: for the other ranks and for tests. A full disk costs rows, not the run.
    """

    def __init__(
        self,
        folder: Path | str | None,
        trackers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
        phase_steps: Mapping[str, int] | None = None,
        total_steps: int = 0,
        console: Console | None = None,
    ):
        """`phase_steps`: steps of each phase in a round, `total_steps`: of the game; both only for "12/40", the bar and the ETA.

        ValueError if a tracker is not installed. Opens nothing yet, so that `cut_back` may come first.
        """
        for name in trackers:
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"metrics.trackers: {name} is not installed; run `pip install {name}` or take it out of metrics.trackers")
        self.folder = None if folder is None else Path(folder)
        self.trackers = tuple(trackers)
        self.config = config or {}
        self.phase_steps = phase_steps or {}
        self.index = 0
        """Index of the next row, i.e. rows written so far: goes into the checkpoint, comes back through `cut_back`."""
        self.lost_rows = 0
        """Rows that could not be written."""
        self._console = console or Console(soft_wrap=True, highlight=False)
        self._progress = _progress_bar(self._console)
        self._game_bar = self._progress.add_task("game", total=total_steps or None, visible=bool(total_steps))
        self._phase_bar = self._progress.add_task("", total=None, visible=False)
        self._file: IO[str] | None = None
        self._sinks: list[Sink] = []
        self._last_time = time.monotonic()
        self._last_step = ("", 0, 0)
        self._pace: deque[float] = deque(maxlen=20)
        self.cut_back(None)

    @property
    def path(self) -> Path | None:
        return self.folder and self.folder / "metrics.jsonl"

    def cut_back(self, num_rows: int | None) -> None:
        """Keep the rows with index < `num_rows` (None: all that are whole), before a resumed run writes on."""
        if self.folder is None:
            return
        assert self._file is None, "rows were written already"
        rows = [row for row in read_rows(self.path) if num_rows is None or row["index"] < num_rows]
        if self.path.exists():
            atomic_write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.index = rows[-1]["index"] + 1 if rows else 0
        self._last_step = (rows[-1]["phase"], rows[-1]["round"], rows[-1]["step"]) if rows else ("", 0, 0)
        self._progress.update(self._game_bar, completed=len({(row["phase"], row["round"], row["step"]) for row in rows}))

    def begin(self, phase: str, round: int) -> None:
        """A phase begins or goes on: the time since the last row was another's."""
        self._last_time = time.monotonic()
        self._pace.clear()

    def say(self, text: str) -> None:
        """One line on the console, above the progress bar."""
        if self.folder is not None:
            self._console.print(text, markup=False)

    def log(self, phase: str, round: int, step: int, values: Mapping[str, float]) -> None:
        """One row: `values` after `step` (counted from 1) of a phase. Reads device tensors, so call it at the logging interval only."""
        if self.folder is None:
            return
        now = time.monotonic()
        numbers = {name: float(value) for name, value in values.items()}
        head = {"index": self.index, "phase": phase, "round": round, "step": step}
        row = {**head, "seconds": now - self._last_time, "wall_time": time.time(), **numbers}
        self._write(row, numbers)
        self._show(row, self._steps_since(phase, round, step))
        self._last_time, self._last_step = now, (phase, round, step)
        self.index += 1

    def _steps_since(self, phase: str, round: int, step: int) -> int:
        """Steps that the row covers: more than one when `metrics.every` is."""
        if self._last_step[:2] != (phase, round):
            self._pace.clear()
            return max(1, step)
        return max(1, step - self._last_step[2])

    def _write(self, row: dict[str, Any], numbers: dict[str, float]) -> None:
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
                self._sinks = [SINKS[name](self.folder, self.config, self.index) for name in self.trackers]
            self._file.write(json.dumps({name: _json_number(value) for name, value in row.items()}) + "\n")
            self._file.flush()
            for log, _ in self._sinks:
                log(self.index, {f"{row['phase']}/{name}": value for name, value in numbers.items()})
        except OSError as error:
            self.lost_rows += 1
            if self.lost_rows == 1:
                self.say(f"warning: metrics could not be written ({error}); the run goes on without those rows")

    def _show(self, row: dict[str, Any], num_steps: int) -> None:
        total = self.phase_steps.get(row["phase"], 0)
        self._pace.append(row["seconds"] / num_steps)
        self.say(format_line(row, total, sum(self._pace) / len(self._pace)))
        if self._console.is_terminal:
            self._progress.start()
            self._progress.advance(self._game_bar, num_steps)
            label = f"round {row['round']} {row['phase']}"
            self._progress.update(self._phase_bar, description=label, completed=row["step"], total=total or None, visible=True)

    def close(self) -> None:
        """Write out and leave the terminal as it was."""
        if self._console.is_terminal:  # elsewhere the bar was never started, and stopping it prints an empty line
            self._progress.stop()
        for _, close in self._sinks:
            close()
        if self._file is not None:
            self._file.close()
        self._file, self._sinks = None, []

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def format_line(row: Mapping[str, Any], total_steps: int, step_seconds: float) -> str:
    """`r1 attack 12/40 | reward 0.31 q 0.92 | ratio 1.000 kl 0.0e+00 | gnorm 0.8 | 1.9 s | ETA 0:53`; the ETA is the phase's."""
    parts = [f"r{row['round']} {row['phase']} {row['step']}" + (f"/{total_steps}" if total_steps else "")]
    for group in LINE:
        parts.append(" ".join(f"{label} {float(row[name]):{form}}" for name, label, form in group if name in row))
    if row.get("applied") == 0:
        parts.append("step skipped")
    parts.append(f"{step_seconds:.1f} s")
    if total_steps:
        minutes, seconds = divmod(round(max(0, total_steps - row["step"]) * step_seconds), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append("ETA " + (f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"))
    return " | ".join(filter(None, parts))


def _progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def _json_number(value: Any) -> Any:
    """JSON knows no NaN: spelled as strings that `float()` takes."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
