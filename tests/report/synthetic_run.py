"""A run folder as the game leaves it: real scenes and implanted edits of the validation split, answers by chance."""

import json
import random
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console

from aot_fast.config import Config, GameConfig, RunConfig
from aot_fast.data.implant import implant
from aot_fast.data.scenes import Scene, make_question, render
from aot_fast.data.schema import Question
from aot_fast.evaluation.summary import summarise
from aot_fast.evaluation.tables import Edit, Prediction, edits_path, image_path, predictions_path, safe_name, write_table
from aot_fast.metrics import Tracker, atomic_write_text

World = tuple[Scene, Question]
Q_LOW = 0.6
TYPES = {"recolored": "replaced"}
"""What the audit calls an implant, where it has another word."""


@lru_cache(maxsize=512)
def world(index: int, size_px: int) -> World:
    return make_question("validation", index, size_px)


def worn(image: Image.Image, rng: random.Random) -> Image.Image:
    """As if through a codec: faint noise everywhere."""
    noise = np.random.default_rng(rng.randrange(2**32)).normal(0, 2.0, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def make_edit(scene: Scene, question: Question, size_px: int, rng: random.Random) -> tuple[Image.Image, float, bool, str]:
    """(picture, q, whether the truth is kept, type) of an edit: most are implants, some damage a target or paint over one."""
    fate = rng.random()
    if fate < 0.8:
        made = implant(scene, question, rng, size_px)
        return worn(render(made.scene, size_px), rng), rng.uniform(0.82, 0.97), True, TYPES.get(made.kind, made.kind)
    image = worn(render(scene, size_px), rng)
    x, y, w, h = question.target_boxes[0] if question.target_boxes else (8, 8, 16, 16)
    inset = 0 if fate < 0.9 else w // 4
    ImageDraw.Draw(image).ellipse((x + inset, y + inset, x + w - inset, y + h - inset), fill=rng.choice(["gray", "teal", "white"]))
    return (image, rng.uniform(0.1, 0.5), rng.random() < 0.7, "hybrid") if fate < 0.9 else (image, rng.uniform(0.62, 0.8), False, "blob")


def write_metrics(folder: Path, rounds: int, steps: int, rng: random.Random) -> None:
    with Tracker(folder, trackers=(), console=Console(quiet=True)) as tracker:
        for round in range(1, rounds + 1):
            for phase in ("attack", "defend"):
                for step in range(1, steps + 1):
                    progress = ((round - 1) * steps + step) / (rounds * steps)
                    tracker.log(phase, round, step, metrics_of(phase, progress, rng))


def metrics_of(phase: str, progress: float, rng: random.Random) -> dict[str, float]:
    """A step's values, as the players log them."""
    values = {"reward": 0.3 + 0.4 * progress + rng.gauss(0, 0.05), "ratio": 1 + rng.gauss(0, 1e-3), "kl": abs(rng.gauss(0, 1e-4))}
    if phase == "attack":
        values |= {"q": 0.9 + rng.gauss(0, 0.02), "e": 0.2 + 0.3 * progress + rng.gauss(0, 0.05), "u": min(1.0, 0.9 + rng.gauss(0, 0.05))}
    else:
        values |= {"accuracy": 0.5 + progress / 3 + rng.gauss(0, 0.04), "entropy": 0.6 - 0.3 * progress, "response/tokens": 7.0}
    return values | {"loss": rng.gauss(0, 0.02), "clip": 0.01, "grad_norm": rng.uniform(0.5, 2), "lr": 1e-4, "applied": 1.0}


def write_questions(folder: Path, worlds: Iterable[World]) -> None:
    head = json.dumps({"images": str(folder / "evaluation" / "images" / "clean")})
    names = ("id", "image", "question", "options", "answer", "target_boxes")
    lines = [json.dumps({name: getattr(question, name) for name in names}) for _, question in worlds]
    atomic_write_text(folder / "data" / "heldout.jsonl", "\n".join([head, *lines]) + "\n")


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_answers(folder: Path, worlds: Iterable[World], defender: int, on: str, wrong: float, rng: random.Random) -> None:
    """Every question is answered wrongly with probability `wrong`."""
    rows = []
    for _, question in worlds:
        right = rng.random() > wrong
        parsed = question.answer if right else "B" if question.answer == "A" else "A"
        rows.append(Prediction(question.id, on, f"\\boxed{{{parsed}}}", parsed, right, question.answer, question.kind))
    write_table(predictions_path(folder, defender, on), rows)


def write_edits(folder: Path, worlds: Iterable[World], on: str, size_px: int, seed: int) -> None:
    """Pictures and table of one Attacker; the same for the same seed, whatever the run."""
    rows = []
    for scene, question in worlds:
        image, q, kept, attack = make_edit(scene, question, size_px, random.Random(f"{seed} {on} {question.id}"))
        save(image_path(folder, on, question.id), image)
        rows.append(Edit(question.id, q, (q, 1.0), f"images/{on}/{safe_name(question.id)}.png", kept, attack))
    write_table(edits_path(folder, on), rows)


def write_curated(folder: Path, worlds: Iterable[World], round: int, size_px: int, rng: random.Random) -> None:
    rows = []
    for scene, question in worlds:
        image, q, kept, attack = make_edit(scene, question, size_px, rng)
        name = f"images/{safe_name(question.id)}_0.png"
        save(folder / name, image)
        verdict = {"question_id": question.id, "prompt": "Add", "seed": 1, "attacker_round": round, "integrity": [q, None], "q": q}
        verdict |= {"ramp": 1.0, "uniqueness": 1.0, "efficacy": rng.choice([0, 0.5, 1]), "answers": ["\\boxed{A}", "\\boxed{B}"]}
        accepted = verdict["efficacy"] > 0 and q > Q_LOW
        rows.append({**verdict, "reward": 0.5, "accepted": accepted, "audit": kept, "attack": attack, "image": name})
    taken = [{"question_id": row["question_id"], "source": "edit", "path": str(folder / row["image"])} for row in rows if row["accepted"]]
    for name, lines in (("edits", rows), ("set", taken)):
        atomic_write_text(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def write_run(
    folder: Path,
    num_questions: int = 8,
    rounds: int = 2,
    steps: int = 3,
    size_px: int = 64,
    strength: float = 0.1,
    seed: int = 0,
    arm: str = "coevolution",
) -> Path:
    """`strength`: how much each round lowers the chance that an edit fools the Defender. A control answers the game's edits of its seed."""
    rng = random.Random(f"{arm} {seed}")
    worlds = [world(i, size_px) for i in range(num_questions)]
    write_questions(folder, worlds)
    for scene, question in worlds:
        save(image_path(folder, "clean", question.id), render(scene, size_px))
    write_table(edits_path(folder, "roundtrip"), [Edit(question.id, rng.uniform(0.9, 0.99)) for _, question in worlds])
    attackers = range(rounds + 1)
    for attacker in attackers:
        write_edits(folder, worlds, f"attacker_{attacker}", size_px, seed)
    for defender in range(rounds + 1) if arm == "coevolution" else (0, rounds):
        write_answers(folder, worlds, defender, "clean", 0.1, rng)
        write_answers(folder, worlds, defender, "roundtrip", 0.12, rng)
        for attacker in attackers:
            write_answers(folder, worlds, defender, f"attacker_{attacker}", max(0.05, 0.35 + 0.08 * attacker - strength * defender), rng)
    for round in range(1, rounds + 1) if arm == "coevolution" else ():
        write_curated(folder / "curated" / f"round_{round:03d}", worlds, round, size_px, rng)
    write_metrics(folder, rounds, steps, rng)
    settings = f"run: {{name: {folder.name}, seed: {seed}}}\nreward: {{q_low: {Q_LOW}}}\nevaluation: {{gallery: 6}}\n"
    atomic_write_text(folder / "config.yaml", settings + f"game: {{arm: {arm}, rounds: {rounds}}}\n")
    atomic_write_text(folder / "FINISHED", "")
    spans = {"load": 4.0, "attack": 100.0, "attack/rollout": 60.0, "attack/update": 35.0, "defend": 50.0, "evaluate": 20.0}
    summarise(folder, Config(run=RunConfig(name=folder.name, seed=seed), game=GameConfig(arm=arm)), spans)
    return folder
