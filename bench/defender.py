"""The Defender's rollout and update with shared prompts, against the plain path, transformers' generate and TRL, in one run.

    python bench/defender.py --json bench/results/cpu/defender.json
    python bench/defender.py --only update --group 8 --response 32 --side 400x384
    python bench/defender.py --model 3b --group 8 --response 256 --prompts 2 --side 2996x1400    # a GPU; 5,350 tokens of a picture

A real Qwen2.5-VL with random weights, real DeepSpeed ZeRO-3 engines of one process. A ratio is one of medians on the same prompts and, for
updates, the same recorded answers, of runs that take turns (TRL's whole steps follow ours); it is null where losses, gradients or tokens
differ (compared in fp32; bf16 runs state the difference). Beside it stands what counting floating-point operations expects. TRL (1.16, with
datasets) takes part where it is installed, beside the small model; its step runs without ZeRO-3.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from run import machine, speed_of_light  # noqa: E402
from timing import peak_bytes, synchronize  # noqa: E402
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # noqa: E402

from aot_fast.bootstrap.folders import build_tokenizer, save_processor  # noqa: E402
from aot_fast.bootstrap.model import defender_config  # noqa: E402
from aot_fast.config import DefenderConfig, EngineConfig, LoraConfig, OptimizerConfig, RunConfig  # noqa: E402
from aot_fast.data.schema import Example, Question  # noqa: E402
from aot_fast.defender import dapo, flops, rollout_padded  # noqa: E402
from aot_fast.defender.counters import shapes_of  # noqa: E402
from aot_fast.defender.drawing import Sampling  # noqa: E402
from aot_fast.defender.groups import Group  # noqa: E402
from aot_fast.defender.model import Defender, load_defender  # noqa: E402
from aot_fast.defender.prompts import Prompts  # noqa: E402
from aot_fast.defender.rollout import sample  # noqa: E402
from aot_fast.engine import close_runtime, open_runtime  # noqa: E402

SHAPES = {
    "3b": {"hidden": 2048, "inner": 11008, "layers": 36, "heads": 16, "kv_heads": 2, "vocabulary": 151_936, "tied": True},
    "7b": {"hidden": 3584, "inner": 18944, "layers": 28, "heads": 28, "kv_heads": 4, "vocabulary": 152_064, "tied": False},
}
"""Of the published Qwen2.5-VL."""

TOLERANCE = 1e-5
"""Norm-relative difference of gradients in fp32 that only the order of sums may make (tests/defender/test_dapo.py)."""


class Endless(Defender):
    """A Defender without a stop token: every answer is as long as the others, in all that is compared."""

    stop_ids = (-1,)


@dataclass(frozen=True)
class Work:
    """What is measured."""

    folder: Path
    examples: list[Example]
    args: argparse.Namespace

    @property
    def group(self) -> int:
        return self.args.group

    @property
    def response(self) -> int:
        return self.args.response

    @property
    def repeats(self) -> int:
        return self.args.repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("small", *SHAPES), default="small", help="small: 10 M parameters; 3b, 7b: the published shapes")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0: full fine-tune")
    parser.add_argument("--attention", default="sdpa", help="as defender.attention")
    parser.add_argument("--frozen-vision", action="store_true", help="train the text layers alone")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--offload", choices=("none", "optimizer", "all"), default="none")
    parser.add_argument("--row-tokens", type=int, default=1 << 20, help="most tokens of a micro-batch")
    parser.add_argument("--padded-rows", type=int, default=0, help="rows of a micro-batch of the plain path; 0: all")
    parser.add_argument("--group", type=int, default=8, help="answers a prompt")
    parser.add_argument("--response", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step")
    parser.add_argument("--side", default="400x384", help="picture in pixels; 16x16 of them are a token, 28x28 for 3b and 7b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--only", choices=("update", "rollout", "trl"), default=None)
    parser.add_argument("--json", type=Path, default=None, help="file for the result")
    parser.add_argument("--commit", default="", help="written into the result; default: git's word")
    args = parser.parse_args()
    runtime = open_runtime(EngineConfig(offload=args.offload), RunConfig(threads=args.threads))
    with tempfile.TemporaryDirectory() as folder:
        width, height = map(int, args.side.split("x"))
        work = Work(Path(folder), pictures(args.prompts, width, height), args)
        facts = save_small(work.folder) if args.model == "small" else save_shape(work.folder, args.model)
        print(json.dumps(facts), flush=True)
        result = {
            "command": shlex.join(["python", "bench/defender.py", *sys.argv[1:]]),
            "machine": machine(runtime.device.type, args.commit),
        }
        result |= {"threads": torch.get_num_threads(), "model": facts, "work": vars(args) | {"json": str(args.json)}}
        if runtime.device.type == "cuda":
            result["speed_of_light"] = speed_of_light()
        defender, prompts = build(work, runtime)
        parts = {"update": compare_updates, "rollout": compare_rollouts, "trl": compare_with_trl}
        for name, part in parts.items():
            if args.only in (None, name) and (name != "trl" or args.model == "small"):
                made = part(work, runtime, defender, prompts)
                print(name, {key: value for key, value in made.items() if not isinstance(value, dict)}, flush=True)
                result |= made
    shown = {name: value for name, value in result.items() if not isinstance(value, (dict, list))}
    print(json.dumps(shown, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    close_runtime()


# The players and what they see


def save_shape(folder: Path, name: str) -> dict[str, float]:
    """A Qwen2.5-VL of a published shape with random weights in bf16, made on the GPU."""
    shape, tokenizer = SHAPES[name], build_tokenizer()
    tree = defender_config(tokenizer).to_dict()
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    tree["text_config"] |= {"hidden_size": shape["hidden"], "intermediate_size": shape["inner"], "num_hidden_layers": shape["layers"]}
    tree["text_config"] |= {"num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv_heads"], "rope_parameters": rope}
    tree["text_config"] |= {"vocab_size": shape["vocabulary"], "tie_word_embeddings": shape["tied"], "max_position_embeddings": 32768}
    tree["text_config"] |= {
        "layer_types": ["full_attention"] * shape["layers"],
        "initializer_range": 0.02,
        "max_window_layers": shape["layers"],
    }
    tree["vision_config"] |= {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
    tree["vision_config"] |= {"out_hidden_size": shape["hidden"], "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112}
    tree |= {"tie_word_embeddings": shape["tied"]}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**tree))
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    facts = facts_of(model)
    save_processor(folder)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"patch_size": 14}))
    return facts


def facts_of(model: Qwen2_5_VLForConditionalGeneration) -> dict[str, float]:
    counts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in (("all", model), ("vision", model.model.visual))}
    text = model.config.text_config
    return {
        "parameters_M": counts["all"],
        "vision_parameters_M": counts["vision"],
        "text_layers": text.num_hidden_layers,
        "vocabulary": text.vocab_size,
    }


def save_small(folder: Path) -> dict[str, float]:
    """A Qwen2.5-VL of about 10 M parameters and its processor, with random weights; returns its sizes."""
    tokenizer = build_tokenizer()
    tree = defender_config(tokenizer).to_dict()
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}
    tree["text_config"] |= {"hidden_size": 384, "intermediate_size": 1280, "num_attention_heads": 6, "num_key_value_heads": 2}
    tree["text_config"] |= {"rope_parameters": rope, "initializer_range": 0.04}
    tree["vision_config"] |= {"depth": 2, "hidden_size": 192, "intermediate_size": 384, "num_heads": 4, "out_hidden_size": 384}
    tree["vision_config"] |= {"fullatt_block_indexes": [1], "window_size": 64}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**tree)).float()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    save_processor(folder)
    return facts_of(model)


def pictures(count: int, width: int, height: int) -> list[Example]:
    """Questions about coloured tiles."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        tiles = torch.randint(0, 255, (6, 6, 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(tiles.numpy()).resize((width, height), Image.Resampling.NEAREST)
        made.append(Example(Question(str(i), f"{i}.png", f"How many red circles are there? {i}", "0"), image))
    return made


