"""All windows in a few calls are transformers' windows one by one."""

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from aot_fast.defender import vision_attention
from tests.defender.recorded import distance

# Windows of 4 x 4 patches: whole ones only; cut off on one side, on both; smaller than a window; several pictures.
GRIDS = [[[1, 8, 8]], [[1, 8, 10]], [[1, 6, 14]], [[1, 2, 2]], [[1, 8, 8], [1, 10, 6], [1, 2, 4]]]


@pytest.mark.parametrize("grid", GRIDS)
def test_features_and_gradients_are_transformers_own(defender_folder, grid):
    grid = torch.tensor(grid)
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 64, generator=torch.Generator().manual_seed(0))
    made = []
    for installed in (False, True):
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(defender_folder, dtype=torch.float64, attn_implementation="sdpa")
        if installed:
            vision_attention.install(model)
        features = torch.cat(model.model.get_image_features(pixels.double(), grid).pooler_output)
        (features * torch.linspace(-1, 1, features.numel(), dtype=torch.float64).view_as(features)).sum().backward()
        made.append((features.detach(), {name: p.grad for name, p in model.model.visual.named_parameters()}))
    assert made[0][0].abs().max() > 0.01
    assert (made[0][0] - made[1][0]).abs().max() < 1e-12
    assert distance(made[1][1], made[0][1]) < 1e-10


def test_calls_are_few_whatever_the_picture(defender_folder, monkeypatch):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(defender_folder, attn_implementation="sdpa")
    vision_attention.install(model)
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments, **options):
        calls.append(arguments[0].shape[0])
        return attend(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    grid = torch.tensor([[1, 22, 26]])  # 5 x 6 whole windows, and cut off on both sides
    model.model.get_image_features(torch.randn(22 * 26, 3 * 2 * 64), grid)
    blocks = model.config.vision_config.depth
    assert len(calls) <= 4 * blocks and max(calls) >= 30
