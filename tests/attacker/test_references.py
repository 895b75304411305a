"""Several reference pictures: the numbers of diffusers' own Edit-Plus pipeline, kept, sampled from and trained on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aot_fast.attacker.counters import tokens_of
from aot_fast.attacker.encoding import encode
from aot_fast.attacker.encoding_cache import Encodings
from aot_fast.attacker.flow_grpo import update
from aot_fast.attacker.region import cut, place_window
from aot_fast.attacker.rollout import Group, rollout
from aot_fast.attacker.sampler import sample, start_noise
from tests.attacker.rollouts import examples, scored
from tests.attacker.tiny_pipeline import LORA, picture

PROMPT = "Add a plausible distractor object {braces} é"
PIXELS = 64 * 64
# At 64 * 64 pixels the pipelines' sides (multiples of 32) are those of this pipeline's unit (8): 128 x 32, 32 x 128, 64 x 64.
SIZES = [((256, 64), (128, 128)), ((64, 256), (256, 64), (96, 96))]


@pytest.fixture
def plus_config(folders, base_config):
    return replace(base_config, model=str(folders["plus"]))


def pictures(sizes):
    return [picture(i, size) for i, size in enumerate(sizes)]


def seen_by(plain, monkeypatch):
    """Records what the pipeline gives its transformer."""
    seen, forward = [], plain.transformer.forward

    def recorded(**given):
        seen.append(given)
        return forward(**given)

    monkeypatch.setattr(plain.transformer, "forward", recorded)
    return seen


@pytest.mark.parametrize("sizes", SIZES, ids=len)
def test_encoding_and_edit_are_the_pipelines_own(sizes, plus_config, load, pipeline, monkeypatch):
    """The whole of its call, but for the areas that it fixes at 1024 * 1024 and 384 * 384 pixels."""
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as plus

    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", PIXELS)
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", PIXELS)
    attacker = load(replace(plus_config, guidance=2.0, still_vae=False))
    [ours] = encode(attacker, [pictures(sizes)], [PROMPT])
    noise = start_noise(attacker, ours, [0])
    with attacker.player.gathered():
        [edit] = sample(attacker, [ours], [0], [0], None)
    seen = seen_by(pipeline["plus"], monkeypatch)
    size = {"height": ours.height, "width": ours.width}
    options = {"negative_prompt": " ", "true_cfg_scale": 2.0, "num_inference_steps": 4, "latents": noise, "output_type": "latent"}
    theirs = pipeline["plus"](pictures(sizes), PROMPT, **size, **options).images

    conditional, unconditional = seen[:2]
    assert [ours.shapes] == conditional["img_shapes"] and len(ours.shapes) == 1 + len(sizes)
    assert torch.equal(ours.reference, conditional["hidden_states"][0, len(noise[0]) :])
    assert torch.equal(ours.prompt, conditional["encoder_hidden_states"][0])
    assert torch.equal(ours.negative, unconditional["encoder_hidden_states"][0])
    # Ours runs both prompts in one forward, theirs in two: as for one picture (test_attacker_sampler.py).
    assert (edit.latents - theirs[0]).abs().max() < 1e-5


def test_the_first_picture_decides_the_target(plus_config, load):
    first, second = pictures(SIZES[0])
    attacker = load(plus_config)
    one, other = encode(attacker, [(first, second), (second, first)], [PROMPT] * 2)
    assert one.size == (4, 16) and other.size == (8, 8) and one.reference_sizes == other.reference_sizes[::-1] == ((4, 16), (8, 8))
    assert torch.equal(one.reference, other.reference.roll(64, 0))
    [alone] = encode(attacker, [[first]], [PROMPT])
    [plain] = encode(attacker, [first], [PROMPT])
    assert torch.equal(alone.prompt, plain.prompt) and torch.equal(alone.reference, one.reference[:64])
    assert tokens_of(Group(one, (), (), 0))[:2] == (64, 128) and one.num_tokens == 64 + 128 + len(one.prompt)


def test_several_pictures_need_an_edit_plus_pipeline(base_config, load):
    with pytest.raises(ValueError, match=r"attacker\.model = .*one picture.*2 were given; use an Edit-Plus pipeline"):
        encode(load(base_config), [pictures(SIZES[0])], [PROMPT])


def test_kept_encodings_of_several_pictures_are_the_fresh_ones(plus_config, load, tmp_path):
    attacker = load(plus_config)
    asked = [pictures(SIZES[0]), pictures(SIZES[1]), picture(0, SIZES[0][0])]
    fresh = encode(attacker, asked, [PROMPT] * 3)
    for number_made in (3, 0):  # the second time from the disk, as another rank reads them
        kept = Encodings(attacker.config, Path(plus_config.model), attacker.runtime.dtype, tmp_path)
        got = kept(attacker, asked, [PROMPT] * 3)
        assert (kept.num_made, kept.num_found) == (number_made, 3 - number_made)
        for ours, theirs in zip(got, fresh, strict=True):
            assert torch.equal(ours.prompt, theirs.prompt) and torch.equal(ours.reference, theirs.reference)
            assert ours.reference_sizes == theirs.reference_sizes and {tuple(ours.shapes)} == {tuple(theirs.shapes)}


def test_an_encodings_key_depends_on_every_picture(plus_config):
    a, b, c = (picture(i) for i in range(3))  # of one size
    kept = Encodings(plus_config, Path(plus_config.model), torch.float32)
    several = [(a,), (a, b), (b, a), (a, c), (a, b, c), (a, b, b)]
    assert len({kept.key(asked, PROMPT) for asked in several}) == len(several)
    assert kept.key(a, PROMPT) == kept.key([a], PROMPT)


# The scene beside a window


@pytest.fixture
def scene_config(plus_config):
    return replace(plus_config, region="window", context_pixels=32 * 32)


def test_a_window_is_edited_beside_its_scene_and_trained_on(scene_config, load):
    """One picture of which a window is edited, and one so small that it is edited as a whole, in one step of rollout and update."""
    attacker = load(replace(scene_config, lora=LORA), seed=1)
    asked = examples(2, sizes=((256, 128), (64, 64)))
    groups = rollout(attacker, asked, seed=0, round=1, step=0)
    (_, window, scene), whole = groups[0].encoding.shapes, groups[1].encoding.shapes
    assert window == (1, 8, 8) and scene == (1, 3, 6) and whole == [(1, 8, 8)] * 2  # 32 * 32 pixels at 2:1 are 45 x 23
    assert tokens_of(groups[0])[:2] == (64, 64 + 18) and tokens_of(groups[1])[:2] == (64, 64)
    assert all(edit.image.size == one.image.size for one, group in zip(asked, groups) for edit in group.edits)
    metrics = update(attacker, scored(groups))
    # Replay and rollout run at other batch sizes: rounding (DESIGN.md rule 4).
    assert metrics["applied"] == 1 and metrics["grad_norm"] > 0 and metrics["logp_mismatch"] <= 1e-5


def test_the_editor_sees_the_scene(scene_config, load):
    """Through its text encoder, and as tokens of the VAE."""
    attacker = load(replace(scene_config, context_pixels=PIXELS), seed=1)
    scenes = [picture(i, (256, 128)) for i in range(2)]
    part = cut(scenes[0], place_window((256, 128), [], 64 * 64, 8, 0))
    one, other = encode(attacker, [(part, scene) for scene in scenes], [PROMPT] * 2, [True] * 2)
    assert torch.equal(one.reference[:64], other.reference[:64])
    with attacker.player.gathered():
        asked = [one, replace(one, prompt=other.prompt), replace(one, reference=other.reference)]
        edit, *changed = sample(attacker, asked, [0] * 3, [0] * 3, None)
    # Ten times what rounding may make of a sample in another batch (test_attacker_sampler.py).
    assert all((x.latents - edit.latents).abs().max() > 1e-4 for x in changed)


def test_without_context_a_window_is_edited_alone(scene_config, load):
    attacker = load(replace(scene_config, context_pixels=0))
    [group] = rollout(attacker, examples(1, sizes=((256, 128),)), seed=0, round=1, step=0)
    assert group.encoding.shapes == [(1, 8, 8)] * 2
