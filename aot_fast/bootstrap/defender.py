"""The small Defender: Qwen2.5-VL's class with 1.5 M parameters, taught to answer on clean scenes.

Several questions about one picture share one row: [system, picture | question 1, answer 1 | question 2, answer 2 | ...]. A question
sees the prefix and itself, and its positions restart after the prefix, so the loss is that of separate rows for half the work.
Shapes: B pictures, K questions, T tokens of a row, R response tokens, P image tokens (4 x 4 cells), V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from aot_fast.bootstrap.facts import REQUEST, facts, letter_drill
from aot_fast.bootstrap.folders import IMAGE_PX, PATCH_PX, build_tokenizer, image_processor
from aot_fast.bootstrap.training import Plan, train
from aot_fast.data.implant import matches
from aot_fast.data.scenes import COLORS, SHAPES, SPLITS, Scene, make_question, plural, render, sample_question, sample_scene
from aot_fast.data.schema import LETTERS, Question, question_text

SIGHT_PLAN = Plan(steps=600, lr=2e-3, muon_lr=0.02, warmup_steps=50, weight_decay=0.01, ema_decay=0.99)
"""The vision tower alone, on what its probe asks: six times cheaper a picture than with the language model, which waits for it anyway."""
SIGHT_PICTURES = 48
FACTS_PLAN = Plan(steps=800, lr=2e-3, muon_lr=0.02, warmup_steps=50, weight_decay=0.01, ema_decay=0.99)
"""The language model alone, on true statements: one token in four carries information, in a question one in forty-five."""
FACTS_PICTURES = 40
PLAN = Plan(steps=1000, lr=2e-3, muon_lr=0.02, warmup_steps=50, weight_decay=0.01, ema_decay=0.995)
"""Answers, beside facts; all weights."""
PICTURES = 24
QUESTIONS_PER_PICTURE = 4
OPEN_SHARE = 0.1
"""Questions asked without options, as a user's data may."""
JUDGE_SHARE = 0.12
"""Questions put as the uniqueness judge puts them: how many of a named thing, with the options below in this order."""
JUDGE_OPTIONS = ("0", "1", "2", "3 or more")
CELLS = IMAGE_PX // (2 * PATCH_PX)
PROBE_WEIGHT = 2.0
"""Keeps the pictures readable, and their words' embeddings in step with them, while answers are learned."""
PROBE_SCALE = 10.0
"""Inverse temperature of the cosine between a picture token and a word: low, so that only real likeness satisfies the probe."""
FEATURE_LENGTH = 5.0
"""Mean norm of a picture token where the language model begins; a word's is about 1."""
END = "<|im_end|>"
Exchange = tuple[str, str]
"""What follows the picture: the rest of the user's turn, and the response."""
Draw = Callable[[torch.Generator], tuple[list[Scene], list[list[Exchange]]]]
"""Scenes, and the exchanges about each."""
PLACES = ("left", "right", "above", "below")
ATTRIBUTES = (*COLORS, *SHAPES, *PLACES)
"""Words that a cell's object answers to; of the places, those on whose side of the middle it lies."""
WORD_GROUPS = ((0, 8), (8, 16), (16, 18), (18, 20))
"""Colours, shapes, left or right, above or below: one of each is true of an object."""
NAMES = {"shape": SHAPES, "color": tuple(COLORS)}


