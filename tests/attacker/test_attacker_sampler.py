"""Sampling: the pipelines' own ODE, independence of the batch, and what is recorded for training."""

from dataclasses import replace

import pytest
import torch

import aot_fast.kernels as K
from aot_fast.attacker.encoding import encode
from aot_fast.attacker.sampler import draw_window, sample, schedule, start_noise
from aot_fast.attacker.velocity import pad_prompts, velocity
from aot_fast.config import AttackerConfig
from tests.attacker.tiny_pipeline import picture

PROMPTS = ["Add a cat", "Add a plausible distractor object, somewhat longer than the other prompt"]


def run(attacker, encodings, window, seeds=range(100)):
    seeds = list(seeds)[: len(encodings)]
    with attacker.player.gathered():
        return sample(attacker, encodings, seeds, [1000 + s for s in seeds], window)


@pytest.mark.parametrize("kind", ["edit", "plus"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ode_sampling_is_the_pipelines_own(kind, guidance, folders, base_config, load, pipeline, monkeypatch):
    # The pipelines fix the reference at 1024^2; a picture of that ratio at 64^2 keeps the test small.
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as edit
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as plus

    monkeypatch.setattr(edit, "calculate_dimensions", lambda area, ratio: (64, 64, None))
    monkeypatch.setattr(plus, "calculate_dimensions", lambda area, ratio: (64, 64))
    config = replace(base_config, model=str(folders[kind]), guidance=guidance, num_steps=4)
    attacker, image = load(config), picture()
    encodings = encode(attacker, [image], PROMPTS[:1])
    noise = start_noise(attacker, encodings[0], [0])
    ours = run(attacker, encodings, None)[0]
    negative = " " if guidance > 1 else None
    theirs = pipeline[kind](
        image if kind == "edit" else [image],
        PROMPTS[0],
        negative_prompt=negative,
        true_cfg_scale=guidance,
        height=64,
        width=64,
        num_inference_steps=4,
        latents=noise,
        output_type="latent",
    ).images
    assert ours.steps == ()
    assert (ours.latents - theirs[0]).abs().max() < 1e-5


def test_a_sample_does_not_depend_on_the_rollout_batch(base_config, load):
    """Different prompts (padded inside a batch), two picture sizes, guidance on."""
    attacker = load(replace(base_config, guidance=2.0), seed=1)
    images = [picture(0), picture(1), picture(2, (96, 64)), picture(3)]
    encodings = encode(attacker, images, [*PROMPTS, *PROMPTS])
    results = {}
    for size in (1, 3, 4):
        attacker.config = replace(attacker.config, rollout_batch=size)
        results[size] = run(attacker, encodings, (0, 2))
    for size in (3, 4):
        for one, other in zip(results[1], results[size]):
            assert (one.latents - other.latents).abs().max() < 1e-5
            for first, second in zip(one.steps, other.steps, strict=True):
                assert (first.logp - second.logp).abs() < 1e-5


def test_padding_a_prompt_does_not_change_its_velocity(base_config, load):
    attacker = load(base_config)
    short, long = encode(attacker, [picture()] * 2, PROMPTS)
    x = start_noise(attacker, short, [0, 1])
    with attacker.player.gathered() as module:
        alone = velocity(module, [short], x[:1], [0.7], False).v
        padded = velocity(module, [short, long], x, [0.7, 0.7], False).v[:1]
    assert pad_prompts([short.prompt, long.prompt])[1] is not None
    assert (alone - padded).abs().max() < 1e-5
    assert (velocity_of_other_prompt(attacker, long, x) - alone).abs().max() > 1e-4  # the prompt matters at all


def velocity_of_other_prompt(attacker, encoding, x):
    with attacker.player.gathered() as module:
        return velocity(module, [encoding], x[:1], [0.7], False).v


@pytest.mark.parametrize("dynamics", ["flow_sde", "dance", "cps", "ode"])
def test_only_the_window_is_stochastic_and_recorded(dynamics, base_config, load):
    attacker = load(replace(base_config, dynamics=dynamics))
    encodings = encode(attacker, [picture()], PROMPTS[:1]) * 2
    with attacker.player.gathered():
        made = sample(attacker, encodings, [5, 5], [1, 2], (1, 3))
        plain = sample(attacker, encodings[:1], [5], [1], None)[0]
    levels = schedule(attacker, 64)
    if dynamics == "ode":
        assert all(one.steps == () for one in made) and torch.allclose(made[0].latents, plain.latents, atol=1e-5)
        return
    for one in made:
        assert [(step.sigma, step.sigma_next) for step in one.steps] == [(levels[1], levels[2]), (levels[2], levels[3])]
        assert torch.equal(one.steps[0].x_next, one.steps[1].x)
    assert torch.equal(made[0].steps[0].x, made[1].steps[0].x)  # same start noise: alike up to the window
    assert not torch.equal(made[0].steps[0].x_next, made[1].steps[0].x_next)  # other step seed: apart from there


def test_recorded_steps_follow_the_operator(base_config, load):
    """x_next and logp are those of flow_step for the velocity at x, noise from (step seed, step)."""
    from aot_fast.engine import seed_of

    attacker = load(base_config)
    encodings = encode(attacker, [picture()], PROMPTS[:1])
    step = run(attacker, encodings, (0, 2))[0].steps[0]
    with attacker.player.gathered() as module:
        v = velocity(module, encodings, step.x[None], [step.sigma], False).v
    seeds = torch.tensor([seed_of(1000, 0)])
    taken = K.flow_step(step.x[None], v, 1.0, step.sigma_next, eta=attacker.config.eta, sigma_max=step.sigma_max, seeds=seeds)
    assert torch.equal(taken.x_next[0], step.x_next) and torch.equal(taken.logp[0], step.logp)


def test_window_is_uniform_in_its_range_and_the_same_for_equal_seeds():
    config = AttackerConfig(num_steps=10, window=3, window_range=(1, 6))
    starts = [draw_window(config, step, 0, "attacker", 1, step) for step in range(200)]
    assert {first for first, _ in starts} == {1, 2, 3} and all(last == first + 3 for first, last in starts)
    assert starts[7] == draw_window(config, 7, 0, "attacker", 1, 7)


def test_a_sliding_window_moves_on_and_begins_again():
    config = AttackerConfig(num_steps=10, window=4, window_range=(1, 6), window_order="slide", window_stays=3)
    assert [draw_window(config, step, "any")[0] for step in range(8)] == [1, 1, 1, 2, 2, 2, 1, 1]
    # Two steps a rollout, which is drawn for at its first: none of the three places is passed over.
    config = replace(config, window_range=(1, 7), window_stays=1, steps_per_rollout=2)
    assert [draw_window(config, step, "any")[0] for step in range(0, 10, 2)] == [1, 2, 3, 1, 2]
