"""What a study folder holds, finished or not; whatever is missing is listed instead of raised."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aot_fast.report.run_files import read_config, read_json

CONFIGS = ("config.yaml", "study.yaml")
"""Where the settings of a study may lie."""


GAME = "coevolution"
ARMS = {
    GAME: ("the game", "Attacker and Defender train in turns; each Defender trains on the edits of the newest Attacker"),
    "clean": ("clean control", "the Defender trains as long, on unedited pictures only"),
    "roundtrip": ("codec control", "the Defender trains as long, on pictures that only went through the editor's codec (encode, decode)"),
    "random_edit": ("untrained-Attacker control", "the Defender trains as long, on edits of the Attacker as it was before the game"),
}
"""Name and meaning of each arm, in plain words."""


def arm_title(arm: str) -> str:
    return ARMS.get(arm, (arm, ""))[0]


@dataclass(frozen=True)
class StudyFiles:
    """The records of a study that its page is made of."""

    folder: Path
    summary: Mapping[str, Any]
    """`summary.json`; empty if it cannot be read."""
    config_text: str

    @property
    def arms(self) -> list[str]:
        """In the order of the study; those that only runs or figures name come last."""
        return list(dict.fromkeys((*self._list("arms"), *self._tree("runs"), *self._tree("figures"))))

    @property
    def seeds(self) -> list[str]:
        return list(dict.fromkeys((*map(str, self._list("seeds")), *(seed for runs in self._tree("runs").values() for seed in runs))))

    @property
    def comparisons(self) -> list[Mapping[str, Any]]:
        return self._list("comparisons")

    @property
    def warnings(self) -> list[str]:
        """What the study says against its own comparisons, such as unequal work."""
        return [str(line).removeprefix("warning: ") for line in self._list("warnings")]

    def _list(self, name: str) -> list[Any]:
        return self.summary.get(name) or []

    def _tree(self, name: str) -> Mapping[str, Any]:
        return self.summary.get(name) or {}

    def run(self, arm: str, seed: str) -> Mapping[str, Any]:
        return (self._tree("runs").get(arm) or {}).get(seed) or {}

    def figures(self, arm: str) -> dict[str, Mapping[str, Any]]:
        """By seed, in the order of the study; seeds without figures are left out."""
        found = self._tree("figures").get(arm) or {}
        return {seed: found[seed] for seed in self.seeds if found.get(seed)}

    def run_folder(self, arm: str, seed: str) -> Path | None:
        """The folder of a run; None if it is not there."""
        given = self.run(arm, seed).get("folder")
        if not given:
            return None
        # Absolute, or relative to the study; a study that was moved, or is read from another directory, still holds its runs by name.
        tries = (self.folder / given, self.folder / Path(given).name, Path(given))
        return next((folder for folder in tries if folder.is_dir() and folder != self.folder), None)

    def link(self, arm: str, seed: str) -> str:
        """Address of a run's own page relative to the study's; empty if it has none."""
        folder = self.run_folder(arm, seed)
        if folder is None or not (folder / "report.html").is_file():
            return ""
        return quote(Path(os.path.relpath(folder / "report.html", self.folder)).as_posix())

    def unfinished(self) -> Iterator[str]:
        """What is still to come, in words."""
        if not self.summary:
            yield "summary.json: nothing is measured yet"
        for arm in self.arms:
            late = [seed for seed in self.seeds if not self.run(arm, seed).get("finished")]
            if late:
                yield f"{arm}: {'seed' if len(late) == 1 else 'seeds'} {', '.join(late)} of {len(self.seeds)} not finished"


def read_study(folder: Path | str) -> StudyFiles:
    """Everything that the page needs; NotADirectoryError if there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: there is no such study folder")
    texts = (read_config(folder / name)[0] for name in CONFIGS)
    return StudyFiles(folder, read_json(folder / "summary.json"), next(filter(None, texts), ""))