def build(work: Work, runtime) -> tuple[Defender, Prompts]:
    args, rows = work.args, work.group * len(work.examples)
    config = DefenderConfig(
        model=str(work.folder),
        optimizer=OptimizerConfig(lr=1e-6),
        lora=LoraConfig(rank=args.lora),
        attention=args.attention,
        gradient_checkpointing=args.checkpointing,
        train_vision=not args.frozen_vision,
        max_pixels=1 << 23,
        max_prompt_tokens=1 << 15,
        group_size=work.group,
        prompts_per_step=len(work.examples),
        max_response_tokens=work.response,
        dual_clip=None,  # TRL has none
        rollout_batch=rows,
        tokens_per_microbatch=args.row_tokens,
        microbatch=args.padded_rows or rows,
        prefetch_workers=0,
    )
    loaded = load_defender(config, EngineConfig(offload=args.offload), runtime)
    defender = Endless(**vars(loaded))
    return defender, Prompts(defender, work.examples)


def configured(defender: Defender, **changes) -> Defender:
    return replace(defender, config=replace(defender.config, **changes))


def answered(defender: Defender, prompts: Prompts, work: Work, version: int) -> list[Group]:
    """Sampled answers with rewards of their tokens alone: the share of even ones."""
    with defender.whole():
        sampled = sample(defender, (prompts[i] for i in range(len(prompts))), range(len(prompts)), sampling(work))
    groups = []
    for i, responses in enumerate(sampled):
        assert {len(r.ids) for r in responses} == {work.response}
        rewards = tuple(float((r.ids % 2 == 0).float().mean()) for r in responses)
        groups.append(Group(i, str(i), tuple(responses), rewards, (True,) * len(rewards), version, *prompts.seen(i)[2:]))
    return groups


