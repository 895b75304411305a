"""Every setting of aot_fast, as frozen dataclasses. Imports no torch, so that `--help` and errors are instant.

`load()` in `settings.py` turns a YAML file and dotted overrides into a `Config`; `check()` there holds the rules between fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

WORLD_VALIDATION = "world:validation"
"""Value of `data.heldout`: the split of the synthetic world on which settings may be chosen."""


@dataclass(frozen=True)
class RunConfig:
    """The run as a whole."""

    name: str = "run"
    """Name of the run; its folder is `folder/name`."""
    folder: str = "runs"
    """Where run folders live."""
    seed: int = 0
    """Base of every seed: they derive from (seed, role, round, step, sample)."""
    deterministic: bool = False
    """Deterministic algorithms on the GPU; the CPU is deterministic anyway."""
    threads: int = 0
    """CPU threads of each process; 0: cores divided by processes."""
    stop_after: int = 0
    """Stop (saved, resumable) after this many optimizer steps of this launch; 0: play to the end."""


@dataclass(frozen=True)
class DataConfig:
    """Questions and images."""

    train: str = "world"
    """Path of a JSONL file of questions, or `world` for the synthetic world."""
    images: str = ""
    """Folder of the training images; empty: the folder of the JSONL file."""
    heldout: str = ""
    """JSONL of held-out questions; empty: the world's held-out split, or a share of the training file. `world:validation`: the world's
    validation split, to choose settings without a look at the split that figures are published on."""
    heldout_images: str = ""
    """Folder of the held-out images; empty: as `images`."""
    heldout_fraction: float = 0.1
    """Share of the training file held out when `heldout` is empty (at least one image's questions)."""
    num_train: int = 0
    """Questions used of the training file, or made in the world; 0: all (world: 2,000)."""
    num_heldout: int = 0
    """Held-out questions used, or made in the world; 0: all (world: 500)."""
    world_size: int = 64
    """Side of the synthetic world's pictures in pixels."""
    max_image_pixels: int = 64_000_000
    """Largest image accepted, read from the header before decoding."""
    max_bad_fraction: float = 0.01
    """Abort when more than this share of the images (and more than 10 of them) cannot be used."""


@dataclass(frozen=True)
class EngineConfig:
    """torchrun and DeepSpeed ZeRO-3."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep optimizer states (`optimizer`) or parameters too (`all`) in host memory while training."""
    offload_idle: bool = True
    """Move the idle player's optimizer states to the host (GPU only)."""
    timeout_s: int = 1800
    """Limit of one collective."""
    persistence_threshold: int = 100_000
    """Parameters with fewer elements stay gathered on every rank (stage3_param_persistence_threshold)."""
    max_bad_steps: int = 5
    """Consecutive skipped (non-finite) optimizer steps that end the run."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a constant rate."""

    lr: float = 1e-6
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    warmup_steps: int = 0


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters; rank 0 trains all weights. No dropout: the replayed log-prob would differ from the rollout's."""

    rank: int = 0
    alpha: int = 128
    targets: tuple[str, ...] = ()
    """Module name endings; empty: the attention projections of the player."""
    fused: bool = True
    """Add what an adapter says in the layer's precision and inside its last product (aot_fast/adapters.py). Off, and where the player's
    `gather` is not update: peft's own forward, which goes through the adapter's precision."""


@dataclass(frozen=True)
class DefenderConfig:
    """The vision-language model and its DAPO training (MATH.md sections 1 and 2; AOT_FACTS.md for AOT's values)."""

    model: str = "asset:tiny/defender"
    """Folder in the Hugging Face layout, hub id, or `asset:NAME` for a bundled one."""
    revision: str = ""
    """Pinned commit of a hub id; required for one."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """flash_attention_2 needs the package flash-attn, flex_attention a GPU."""
    shared_prefix: bool = True
    """Compute a prompt once for all of its responses, in rollout and training; false: the plain path, a padded row for every response."""
    liger: bool = True
    """On a GPU, where liger-kernel is installed, take its RMSNorm and SwiGLU."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train_vision: bool = True
    """Train the vision tower too."""
    vision_lr: float = 0.0
    """Learning rate of the vision tower; 0: as optimizer.lr."""
    gradient_checkpointing: bool = False
    gather: Literal["rollout", "update"] = "update"
    """What ZeRO-3 has cut up a rank holds whole while it samples; update: also for all micro-batches of an update, which otherwise gather
    every module's weights twice each (7B in bf16: 17 GB; one rank alone holds no second copy). With engine.offload all: as rollout."""
    min_pixels: int = 0
    """Smallest image after resizing; 0: as the model's processor says."""
    max_pixels: int = 0
    """Largest image after resizing; 0: as the model's processor says."""
    max_prompt_tokens: int = 8192
    """A longer prompt is refused, never truncated."""
    max_response_tokens: int = 4096
    temperature: float = 1.0
    top_p: float = 1.0
    group_size: int = 5
    """Responses a prompt (G)."""
    prompts_per_step: int = 128
    """Groups an optimizer step trains on, over all ranks."""
    steps_per_rollout: int = 1
    """Optimizer steps on one rollout; the rollout keeps prompts_per_step * steps_per_rollout groups."""
    prompts_per_try: int = 0
    """Prompts drawn per generation batch of dynamic sampling; 0: as many as are wanted."""
    max_generation_batches: int = 10
    """Generation batches before a step makes do with what it has."""
    max_staleness: int = 1
    """Policy versions a banked group may be old."""
    rollout_batch: int = 64
    """Responses generated at a time on one rank."""
    tokens_per_microbatch: int = 16384
    """Tokens in one forward and backward on one rank (shared_prefix); a prompt with one response may be more."""
    microbatch: int = 4
    """Responses in one forward and backward on one rank (shared_prefix: false)."""
    prefetch_workers: int = 2
    """Threads that decode and cut up pictures ahead of their use; 0: none."""
    prefetch_bytes: int = 4 << 30
    """Host memory for prompts with their pictures."""
    old_logp: Literal["rollout", "recompute"] = "rollout"
    """Old log-probs of the ratio once the policy has moved: those recorded while sampling, or the trainer's own, from one more forward pass
    after the rollout."""
    importance_cap: float = 0.0
    """Weigh each token by min(exp(trainer's - sampler's log-prob at the sampling policy), this); 0: off. Needs old_logp: recompute."""
    cuda_graph: bool = True
    """Replay a rollout's steps as a CUDA graph. Same results; off: the host calls every kernel of every step."""
    head_chunk_rows: int = 4096
    """Response tokens whose logits are held at once, in fp32 (4,096 of 152,064: 2.3 GiB). Changes results by rounding only."""
    loss: Literal["ppo", "gspo", "cispo"] = "ppo"
    agg: Literal["token", "seq_mean", "seq_sum_norm"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 3.0
    advantage_std: Literal["group", "batch", "none"] = "group"
    beta: float = 0.0
    """Weight of the KL to the reference (the Defender before training); 0: off."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    overlong_buffer: int = 0
    """Tokens before max_response_tokens in which a response is punished softly; 0: off."""
    mask_truncated: bool = False
    """Leave truncated responses out of the loss."""
    reward: str = "aot"
    """aot | exact | module:function(text, question) -> (reward, correct)."""


@dataclass(frozen=True)
class AttackerConfig:
    """The image editor and its Flow-GRPO training (MATH.md section 3)."""

    model: str = "asset:tiny/attacker"
    """Pipeline folder in the diffusers layout, hub id, or `asset:NAME` for a bundled one."""
    revision: str = ""
    """Pinned commit of a hub id; required for one."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=3e-4, weight_decay=1e-4))
    gradient_checkpointing: bool = False
    ema_decay: float = 0.0
    """Exponential average of the trained weights, used for the curated set and the evaluation; 0: off."""
    target_pixels: int = 512 * 512
    """Area of the edited image, or of the edited window."""
    region: Literal["whole", "window"] = "whole"
    """Edit the whole picture at about `target_pixels`, or a window of so many pixels at full resolution, pasted back: pictures of any size
    for the same cost. A group shares its window, which covers no target where there is room beside them."""
    feather: int = 16
    """Pixels over which an edited window fades into the picture."""
    context_pixels: int = 0
    """With `region: window`, area of the whole picture given as a second reference beside the window, so that the editor sees the scene
    that it edits a piece of; 0: it sees the window alone. Edit-Plus pipelines only. Costs its tokens in every step (512 * 512 has as many
    as a target of that size), and the text encoder another picture of `condition_pixels`."""
    reference_pixels: int = 512 * 512
    """Area of the reference given to the VAE (the pipeline's own is 1024 * 1024: four times the tokens of a 512 * 512 target)."""
    condition_pixels: int = 384 * 384
    """Area of the image given to the text encoder."""
    still_vae: bool = True
    """Encode and decode with 2-D convolutions: of one frame, the video VAE's 3-D kernels only ever see their last slice."""
    num_steps: int = 10
    """Denoising steps S."""
    dynamics: Literal["flow_sde", "dance", "cps", "ode"] = "flow_sde"
    eta: float = 1.0
    window: int = 3
    """Consecutive stochastic, trained steps w."""
    window_range: tuple[int, int] = (0, 5)
    """[lo, hi): the window lies inside."""
    window_order: Literal["random", "slide"] = "random"
    """Where it starts. random: drawn for every rollout (Flow-GRPO-Fast). slide: from lo towards hi, a step further every `window_stays`
    optimizer steps of a round, then from lo again (MixGRPO, arXiv 2507.21802, with a window of 4)."""
    window_stays: int = 25
    """Optimizer steps before a sliding window moves on; never fewer than share a rollout, which has one window."""
    tail_steps: int = 0
    """Steps from the window's end to the picture while training, in longer strides over the same schedule (MixGRPO-Flash's idea); 0: the
    schedule's own. Edits that nothing is trained on always take all steps."""
    shared_noise: bool = True
    """Give every sample of a group the same start noise, so that the group differs only inside the window."""
    encode_once: bool = True
    """Encode a picture and its prompt once for the whole group, and keep the encoding. Off: for every sample, and no prefix is shared."""
    gather: Literal["block", "rollout", "update"] = "update"
    """What a rank holds whole of the transformer that ZeRO-3 has cut up (Qwen-Image-Edit in bf16: 41 GB; one rank alone holds no second
    copy). block: a block's weights while it runs, also when sampling; least memory, a gather of all of them for every denoising step.
    rollout: all of them while it samples. update: also for the micro-batches of an update, which otherwise gather them twice each and run
    ZeRO's hooks around every module (bench/attacker_modes.py times all three). With engine.offload all: as rollout."""
    compile_blocks: bool = False
    """Compile the transformer's block with torch.compile (the one, for all of them), for sampling and training. Needs gather: update, where
    no ZeRO hooks run inside. Rollout and training then compile apart and may round apart (logp_mismatch tells); with old_logp recompute the
    first step's ratio is exactly 1 all the same."""
    shared_prefix: bool = True
    """With `shared_noise`, take the steps before the window once for the whole group. Off: for every sample; the same but for rounding."""
    encoding_bytes: int = 1 << 31
    """Host memory for encodings that may be wanted again."""
    encoding_folder: str = ""
    """Folder, below the run's unless absolute, where encodings are kept for later rounds, other ranks and other runs; none: in memory."""
    guidance: float = 1.0
    """True classifier-free guidance scale; 1: off."""
    negative_prompt: str = " "
    group_size: int = 16
    prompts_per_step: int = 16
    """Groups an optimizer step trains on, over all ranks."""
    steps_per_rollout: int = 1
    """Optimizer steps on one rollout of steps_per_rollout * prompts_per_step groups (flow_grpo's own recipes: 2)."""
    old_logp: Literal["rollout", "recompute"] = "rollout"
    """Old log-probs of the ratio: those recorded while sampling, or the trainer's own under the sampling weights in the update's own
    micro-batches, which round as the update does (one more forward pass for all optimizer steps of a rollout but the first)."""
    probe_edits: int = 0
    """Edits of every attackable question before a round's training, to see where the Attacker can earn anything; 0: none."""
    probe_share: float = 0.5
    """Share of the questions that is trained on: those whose probes earn the most different rewards. As many are probed as the round would
    draw without probing, so that each of those kept is drawn 1 / probe_share times."""
    rollout_batch: int = 16
    """Samples denoised at a time on one rank."""
    decode_batch: int = 8
    """Pictures decoded at a time on one rank."""
    microbatch: int = 4
    """(sample, step) pairs in one forward and backward on one rank."""
    tokens_per_microbatch: int = 0
    """As many pairs in one forward and backward as have so many tokens (edit, reference, prompts) together; 0: `microbatch` pairs."""
    variant: Literal["grpo", "guard", "dppo", "nft"] = "grpo"
    """Flow-GRPO's loss or one of its variants; `nft` learns from what the samples came out as (aot_fast/attacker/nft.py), with dynamics
    `ode` and `window` noise levels a sample in place of recorded steps."""
    clip: float = 0.0
    """Clip range; 0: 1e-4 (flow_sde, dance), 1e-5 (cps), 2e-6 (guard)."""
    adv_clip: float = 5.0
    advantage_std: Literal["group", "batch", "none"] = "group"
    beta: float = 0.0
    """Weight of the KL to the base model (LoRA switched off); 0: off."""
    kl: Literal["exact", "flow_grpo"] = "exact"
    cps_logp: Literal["published", "gaussian"] = "published"


@dataclass(frozen=True)
class RewardConfig:
    """The Attacker's reward (MATH.md section 4). AOT's own formula, weights and thresholds are not published."""

    kind: Literal["gated", "weighted"] = "gated"
    q_low: float = 0.6
    q_high: float = 0.8
    pad: float = 0.1
    """Padding of the target box before SSIM, as a share of its longer side."""
    trials: int = 4
    """Sampled answers of the Defender on each edit (m)."""
    efficacy: Literal["fraction", "consecutive", "likelihood"] = "fraction"
    """e: share of wrong trials; 1 only if the first `consecutive` all are; or 1 - p, with p the probability that the Defender repeats its
    answer to the original: without the trials' noise and for less work, where answers are short. Curation always counts trials."""
    efficacy_temperature: float = 1.0
    """The odds of a failure to the power of 1 / this (efficacy: likelihood). Over 1, an edit that moves a sure Defender from 0.999 to 0.99
    earns something too: until the first edits fool it, no other reward tells the Attacker where to go."""
    consecutive: int = 3
    """First k trials that must all be wrong (efficacy: consecutive)."""
    weights: tuple[float, float, float] = (0.5, 0.4, 0.1)
    """w_e, w_q, w_u (kind: weighted)."""
    judge: str = "defender"
    """Uniqueness: `defender` (a frozen Defender counts the targets in both images), `off`, or module:function."""
    judge_model: str = ""
    """Whose counts the judge takes (judge: defender): folder, hub id or `asset:NAME` of a Qwen2.5-VL; empty: the first Defender."""
    judge_revision: str = ""
    """Pinned commit of a hub id; required for one."""
    judge_answers: bool = False
    """Whether the judge must answer the question itself rightly on the edit, too (judge_model only: the first Defender would forbid what
    fools it). Two models that err together are fewer wrong lessons than one."""
    solvable_trials: int = 2
    """A question is attacked only if this many of this many trials are right on the clean image and on its round trip; 0: all are."""
    temperature: float = 1.0
    """Temperature of the trials."""
    poor_codec: Literal["refuse", "warn"] = "refuse"
    """What to do when the codec's round trip alone has a 5th percentile of q under q_high: it would pass for an attack."""


@dataclass(frozen=True)
class CurationConfig:
    """What the frozen Attacker's edits become training data for the Defender. AOT's own mix is unpublished."""

    num_questions: int = 256
    """Solvable questions edited for one curated set."""
    edits_per_question: int = 2
    """Edits tried for each."""
    num_pictures: int = 0
    """Pictures in the set: an Attacker that seldom fools the Defender then has less to say. 0: as many as give the accepted edits the
    share that the other two leave."""
    clean_share: float = 0.25
    """Least share of clean images in the set: they also fill the places of edits that are wanting."""
    replay_share: float = 0.15
    """Share of edits from earlier rounds."""
    hard_share: float = 0.5
    """Largest share of edits that fooled every trial (e = 1)."""


@dataclass(frozen=True)
class GameConfig:
    """How long the game is."""

    arm: Literal["coevolution", "clean", "roundtrip", "random_edit"] = "coevolution"
    """What the Defender trains on: the game itself, or one of the controls of MATH.md section 5."""
    warmup_steps: int = 0
    """Defender steps on clean images before the first round."""
    rounds: int = 3
    attacker_steps: int = 100
    """Attacker optimizer steps a round."""
    defender_steps: int = 100
    """Defender optimizer steps a round."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation after every round (MATH.md section 5)."""

    num_questions: int = 0
    """Held-out questions used; 0: all."""
    num_attacked: int = 0
    """Held-out questions that each Attacker edits; 0: as num_questions."""
    rounds: Literal["all", "last"] = "all"
    """all: every Defender answers every Attacker's edits. last: only the first and the last one do; Attackers edit after every round."""
    attacks_from: str = ""
    """Folder of a finished run whose held-out round trips and edits are answered instead of this run's own; empty: its own."""
    gallery: int = 12
    """Edits shown in the report for each Attacker."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of the pair of players (RELIABILITY.md)."""

    every: int = 50
    """Optimizer steps of a player between checkpoints; one is also written at the end of every phase."""
    keep: int = 2
    """Newest checkpoints kept (at least 2)."""


@dataclass(frozen=True)
class MetricsConfig:
    """Where metrics go besides `metrics.jsonl`."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    every: int = 1
    """Steps between log lines; the device is read only then."""


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementation of the operators is used."""

    backend: Literal["auto", "reference", "triton", "csrc"] = "auto"
    """auto: Triton for CUDA tensors, C++ for CPU tensors where csrc is built, else plain torch. reference: plain torch, and the Defender's
    loss from all logits at once."""


@dataclass(frozen=True)
class Config:
    """All settings; one attribute a section."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    defender: DefenderConfig = field(default_factory=DefenderConfig)
    attacker: AttackerConfig = field(default_factory=AttackerConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    curation: CurationConfig = field(default_factory=CurationConfig)
    game: GameConfig = field(default_factory=GameConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
