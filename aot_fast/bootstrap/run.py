"""Makes the small players from nothing (`aot-fast bootstrap tiny`): codec, Defender, judge, Attacker, and a card of what they can do."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLForConditionalGeneration

from aot_fast.bootstrap import attacker, defender, vae
from aot_fast.bootstrap.answers import accuracy_by_kind, look_alike_metrics, shortcut_metrics
from aot_fast.bootstrap.folders import save_attacker, save_defender
from aot_fast.bootstrap.training import Plan

FAST_STEPS = 8
"""Steps of each training in a rehearsal, which shows that everything runs and nothing else."""


@dataclass(frozen=True)
class Plans(defender.Plans):
    """How the parts are trained."""

    vae: Plan = vae.PLAN
    edits: Plan = attacker.BASE_PLAN
    cold_start: Plan = attacker.PLAN


SEEDS = {"vae": 1, "sight": 2, "facts": 2, "taught": 2, "asked": 4, "judges": 2, "alike": 4, "edits": 3, "cold_start": 3}
"""Added to the seed of the command."""


def _plans(seed: int, fast: bool) -> Plans:
    short = {"steps": FAST_STEPS, "warmup_steps": 2, "save_every": 4, "log_every": 1} if fast else {}
    return Plans(**{name: replace(plan, seed=seed + SEEDS[name], **short) for name, plan in vars(Plans()).items()})


def _train_codec(training: Path, plan: Plan, num_scenes: int) -> None:
    folder = training / "vae" / "model"
    if not (folder / "config.json").exists():
        vae.train_vae(training / "vae", plan, num_scenes).save_pretrained(folder)


def _train_encoder(training: Path, plans: Plans) -> None:
    """The Attacker's text encoder is the Defender that sees but has not learned to speak: its layers are still silent.

    Words and picture tokens then reach the transformer as they are. After the facts, a word's last state tells of the word to come
    instead: asked for a red star, the editor did not learn which colour was meant.
    """
    folder = training / "encoder"
    if not (folder / "config.json").exists():
        save_defender(defender.train_eyes(training / "defender", plans.sight).defender, folder, torch.float32)


def _load_frozen(training: Path) -> tuple[AutoencoderKLQwenImage, Qwen2_5_VLForConditionalGeneration]:
    codec = AutoencoderKLQwenImage.from_pretrained(training / "vae" / "model", torch_dtype=torch.float32)
    return vae.use_image_convolutions(codec), Qwen2_5_VLForConditionalGeneration.from_pretrained(training / "encoder").eval()


def _train_attacker(training: Path, plans: Plans, num_pairs: int, threads: int) -> QwenImageTransformer2DModel:
    torch.set_num_threads(threads)
    return attacker.train_attacker(*_load_frozen(training), training / "attacker", (plans.edits, plans.cold_start), num_pairs)


def _train_side_by_side(training: Path, plans: Plans, num_pairs: int) -> list[Qwen2_5_VLForConditionalGeneration]:
    """Attacker in a process of its own, Defender and judge in this one: that gains more than threads."""
    threads = torch.get_num_threads()
    each = max(1, threads // 2)
    child = multiprocessing.get_context("spawn").Process(target=_train_attacker, args=(training, plans, num_pairs, each), daemon=True)
    child.start()
    torch.set_num_threads(each)
    answering = [train(training / "defender", plans) for train in (defender.train_defender, defender.train_judge)]
    child.join()
    torch.set_num_threads(threads)
    if child.exitcode:
        raise RuntimeError(f"the Attacker's training ended with exit code {child.exitcode}; its error is above, the same command continues")
    return answering


def bootstrap(out: Path, seed: int, fast: bool = False) -> dict:
    """Write `out/defender`, `out/judge`, `out/attacker`, `out/card.json` and `out/CARD.md`; returns the card.

    A killed run continues from `out/training`, which may be deleted afterwards. `fast` rehearses with a few steps.
    """
    out = Path(out)
    training, plans = out / "training", _plans(seed, fast)
    num_scenes, num_pairs, num_checked = (64, 8, 8) if fast else (6000, 8000, 1000)

    _train_codec(training, plans.vae, num_scenes)
    _train_encoder(training, plans)
    print(f"codec and text encoder trained, {training_minutes(training):.1f} minutes so far", flush=True)
    answering, judging = _train_side_by_side(training, plans, num_pairs)
    editing = _train_attacker(training, plans, num_pairs, torch.get_num_threads())
    print(f"Defender, judge and Attacker trained, {training_minutes(training):.1f} minutes in all", flush=True)
    codec, encoder = _load_frozen(training)
    save_defender(answering, out / "defender")
    save_defender(judging, out / "judge")
    save_attacker(editing, codec, encoder, out / "attacker")
    card = {
        "command": f"aot-fast bootstrap tiny --seed {seed}",
        "seed": seed,
        "commit": commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "minutes": training_minutes(training),
        "steps": {name: plan.steps for name, plan in vars(plans).items()},
        "split": "validation",
        **_figures(out, codec, num_checked, training),
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (out / "CARD.md").write_text(_card_text(card))
    return card


def _figures(out: Path, codec: AutoencoderKLQwenImage, num_checked: int, training: Path) -> dict[str, dict[str, float]]:
    """What the written players can do, on the validation split; with a sheet of pictures of both editors in `training`."""
    _, encoder = _load_frozen(training)
    answering, judging = (
        Qwen2_5_VLForConditionalGeneration.from_pretrained(out / name, dtype=torch.float32).eval() for name in ("defender", "judge")
    )
    figures = {"vae": vae.round_trip_metrics(codec, "validation", num_checked)}
    for name, model in (("defender", answering), ("judge", judging)):
        figures[name] = accuracy_by_kind(model, "validation", num_checked) | shortcut_metrics(model, "validation", num_checked)
    figures["judge"] |= look_alike_metrics(judging, "validation", num_checked)
    for name, folder in (("editor", training / "attacker" / "base" / "model"), ("attacker", out / "attacker" / "transformer")):
        transformer = QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
        made = attacker.sample_split(transformer, codec, encoder, "validation", num_checked)
        attacker.contact_sheet([made.clean, made.edited]).save(training / f"{name}.png")
        figures[name] = attacker.editing_metrics(made) | attacker.attack_metrics(made, answering)
    return figures


def commit() -> str:
    """The commit of the checkout that this package lies in, "+" behind it when files differ; empty outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    found = git("rev-parse", "--short", "HEAD")
    return found + "+" * bool(found and git("status", "--porcelain"))


