"""The likelihood that a Defender repeats its answer is what its own sampler would find."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from aot_fast.defender import answers
from aot_fast.defender.answers import likelihood
from aot_fast.defender.drawing import Sampling
from aot_fast.defender.model import load_frozen
from tests.models import answers_to, defender_config_of, scene_examples


@pytest.fixture(scope="module")
def defender(defender_folder, runtime):
    return load_frozen(defender_folder, defender_config_of(defender_folder, max_response_tokens=2), runtime)


@pytest.fixture(scope="module")
def pairs():
    originals = scene_examples(3)
    return originals, [replace(example, image=Image.new("RGB", (64, 64), (200, 60, 60)), source="edit") for example in originals]


@pytest.mark.parametrize("workers", [0, 2])
def test_prompts_come_in_order_and_not_too_far_ahead(defender, pairs, monkeypatch, workers):
    """Threads cut them up while those before are answered; what one of them raises comes where its prompt is asked for."""
    begun = []

    def encode(owner, example):
        begun.append(example)
        if example == 30:
            raise ValueError("no picture")
        return 10 * example

    monkeypatch.setattr(answers, "encode", encode)
    made = answers.encoded(SimpleNamespace(config=SimpleNamespace(prefetch_workers=workers)), list(range(40)))
    assert [next(made) for _ in range(30)] == [10 * i for i in range(30)]
    assert len(begun) <= 30 + answers.AHEAD * workers + 1
    with pytest.raises(ValueError, match="no picture"):
        next(made)


def test_likelihood_is_the_product_over_the_answers_tokens(defender, pairs):
    originals, edited = pairs
    greedy = answers_to(defender, originals, [0, 0, 0], Sampling(1, 0.0, 1.0, 2))
    # On the originals themselves the rollout has recorded the same log-probs (there at temperature 1 too: greedy divides by 1).
    expected = [group[0].logp.sum().exp().item() for group in greedy]
    assert likelihood(defender)(originals, originals) == pytest.approx(expected, rel=1e-4)
    assert likelihood(defender)(originals, edited) != pytest.approx(expected, rel=1e-2)


def test_likelihood_is_the_rate_at_which_samples_repeat_the_answer(defender, pairs):
    originals, edited = pairs
    told = likelihood(defender)(originals, edited)
    count = 2000
    for original, example, p in zip(originals, edited, told):
        answer = answers_to(defender, [original], [0], Sampling(1, 0.0, 1.0, 2))[0][0].ids.tolist()
        tried = answers_to(
            replace(defender, config=replace(defender.config, rollout_batch=count)), [example], [7], Sampling(count, 1.0, 1.0, 2)
        )[0]
        rate = sum(response.ids.tolist() == answer for response in tried) / count
        assert rate == pytest.approx(p, abs=4 * (max(p, 1e-3) / count) ** 0.5)  # four standard errors


def test_likelihood_does_not_depend_on_the_batch(defender, pairs):
    originals, edited = pairs
    together = likelihood(defender)(originals, edited)
    alone = [likelihood(defender)([a], [b])[0] for a, b in zip(originals, edited)]
    assert together == pytest.approx(alone, rel=1e-4)