def sampling(work: Work, temperature: float = 1.0) -> Sampling:
    return Sampling(work.group, temperature, 1.0, work.response)


def alternating(runs: dict[str, object], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times in turn, after one untimed turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            synchronize("cuda" if torch.cuda.is_available() else "cpu")
            start = time.perf_counter()
            run()
            synchronize("cuda" if torch.cuda.is_available() else "cpu")
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


# Update


def compare_updates(work: Work, runtime, defender: Defender, prompts: Prompts) -> dict[str, object]:
    """dapo.update on recorded answers, shared against padded."""
    players = {"shared": defender, "padded": configured(defender, shared_prefix=False)}
    groups = answered(defender, prompts, work, version=0)
    kept = {name: gradients_of(player, prompts, groups) for name, player in players.items()}
    difference = max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(kept["shared"][1], kept["padded"][1]))
    agree = runtime.dtype is torch.bfloat16 or difference < TOLERANCE and abs(kept["shared"][0] - kept["padded"][0]) < TOLERANCE
    del kept
    runs = {name: (lambda d=d: dapo.update(d, prompts, groups)) for name, d in players.items()}
    fresh = dapo.update(defender, prompts, [replace(g, version=defender.version) for g in groups])
    seconds = alternating(runs, work.repeats)
    memory = {name: peak_bytes(run, runtime.device.type) for name, run in runs.items()}
    shapes = shapes_of(groups, [True] * work.group * len(groups))
    config, how = defender.core.config, {"train_vision": defender.config.train_vision, "lora": bool(work.args.lora)}
    counted = [flops.update_flops(config, shapes, shared=shared, **how).total for shared in (True, False)]
    tokens = [sum(s.prompt + sum(s.responses) for s in shapes), sum(s.prompt * len(s.responses) + sum(s.responses) for s in shapes)]
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "update_gradient_difference": difference,
        "update_speedup": ratio(median["padded"], median["shared"], agree),
        "update_expected_by_flops": counted[1] / counted[0],
        "update_expected_by_tokens": tokens[1] / tokens[0],
        "update_memory_ratio": memory["shared"] / memory["padded"],
        "update_shared_gflops": counted[0] / median["shared"] / 1e9,
        "update_mfu": flops.mfu(counted[0], median["shared"], torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"),
        "update_tokens_per_s": tokens[0] / median["shared"],
        "update_nominal_tokens_per_s": tokens[1] / median["shared"],
        "logp_mismatch": fresh["logp_mismatch"],
        "update": {"seconds": seconds, "peak_bytes": memory, "flops": {"shared": counted[0], "nominal": counted[1]}, "tokens": tokens},
    }


