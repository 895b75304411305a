"""The Attacker's step, sampling to optimizer, with what it does once for a group against the plain path, in one run.

    python bench/attacker.py --json bench/results/cpu/attacker.json
    python bench/attacker.py --plan
    python bench/attacker.py --model qwen_image_edit --published --json FILE     a GPU: attacker_true_shape.py, which says what it measures

The bundled small pipeline, a real DeepSpeed ZeRO-3 engine of one process. Both sides do the same work: same pictures, window, reference
size and guidance, the same samples and gradients (compared before anything is timed; no ratio is given where they differ); rewards are
given, for a Defender's answers cost both the same. A ratio is one of medians of steps that take turns. Each lever's factor is the time with
that lever off over the time with all on. `recipe` is other work: it is stated as operations and seconds, not as a speed-up. --plan counts
the operations of an epoch of 512 images at Qwen-Image-Edit's true shape, without running anything.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import attacker_true_shape  # noqa: E402
import torch  # noqa: E402
from attacker_true_shape import SHAPES, encoder_config  # noqa: E402
from attacker_work import forget, questions, rewarded, write  # noqa: E402
from run import machine  # noqa: E402
from timing import peak_bytes, synchronize  # noqa: E402

from aot_fast.attacker import flops  # noqa: E402
from aot_fast.attacker.flow_grpo import update  # noqa: E402
from aot_fast.attacker.model import Attacker, load_attacker  # noqa: E402
from aot_fast.attacker.recipes import RECIPES  # noqa: E402
from aot_fast.attacker.rollout import rollout  # noqa: E402
from aot_fast.attacker.sampler import draw_window  # noqa: E402
from aot_fast.config import AttackerConfig, EngineConfig, LoraConfig, OptimizerConfig, RunConfig  # noqa: E402
from aot_fast.data.schema import Example, edit_prompt  # noqa: E402
from aot_fast.engine import close_runtime, open_runtime  # noqa: E402
from aot_fast.settings import load  # noqa: E402

TOLERANCE = 1e-5
"""Norm-relative difference of gradients in fp32 that only the order of sums may make (tests/attacker/test_attacker_speed.py)."""

LEVERS = {
    "encode_once": {"encode_once": False},
    "shared_prefix": {"shared_prefix": False},
    "batched_decode": {"decode_batch": 1},
    "batched_replay": {"tokens_per_microbatch": 0},  # then a micro-batch holds as many (sample, step) pairs as a group has samples
}
"""What each lever's absence is. Without encode_once no two samples have the same encoding, and none shares a prefix either."""


DEFAULTS = {"group": (8, 16), "prompts": (4, 1), "repeats": (5, 3)}
"""Of the bundled pipeline, and of a shape of attacker_true_shape.py."""


def main() -> None:
    args = arguments()
    if args.plan:
        print(plan())
        return
    runtime = open_runtime(EngineConfig(), RunConfig(threads=args.threads))
    result = {"command": shlex.join(["python", "bench/attacker.py", *sys.argv[1:]]), "machine": machine(runtime.device.type, args.commit)}
    result |= {"threads": torch.get_num_threads(), "work": vars(args) | {"json": str(args.json)}}
    if args.model in SHAPES:
        result = attacker_true_shape.measure(args, runtime, result)
    else:
        attacker = load_attacker(config_of(args), EngineConfig(), runtime)
        disturb(attacker)
        asked = questions(args.prompts)
        result |= compare_steps(attacker, asked, args.repeats) | compare_recipes(attacker, asked, args.repeats)
    write(result, args.json)
    print(json.dumps({name: value for name, value in result.items() if name not in ("raw", "machine", "work", "settings")}, indent=1))
    close_runtime()
    if "failed" in result.get("ours", {}):
        sys.exit(1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="count the operations of an epoch; runs nothing")
    parser.add_argument("--model", choices=("small", *SHAPES), default="small", help="small: the bundled pipeline")
    parser.add_argument("--group", type=int, default=None, help="samples a prompt; 8, at the true shape 16")
    parser.add_argument("--prompts", type=int, default=None, help="prompts a step; 4, at the true shape 1")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--window", type=int, default=3, help="stochastic, trained steps")
    parser.add_argument("--repeats", type=int, default=None, help="steps that count; 5, at the true shape 3")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--json", type=Path, default=None, help="file for the result")
    parser.add_argument("--commit", default="", help="written into the result; default: git's word")
    attacker_true_shape.add_arguments(parser)
    args = parser.parse_args()
    for name, values in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.model in SHAPES])
    return args


