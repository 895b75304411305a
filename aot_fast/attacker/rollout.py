"""The edits of one optimizer step: every question's group on one rank, and the same edits whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from PIL.Image import Image

from aot_fast.attacker.counters import Stopwatch
from aot_fast.attacker.encoding import Encoding, decode, encode, window_of
from aot_fast.attacker.model import Attacker
from aot_fast.attacker.region import Window, cut, paste
from aot_fast.attacker.reward import Edit
from aot_fast.attacker.sampler import Sample, draw_window, sample, strides
from aot_fast.config import AttackerConfig
from aot_fast.data.schema import Example, edit_prompt
from aot_fast.engine import seed_of


@dataclass(frozen=True)
class Group:
    """The samples of one question."""

    encoding: Encoding
    samples: tuple[Sample, ...]
    edits: tuple[Edit, ...]
    """The samples' pictures, in the same order."""
    version: int
    """The Attacker's version (optimizer steps) that made them."""
    shared_steps: int = 0
    """Denoising steps that were taken once for the group."""
    num_steps: int = 0
    """Denoising steps of a sample, the shared ones included."""


def pictures_of(config: AttackerConfig, image: Image, window: Window | None) -> list[Image]:
    """What an edit is made from: the picture or its window, and beside a window the whole picture if it is asked for."""
    if window is None:
        return [image]
    return [cut(image, window), image] if config.context_pixels else [cut(image, window)]


def rollout(
    attacker: Attacker, examples: Sequence[Example], *, seed: int, round: int, step: int, group_size: int = 0, train: bool = True
) -> list[Group]:
    """This rank's groups, one for each of its share of `examples` (every rank passes the same sequence; only its own are read).

    train: samples with this step's stochastic window, recorded, `config.shared_noise` as set. Otherwise plain ODE samples, each from its
    own start noise, by the averaged weights where there are any. group_size 0: the config's. Seeds derive from (seed, round, step,
    question, sample), never from a position. A collective.
    """
    config = attacker.config
    count = group_size or config.group_size
    own = [examples[i] for i in attacker.runtime.mine(len(examples))]
    prompts = [edit_prompt(example.question.question) for example in own]
    base = (seed, "attacker", round, step)
    keys = [(*base, example.key) for example in own]
    windows = [window_of(attacker, example, seed_of(*key, "region")) for example, key in zip(own, keys)]
    seen = [pictures_of(config, example.image, window) for example, window in zip(own, windows)]
    copies = 1 if config.encode_once else count
    asked = tuple([x for x in xs for _ in range(copies)] for xs in (seen, prompts, [window is not None for window in windows]))
    attacker.stopwatch = watch = Stopwatch(attacker.runtime.device)
    if config.encode_once:
        encodings = attacker.encodings(attacker, *asked)
    else:
        with attacker.encoders():
            encodings = encode(attacker, *asked)
    attacker.runtime.barrier()  # here, so that nobody's denoising is seen to take as long as another's encoding
    watch.mark("encode")
    shared = train and config.shared_noise
    starts = [seed_of(*key, "start", 0 if shared else j) for key in keys for j in range(count)]
    noises = [seed_of(*key, "noise", j) for key in keys for j in range(count)]
    repeated = [encoding for encoding in encodings for _ in range(count // copies)]
    window = draw_window(config, step, *base) if train and config.dynamics != "ode" else None
    averaged = attacker.ema.applied() if attacker.ema and not train else nullcontext()
    with averaged, attacker.sampling():
        samples = sample(attacker, repeated, starts, noises, window)
    watch.mark("denoise")
    pictures = decode(attacker, [made.latents for made in samples], repeated)

    places = [(example.image, window) for example, window in zip(own, windows) for _ in range(count)]
    pictures = [edit if w is None else paste(image, w, edit, config.feather) for edit, (image, w) in zip(pictures, places)]
    watch.mark("decode")
    num_steps = len(strides(config, window[1] if window else 0))
    shared_steps = window[0] if window and shared and config.shared_prefix and config.encode_once else 0

    def group(i: int) -> Group:
        part = slice(i * count, (i + 1) * count)
        edits = (Edit(own[i], picture, prompts[i], noise, round) for picture, noise in zip(pictures[part], noises[part]))
        return Group(repeated[i * count], tuple(samples[part]), tuple(edits), attacker.player.version, shared_steps, num_steps)

    return [group(i) for i in range(len(own))]
