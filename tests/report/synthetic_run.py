"""A run folder as the game leaves it, made of random numbers: what the report is tested on."""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

from aot_fast.config import Config, RunConfig
from aot_fast.data.scenes import make_question, render
from aot_fast.evaluation.summary import summarise
from aot_fast.evaluation.tables import Edit, Prediction, edits_path, image_path, predictions_path, safe_name, write_table
from aot_fast.metrics import Tracker, atomic_write_text


def edited(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image with a distractor somewhere."""
    copy = image.copy()
    x, y, side = (rng.randrange(image.width - 12) for _ in range(3))
    ImageDraw.Draw(copy).ellipse((x, y, x + 10 + side % 4, y + 10 + side % 4), fill=rng.choice(["red", "gold", "navy", "purple"]))
    return copy


def write_metrics(folder: Path, rounds: int, steps: int, rng: random.Random) -> None:
    with Tracker(folder, trackers=()) as tracker:
        for round in range(1, rounds + 1):
            for phase in ("attack", "defend"):
                for step in range(1, steps + 1):
                    progress = ((round - 1) * steps + step) / (rounds * steps)
                    values = {
                        "reward": 0.3 + 0.4 * progress + rng.gauss(0, 0.05),
                        "ratio": 1 + rng.gauss(0, 1e-3),
                        "kl": abs(rng.gauss(0, 1e-4)),
                    }
                    values |= (
                        {"q": 0.9 + rng.gauss(0, 0.02), "e": 0.2 + 0.3 * progress + rng.gauss(0, 0.05)}
                        if phase == "attack"
                        else {"accuracy": 0.5 + progress / 3}
                    )
                    tracker.log(
                        phase,
                        round,
                        step,
                        {**values, "loss": rng.gauss(0, 0.02), "grad_norm": rng.uniform(0.5, 2), "lr": 1e-4, "applied": 1.0},
                    )


def write_run(folder: Path, num_questions: int = 8, rounds: int = 2, steps: int = 3, size_px: int = 64, strength: float = 0.1) -> Path:
    """`strength`: how much each round lowers the chance that an edit fools the Defender."""
    rng = random.Random(0)
    worlds = [make_question("heldout", i, size_px) for i in range(num_questions)]
    images = {question.id: render(scene, size_px) for scene, question in worlds}
    head = json.dumps({"images": str(folder / "evaluation" / "images" / "clean")})
    lines = [
        json.dumps(
            {"id": q.id, "image": q.image, "question": q.question, "options": q.options, "answer": q.answer, "target_boxes": q.target_boxes}
        )
        for _, q in worlds
    ]
    atomic_write_text(folder / "data" / "heldout.jsonl", "\n".join([head, *lines]) + "\n")

    def save(path: Path, image: Image.Image) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)

    def answer(defender: int, on: str, wrong: float) -> None:
        rows = []
        for _, question in worlds:
            right = rng.random() > wrong
            parsed = question.answer if right else "B" if question.answer == "A" else "A"
            rows.append(Prediction(question.id, on, f"\\boxed{{{parsed}}}", parsed, right, question.answer, question.kind))
        write_table(predictions_path(folder, defender, on), rows)

    for id, image in images.items():
        save(image_path(folder, "clean", id), image)
    write_table(edits_path(folder, "roundtrip"), [Edit(id, rng.uniform(0.9, 0.99)) for id in images])
    for attacker in range(rounds + 1):
        on, edits = f"attacker_{attacker}", []
        for id, image in images.items():
            save(image_path(folder, on, id), edited(image, rng))
            q = rng.choice([0.95, 0.9, 0.85, 0.4])
            edits.append(Edit(id, q, (q, 1.0), f"images/{on}/{safe_name(id)}.png", rng.random() > 0.1))
        write_table(edits_path(folder, on), edits)
    for defender in range(rounds + 1):
        answer(defender, "clean", 0.1)
        answer(defender, "roundtrip", 0.12)
        for attacker in range(rounds + 1):
            answer(defender, f"attacker_{attacker}", max(0.05, 0.35 + 0.08 * attacker - strength * defender))
    for round in range(1, rounds + 1):
        write_curated(folder / "curated" / f"round_{round:03d}", images, round, rng)
    write_metrics(folder, rounds, steps, rng)
    atomic_write_text(folder / "config.yaml", f"run: {{name: {folder.name}}}\nreward: {{q_low: 0.6}}\nevaluation: {{gallery: 6}}\n")
    atomic_write_text(folder / "FINISHED", "")
    spans = {"load": 4.0, "attack": 100.0, "attack/rollout": 60.0, "attack/update": 35.0, "defend": 50.0, "evaluate": 20.0}
    summarise(folder, Config(run=RunConfig(name=folder.name)), spans)
    return folder


def write_curated(folder: Path, images: dict[str, Image.Image], round: int, rng: random.Random) -> None:
    rows = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for id, image in images.items():
        edited(image, rng).save(folder / "images" / f"{safe_name(id)}_0.png")
        verdict = {
            "question_id": id,
            "prompt": "Add",
            "seed": 1,
            "attacker_round": round,
            "integrity": [0.9, None],
            "q": None,
            "ramp": 1.0,
            "uniqueness": 1.0,
        }
        verdict |= {"efficacy": rng.choice([0, 0.5, 1]), "answers": ["\\boxed{A}", "\\boxed{B}"], "reward": 0.5}
        rows.append({**verdict, "accepted": verdict["efficacy"] > 0, "image": f"images/{safe_name(id)}_0.png"})
    atomic_write_text(folder / "edits.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
