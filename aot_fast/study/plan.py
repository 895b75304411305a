"""What a study consists of: its arms and seeds, the runs they make, their order, and the folder they live in.

Runs live in `runs/<study>/<arm>_seed<k>/`; `study.yaml` holds the configuration they share. A study that is given more arms or seeds
later is widened. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import yaml

from aot_fast.config import Config, GameConfig
from aot_fast.metrics import atomic_write_text
from aot_fast.run_folder import FINISHED
from aot_fast.settings import SettingsError, differences, from_tree, load, parse_overrides, to_yaml

STUDY = "study.yaml"
"""Marks the folder of a study."""
ARMS: tuple[str, ...] = get_args(get_type_hints(GameConfig)["arm"])
GAME = "coevolution"
OWN = ("run.seed", "run.stop_after", "game.arm", "evaluation.attacks_from")
"""Settings that a study gives each run itself."""


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    arm: str
    seed: int
    study: Path
    attacked_by_game: bool
    """Answers the held-out edits of the coevolution of its seed, which is played before it."""

    @property
    def name(self) -> str:
        return name_of(self.arm, self.seed)

    @property
    def folder(self) -> Path:
        return self.study / self.name

    @property
    def log(self) -> Path:
        return self.study / f"{self.name}.log"

    @property
    def waits_for(self) -> Path | None:
        """Folder of the run that must be finished before this one starts."""
        return self.study / name_of(GAME, self.seed) if self.attacked_by_game else None

    @property
    def finished(self) -> bool:
        return (self.folder / FINISHED).is_file()

    @property
    def state(self) -> str:
        return "finished" if self.finished else "unfinished" if (self.folder / "config.yaml").is_file() else "new"

    @property
    def settings(self) -> dict[str, str | int]:
        """What it sets besides the settings of the study. Of a control only the first and the last Defender are compared, so only they
        answer; the game's own rounds are all wanted."""
        own = {"run.folder": str(self.study), "run.name": self.name, "run.seed": self.seed, "game.arm": self.arm}
        if self.attacked_by_game:
            own |= {"evaluation.attacks_from": str(self.waits_for), "evaluation.rounds": "last"}
        return own

    def words(self) -> list[str]:
        """Its settings as words of the command line."""
        return [word for key, value in self.settings.items() for word in (f"--{key}", _quoted(value))]

    def config(self, shared: Config) -> Config:
        """Its whole configuration."""
        for key, value in self.settings.items():
            section, field = key.split(".")
            shared = dataclasses.replace(shared, **{section: dataclasses.replace(getattr(shared, section), **{field: value})})
        return shared


@dataclass(frozen=True)
class Study:
    """Arms times seeds of one configuration."""

    config: Config
    """What the runs share; `run.name` is the study's."""
    arms: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder) / self.config.run.name

    def runs(self) -> list[StudyRun]:
        """In the order in which they are played: every coevolution first, then the controls seed by seed.

        A coevolution takes longest and its controls wait for it; begun first, none of them leaves a slot idle at the end.
        """
        controls = [arm for arm in self.arms if arm != GAME]
        course = [(GAME, seed) for seed in self.seeds if GAME in self.arms] + [(arm, seed) for seed in self.seeds for arm in controls]
        return [StudyRun(arm, seed, self.folder, arm != GAME and GAME in self.arms) for arm, seed in course]


def name_of(arm: str, seed: int) -> str:
    return f"{arm}_seed{seed}"


def _quoted(value: str | int) -> str:
    """A word that `--key WORD`, which is read as YAML, gives back unchanged."""
    word = str(value)
    return word if yaml.safe_load(word) == value else yaml.safe_dump(value, default_style='"', width=10**6).strip()


# The command line


def parse_flags(arms: str | None, seeds: str | None, jobs: str | None) -> tuple[tuple[str, ...], tuple[int, ...], int]:
    """`--arms`, `--seeds`, `--jobs` as given; empty or 0 where not. Raises SettingsError."""
    if arms is None and seeds is None:
        raise SettingsError(f"--jobs = {jobs!r}: runs at a time of a study; give --seeds or --arms with it")
    found = parse_arms(arms) if arms is not None else (), parse_seeds(seeds) if seeds is not None else ()
    return *found, parse_jobs(jobs) if jobs is not None else 0


