"""The fused forward of LoRA layers against peft's own and against fp64."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from aot_fast.adapters import FusedLinear, fuse_adapters
from aot_fast.engine import adapter_off

NAMES = ("first", "second")


class Pair(nn.Module):
    """Two layers on one input, as queries and keys are; one without a bias."""

    def __init__(self, width, out):
        super().__init__()
        self.first, self.second = nn.Linear(width, out), nn.Linear(width, out, bias=False)

    def forward(self, x):
        return self.first(x), self.second(x)


def make(width=48, out=32, rank=4, dtype=torch.float32):
    """peft's layers with adapters that do something, and the same ones fused."""
    torch.manual_seed(0)
    model = Pair(width, out).to(dtype).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=list(NAMES)), model)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape)  # fp32, over any base
    fused = copy.deepcopy(model)
    assert fuse_adapters(fused) == 2 and isinstance(fused.first, FusedLinear)
    return model, fused


def run(model, x):
    """Outputs, and the gradients of the input and of the adapters, of a fixed loss."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    outs = model(x)
    weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).to(x.device) for i, o in enumerate(outs)]
    sum((o.double() * w).sum() for o, w in zip(outs, weights)).backward()
    return [*outs, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48)], ids=str)
def test_fp32_is_pefts_but_for_the_order_of_sums(shape):
    plain, fused = make()
    x = torch.randn(shape)
    for ours, theirs in zip(run(fused, x), run(plain, x), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 2**-24 * 48 * theirs.norm()  # sums of at most 48 terms, each rounded once


def test_bf16_is_as_near_to_fp64_as_peft():
    """Both round the layer's output to bf16 (2^-9); ours also h, A and B: 3 * 2^-9 of the adapter's part, which is a tenth to all of it."""
    plain, fused = make(width=256, out=128, dtype=torch.bfloat16)
    exact = copy.deepcopy(plain).double()
    x = torch.randn(64, 256).bfloat16()
    rows = zip(run(fused, x), run(plain, x), run(exact, x.double()), strict=True)
    for ours, theirs, truth in rows:
        assert ours.dtype == theirs.dtype
        far, near = ((y.double() - truth).norm() / truth.norm() for y in (ours, theirs))
        assert far <= near + 3 * 2**-9, (far, near)


def test_without_the_adapter_it_is_the_layer_bit_for_bit():
    _, fused = make(dtype=torch.bfloat16)
    x = torch.randn(5, 48).bfloat16()
    with adapter_off(fused):
        assert torch.equal(fused.first(x), fused.first.base_layer(x))
    assert not torch.equal(fused.first(x), fused.first.base_layer(x))


def test_less_is_kept_for_the_backward_pass():
    """peft keeps the input twice in fp32; the fused layers share the bf16 one. Weights, which ZeRO-3 holds, are left out."""
    kept = []
    for model in make(width=256, out=256, dtype=torch.bfloat16):
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen = {}

        def keep(t, seen=seen, weights=weights):
            storage = t.untyped_storage()
            seen |= {} if storage.data_ptr() in weights else {storage.data_ptr(): (t, storage.nbytes())}
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(torch.randn(512, 256).bfloat16().requires_grad_())
        kept.append(sum(size for _, size in seen.values()))
    assert kept[1] < 0.4 * kept[0], kept


def test_compiled_it_is_the_same():
    _, fused = make()
    x = torch.randn(2, 3, 48)
    expected = run(fused, x)
    for ours, theirs in zip(run(torch.compile(fused, backend="aot_eager", fullgraph=True), x), expected, strict=True):
        assert (ours - theirs).norm() <= 2**-24 * 48 * theirs.norm()


def test_names_and_other_layers_stay():
    plain, fused = make()
    assert plain.state_dict().keys() == fused.state_dict().keys()
    torch.manual_seed(0)
    dropping = Pair(8, 8)
    inject_adapter_in_model(LoraConfig(r=2, lora_dropout=0.1, target_modules=list(NAMES)), dropping)
    assert fuse_adapters(dropping) == 0
    biased = Pair(8, 8)
    inject_adapter_in_model(LoraConfig(r=2, lora_bias=True, target_modules=["first"]), biased)
    assert fuse_adapters(biased) == 0


@pytest.mark.gpu
def test_bf16_on_a_gpu_is_as_near_to_fp64_and_its_weights_gradients_are_summed_in_fp32():
    plain, fused = (model.cuda() for model in make(width=256, out=128, dtype=torch.bfloat16))
    exact = copy.deepcopy(plain).double()
    x = torch.randn(64, 256, device="cuda").bfloat16()
    for ours, theirs, truth in zip(run(fused, x), run(plain, x), run(exact, x.double()), strict=True):
        assert ours.dtype == theirs.dtype
        far, near = ((y.double() - truth).norm() / truth.norm() for y in (ours, theirs))
        assert far <= near + 3 * 2**-9, (far, near)


@pytest.mark.gpu
def test_a_recorded_graph_reads_the_adapters_as_they_are_when_it_is_replayed():
    _, fused = (model.cuda() for model in make(dtype=torch.bfloat16))
    x = torch.randn(5, 48, device="cuda").bfloat16()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            fused(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused.first(x)
        fused.first.lora_B["default"].weight.mul_(2)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, fused.first(x))
