"""Encodings hold the numbers of the diffusers pipelines' own encode_prompt and prepare_latents."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from aot_fast.attacker.encoding import IMAGE_PAD, decode, encode, expand_image_pad, fit_size, pack, roundtrip, unpack
from aot_fast.data.schema import Example, Question
from tests.attacker.tiny_pipeline import picture

PROMPT = "Add a plausible distractor object {braces} é"


@pytest.mark.parametrize("kind", ["edit", "plus"])
@pytest.mark.parametrize("size", [(64, 64), (96, 64)])  # square, and an aspect ratio that the target has to keep
def test_encoding_equals_the_pipelines_own(kind, size, folders, base_config, load, pipeline):
    pixels = size[0] * size[1]
    sizes = {"target_pixels": pixels, "reference_pixels": pixels, "condition_pixels": pixels}
    config = replace(base_config, model=str(folders[kind]), guidance=2.0, still_vae=False, **sizes)
    plain, image = pipeline[kind], picture(size=size)
    ours, fast = (encode(load(c), [image], [PROMPT])[0] for c in (config, replace(config, still_vae=True)))

    with torch.no_grad():
        condition = plain.image_processor.resize(image, size[1], size[0])
        condition = [condition] if kind == "plus" else condition
        prompt, _ = plain.encode_prompt(image=condition, prompt=PROMPT, device="cpu")
        negative, _ = plain.encode_prompt(image=condition, prompt=" ", device="cpu")
        tensor = plain.image_processor.preprocess(image, size[1], size[0]).unsqueeze(2)
        tensor = [tensor] if kind == "plus" else tensor
        generator = torch.Generator().manual_seed(0)
        _, reference = plain.prepare_latents(tensor, 1, 16, size[1], size[0], torch.float32, "cpu", generator)
    assert torch.equal(ours.prompt, prompt[0])
    assert torch.equal(ours.negative, negative[0])
    assert torch.equal(ours.reference, reference[0])
    # Other sums of the same products: one convolution in fp32 errs by some 1e-6 of its inputs, and a dozen follow one another.
    torch.testing.assert_close(fast.reference, reference[0], rtol=1e-4, atol=1e-4)
    assert (ours.width, ours.height) == size
    assert ours.shapes == [(1, size[1] // 8, size[0] // 8)] * 2


def test_sizes_keep_the_aspect_ratio_and_the_unit():
    assert fit_size(64, 64, 64 * 64, 8) == (64, 64)
    assert fit_size(4032, 3024, 512 * 512, 16) == (448, 592)
    assert fit_size(5000, 10, 64 * 64, 8)[0] == 8  # a sliver still gets one token row


def test_image_pad_is_expanded_once_a_token():
    grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
    assert expand_image_pad(f"a{IMAGE_PAD}b{IMAGE_PAD}c", grid, 2) == "a" + IMAGE_PAD * 6 + "b" + IMAGE_PAD + "c"


def test_a_prompt_that_forges_an_image_token_is_refused(base_config, load):
    with pytest.raises(ValueError, match="image_pad"):
        encode(load(base_config), [picture()], [f"see {IMAGE_PAD}"])


def test_unpack_undoes_pack():
    latents = torch.randn(2, 16, 6, 4)
    assert torch.equal(unpack(pack(latents), (3, 2)), latents)


def test_roundtrip_is_the_vaes_own_decode_of_its_mode(base_config, load, pipeline):
    attacker, vae, image = load(base_config), pipeline["edit"].vae, picture()
    with torch.no_grad():
        tensor = pipeline["edit"].image_processor.preprocess(image).unsqueeze(2)
        expected = vae.decode(vae.encode(tensor).latent_dist.mode()).sample[:, :, 0]
    expected = pipeline["edit"].image_processor.postprocess(expected, output_type="np")[0] * 255
    ours = np.asarray(roundtrip(attacker, [Example(Question("q", "q.png", "?", "A"), image)])[0], dtype=float)
    assert np.abs(ours - expected).max() <= 1  # rounding to 8 bits

    encoding = encode(attacker, [image], [PROMPT])[0]
    assert np.abs(np.asarray(decode(attacker, [encoding.reference], [encoding])[0], dtype=float) - expected).max() <= 1
