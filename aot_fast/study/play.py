"""Plays the runs of a study as processes of their own, some at a time, and compares them whenever one is finished.

`aot-fast run tiny_study --seeds 0,1,2 --arms coevolution,clean,roundtrip,random_edit`. The same command continues: finished runs are not
played again. Models this small gain more from two one-thread processes than from one run on two ranks.

Not done here: a run on several GPUs. Every run gets one (CUDA_VISIBLE_DEVICES). Launch larger ones one by one with torchrun, as `--dry-run`
lists them; when all are finished, the study command has nothing left to play and only compares.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aot_fast.run_folder import FINISHED
from aot_fast.settings import SettingsError
from aot_fast.study.plan import Study, StudyRun, open_study
from aot_fast.study.summary import publish_study

EXIT_SIGNAL = 143
COMMAND = (sys.executable, "-m", "aot_fast", "run")
POLL_S = 0.2
LOG_LINES = 15
"""Last lines of a failed run's log that are shown."""
GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SET_DEATH_SIGNAL = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
GUARD = (sys.executable, "-c", SET_DEATH_SIGNAL) if sys.platform == "linux" else ()
"""Has the kernel send a run SIGTERM when the study is killed (prctl 1, PR_SET_PDEATHSIG): the next launch would else find another writer
in the run's folder. Not a `preexec_fn`, which is unsafe once numpy or torch have started threads."""


@dataclass
class Child:
    """A run that is being played."""

    run: StudyRun
    process: subprocess.Popen
    slot: int
    since: float = field(default_factory=time.monotonic)

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.since) / 60


@dataclass
class Course:
    """How far the study has come in this launch."""

    waiting: list[StudyRun]
    total: int
    running: list[Child] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """By name of the run: what to say of it."""
    stopped: bool = False

    def take_ready(self) -> StudyRun | None:
        """The next run whose coevolution, if it waits for one, is finished."""
        for run in self.waiting:
            if run.waits_for is None or (run.waits_for / FINISHED).is_file():
                self.waiting.remove(run)
                return run
        return None

    @property
    def place(self) -> str:
        return f"[{self.total - len(self.waiting) - len(self.running)}/{self.total}]"


def run_study(study: Study, commands: dict[str, list[str]], jobs: int = 0) -> int:
    """Play what is unfinished of the study and compare; returns the exit code: 0 well, 1 a run failed, 143 stopped by a signal.

    `commands`: how each run, by name, is started. `jobs`: runs at a time; 0: one a GPU, 2 on a CPU.
    """
    open_study(study)
    gpus = visible_gpus()
    jobs = jobs or len(gpus) or 2
    threads = study.config.run.threads or max(1, _cores() // jobs)
    commands = {name: [*command, "--run.threads", str(threads)] for name, command in commands.items()}
    code = play(study, commands, [_environment(gpus, slot, threads) for slot in range(jobs)])
    publish_study(study.folder, say=True)
    return code


def refuse_torchrun() -> None:
    """Raises SettingsError in a worker of torchrun's."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise SettingsError(
            f"--seeds, --arms: refused under torchrun (WORLD_SIZE = {world}): a study starts its runs itself, each on one GPU or a share "
            "of the cores; play larger runs one by one with torchrun (--dry-run lists them), then call the study without it to compare"
        )


def visible_gpus() -> list[str]:
    """Names of the GPUs as CUDA_VISIBLE_DEVICES has them."""
    import torch

    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return given or [str(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment(gpus: list[str], slot: int, threads: int) -> dict[str, str]:
    """For the runs of a slot: a GPU, its share of the threads, and no process group of torchrun's."""
    kept = {key: value for key, value in os.environ.items() if key not in GROUP}
    gpu = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
    return kept | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads)} | gpu


def play(study: Study, commands: dict[str, list[str]], slots: list[dict[str, str]]) -> int:
    """Keep every slot (its environment) busy until all runs are finished, failed or stopped; returns the exit code."""
    runs = study.runs()
    course = Course([run for run in runs if not run.finished], len(runs))
    print(f"study {study.folder}: {len(runs)} runs, {len(runs) - len(course.waiting)} finished, {len(slots)} at a time", flush=True)
    with _passing_on_signals(course):
        while course.running or course.waiting:
            ended = [child for child in course.running if child.process.poll() is not None]
            for child in ended:
                _close(course, child)
            _fill(course, commands, slots)
            if any(child.run.finished for child in ended):
                publish_study(study.folder)  # after the free slots are taken: drawing the report lets no slot wait
            if not course.running:
                break
            time.sleep(POLL_S)
    return _verdict(course)


@contextmanager
def _passing_on_signals(course: Course) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGUSR1 go to the running children as SIGTERM, on which they save; a second one ends them at once."""

    def pass_on(number: int, frame: object) -> None:
        course.stopped = True
        for child in course.running:
            child.process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fill(course: Course, commands: dict[str, list[str]], slots: list[dict[str, str]]) -> None:
    free = [slot for slot in range(len(slots)) if slot not in {child.slot for child in course.running}]
    while free and not course.stopped and (run := course.take_ready()):
        _start(course, run, commands[run.name], free[0], slots[free.pop(0)])


def _start(course: Course, run: StudyRun, command: list[str], slot: int, environment: dict[str, str]) -> None:
    verb = "continues" if run.state == "unfinished" else "starts"
    with run.log.open("ab") as log:
        # A session of its own: a terminal's Ctrl-C reaches this process only, which asks the children to save.
        process = subprocess.Popen(
            [*GUARD, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    course.running.append(Child(run, process, slot))
    print(f"{course.place} {run.name} {verb} (log: {run.log})", flush=True)
    if course.stopped:  # the signal came before the child was in the list
        process.send_signal(signal.SIGTERM)


def _close(course: Course, child: Child) -> None:
    course.running.remove(child)
    run, code = child.run, child.process.returncode
    if run.finished and code == 0:
        print(f"{course.place} {run.name} finished after {child.minutes:.1f} min", flush=True)
    elif course.stopped and code in (0, EXIT_SIGNAL, -signal.SIGTERM):
        course.waiting.append(run)
        print(f"{course.place} {run.name} stopped after {child.minutes:.1f} min; the same command continues", flush=True)
    else:
        course.failed[run.name] = f"exit code {code}; end of {run.log}:\n{_tail(run.log)}"
        print(f"{course.place} {run.name} failed after {child.minutes:.1f} min (exit code {code})", flush=True)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join(f"    {line}" for line in lines)


def _verdict(course: Course) -> int:
    """Say what became of the runs that are not finished; the exit code."""
    for name, text in course.failed.items():
        print(f"aot-fast: {name} failed: {text}", file=sys.stderr, flush=True)
    if course.stopped:
        print("aot-fast: stopped by a signal; the same command continues", file=sys.stderr, flush=True)
        return EXIT_SIGNAL
    for run in course.waiting:
        print(f"aot-fast: {run.name} was not played: it answers the edits of {run.waits_for}, which is not finished", file=sys.stderr)
    return 1 if course.failed else 0