def training_minutes(folder: Path) -> float:
    """Sum over the trainings, which partly run side by side; a log's seconds start again from zero when a run was resumed."""
    minutes = 0.0
    for path in sorted(folder.glob("**/train.jsonl")):
        seconds = [json.loads(line)["seconds"] for line in path.read_text().splitlines()]
        minutes += sum(a for a, b in zip(seconds, [*seconds[1:], 0.0]) if b < a) / 60
    return minutes


def _card_text(card: dict) -> str:
    rows = [(part, name, value) for part in ("vae", "defender", "judge", "editor", "attacker") for name, value in card[part].items()]
    table = "\n".join(f"| {part} | {name} | {value:.4g} |" for part, name, value in rows)
    remarks = "".join(f"{remark} " for remark in card.get("remarks", []))
    return (
        "# The small players\n\n"
        "A Qwen2.5-VL and a Qwen-Image-Edit of a few million parameters, trained from scratch on rendered scenes of 64 x 64 px "
        "(`aot_fast/data/scenes.py`). They exist so that the whole game runs on a CPU; they know nothing but that world.\n\n"
        f"Made by `{card['command']}` at commit {card['commit'] or 'unknown'}, torch {card['torch']}, "
        f"{card['minutes']:.0f} minutes of training on {card['threads']} CPU threads. "
        f"{remarks}"
        f"Figures are from the `{card['split']}` split, whose seeds no training uses. Licence: Apache-2.0.\n\n"
        f"| part | figure | value |\n|---|---|---|\n{table}\n\n"
        "q is the least SSIM over the target boxes, against the clean picture; `attack_success` is the share of questions that the "
        "Defender answers rightly on the codec's round trip and wrongly on an edit with q over 0.6. `editor` is the Attacker before its "
        "cold start, taught plain instructions only; `second_instance` is its failure (an added object that answers to a target's name), "
        'and `answer_still_true` what the scene graph\'s audit says of all edits. `fooled_by_companion` is the share of the "is there" '
        "questions with a right no on the clean scene and with yes once something red is drawn in, `fooled_by_others` the same for "
        "other colours. `counts_look_alikes` is the share of right counts where objects share colours and shapes, "
        "`answers_look_alikes` the same of the world's own questions.\n"
    )


def publish(out: Path, assets: Path) -> None:
    """Copy what `bootstrap` made, without its training state, into the package's assets."""
    for name in ("defender", "judge", "attacker"):
        shutil.rmtree(assets / name, ignore_errors=True)
        shutil.copytree(out / name, assets / name)
    for name in ("card.json", "CARD.md"):
        shutil.copy(out / name, assets / name)