def config_of(args: argparse.Namespace) -> AttackerConfig:
    """All levers on."""
    return AttackerConfig(
        model="asset:tiny/attacker",
        lora=LoraConfig(rank=16, alpha=32),
        optimizer=OptimizerConfig(lr=1e-9),  # so that all steps are taken by the same weights
        target_pixels=64 * 64,
        reference_pixels=64 * 64,
        condition_pixels=64 * 64,
        num_steps=args.steps,
        window=args.window,
        window_range=(0, args.window + 2),
        group_size=args.group,
        prompts_per_step=args.prompts,
        rollout_batch=args.group * args.prompts,
        microbatch=args.group,
        tokens_per_microbatch=1 << 14,
    )


def disturb(attacker: Attacker) -> None:
    """Adapters that do something: fresh ones are zero, and half of their gradient with them."""
    import deepspeed

    trained = [p for p in attacker.player.module.parameters() if p.requires_grad]
    made = torch.Generator().manual_seed(0)
    with deepspeed.zero.GatheredParameters(trained, modifier_rank=0), torch.no_grad():
        for parameter in trained:
            parameter += 0.02 * torch.randn(parameter.shape, generator=made).to(parameter.device)


# The same work


def compare_steps(attacker: Attacker, asked: list[Example], repeats: int) -> dict[str, object]:
    """Whole steps with all levers on, with all off, and with each off."""
    off = {name: value for changes in LEVERS.values() for name, value in changes.items()}
    players = {"fast": attacker, "plain": changed(attacker, **off)}
    players |= {f"without_{name}": changed(attacker, **changes) for name, changes in LEVERS.items()}
    found = {name: gradients_of(player, asked, turn=1) for name, player in players.items()}
    norm = torch.linalg.vector_norm(found["plain"])
    difference = max(float((found[name] - found["plain"]).norm() / norm) for name in players)
    agree = difference < TOLERANCE
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in players}
    for turn in range(repeats + 1):
        for name, player in players.items():
            seconds = step(player, asked, turn)
            stages[name] += [seconds] if turn else []
    memory = {name: peak_bytes(lambda p=players[name]: step(p, asked, 1), attacker.runtime.device.type) for name in ("fast", "plain")}
    median = {name: statistics.median(sum(s.values()) for s in times) for name, times in stages.items()}
    return {
        "gradient_difference": difference,
        "step_speedup": median["plain"] / median["fast"] if agree else None,
        "memory_ratio": memory["fast"] / memory["plain"],
        "levers": {name: median[f"without_{name}"] / median["fast"] if agree else None for name in LEVERS},
        "seconds": {
            name: {stage: statistics.median(s[stage] for s in stages[name]) for stage in stages[name][0]} for name in ("fast", "plain")
        },
        "images_per_s": len(asked) * attacker.config.group_size / median["fast"],
        "raw": {"seconds": stages, "peak_bytes": memory},
    }


def changed(attacker: Attacker, **changes: object) -> Attacker:
    return replace(attacker, config=replace(attacker.config, **changes))


def step(attacker: Attacker, asked: list[Example], turn: int) -> dict[str, float]:
    """Seconds of sampling and of the update. No encoding is known from a step before."""
    forget(attacker)
    device = attacker.runtime.device.type
    synchronize(device)
    start = time.perf_counter()
    groups = rollout(attacker, asked, seed=0, round=1, step=turn)
    synchronize(device)
    between = time.perf_counter()
    update(attacker, [rewarded(group) for group in groups])
    synchronize(device)
    return {"rollout": between - start, "update": time.perf_counter() - between}


def gradients_of(attacker: Attacker, asked: list[Example], turn: int) -> torch.Tensor:
    """The whole gradient of a step that is not applied, as one vector."""
    from deepspeed.utils import safe_get_full_grad

    player, made = attacker.player, []
    apply = player.step

    def keep(healthy):
        made.extend(safe_get_full_grad(p).float().flatten().clone() for p in player.module.parameters() if p.requires_grad)
        return apply(healthy=False)

    player.step = keep
    step(attacker, asked, turn)
    player.step = apply
    player.bad_steps = 0
    return torch.cat(made)


# Other work