def defender_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL in small: 8-px patches, windows of 32 px, full attention in the last vision block."""
    token = tokenizer.get_vocab()
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        # The usual 0.02 leaves attention at this width nearly uniform.
        "initializer_range": 0.08,
        "bos_token_id": None,
        "eos_token_id": token["<|im_end|>"],
        "pad_token_id": token["<|endoftext|>"],
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1000000.0},
    }
    vision = {
        "depth": 4,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 3,
        "out_hidden_size": 128,
        "patch_size": PATCH_PX,
        "window_size": 32,
        "fullatt_block_indexes": [1, 3],
        "initializer_range": 0.08,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=True,
    )


@torch.no_grad()
def _make_likes_attend(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Start with queries equal to keys and with silent blocks: a word then looks at what resembles it, other words or picture tokens.

    Mimetic initialization (Trockman and Kolter, arXiv 2305.09828). From random queries, looking things up took three times the steps.
    """
    config = model.config.text_config
    shared = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.language_model.layers:
        keys = layer.self_attn.k_proj.weight.view(config.num_key_value_heads, 1, -1, config.hidden_size)
        queries = keys.expand(-1, shared, -1, -1).reshape_as(layer.self_attn.q_proj.weight)
        layer.self_attn.q_proj.weight.copy_(queries + 0.02 * torch.randn_like(queries))
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def build_defender(seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained small Defender that stops at <|im_end|>."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = Qwen2_5_VLForConditionalGeneration(defender_config(tokenizer))
    _make_likes_attend(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    return model


def prefix_text(num_image_tokens: int = CELLS**2) -> str:
    """The chat template up to the question."""
    picture = "<|vision_start|>" + "<|image_pad|>" * num_image_tokens + "<|vision_end|>"
    return f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{picture}"


def turn_text(text: str) -> str:
    """The rest of the user's turn and the start of the response."""
    return f"{text}<|im_end|>\n<|im_start|>assistant\n"


def branch_text(question: Question) -> str:
    return turn_text(question_text(question.question, question.options or None))


def response_text(question: Question) -> str:
    """The word, then the letter: the letter is easy to learn once the word is there."""
    answer = question.options[LETTERS.index(question.answer)] if question.options else question.answer
    return f"{answer} \\boxed{{{question.answer}}}{END}"


def without_options(question: Question) -> Question:
    """The same question asked openly."""
    return replace(question, answer=question.options[LETTERS.index(question.answer)], options=())


def patchify(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [B, 3, 64, 64] -> pixel_values [B * 64, 3 * 2 * 8 * 8] and grids [B, 3], as the image processor makes them."""
    processor = image_processor()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    x = (pictures.float() / 255 - mean) / std
    batch, side = len(x), x.shape[-1] // PATCH_PX
    x = x.view(batch, 3, side // 2, 2, PATCH_PX, side // 2, 2, PATCH_PX).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(*x.shape[:6], 2, *x.shape[6:])
    return x.reshape(batch * side * side, -1), torch.tensor([[1, side, side]]).repeat(batch, 1)


@dataclass(frozen=True)
class Rows:
    """A batch of shared-prefix rows."""

    input_ids_BT: Tensor
    position_ids_3BT: Tensor
    mask_BTT: Tensor
    """True where a row (second axis) may attend (third axis)."""
    response_BT: Tensor
    """True at tokens that predict a token of an answer."""
    pixel_values: Tensor
    grids_B3: Tensor


def _prefix_positions(model: Qwen2_5_VLForConditionalGeneration, prefix: Tensor) -> Tensor:
    is_image = (prefix == model.config.image_token_id).long()[None]
    grid, mask = torch.tensor([[1, 2 * CELLS, 2 * CELLS]]), torch.ones_like(prefix)[None]
    return model.model.get_rope_index(prefix[None], image_grid_thw=grid, mm_token_type_ids=is_image, attention_mask=mask)[0][:, 0]


def exchange(question: Question) -> Exchange:
    return branch_text(question), response_text(question)


def pack_rows(model: nn.Module, tokenizer: Qwen2Tokenizer, pictures: Tensor, exchanges: Sequence[Sequence[Exchange]]) -> Rows:
    """K exchanges about each of B pictures as shared-prefix rows."""
    prefix = tokenizer(prefix_text(), return_tensors="pt").input_ids[0]
    prefix_positions = _prefix_positions(model, prefix)
    start = int(prefix_positions.max()) + 1
    rows = []
    for row in exchanges:
        ids, branch, offset, response = [], [], [], []
        for k, texts in enumerate(row):
            asked, answer = (tokenizer(text).input_ids for text in texts)
            ids += asked + answer
            branch += [k + 1] * (len(asked) + len(answer))
            offset += range(start, start + len(asked) + len(answer))
            # A token predicts the next one: the last of the question predicts the first of the answer.
            response += [False] * (len(asked) - 1) + [True] * len(answer) + [False]
        rows.append((ids, branch, offset, response))
    length = max(len(row[0]) for row in rows)

    def padded(column: int, fill: int) -> Tensor:
        return torch.tensor([list(row[column]) + [fill] * (length - len(row[column])) for row in rows])

    batch = len(rows)
    ids, branch = padded(0, tokenizer.pad_token_id), torch.cat([torch.zeros(batch, len(prefix), dtype=torch.long), padded(1, -1)], 1)
    total = branch.shape[1]
    visible = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    tail = padded(2, start).expand(3, -1, -1)
    pixel_values, grids = patchify(pictures)
    return Rows(
        input_ids_BT=torch.cat([prefix.expand(batch, -1), ids], 1),
        position_ids_3BT=torch.cat([prefix_positions[:, None].expand(-1, batch, -1), tail], 2),
        mask_BTT=visible & torch.ones(total, total, dtype=torch.bool).tril(),
        response_BT=torch.cat([torch.zeros(batch, len(prefix), dtype=torch.bool), padded(3, 0).bool()], 1),
        pixel_values=pixel_values,
        grids_B3=grids,
    )


class WithProbe(nn.Module):
    """The Defender beside a probe on its image tokens: what stands in each cell, and where. The probe is thrown away.

    From the answers alone a vision tower starts to see only after thousands of steps. Colours and shapes are probed with the embeddings of
    their own words, so that a picture's tokens come to lie beside the words for what they show.
    """

    def __init__(self, defender: Qwen2_5_VLForConditionalGeneration):
        super().__init__()
        self.defender = defender
        self.words = word_tokens(" ")
        self.probe = nn.Linear(defender.config.text_config.hidden_size, 3)
        self.register_buffer("length", torch.tensor(1.0))

    def read(self, features_BPH: Tensor) -> Tensor:
        """Logits of attributes and presence, and the centre, [B, P, attributes + 3]."""
        words = F.normalize(self.defender.get_input_embeddings().weight[self.words], dim=-1)
        likeness = F.normalize(features_BPH, dim=-1) @ words.T
        return torch.cat([PROBE_SCALE * likeness, self.probe(features_BPH)], -1)

    @torch.no_grad()
    def join(self) -> None:
        """Make what was learned apart ready for the language model: words at the start of a line as inside one, features as long as words.

        The probe's cosine does not see length: features come out 35 times as long as a word, and no layer could then add anything to them.
        """
        weight = self.defender.get_input_embeddings().weight
        weight[word_tokens("")] = weight[self.words]
        last = self.defender.model.visual.merger.mlp[2]
        length = FEATURE_LENGTH / self.length
        for tensor in (last.weight, last.bias):
            tensor.mul_(length)
        self.probe.weight.div_(length)


def word_tokens(before: str) -> list[int]:
    """Token of each attribute's word with `before` in front."""
    tokenizer = build_tokenizer()
    return [tokenizer.encode(before + word)[0] for word in ATTRIBUTES]


def probe_targets(scene: Scene) -> Tensor:
    """[P, attributes + 3]: attributes of the object centred in each cell, its presence, and its centre in [-1, 1]."""
    target = torch.zeros(CELLS, CELLS, len(ATTRIBUTES) + 3)
    for item in scene.objects:
        cell = target[int(item.y * CELLS), int(item.x * CELLS)]
        for word in (item.color, item.shape, "left" if item.x < 0.5 else "right", "above" if item.y < 0.5 else "below"):
            cell[ATTRIBUTES.index(word)] = 1
        cell[-3] = 1
        cell[-2:] = torch.tensor([2 * item.x - 1, 2 * item.y - 1])
    return target.flatten(0, 1)


def _probe_loss(output_BPA: Tensor, target_BPA: Tensor) -> Tensor:
    """Which cell a word is true of, and which word is true of a cell's object (both ways, as CLIP); presence; the object's centre.

    One yes or no a word would also push all features away from all words: a constant which then hides them.
    """
    present = target_BPA[..., -3] > 0
    objects, wanted = output_BPA[present], target_BPA[present]
    loss = F.mse_loss(objects[:, -2:], wanted[:, -2:]) + F.binary_cross_entropy_with_logits(output_BPA[..., -3], target_BPA[..., -3])
    words_BAP, cells_BAP = (x[..., :-3].transpose(1, 2) for x in (output_BPA, target_BPA))
    once = cells_BAP.sum(-1) == 1
    loss = loss + F.cross_entropy(words_BAP[once], cells_BAP[once].argmax(-1))
    for start, stop in WORD_GROUPS:
        loss = loss + 0.5 * F.cross_entropy(objects[:, start:stop], wanted[:, start:stop].argmax(-1))
    return loss


def image_features(model: Qwen2_5_VLForConditionalGeneration, pixel_values: Tensor, grids_B3: Tensor) -> Tensor:
    """The merger's output, [B, P, H]."""
    features = model.model.get_image_features(pixel_values, grids_B3).pooler_output
    features = torch.cat(list(features)) if isinstance(features, (tuple, list)) else features
    return features.view(len(grids_B3), CELLS**2, -1)


def answer_logits(model: Qwen2_5_VLForConditionalGeneration, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [R, V] of the answers' tokens, these tokens [R], and the image features [B, P, H]."""
    core = model.model
    features = image_features(model, rows.pixel_values, rows.grids_B3)
    embeds = core.get_input_embeddings()(rows.input_ids_BT)
    is_image = (rows.input_ids_BT == model.config.image_token_id)[..., None].expand_as(embeds)
    hidden = core.language_model(
        inputs_embeds=embeds.masked_scatter(is_image, features.to(embeds.dtype)),
        position_ids=rows.position_ids_3BT,
        attention_mask={"full_attention": rows.mask_BTT[:, None]},
        use_cache=False,
    ).last_hidden_state
    targets = rows.input_ids_BT.roll(-1, 1)[rows.response_BT]
    return model.lm_head(hidden[rows.response_BT]), targets, features


def picture_of(scene: Scene) -> Tensor:
    """uint8 [3, 64, 64]."""
    return torch.from_numpy(np.array(render(scene, IMAGE_PX))).permute(2, 0, 1)


def judge_question(scene: Scene, rng: random.Random) -> Question:
    """How many of a named thing there are, which may be in the picture or not."""
    shapes, colors = (rng.choice((getattr(rng.choice(scene.objects), key), rng.choice(names))) for key, names in NAMES.items())
    name = rng.choice((shapes, f"{colors} object", f"{colors} {shapes}"))
    count = sum(matches(item, name) for item in scene.objects)
    asked = name if rng.random() < 0.5 else plural(name)
    return Question("", "", f"How many {asked} are there?", LETTERS[min(count, 3)], JUDGE_OPTIONS, kind="judge")


def _draw_question(scene: Scene, rng: random.Random) -> Question:
    style = rng.random()
    if style < JUDGE_SHARE:
        return judge_question(scene, rng)
    question = sample_question(scene, rng, IMAGE_PX)
    return without_options(question) if style < JUDGE_SHARE + OPEN_SHARE else question


def _draw_facts(generator: torch.Generator) -> tuple[list[Scene], list[list[Exchange]]]:
    """One list of facts about each of many scenes."""
    split = SPLITS["bootstrap"]
    seeds = torch.randint(len(split), (FACTS_PICTURES,), generator=generator).tolist()
    scenes = [sample_scene(split[seed]) for seed in seeds]
    return scenes, [[(turn_text(REQUEST), facts(scene, random.Random(f"facts {seed}")) + END)] for seed, scene in zip(seeds, scenes)]


def _draw_examples(generator: torch.Generator) -> tuple[list[Scene], list[list[Exchange]]]:
    """Fresh bootstrap scenes at every step: nothing can be memorised."""
    split = SPLITS["bootstrap"]
    seeds = torch.randint(len(split), (PICTURES,), generator=generator).tolist()
    scenes, exchanges = [sample_scene(split[seed]) for seed in seeds], []
    for seed, scene in zip(seeds, scenes):
        rng = random.Random(f"sft {seed}")
        row = [exchange(_draw_question(scene, rng)) for _ in range(QUESTIONS_PER_PICTURE)]
        options, letters = letter_drill(rng)
        exchanges.append([*row, (turn_text(REQUEST), facts(scene, rng) + END), (turn_text(options), letters + END)])
    return scenes, exchanges


def _pictures(scenes: Sequence[Scene]) -> Tensor:
    return torch.stack([picture_of(scene) for scene in scenes])


def _freeze(parameters: Iterable[nn.Parameter], frozen: bool = True) -> None:
    for parameter in parameters:
        parameter.requires_grad_(not frozen)


def _probe_loss_of(model: WithProbe, features_BPH: Tensor, scenes: Sequence[Scene]) -> tuple[Tensor, float]:
    """The probe's loss, and the share of objects whose shape it names."""
    output, target = model.read(features_BPH.float()), torch.stack([probe_targets(scene) for scene in scenes])
    present, shapes = target[..., -3] > 0, slice(len(COLORS), len(COLORS) + len(SHAPES))
    right = output[present][:, shapes].argmax(-1) == target[present][:, shapes].argmax(-1)
    return _probe_loss(output, target), right.float().mean().item()


def train_sight(model: WithProbe, folder: Path, plan: Plan) -> None:
    """Train the vision tower, its probe and the words' embeddings in place; the language model's layers stay as they are."""
    split = SPLITS["bootstrap"]

    def batch_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        seeds = torch.randint(len(split), (SIGHT_PICTURES,), generator=generator).tolist()
        scenes = [sample_scene(split[seed]) for seed in seeds]
        with torch.autocast("cpu", torch.bfloat16):
            features = image_features(model.defender, *patchify(_pictures(scenes)))
        loss, right = _probe_loss_of(model, features, scenes)
        model.length.lerp_(features.detach().float().norm(dim=-1).mean(), 0.1)
        return loss, {"shape_accuracy": right}

    layers = model.defender.model.language_model.layers.parameters
    _freeze(layers())
    train(model, batch_loss, plan, folder)
    _freeze(layers(), False)
    model.join()


def train_language(model: WithProbe, draw: Draw, folder: Path, plan: Plan, stop_at: int | None = None) -> None:
    """Next tokens of the exchanges that `draw` gives, in place; the probe goes on."""
    tokenizer = build_tokenizer()

    def batch_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        scenes, exchanges = draw(generator)
        rows = pack_rows(model.defender, tokenizer, _pictures(scenes), exchanges)
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets, features = answer_logits(model.defender, rows)
        # Summed over an answer: only its word and its letter carry information, the rest is format.
        answer_loss = F.cross_entropy(logits.float(), targets, reduction="sum") / len(exchanges) / len(exchanges[0])
        probe_loss, _ = _probe_loss_of(model, features, scenes)
        right = (logits.argmax(-1) == targets).float().mean()
        return answer_loss + PROBE_WEIGHT * probe_loss, {
            "answer_loss": answer_loss.item(),
            "probe_loss": probe_loss.item(),
            "token_accuracy": right.item(),
        }

    train(model, batch_loss, plan, folder, stop_at)


def train_encoder(folder: Path, sight: Plan = SIGHT_PLAN, facts: Plan = FACTS_PLAN, stop_at: int | None = None) -> WithProbe:
    """A Defender that sees and states facts, from scratch or from the states in `folder`: also the Attacker's text encoder."""
    model = WithProbe(build_defender(sight.seed))
    train_sight(model, folder / "sight", sight)
    vision = model.defender.model.visual.parameters
    _freeze(vision())
    train_language(model, _draw_facts, folder / "facts", facts, stop_at)
    _freeze(vision(), False)
    return model


def train_defender(
    folder: Path, plan: Plan = PLAN, sight: Plan = SIGHT_PLAN, facts: Plan = FACTS_PLAN, stop_at: int | None = None
) -> Qwen2_5_VLForConditionalGeneration:
    """Vision, facts, then answers; from scratch, or from the states in `folder`."""
    model = train_encoder(folder, sight, facts)
    train_language(model, _draw_examples, folder, plan, stop_at)
    return model.defender


def chat_inputs(
    tokenizer: Qwen2Tokenizer, images: Sequence[Image.Image], texts: Sequence[str], image_token_id: int, padding_side: str = "left"
) -> dict[str, Tensor]:
    """Model inputs for prompts with one <|image_pad|> each."""
    pixels = image_processor()(list(images), return_tensors="pt")
    counts = (pixels["image_grid_thw"].prod(-1) // 4).tolist()
    expanded = [text.replace("<|image_pad|>", "<|image_pad|>" * count) for text, count in zip(texts, counts)]
    inputs = tokenizer(expanded, padding=True, padding_side=padding_side, return_tensors="pt")
    return {**inputs, **pixels, "mm_token_type_ids": (inputs["input_ids"] == image_token_id).long()}


@torch.no_grad()
def greedy_answers(model: Qwen2_5_VLForConditionalGeneration, images: Sequence[Image.Image], questions: Sequence[Question]) -> list[str]:
    """Responses at temperature 0, through the library's own `generate`."""
    tokenizer, answers = build_tokenizer(), []
    for start in range(0, len(questions), 100):
        part = slice(start, start + 100)
        texts = [prefix_text(1) + branch_text(question) for question in questions[part]]
        inputs = chat_inputs(tokenizer, images[part], texts, model.config.image_token_id)
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return answers


def right_answers(model: Qwen2_5_VLForConditionalGeneration, images: Sequence[Image.Image], questions: Sequence[Question]) -> Tensor:
    """Whether each greedy response boxes the true answer, [N]."""
    answers = greedy_answers(model, images, questions)
    return torch.tensor([f"\\boxed{{{question.answer}}}" in answer for question, answer in zip(questions, answers)])


def accuracy_by_kind(model: Qwen2_5_VLForConditionalGeneration, split: str, num_questions: int) -> dict[str, float]:
    """Greedy accuracy on multiple-choice questions about clean scenes, in all and by kind."""
    pairs = [make_question(split, index, IMAGE_PX) for index in range(num_questions)]
    questions = [question for _, question in pairs]
    right = right_answers(model, [render(scene, IMAGE_PX) for scene, _ in pairs], questions).float()
    scores = {"all": right.mean().item()}
    for kind in sorted({question.kind for question in questions}):
        scores[kind] = right[torch.tensor([question.kind == kind for question in questions])].mean().item()
    return scores
