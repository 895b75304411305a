"""The small tokenizer is Qwen2's in kind: any text encodes, words of the world are whole, the edit template keeps its 64 tokens."""

import pytest
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from transformers import AutoTokenizer, Qwen2Tokenizer

from aot_fast.bootstrap.folders import EDIT_PREFIX, EDIT_PREFIX_TOKENS, EDIT_TEMPLATE, SPECIAL_TOKENS, build_tokenizer, save_processor
from aot_fast.data.scenes import COLORS, SHAPES
from aot_fast.data.schema import question_text

TEXTS = [
    "Is the red circle left of or right of the blue star?\nA. left of\nB. right of",
    "tabs\tand  spaces \r\n\r\n  at the end  ",
    "naïve façade — “quotes” … 3½ €",  # several bytes a character, and punctuation outside ASCII
    "你好，世界 こんにちは 안녕 שלום مرحبا",  # scripts of which no byte pair is merged
    "👩‍🚀🏳️‍🌈",  # joined emoji: four bytes each, with zero-width joiners
    "\\boxed{A} <|im_start|> {{x}} \x00\x7f",
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_words_of_the_world_are_one_token(tokenizer):
    for word in (*COLORS, *SHAPES, "left", "right", "above", "below", "yes", "no"):
        assert len(tokenizer(f" {word}").input_ids) == 1
        assert len(tokenizer(word).input_ids) == 1
    # One token a word, mark and line break: a question that is cut to pieces would be longer.
    assert len(tokenizer(question_text("What color is the star?", ["red", "blue"])).input_ids) == 6 + 2 * 4 + 10


@pytest.mark.parametrize("pipeline", [QwenImageEditPipeline, QwenImageEditPlusPipeline])
def test_the_pipelines_drop_exactly_the_system_turn(tokenizer, pipeline):
    empty = pipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, processor=None, transformer=None)
    assert empty.prompt_template_encode.startswith(EDIT_PREFIX)
    assert empty.prompt_template_encode_start_idx == EDIT_PREFIX_TOKENS == len(tokenizer(EDIT_PREFIX).input_ids)
    ids = tokenizer(empty.prompt_template_encode.format("Add a star")).input_ids
    assert tokenizer.decode(ids[:EDIT_PREFIX_TOKENS]) == EDIT_PREFIX


def test_template_is_the_pipelines():
    empty = QwenImageEditPipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, processor=None, transformer=None)
    assert empty.prompt_template_encode == EDIT_TEMPLATE


def test_saved_tokenizer_loads_as_qwen2(tokenizer, tmp_path):
    save_processor(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), Qwen2Tokenizer.from_pretrained(tmp_path)):
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert [loaded(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
        assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_special_tokens_are_never_cut(tokenizer):
    for token in SPECIAL_TOKENS:
        assert len(tokenizer(f"a{token}b").input_ids) == 3


def test_chat_template_is_qwens(tokenizer):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi?"}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi?<|im_end|>\n<|im_start|>assistant\n"
    )
