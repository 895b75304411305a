"""Makes the small players from nothing (`aot-fast bootstrap tiny`): codec, Defender, Attacker, and a card of what they can do."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLForConditionalGeneration

from aot_fast.bootstrap import attacker, defender, vae
from aot_fast.bootstrap.folders import save_attacker, save_defender
from aot_fast.bootstrap.training import Plan

FAST_STEPS = 8
"""Steps of each training in a rehearsal, which shows that everything runs and nothing else."""


def _plans(seed: int, fast: bool) -> dict[str, Plan]:
    parts = {"vae": vae, "defender": defender, "attacker": attacker}
    plans = {name: replace(part.PLAN, seed=seed + k) for k, (name, part) in enumerate(parts.items(), 1)}
    if fast:
        plans = {name: replace(plan, steps=FAST_STEPS, warmup_steps=2, save_every=4, log_every=1) for name, plan in plans.items()}
    return plans


def _sight_steps(plan: Plan) -> int:
    return min(defender.SIGHT_PLAN.steps, plan.steps)


def _train_encoder(training: Path, plan: Plan) -> None:
    """The Attacker's text encoder is the Defender after a part of its steps, so that the two can go on side by side."""
    folder = training / "encoder"
    if not (folder / "config.json").exists():
        stop_at = min(defender.ENCODER_STEPS, plan.steps // 2)
        encoder = defender.train_defender(training / "defender", plan, _sight_steps(plan), stop_at)
        save_defender(encoder, folder, torch.float32)


def _load_frozen(training: Path) -> tuple[AutoencoderKLQwenImage, Qwen2_5_VLForConditionalGeneration]:
    codec = vae.use_image_convolutions(AutoencoderKLQwenImage.from_pretrained(training / "vae" / "model"))
    return codec, Qwen2_5_VLForConditionalGeneration.from_pretrained(training / "encoder").eval()


def _train_attacker(training: Path, plan: Plan, num_questions: int, threads: int) -> QwenImageTransformer2DModel:
    torch.set_num_threads(threads)
    return attacker.train_attacker(*_load_frozen(training), training / "attacker", plan, num_questions)


def _train_side_by_side(training: Path, plans: dict[str, Plan], num_questions: int) -> Qwen2_5_VLForConditionalGeneration:
    """Attacker in a process of its own, Defender in this one: models this small gain more from two processes than from more threads."""
    threads = torch.get_num_threads()
    each = max(1, threads // 2)
    arguments = (training, plans["attacker"], num_questions, each)
    child = multiprocessing.get_context("spawn").Process(target=_train_attacker, args=arguments, daemon=True)
    child.start()
    torch.set_num_threads(each)
    answering = defender.train_defender(training / "defender", plans["defender"], _sight_steps(plans["defender"]))
    child.join()
    torch.set_num_threads(threads)
    if child.exitcode:
        raise RuntimeError(f"the Attacker's training ended with exit code {child.exitcode}; its error is above, the same command continues")
    return answering


def bootstrap(out: Path, seed: int, fast: bool = False) -> dict:
    """Write `out/defender`, `out/attacker`, `out/card.json` and `out/CARD.md`; returns the card.

    A killed run continues from `out/training`, which may be deleted afterwards. `fast` rehearses with a few steps.
    """
    out = Path(out)
    training, plans = out / "training", _plans(seed, fast)
    num_scenes, num_questions, num_checked = (64, 8, 8) if fast else (6000, 10_000, 1000)

    codec = vae.train_vae(training / "vae", plans["vae"], num_scenes)
    codec.save_pretrained(training / "vae" / "model")
    _train_encoder(training, plans["defender"])
    print(f"codec and text encoder trained, {training_minutes(training):.1f} minutes so far")
    answering = _train_side_by_side(training, plans, num_questions)
    editing = _train_attacker(training, plans["attacker"], num_questions, torch.get_num_threads())
    print(f"Defender and Attacker trained, {training_minutes(training):.1f} minutes in all")
    codec, encoder = _load_frozen(training)
    save_defender(answering, out / "defender")
    save_attacker(editing, codec, encoder, out / "attacker")

    start = time.perf_counter()
    card = {
        "command": f"aot-fast bootstrap tiny --seed {seed}",
        "seed": seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "minutes": training_minutes(training),
        "split": "validation",
        "vae": vae.round_trip_metrics(codec, "validation", num_checked),
        "defender": defender.accuracy_by_kind(answering, "validation", num_checked),
        "attacker": attacker.attack_metrics(editing, codec, encoder, answering, "validation", num_checked, sheet=training / "attacker.png"),
    }
    print(f"measured in {time.perf_counter() - start:.0f} s")
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (out / "CARD.md").write_text(_card_text(card))
    return card


def training_minutes(folder: Path) -> float:
    """Sum over the trainings, which partly run side by side; a log's seconds start again from zero when a run was resumed."""
    minutes = 0.0
    for path in sorted(folder.glob("**/train.jsonl")):
        seconds = [json.loads(line)["seconds"] for line in path.read_text().splitlines()]
        minutes += sum(a for a, b in zip(seconds, [*seconds[1:], 0.0]) if b < a) / 60
    return minutes


def _card_text(card: dict) -> str:
    rows = [(part, name, value) for part in ("vae", "defender", "attacker") for name, value in card[part].items()]
    table = "\n".join(f"| {part} | {name} | {value:.4g} |" for part, name, value in rows)
    remarks = "".join(f"{remark} " for remark in card.get("remarks", []))
    return (
        "# The small players\n\n"
        "A Qwen2.5-VL and a Qwen-Image-Edit of a few million parameters, trained from scratch on rendered scenes of 64 x 64 px "
        "(`aot_fast/data/scenes.py`). They exist so that the whole game runs on a CPU; they know nothing but that world.\n\n"
        f"Made by `{card['command']}`, torch {card['torch']}, {card['minutes']:.0f} minutes of training on {card['threads']} CPU threads. "
        f"{remarks}"
        f"Figures are from the `{card['split']}` split, whose seeds no training uses. Licence: Apache-2.0.\n\n"
        f"| part | figure | value |\n|---|---|---|\n{table}\n\n"
        "q is the least SSIM over the target boxes, against the clean picture; `attack_success` is the share of questions that the "
        "Defender answers rightly on the codec's round trip and wrongly on an edit with q over 0.6.\n"
    )


def publish(out: Path, assets: Path) -> None:
    """Copy what `bootstrap` made, without its training state, into the package's assets."""
    for name in ("defender", "attacker"):
        shutil.rmtree(assets / name, ignore_errors=True)
        shutil.copytree(out / name, assets / name)
    for name in ("card.json", "CARD.md"):
        shutil.copy(out / name, assets / name)