def gradients_of(defender: Defender, prompts: Prompts, groups: list[Group]) -> tuple[float, list[torch.Tensor]]:
    """Loss and whole gradients (of a large model: every 16th) of one update that is not applied, with the groups as an earlier policy's, so
    that ratios matter."""
    from deepspeed.utils import safe_get_full_grad

    player, made = defender.player, []
    apply = player.step
    trained = [p for p in player.module.parameters() if p.requires_grad]
    trained = trained if len(trained) < 200 else trained[5::16]

    def keep(healthy):
        made.extend(safe_get_full_grad(p).float().clone() for p in trained)
        return apply(healthy=False)

    player.step = keep
    metrics = dapo.update(defender, prompts, [replace(g, version=-1) for g in groups])
    player.step = apply
    player.bad_steps = 0
    return metrics["loss"], made


def ratio(slow: float, fast: float, agree: bool) -> float | None:
    """slow / fast; None where the two did not compute the same."""
    return slow / fast if agree else None


# Rollout


def compare_rollouts(work: Work, runtime, defender: Defender, prompts: Prompts) -> dict[str, object]:
    """Sampling against `generate` with num_return_sequences = G. In fp32 greedy tokens must be its, sampled ones the plain rollout's."""
    every = [prompts[i] for i in range(len(prompts))]
    with defender.whole():
        agree = runtime.dtype is torch.bfloat16 or same_tokens(defender, every, work)
        runs = {
            "shared": lambda: sample(defender, every, range(len(every)), sampling(work)),
            "prefill": lambda: sample(defender, every, range(len(every)), replace(sampling(work), max_tokens=1)),
            "generate": lambda: generate(defender, every, work, num_return_sequences=work.group, do_sample=True, top_k=0),
        }
        seconds = alternating(runs, work.repeats)
        floor = step_bytes(defender, every, work)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    shapes = [flops.GroupShape.of(p.grid, len(p.ids), [work.response] * work.group) for p in every]
    counted = [flops.rollout_flops(defender.core.config, shapes, shared=shared).total for shared in (True, False)]
    step = (median["shared"] - median["prefill"]) / max(1, work.response - 1)
    return {
        "rollout_speedup": ratio(median["generate"], median["shared"], agree),
        "rollout_expected_by_flops": counted[1] / counted[0],
        "rollout_tokens_per_s": work.group * len(every) * work.response / median["shared"],
        "decode_steps_per_s": 1 / step,
        "decode_bytes_per_step": floor,
        "decode_bytes_per_s": floor / step,
        "rollout": {"seconds": seconds, "flops": {"shared": counted[0], "nominal": counted[1]}},
    }


def step_bytes(defender: Defender, every, work: Work) -> float:
    """Least bytes of a decoding step: weights of text layers and head, keys and values of each prompt and of half a response a row."""
    core, text = defender.core, defender.core.config.text_config
    size = core.lm_head.weight.element_size()
    weights = sum(p.numel() for p in core.model.language_model.layers.parameters()) + core.lm_head.weight.numel()
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    a_token = 2 * text.num_key_value_heads * dim * text.num_hidden_layers
    return size * (weights + a_token * (sum(len(p.ids) for p in every) + work.group * len(every) * work.response / 2))


def same_tokens(defender: Defender, every, work: Work) -> bool:
    """Whether greedy tokens are those of `generate`, and sampled ones those of the plain rollout."""
    greedy = [r.ids for group in sample(defender, every, range(len(every)), replace(sampling(work, 0.0), num_samples=1)) for r in group]
    theirs = generate(defender, every, work, num_return_sequences=1, do_sample=False)
    drawn = [draws(defender, every, range(len(every)), sampling(work)) for draws in (sample, rollout_padded.sample)]
    ours, plain = ([r.ids for group in made for r in group] for made in drawn)
    return all(torch.equal(a, b.cpu()) for a, b in zip([*greedy, *ours], [*theirs, *plain], strict=True))


