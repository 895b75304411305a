"""Sampling: a sample is its own whatever the batch, and never emits what needs an image behind it."""

import dataclasses

import pytest
import torch

from aot_fast.defender.model import load_frozen
from aot_fast.defender.packing import left_pad
from aot_fast.defender.prompt import encode
from aot_fast.defender.rollout import Sampling, draw, sample
from tests.models import defender_config_of, scene_examples

SAMPLING = Sampling(num_samples=3, temperature=1.0, top_p=1.0, max_tokens=6)


@pytest.fixture(scope="module")
def defender(defender_folder, runtime):
    return load_frozen(defender_folder, defender_config_of(defender_folder), runtime)


def test_sample_does_not_depend_on_its_batch(defender):
    examples = scene_examples(4)
    together = sample(defender, examples, [1, 2, 3, 4], SAMPLING)
    for i, example in enumerate(examples):
        alone = sample(defender, [example], [i + 1], SAMPLING)[0]
        for a, b in zip(together[i], alone):
            assert torch.equal(a.ids, b.ids) and (a.logp - b.logp).abs().max() < 1e-5


def test_greedy_answers_equal_transformers_generate(defender):
    example = scene_examples(1)[0]
    prompt = encode(defender, example)
    ours = sample(defender, [example], [0], Sampling(1, 0.0, 1.0, 6))[0][0]
    theirs = defender.model.generate(
        input_ids=prompt.ids[None],
        attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long),
        pixel_values=prompt.pixels,
        image_grid_thw=prompt.grid,
        mm_token_type_ids=(prompt.ids == defender.core.config.image_token_id).int()[None],
        suppress_tokens=defender.banned_ids,
        do_sample=False,
        max_new_tokens=6,
    )[0, len(prompt.ids) :]
    assert ours.ids.tolist() == theirs[: len(ours.ids)].tolist()


def test_draw_follows_the_distribution_and_records_its_logp():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125]])).expand(4000, -1)
    uniform = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    token, logp = draw(logits, uniform, SAMPLING, banned=[])
    share = torch.bincount(token, minlength=4) / 4000
    # Three standard errors of a share of 4,000 draws are below 0.024.
    assert (share - torch.tensor([0.5, 0.25, 0.125, 0.125])).abs().max() < 0.024
    assert torch.allclose(logp, logits[0].log_softmax(-1)[token])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_never_drawn(temperature):
    logits = torch.tensor([[9.0, 1.0, 0.0]]).expand(200, -1)
    uniform = torch.linspace(0, 1 - 1e-9, 200, dtype=torch.float64)
    token, logp = draw(logits, uniform, dataclasses.replace(SAMPLING, temperature=temperature), banned=[0])
    assert 0 not in token
    # The log-prob is the model's own: the trainer, which bans nothing, must find the same one.
    assert torch.allclose(logp, logits[0].log_softmax(-1)[token])


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(500, -1)
    uniform = torch.linspace(0, 1 - 1e-9, 500, dtype=torch.float64)
    token, _ = draw(logits, uniform, dataclasses.replace(SAMPLING, top_p=0.7), banned=[])
    assert set(token.tolist()) == {0, 1}


def test_response_ends_with_its_stop_token_or_is_truncated(defender):
    for responses in sample(defender, scene_examples(3), [5, 6, 7], SAMPLING):
        for response in responses:
            ended = int(response.ids[-1]) in defender.stop_ids
            assert response.truncated != ended and not set(response.ids[:-1].tolist()) & set(defender.stop_ids)
            assert len(response.ids) == len(response.logp) <= SAMPLING.max_tokens


def test_too_long_prompt_is_refused_with_the_fix(defender, monkeypatch):
    monkeypatch.setattr(defender, "config", dataclasses.replace(defender.config, max_prompt_tokens=20))
    with pytest.raises(ValueError, match="max_prompt_tokens = 20"):
        encode(defender, scene_examples(1)[0])


def test_left_padding_ends_all_prompts_in_one_column(defender):
    prompts = [encode(defender, example) for example in scene_examples(4)]
    ids, mask, positions = left_pad(prompts, pad_id=0)
    for i, prompt in enumerate(prompts):
        n = len(prompt.ids)
        assert torch.equal(ids[i, -n:], prompt.ids) and mask[i].sum() == n and torch.equal(positions[:, i, -n:], prompt.positions)
