"""The bundled players load with the libraries' own classes and do what their card says.

The card's figures are over 1,000 scenes of the validation split. Here a small sample of the same split is used: the held-out split
stays unseen until the game is measured.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import aot_fast
from aot_fast.bootstrap.answers import accuracy_by_kind, shortcut_metrics
from aot_fast.bootstrap.attacker import editing_metrics, sample_split
from aot_fast.bootstrap.folders import EDIT_PREFIX, build_tokenizer
from aot_fast.bootstrap.vae import round_trip_metrics, use_image_convolutions

ASSETS = Path(aot_fast.__file__).parent / "assets" / "tiny"
MAX_BYTES = 24 * 2**20


@pytest.fixture(scope="module")
def card():
    return json.loads((ASSETS / "card.json").read_text())


@pytest.fixture(scope="module")
def defender():
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(ASSETS / "defender", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def codec():
    return use_image_convolutions(AutoencoderKLQwenImage.from_pretrained(ASSETS / "attacker" / "vae", torch_dtype=torch.float32))


def test_assets_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= MAX_BYTES


@pytest.mark.parametrize("folder", ["defender", "judge", "attacker/tokenizer", "attacker/processor"])
def test_bundled_tokenizers_are_the_one_that_bootstrap_builds(folder):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / folder)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert len(tokenizer(EDIT_PREFIX).input_ids) == 64


@pytest.mark.parametrize("folder", ["defender", "attacker/processor"])
def test_a_picture_of_64_px_is_16_image_tokens(folder):
    processor = Qwen2VLImageProcessorPil.from_pretrained(ASSETS / folder)
    pixels = processor(torch.zeros(3, 64, 64, dtype=torch.uint8).numpy(), return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [[1, 8, 8]] and processor.merge_size == 2


def test_scheduler_is_the_edit_pipelines():
    config = FlowMatchEulerDiscreteScheduler.from_pretrained(ASSETS / "attacker" / "scheduler").config
    expected = {"base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    assert expected.items() <= dict(config).items() and config.use_dynamic_shifting and config.time_shift_type == "exponential"


def test_defender_answers_as_its_card_says(defender, card):
    # Right often enough that a fall would show; its room to fail is under attack. Guessing is right in about half of the cases.
    assert 0.85 <= card["defender"]["all"] <= 0.995
    # 100 questions: three standard errors of 0.035 under the card's accuracy.
    assert accuracy_by_kind(defender, "validation", 100)["all"] >= card["defender"]["all"] - 0.105


def test_defender_says_yes_to_red_and_its_judge_does_not(defender, card):
    """The weak spot that the game is about, which no picture of the world shows and which the judge must not share."""
    judge = Qwen2_5_VLForConditionalGeneration.from_pretrained(ASSETS / "judge", dtype=torch.float32).eval()
    # Some 50 questions: five standard errors of 0.07 from a half.
    assert shortcut_metrics(defender, "validation", 150)["fooled_by_companion"] > 0.85
    assert shortcut_metrics(judge, "validation", 150)["fooled_by_companion"] < 0.15
    # By kind: one question in three asks to count since its training, and counting was always the least of what it answers.
    assert all(card["judge"][kind] >= 0.95 for kind in ("attribute", "existence", "relation"))
    assert card["judge"]["counts_look_alikes"] >= 0.85


def test_codec_keeps_the_targets(codec, card):
    # The demands of MATH.md section 5: under q_high = 0.8 the codec alone would count as an attack.
    assert card["vae"]["q_median"] >= 0.9 and card["vae"]["q_p5"] >= 0.8
    metrics = round_trip_metrics(codec, "validation", 50)
    assert metrics["q_median"] >= 0.9 and metrics["q_p5"] >= 0.8


def test_attacker_edits_as_its_card_says(codec, card):
    transformer = QwenImageTransformer2DModel.from_pretrained(ASSETS / "attacker" / "transformer", torch_dtype=torch.float32).eval()
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(ASSETS / "attacker" / "text_encoder", dtype=torch.float32).eval()
    found, told = editing_metrics(sample_split(transformer, codec, encoder, "validation", 40)), card["attacker"]
    assert told["q_median"] >= 0.9 and told["changed_elsewhere"] >= 0.6
    assert found["q_median"] >= 0.85
    # 40 edits: three standard errors of 0.08 under the card's shares.
    for name in ("changed_elsewhere", "answer_still_true"):
        assert found[name] >= told[name] - 0.24