def generate(defender: Defender, prompts, work: Work, **options) -> torch.Tensor:
    """[rows, R] tokens by transformers; all prompts have the same length here."""
    device = defender.runtime.device
    ids = torch.stack([p.ids for p in prompts]).to(device)
    out = defender.core.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.cat([p.pixels for p in prompts]).to(device),
        image_grid_thw=torch.cat([p.grid for p in prompts]).to(device),
        mm_token_type_ids=(ids == defender.core.config.image_token_id).int(),
        suppress_tokens=defender.banned_ids,
        min_new_tokens=work.response,
        max_new_tokens=work.response,
        **options,
    )
    return out[:, ids.shape[1] :]


# TRL


def compare_with_trl(work: Work, runtime, *moved: object) -> dict[str, object]:
    """A whole step, sampling to optimizer, and the loss on the same recorded answers."""
    try:
        import trl_step
        from trl import __version__
    except ImportError as missing:
        print(f"TRL takes no part: {missing}", flush=True)
        return {"trl_step_speedup": None}
    defender, prompts = build(work, runtime)  # anew: the other has been trained
    asked = [trl_step.Prompt(e.image, dapo_text(e)) for e in work.examples]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(work.folder, dtype=torch.float32)
    processor = trl_step.build_processor(work.folder, max_pixels=1 << 22)
    trainer = trl_step.build_trainer(
        model,
        processor,
        asked * (work.repeats + 1),
        work.folder / "trl",
        group_size=work.group,
        response_tokens=work.response,
        prompts_per_step=len(asked),
        banned_ids=defender.banned_ids,
    )
    groups = [replace(g, version=-1) for g in answered(defender, prompts, work, version=0)]
    drifted = [drift(g) for g in groups]
    loss, gradients = gradients_of(defender, prompts, drifted)
    norm = float(torch.stack([g.norm() for g in gradients]).norm())
    theirs, their_norm = trl_step.recorded_loss(trainer, rollouts_of(asked, drifted))
    agree = abs(theirs - loss) < TOLERANCE and abs(their_norm / norm - 1) < 1e-4
    seconds = []
    for turn in range(work.repeats + 1):
        start = time.perf_counter()
        dapo.update(defender, prompts_again(defender, work), answered(defender, prompts_again(defender, work), work, defender.version))
        seconds += [time.perf_counter() - start] if turn else []
    times = trl_step.train_steps(trainer, work.repeats)
    median = statistics.median(t.seconds for t in times)
    return {
        "trl_version": __version__,
        "trl_loss": [loss, theirs],
        "trl_gradient_norm": [norm, their_norm],
        "trl_step_speedup": ratio(median, statistics.median(seconds), agree),
        "trl": {"seconds": {"aot_fast": seconds, "trl": [t.seconds for t in times], "trl_generation": [t.generation for t in times]}},
    }


def dapo_text(example: Example) -> str:
    from aot_fast.data.schema import question_text

    return question_text(example.question.question, example.question.options)


def prompts_again(defender: Defender, work: Work) -> Prompts:
    """Nothing is kept from the step before: pictures are cut up again, as TRL does."""
    return Prompts(defender, work.examples)


def drift(group: Group) -> Group:
    """The answers as an earlier policy's, some tokens far enough away for both clips."""
    moved = [replace(r, logp=r.logp + 0.4 * torch.cos(torch.arange(len(r.logp)) + i)) for i, r in enumerate(group.responses)]
    return replace(group, responses=tuple(moved))


def rollouts_of(asked, groups: list[Group]) -> list:
    import trl_step

    rows = []
    for prompt, group in zip(asked, groups):
        rewards = torch.tensor(group.rewards)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        rows += [trl_step.Rollout(prompt, r.ids.tolist(), float(a), r.logp.tolist()) for r, a in zip(group.responses, advantages)]
    return rows


if __name__ == "__main__":
    main()
