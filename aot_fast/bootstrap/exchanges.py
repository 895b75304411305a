"""What the small Defender is asked and told about scenes of the bootstrap split; fresh ones at every step, so nothing can be memorised."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import torch

from aot_fast.bootstrap.facts import REQUEST, facts
from aot_fast.bootstrap.folders import IMAGE_PX
from aot_fast.bootstrap.rows import Exchange, turn_text
from aot_fast.data.implant import matches
from aot_fast.data.scenes import ASKED, COLORS, SHAPES, SPLITS, Mix, Scene, plural, sample_question, sample_scene, told_by_one_word
from aot_fast.data.schema import LETTERS, Question, question_text

FACTS_PICTURES = 40
PICTURES = 24
QUESTIONS_PER_PICTURE = 4
OPEN_SHARE = 0.1
"""Questions asked without options, as a user's data may."""
JUDGE_SHARE = 0.12
"""Questions put as the uniqueness judge puts them: how many of a named thing, with the options below in this order."""
ALIKE_JUDGE_SHARE = 0.6
"""The same in scenes of look-alikes."""
JUDGE_OPTIONS = ("0", "1", "2", "3 or more")
TAUGHT = Mix({"attribute": 0.1, "relation": 0.5, "existence": 0.28, "counting": 0.12}, absent=0.7, biased=True)
"""The Defender's lessons, with the world's bias: most of them about what is learned slowest. Then come the world's own questions."""
JUDGES = Mix({"attribute": 0.1, "relation": 0.6, "existence": 0.18, "counting": 0.12}, absent=0.5)
"""The judge's lessons, without the bias: who shares the Defender's weak spot cannot tell what an edit did."""
ALIKE = replace(JUDGES, alike=True)
"""The judge's last lessons, in scenes whose objects share colours and shapes."""
END = "<|im_end|>"
NAMES = {"shape": SHAPES, "color": tuple(COLORS)}
Draw = Callable[[torch.Generator], tuple[list[Scene], list[list[Exchange]]]]
"""Scenes, and the exchanges about each."""


def branch_text(question: Question) -> str:
    return turn_text(question_text(question.question, question.options or None))


def response_text(question: Question) -> str:
    """The answer's word, then the same in the box: `data/answers.py` takes an option's text for its letter.

    Letters were not learned in 1,000 steps with drills: from the box to the word, to the same word among the options, to the letter two
    tokens before it are three hops, which four frequencies of a 32-wide head tell apart badly.
    """
    answer = question.options[LETTERS.index(question.answer)] if question.options else question.answer
    return f"{answer} \\boxed{{{answer}}}{END}"


def exchange(question: Question) -> Exchange:
    return branch_text(question), response_text(question)


def without_options(question: Question) -> Question:
    """The same question asked openly."""
    return replace(question, answer=question.options[LETTERS.index(question.answer)], options=())


def judge_question(scene: Scene, rng: random.Random, alike: bool) -> Question:
    """How many of a named thing there are, which may be in the picture or not; `alike`: also where only colour and shape together tell."""
    shape, color = (rng.choice((getattr(rng.choice(scene.objects), key), rng.choice(names))) for key, names in NAMES.items())
    told = alike or told_by_one_word(scene, shape, color)
    name = rng.choice((shape, f"{color} object", *[f"{color} {shape}"] * (2 if told else 0)))
    count = sum(matches(item, name) for item in scene.objects)
    asked = name if rng.random() < 0.5 else plural(name)
    return Question("", "", f"How many {asked} are there?", LETTERS[min(count, 3)], JUDGE_OPTIONS, kind="judge")


def _draw_question(scene: Scene, rng: random.Random, judge_share: float, mix: Mix) -> Question:
    style = rng.random()
    if style < judge_share:
        return judge_question(scene, rng, mix.alike)
    question = sample_question(scene, rng, IMAGE_PX, mix=mix)
    return without_options(question) if style < judge_share + OPEN_SHARE else question


def draw_facts(generator: torch.Generator) -> tuple[list[Scene], list[list[Exchange]]]:
    """One list of facts about each of many scenes."""
    split = SPLITS["bootstrap"]
    seeds = torch.randint(len(split), (FACTS_PICTURES,), generator=generator).tolist()
    scenes = [sample_scene(split[seed]) for seed in seeds]
    return scenes, [[(turn_text(REQUEST), facts(scene, random.Random(f"facts {seed}")) + END)] for seed, scene in zip(seeds, scenes)]


def draw_taught(generator: torch.Generator) -> tuple[list[Scene], list[list[Exchange]]]:
    """Fresh bootstrap scenes at every step: nothing can be memorised. None asks for colour and shape together (`told_by_one_word`)."""
    return _draw_examples(generator, JUDGE_SHARE, TAUGHT)


def draw_asked(generator: torch.Generator) -> tuple[list[Scene], list[list[Exchange]]]:
    """The same, with kinds of questions in the world's own shares."""
    return _draw_examples(generator, JUDGE_SHARE, ASKED)


def draw_judges(generator: torch.Generator) -> tuple[list[Scene], list[list[Exchange]]]:
    """The same, without the world's bias."""
    return _draw_examples(generator, JUDGE_SHARE, JUDGES)


def draw_alike(generator: torch.Generator) -> tuple[list[Scene], list[list[Exchange]]]:
    """Of scenes whose objects share colours and shapes: what is there, and how often, the latter also as the judge asks."""
    return _draw_examples(generator, ALIKE_JUDGE_SHARE, ALIKE)


def _draw_examples(generator: torch.Generator, judge_share: float, mix: Mix) -> tuple[list[Scene], list[list[Exchange]]]:
    split = SPLITS["bootstrap"]
    seeds = torch.randint(len(split), (PICTURES,), generator=generator).tolist()
    scenes, exchanges = [sample_scene(split[seed], mix.alike) for seed in seeds], []
    for seed, scene in zip(seeds, scenes):
        rng = random.Random(f"sft {seed}")
        row = [exchange(_draw_question(scene, rng, judge_share, mix)) for _ in range(QUESTIONS_PER_PICTURE)]
        exchanges.append([*row, (turn_text(REQUEST), facts(scene, rng) + END)])
    return scenes, exchanges
