"""Linear layers in another shape give what they gave."""

import copy

import pytest
import torch

from aot_fast.bootstrap.folders import build_tokenizer
from aot_fast.bootstrap.model import defender_config
from aot_fast.defender import linears
from aot_fast.defender.linears import joined_projections, pad_vision_mlps


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = defender_config(build_tokenizer())
    config.vision_config.intermediate_size = 101  # three short of what is aligned
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).double()


def test_padded_vision_mlps_give_the_same_outputs_and_gradients(model):
    plain, padded = model.model.visual.blocks[0].mlp, copy.deepcopy(model.model.visual)
    pad_vision_mlps(padded)
    padded = padded.blocks[0].mlp
    assert padded.gate_proj(torch.zeros(1, padded.gate_proj.in_features).double()).shape[-1] == 104
    x = torch.randn(5, plain.gate_proj.in_features, dtype=torch.float64, requires_grad=True)
    made = [torch.autograd.grad(mlp(x).square().sum(), [x, *mlp.parameters()]) for mlp in (plain, padded)]
    for expected, got in zip(*made, strict=True):
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-14)


def test_an_error_on_the_way_in_leaves_no_layer_changed(model, monkeypatch):
    layers, joined = model.model.language_model.layers, linears._joined
    monkeypatch.setattr(linears, "_joined", lambda parts: joined(parts) if parts[0] is layers[0].self_attn.q_proj else 1 / 0)
    with pytest.raises(ZeroDivisionError), joined_projections(layers):
        pass
    assert not any("forward" in vars(m) for m in model.model.language_model.modules())


def test_joined_projections_give_the_same_and_leave_nothing_behind(model):
    ids = torch.randint(0, 600, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with joined_projections(model.model.language_model.layers):
            assert "forward" in vars(model.model.language_model.layers[0].self_attn.q_proj)
            got = model(input_ids=ids).logits
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)
    assert not any("forward" in vars(m) for m in model.model.language_model.modules())