def compare_recipes(attacker: Attacker, asked: list[Example], repeats: int) -> dict[str, object]:
    """The published recipe's settings, scaled down: guidance, a reference of four times the area, every step but the last trained."""
    config = attacker.config
    published = changed(
        attacker,
        guidance=4.0,
        reference_pixels=4 * config.target_pixels,
        window=config.num_steps - 1,
        window_range=(0, config.num_steps - 1),
        encode_once=False,
        shared_prefix=False,
        tokens_per_microbatch=0,
    )
    players = {"ours": attacker, "published": published}
    seconds: dict[str, list[float]] = {name: [] for name in players}
    turns = range(1, max(2, repeats // 2) + 1)
    for turn in (0, *turns):
        for name, player in players.items():
            taken = sum(step(player, asked, turn).values())
            seconds[name] += [taken] if turn else []
    counted = {name: operations(player, asked, turns) for name, player in players.items()}
    return {
        "recipe": {
            "operations": counted,
            "operations_saved": counted["published"] / counted["ours"],
            "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        }
    }


def operations(attacker: Attacker, asked: list[Example], turns: Sequence[int]) -> int:
    """Of the transformer in a turn, on average."""
    config = attacker.config
    [encoding] = attacker.encodings(attacker, [asked[0].image], [edit_prompt(asked[0].question.question)])
    target = encoding.size[0] * encoding.size[1]
    tokens = flops.Tokens(target, len(encoding.reference), len(encoding.prompt), 0 if encoding.negative is None else len(encoding.negative))
    starts = [draw_window(config, turn, 0, "attacker", 1, turn)[0] for turn in turns]
    before = sum(starts) / len(starts) if config.shared_prefix else 0.0
    work = flops.Work(len(asked), config.group_size, tokens, config.num_steps - before, before, config.window, True, False)
    return flops.step_flops(attacker.player.module.config, work).total


# Plan

TRUE = SHAPES["qwen_image_edit"]
WORDS = 60
"""Tokens of a prompt's own words and of what the template adds after its system turn."""
IMAGES = 512


def plan() -> str:
    """Operations of one epoch of 512 images under three recipes."""
    ours, theirs = load("paper_8gpu").attacker, RECIPES["flow_grpo_edit"].settings
    rows = {
        # flow_grpo's edit recipe: the reference and the encoder's picture at 1024^2, guidance, 10 steps of which it trains 9.
        "flow_grpo, published": recipe(
            1024**2, 1024**2, theirs["guidance"] > 1, theirs["num_steps"], theirs["window"], 0.0, theirs["group_size"], each_encoded=True
        ),
        "paper_8gpu with guidance": planned(ours, guided=True),
        "paper_8gpu": planned(ours, guided=False),
    }
    first = rows["flow_grpo, published"]
    lines = [f"{'EFLOP an epoch of 512 images, 512^2':36s}{'sampling':>10s}{'update':>10s}{'recomputed':>12s}{'all':>8s}{'fewer':>8s}"]
    for name, done in rows.items():
        whole = done.total + done.recomputed
        values = [f"{x / 1e18:.2f}" for x in (done.encode + done.denoise + done.decode, done.update, done.recomputed, whole)]
        times = (first.total + first.recomputed) / whole
        lines.append(f"{name:36s}{values[0]:>10s}{values[1]:>10s}{values[2]:>12s}{values[3]:>8s}{times:7.1f}x")
    return "\n".join(lines)


def planned(config: AttackerConfig, guided: bool) -> flops.StepFlops:
    low, high = config.window_range
    before = (high - config.window - low) / 2 + low  # of a window that starts anywhere in its range
    areas = config.reference_pixels, config.condition_pixels
    return recipe(*areas, guided, config.num_steps, config.window, before, config.group_size, each_encoded=False)


def recipe(
    reference: int, condition: int, guided: bool, steps: int, trained: int, shared: float, group: int, each_encoded: bool
) -> flops.StepFlops:
    text = condition // 28**2 + WORDS
    tokens = flops.Tokens(512**2 // 16**2, reference // 16**2, text, text if guided else 0)
    work = flops.Work(IMAGES // group, group, tokens, steps - shared, shared, trained, True, True, False, IMAGES if each_encoded else 0)
    side = int(condition**0.5) // 28 * 28
    encoder = flops.text_encoder_flops(encoder_config(TRUE), (side, side), text + 64) * (2 if guided else 1)
    vae = json.dumps(TRUE.vae)
    still = not each_encoded  # the published recipe runs the video VAE as it is
    wide = int(reference**0.5)
    encoding = encoder + flops.vae_flops(vae, wide, wide, True, still)
    return flops.step_flops(TRUE.transformer, work, encoding, flops.vae_flops(vae, 512, 512, False, still))


if __name__ == "__main__":
    main()