def parse_arms(text: str) -> tuple[str, ...]:
    """`coevolution,clean` -> names of arms. Raises SettingsError."""
    arms = tuple(part.strip() for part in text.split(","))
    for arm in arms:
        if arm not in ARMS:
            near = difflib.get_close_matches(arm, ARMS, 1, cutoff=0.0)[0]
            raise SettingsError(f"--arms = {text!r}: {arm!r} is not one of {', '.join(ARMS)}, separated by commas; did you mean {near!r}?")
    _refuse_twice("--arms", text, arms)
    return tuple(arm for arm in ARMS if arm in arms)


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` -> seeds. Raises SettingsError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d+", part, re.ASCII) for part in parts):
        listed = re.sub(r"([0-9]{1,3})-([0-9]{1,3})", lambda m: ",".join(map(str, range(int(m[1]), int(m[2]) + 1))), text)
        near = ",".join(dict.fromkeys(re.findall(r"[0-9]+", listed))) or "0,1,2"
        raise SettingsError(f"--seeds = {text!r}: must be whole numbers from 0, separated by commas; did you mean {near!r}?")
    seeds = tuple(int(part) for part in parts)
    _refuse_twice("--seeds", text, seeds)
    return seeds


def _refuse_twice(flag: str, text: str, values: Sequence[object]) -> None:
    if len(set(values)) < len(values):
        near = ",".join(map(str, dict.fromkeys(values)))
        raise SettingsError(f"{flag} = {text!r}: each may be named once; did you mean {near!r}?")


def parse_jobs(text: str) -> int:
    """Runs at a time. Raises SettingsError."""
    if not re.fullmatch(r"[1-9]\d*", text, re.ASCII):
        raise SettingsError(f"--jobs = {text!r}: must be a whole number of at least 1; use --jobs 1")
    return int(text)


def refuse_own_settings(overrides: Iterable[str]) -> None:
    """Raises SettingsError for an override of what the study sets itself."""
    for key, value in parse_overrides(list(overrides)):
        if key in OWN:
            raise SettingsError(
                f"--{key} = {value!r}: a study (--seeds, --arms) sets it for each run; leave it out, or play that run alone"
            )


# The folder


def read_study(folder: Path) -> Study:
    """The study that lives in `folder`."""
    path = folder / STUDY
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Study(from_tree(tree["config"], str(path)), tuple(tree["arms"]), tuple(tree["seeds"]))


def planned(config: Config, arms: tuple[str, ...], seeds: tuple[int, ...]) -> Study:
    """The study of these arms and seeds, and of those that its folder has already; nothing is written.

    Raises SettingsError when the folder, or a run in it, has other settings.
    """
    study = Study(config, arms, seeds)
    if (study.folder / "config.yaml").is_file():
        raise SettingsError(f"{study.folder} holds a single run; give the study another --run.name")
    if (study.folder / STUDY).is_file():
        saved = read_study(study.folder)
        _refuse_changed(study.folder, differences(saved.config, config))
        known = tuple(arm for arm in ARMS if arm in saved.arms + arms)
        study = Study(config, known, tuple(dict.fromkeys(saved.seeds + seeds)))
    for run in study.runs():
        saved_config = run.folder / "config.yaml"
        if saved_config.is_file():
            _refuse_changed(run.folder, differences(load(str(saved_config)), run.config(config)))
    return study


def _refuse_changed(folder: Path, changed: list[str]) -> None:
    if changed:
        lines = "\n  ".join(changed)
        raise SettingsError(f"{folder} was played with other settings; give another --run.name, or --fresh to move it aside:\n  {lines}")


def open_study(study: Study) -> None:
    """Write `study.yaml`. Raises SettingsError when the folder cannot be written."""
    tree = {"arms": list(study.arms), "seeds": list(study.seeds), "config": yaml.safe_load(to_yaml(study.config))}
    try:
        study.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(study.folder / STUDY, yaml.safe_dump(tree, sort_keys=False))
    except OSError as error:
        raise SettingsError(f"run.folder = {study.config.run.folder!r}: cannot be written: {error}") from error


def move_aside(config: Config) -> None:
    """Make room for a fresh study."""
    folder = Path(config.run.folder) / config.run.name
    if (folder / STUDY).is_file():
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        print(f"the earlier study is now in {aside}", flush=True)
