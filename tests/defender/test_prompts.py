"""Prompts are encoded once, ahead of time, and within a bound of memory."""

import threading
from dataclasses import replace

import pytest
import torch

from aot_fast.defender.model import load_frozen
from aot_fast.defender.prompt import encode, encode_chat
from aot_fast.defender.prompts import Prompts
from tests.models import defender_config_of, scene_examples


@pytest.fixture(scope="module")
def defender(defender_folder, runtime):
    return load_frozen(defender_folder, defender_config_of(defender_folder), runtime)


def configured(defender, **changes):
    return replace(defender, config=replace(defender.config, **changes))


class Counted(list):
    """Examples that remember who asked for them."""

    def __init__(self, examples):
        super().__init__(examples)
        self.asked = []

    def __getitem__(self, index):
        self.asked.append((index, threading.current_thread() is threading.main_thread()))
        return super().__getitem__(index)


def equal(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "positions", "pixels", "grid")) and a.key == b.key


@pytest.mark.parametrize("workers", [0, 2])
def test_a_prompt_is_encoded_once(defender, workers):
    examples = Counted(scene_examples(4))
    with Prompts(configured(defender, prefetch_workers=workers), examples) as prompts:
        prompts.prefetch([0, 1, 2])
        for _ in range(2):
            for i in range(4):
                assert equal(prompts[i], encode(defender, list(examples)[i]))
        assert prompts.num_encoded == 4 and sorted(i for i, _ in examples.asked) == [0, 1, 2, 3]
        assert prompts.seen(2) == (list(examples)[2].question, prompts[2].key, len(prompts[2].ids), ((1, 8, 8),))
        assert workers == 0 or not any(main for _, main in examples.asked)


def test_memory_is_bounded_by_giving_up_the_oldest(defender):
    examples = scene_examples(6)
    size = encode(defender, examples[0]).num_bytes
    with Prompts(configured(defender, prefetch_bytes=int(5.2 * size)), examples) as prompts:
        for i in range(6):
            prompts[i]
            assert len(prompts.kept) <= 2 and i in prompts.kept
        before = prompts.num_encoded
        prompts[5]
        assert prompts.num_encoded == before
        prompts[0]
        assert prompts.num_encoded == before + 1


def test_prefetching_stops_at_half_of_the_memory(defender):
    examples = scene_examples(6)
    size = encode(defender, examples[0]).num_bytes
    with Prompts(configured(defender, prefetch_bytes=4 * size), examples) as prompts:
        prompts[0]
        prompts.prefetch([1, 2, 3, 4, 5])
        assert prompts.kept == [0, 1, 2]
        prompts[1]
        assert prompts.kept == [0, 1, 2, 3]  # a place has become free


def test_an_error_is_raised_where_its_prompt_is_asked_for(defender):
    with Prompts(configured(defender, max_prompt_tokens=20), scene_examples(2)) as prompts:
        prompts.prefetch([0, 1])
        with pytest.raises(ValueError, match="max_prompt_tokens = 20"):
            prompts[1]


def test_pictures_without_a_place_are_refused(defender):
    example = scene_examples(1)[0]
    with pytest.raises(ValueError, match="question 7: its prompt has 0 places for images, but 1 images"):
        encode_chat(defender, "no place", [example.image], "", "question 7")
