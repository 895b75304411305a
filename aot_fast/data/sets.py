"""The pictures that a phase works on: the training and held-out questions, and lists of examples that are decoded when asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import overload

from aot_fast.config import WORLD_VALIDATION, DataConfig
from aot_fast.data.images import ImageStore, load_image
from aot_fast.data.questions import read_questions, split_heldout
from aot_fast.data.scenes import write_world
from aot_fast.data.schema import Example, Question
from aot_fast.engine import Runtime, on_rank_0
from aot_fast.metrics import atomic_write_text

WORLD_TRAIN, WORLD_HELDOUT = 2000, 500


@dataclass(frozen=True)
class Split:
    """Questions with the store of their images."""

    questions: list[Question]
    images: ImageStore

    def examples(self) -> Pictures:
        """The clean pictures."""
        rows = [Picture(question.id, "clean", -1, str(self.images.folder / question.image)) for question in self.questions]
        return Pictures(rows, self)


@dataclass(frozen=True)
class Picture:
    """A line of a curated or evaluated set."""

    question_id: str
    source: str
    """clean | roundtrip | edit."""
    attacker_round: int
    path: str


class Pictures(Sequence[Example]):
    """Examples whose pictures are read from disk when asked for."""

    def __init__(self, rows: Iterable[Picture], split: Split):
        self.rows = list(rows)
        self.split = split
        self._questions = {question.id: question for question in split.questions}

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Pictures: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return Pictures(self.rows[index], self.split)
        row = self.rows[index]
        question = self._questions[row.question_id]
        if row.source == "clean":
            image = self.split.images.load(question)
        else:
            image = load_image(Path(row.path), self.split.images.max_pixels)
        return Example(question, image, row.source, row.attacker_round)

    def save(self, path: Path) -> None:
        """Write the rows as JSON lines, whole or not at all."""
        atomic_write_text(path, "".join(json.dumps(asdict(row)) + "\n" for row in self.rows))

    @staticmethod
    def read(path: Path, split: Split) -> Pictures:
        """Inverse of `save`."""
        return Pictures([Picture(**json.loads(line)) for line in _lines(path)], split)


def open_data(config: DataConfig, run_folder: Path, seed: int, runtime: Runtime) -> tuple[Split, Split]:
    """(training, held-out) questions, every image of which has been decoded once; bad ones are in `bad_samples.jsonl`.

    Raises ValueError for a bad line, or when too many images are bad (RELIABILITY.md, "Data").
    """
    on_rank_0(runtime, lambda: _prepare(config, run_folder, seed))
    return tuple(_read_prepared(run_folder, name, config) for name in ("train", "heldout"))


def _prepare(config: DataConfig, run_folder: Path, seed: int) -> None:
    """On rank 0: write `data/{train,heldout}.jsonl` of usable questions with the folder of their images into the run folder."""
    folder = run_folder / "data"
    if (folder / "heldout.jsonl").is_file():  # checked by the launch that began the run
        return
    if config.train == "world":
        splits = {"train": "train", "heldout": "validation" if config.heldout == WORLD_VALIDATION else "heldout"}
        sets = {name: _world(config, folder / "world" / split, split) for name, split in splits.items()}
    else:
        sets = _user_sets(config, seed)
    for name, (questions, images) in sets.items():
        limit = config.num_train if name == "train" else config.num_heldout
        store = ImageStore(images, config.max_image_pixels)
        usable = store.check(questions[: limit or None], run_folder / "bad_samples.jsonl", config.max_bad_fraction)
        lines = [json.dumps({"images": str(Path(images).resolve())})] + [json.dumps(asdict(q), ensure_ascii=False) for q in usable]
        atomic_write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")


def _world(config: DataConfig, folder: Path, split: str) -> tuple[list[Question], Path]:
    count = config.num_train or WORLD_TRAIN if split == "train" else config.num_heldout or WORLD_HELDOUT
    return read_questions(write_world(folder, split, count, config.world_size), folder), folder


def _user_sets(config: DataConfig, seed: int) -> dict[str, tuple[list[Question], Path]]:
    images = Path(config.images or Path(config.train).parent)
    train = read_questions(config.train, images)
    if not config.heldout:
        train, heldout = split_heldout(train, config.heldout_fraction, seed)
        return {"train": (train, images), "heldout": (heldout, images)}
    heldout_images = Path(config.heldout_images or config.images or Path(config.heldout).parent)
    return {"train": (train, images), "heldout": (read_questions(config.heldout, heldout_images), heldout_images)}


def _read_prepared(run_folder: Path, name: str, config: DataConfig) -> Split:
    head, *lines = _lines(run_folder / "data" / f"{name}.jsonl")
    store = ImageStore(json.loads(head)["images"], config.max_image_pixels)
    return Split([_question(json.loads(line)) for line in lines], store)


def _lines(path: Path) -> list[str]:
    # Not splitlines(): a question may hold a U+2028, which JSON leaves as it is.
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def _question(record: dict) -> Question:
    lists = {key: tuple(record[key]) for key in ("options", "target_names")}
    return Question(**{**record, **lists, "target_boxes": tuple(map(tuple, record["target_boxes"]))})
