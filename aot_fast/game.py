"""What the game is played with: both players, the data, the run folder, and the cursor that says where the game stands.

`Game` keeps no state besides the players' weights, the cursor and the phase's stream of questions; a checkpoint is exactly that.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

import aot_fast.kernels as K
from aot_fast.attacker.judge import Judge, load_judge
from aot_fast.attacker.model import Attacker, load_attacker
from aot_fast.checkpoint import Cursor, find_newest, save_pair
from aot_fast.config import Config
from aot_fast.data.sets import open_data
from aot_fast.defender.answers import answerer
from aot_fast.defender.groups import Stream
from aot_fast.defender.model import Defender, load_defender, load_frozen
from aot_fast.engine import Runtime, seed_of
from aot_fast.metrics import Spans, Tracker, atomic_write_text
from aot_fast.models import model_folder
from aot_fast.run_folder import FINISHED, StopFlag


class Stopped(RuntimeError):
    """The run was asked to stop; it is saved and can be continued."""


class Game:
    """Both players at a point of the game."""

    def __init__(self, config: Config, runtime: Runtime, folder: Path):
        self.config, self.runtime, self.folder = config, runtime, folder
        self.stop = StopFlag()
        self.spans = Spans()
        with self.spans("load"):
            self.train, self.heldout = open_data(config.data, folder, config.run.seed, runtime)
            self.defender: Defender = load_defender(config.defender, config.engine, runtime)
            self.attacker: Attacker = load_attacker(config.attacker, config.engine, runtime, folder)
            if config.reward.judge_model:  # a wrong path must show now, not at the first attack
                model_folder(config.reward.judge_model, config.reward.judge_revision, "reward.judge_model")
        self.tracker = Tracker(
            folder if runtime.rank == 0 else None,
            config.metrics.trackers,
            asdict(config),
            {phase: steps for phase, steps in self.steps().items() if steps},
            sum(self.steps()[phase] for _, phase in self.schedule()),
        )
        self.cursor = Cursor(*self.schedule()[0])
        self.stream = self._new_stream()
        self.steps_done = 0
        self._first: Defender | None = None
        self._judge: Defender | None = None
        self._loaded: Cursor | None = None
        self._restore()
        self._mark()

    # The course of the game

    def steps(self) -> dict[str, int]:
        """Optimizer steps of each phase in a round; 0: the phase is one whole."""
        game = self.config.game
        return {"warmup": game.warmup_steps, "attack": game.attacker_steps, "curate": 0, "defend": game.defender_steps, "evaluate": 0}

    def schedule(self) -> list[tuple[int, str]]:
        """(round, phase) in the order of play; round 0 is the warm-up. The controls leave out what they do not have (MATH.md section 5)."""
        phases = {
            "coevolution": ("attack", "curate", "defend", "evaluate"),
            "random_edit": ("curate", "defend", "evaluate"),
            "roundtrip": ("curate", "defend", "evaluate"),
            "clean": ("curate", "defend", "evaluate"),
        }[self.config.game.arm]
        first = [(0, "warmup")] * bool(self.config.game.warmup_steps) + [(0, "evaluate")]
        return first + [(round, phase) for round in range(1, self.config.game.rounds + 1) for phase in phases]

    def phases(self) -> Iterator[Cursor]:
        """The phases still to be played; each is closed, and saved, when the next is asked for."""
        course = self.schedule()
        for place in range(course.index((self.cursor.round, self.cursor.phase)), len(course)):
            self.tracker.begin(self.cursor.phase, self.cursor.round)
            yield self.cursor
            if place + 1 < len(course):
                self.cursor = Cursor(*course[place + 1])
                self.stream = self._new_stream()
                self._mark()
                self.save()

    def advance(self, rows: list[dict[str, float]]) -> None:
        """The phase has done one optimizer step a row: log, move the cursor, save when it is due, stop when asked to."""
        every = self.config.metrics.every
        for values in rows:
            self.cursor = Cursor(self.cursor.round, self.cursor.phase, self.cursor.step + 1)
            self.steps_done += 1
            if self.cursor.step % every == 0 or values.get("applied") == 0:
                self.tracker.log(self.cursor.phase, self.cursor.round, self.cursor.step, values)
        self._mark()
        due = self.config.checkpoint.every
        before = self.cursor.step - len(rows)
        if self.config.run.stop_after and self.steps_done >= self.config.run.stop_after:
            raise Stopped(f"run.stop_after = {self.config.run.stop_after} steps are done")
        self.check_stop()
        if self.cursor.step // due > before // due and self.cursor.step < self.steps()[self.cursor.phase]:
            self.save()

    def stopping(self) -> bool:
        """Whether any rank was asked to stop. A collective: all ranks leave a loop at the same turn."""
        return bool(self.runtime.all_reduce(torch.tensor(float(self.stop.signal > 0), device=self.runtime.device), "max"))

    def check_stop(self) -> None:
        if self.stopping():
            raise Stopped("a signal asked to stop")

    # Randomness and frozen players

    def seed(self, *parts: object) -> int:
        """A seed derived from the run's and the place in the game."""
        return seed_of(self.config.run.seed, self.cursor.round, *parts)

    def _new_stream(self) -> Stream:
        return Stream(self.seed(self.cursor.phase))

    def frozen_defender(self, round: int) -> Defender:
        """Defender `round` as it was at the end of that round, whole on every rank; the first is the one the run began with."""
        exported = self.folder / "players" / f"defender_{round}"
        return load_frozen(exported, self.config.defender, self.runtime) if exported.is_dir() else self.first_defender()

    def first_defender(self) -> Defender:
        """The Defender that the run was given, before any training: the reference of a full fine-tune's KL, and the judge by default."""
        if self._first is None:
            config = self.config.defender
            self._first = load_frozen(model_folder(config.model, config.revision, "defender.model"), config, self.runtime)
        return self._first

    def judging_defender(self) -> Defender:
        """Who counts for the uniqueness judge: `reward.judge_model`, or the first Defender."""
        config = self.config.reward
        if not config.judge_model:
            return self.first_defender()
        if self._judge is None:
            folder = model_folder(config.judge_model, config.judge_revision, "reward.judge_model")
            self._judge = load_frozen(folder, self.config.defender, self.runtime)
        return self._judge

    # Checkpoints

    def _mark(self) -> None:
        """Remember the state that belongs to the players' weights as they are now."""
        self._marked = {"cursor": self.cursor, "stream": copy.deepcopy(self.stream.state()), "metrics_rows": self.tracker.index}

    def save(self) -> None:
        """Write the checkpoint of the last finished step. A collective."""
        if self._marked["cursor"] == self._loaded and not self.steps_done:
            return  # the one this launch continued from is still the newest; it is not put at risk
        state = {"metrics_rows": self._marked["metrics_rows"], "seconds": self.spans.state(), "seed": self.config.run.seed}

        def write(stage: Path) -> None:
            self.attacker.player.save(stage / "attacker")
            self.defender.player.save(stage / "defender")
            torch.save(self.attacker.save_extra(), stage / f"attacker_extra_rank_{self.runtime.rank:05d}.pt")
            if self.runtime.rank == 0:
                torch.save(self._marked["stream"], stage / "stream.pt")

        with self.spans("checkpoint"):
            save_pair(self.folder / "checkpoints", self._marked["cursor"], self.runtime, write, state, self.config.checkpoint.keep)

    def _restore(self) -> None:
        found = find_newest(self.folder / "checkpoints", self.runtime)
        if found is None:
            self.tracker.cut_back(0)
            return
        path, manifest = found
        state = json.loads((path / "state.json").read_text())
        rank = f"rank_{self.runtime.rank:05d}"
        self.attacker.player.load(path / "attacker")
        self.defender.player.load(path / "defender")
        self.attacker.load_extra(torch.load(path / f"attacker_extra_{rank}.pt", weights_only=True))
        self.stream = Stream.restore(torch.load(path / "stream.pt", weights_only=True))
        torch.set_rng_state(torch.load(path / f"rng_{rank}.pt", weights_only=True))
        self.cursor = self._loaded = Cursor(**manifest["cursor"])
        self.spans.restore(state["seconds"])
        self.tracker.cut_back(state["metrics_rows"])
        self.tracker.say(f"continuing {self.folder} at {path.name}")

    def finish(self) -> None:
        """Mark the run as played to its end."""
        self.save()
        if self.runtime.rank == 0:
            atomic_write_text(self.folder / FINISHED, "")
        self.runtime.barrier()


def judge_of(game: Game) -> Judge | None:
    """The uniqueness judge; by default a frozen Defender, which no Attacker is trained against later."""
    if game.config.reward.judge != "defender":
        return load_judge(game.config.reward, answerer(game.defender))
    return load_judge(game.config.reward, answerer(game.judging_defender()))


@contextmanager
def backend(config: Config) -> Iterator[None]:
    """The operators' implementation named by the configuration."""
    if config.kernels.backend == "auto":
        yield
    else:
        with K.backend(config.kernels.backend):
            yield
