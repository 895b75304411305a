"""Makes the small players from nothing (`aot-fast bootstrap tiny`): codec, Defender, Attacker, and a card of what they can do."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from aot_fast.bootstrap import attacker, defender, vae
from aot_fast.bootstrap.folders import save_attacker, save_defender

FAST_STEPS = 8
"""Steps of each training in a rehearsal, which shows that everything runs and nothing else."""


def _card_text(card: dict) -> str:
    rows = [(part, name, value) for part in ("vae", "defender", "attacker") for name, value in card[part].items()]
    table = "\n".join(f"| {part} | {name} | {value:.4g} |" for part, name, value in rows)
    return (
        "# The small players\n\n"
        "A Qwen2.5-VL and a Qwen-Image-Edit of a few million parameters, trained from scratch on rendered scenes of 64 x 64 px "
        "(`aot_fast/data/scenes.py`). They exist so that the whole game runs on a CPU; they know nothing but that world.\n\n"
        f"Made by `{card['command']}`, torch {card['torch']}, {card['minutes']:.0f} minutes of training on {card['threads']} CPU threads. "
        f"Figures are from the `{card['split']}` split, whose seeds no training uses. Licence: Apache-2.0.\n\n"
        f"| part | figure | value |\n|---|---|---|\n{table}\n\n"
        "q is the least SSIM over the target boxes, against the clean picture; `attack_success` is the share of questions that the "
        "Defender answers rightly on the codec's round trip and wrongly on an edit with q over 0.6.\n"
    )


def _training_minutes(folder: Path) -> float:
    """Sum over the logs; a log starts again from zero seconds when a run was resumed."""
    minutes = 0.0
    for path in sorted(folder.glob("*/train.jsonl")):
        seconds = [json.loads(line)["seconds"] for line in path.read_text().splitlines()]
        minutes += sum(a for a, b in zip(seconds, [*seconds[1:], 0.0]) if b < a) / 60
    return minutes


def bootstrap(out: Path, seed: int, fast: bool = False) -> dict:
    """Write `out/defender`, `out/attacker`, `out/card.json` and `out/CARD.md`; returns the card.

    A killed run continues from `out/training`, which may be deleted afterwards. `fast` rehearses with a few steps.
    """
    out = Path(out)
    training = out / "training"
    parts = {"vae": vae, "defender": defender, "attacker": attacker}
    plans = {name: replace(part.PLAN, seed=seed + k) for k, (name, part) in enumerate(parts.items(), 1)}
    if fast:
        plans = {name: replace(plan, steps=FAST_STEPS, warmup_steps=2, save_every=4, log_every=1) for name, plan in plans.items()}
    num_scenes, num_questions, num_checked = (64, 8, 8) if fast else (6000, 10_000, 1000)

    codec = vae.train_vae(training / "vae", plans["vae"], num_scenes)
    print(f"codec trained, {_training_minutes(training):.1f} minutes so far")
    answering = defender.train_defender(training / "defender", plans["defender"])
    save_defender(answering, out / "defender")
    print(f"Defender trained, {_training_minutes(training):.1f} minutes so far")
    editing = attacker.train_attacker(codec, answering, training / "attacker", plans["attacker"], num_questions)
    save_attacker(editing, codec, answering, out / "attacker")
    print(f"Attacker trained, {_training_minutes(training):.1f} minutes so far")

    start = time.perf_counter()
    card = {
        "command": f"aot-fast bootstrap tiny --seed {seed}",
        "seed": seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "minutes": _training_minutes(training),
        "split": "validation",
        "vae": vae.round_trip_metrics(codec, "validation", num_checked),
        "defender": defender.accuracy_by_kind(answering, "validation", num_checked),
        "attacker": attacker.attack_metrics(editing, codec, answering, "validation", num_checked, sheet=training / "attacker.png"),
    }
    print(f"measured in {time.perf_counter() - start:.0f} s")
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (out / "CARD.md").write_text(_card_text(card))
    return card


def publish(out: Path, assets: Path) -> None:
    """Copy what `bootstrap` made, without its training state, into the package's assets."""
    for name in ("defender", "attacker"):
        shutil.rmtree(assets / name, ignore_errors=True)
        shutil.copytree(out / name, assets / name)
    for name in ("card.json", "CARD.md"):
        shutil.copy(out / name, assets / name)
