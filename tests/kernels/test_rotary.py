"""rotary against its definition in fp64, and against what transformers computes."""

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import rotate_half

import aot_fast.kernels as K
from tests.kernels.conftest import INTERPRETED

SHAPES = {"ragged": (1, 6, 2, 7, 24), "batch": (2, 4, 4, 5, 32), "vision": (1, 3, 3, 9, 80), "empty": (1, 2, 1, 0, 16)}


def case(name, device="cpu", dtype=torch.float32):
    batch, heads, kv_heads, tokens, dim = SHAPES[name]
    made = torch.Generator().manual_seed(0)
    q, gq = (torch.randn(batch, tokens, heads, dim, generator=made).to(device, dtype).transpose(1, 2) for _ in range(2))
    k, gk = (torch.randn(batch, kv_heads, tokens, dim, generator=made).to(device, dtype) for _ in range(2))
    cos, sin = (torch.randn(batch, tokens, dim, generator=made).to(device, dtype) for _ in range(2))
    return q.requires_grad_(), k.requires_grad_(), cos, sin, gq, gk


def outcome(q, k, cos, sin, gq, gk):
    made = K.rotary(q, k, cos, sin)
    return *made, *torch.autograd.grad(made, (q, k), (gq, gk))


def by_definition(q, k, cos, sin, gq, gk):
    q, k, cos, sin, gq, gk = (x.detach().cpu().double() for x in (q, k, cos, sin, gq, gk))
    q, k, cos, sin = q.requires_grad_(), k.requires_grad_(), cos[:, None], sin[:, None]
    made = [x * cos + rotate_half(x) * sin for x in (q, k)]
    return *made, *torch.autograd.grad(made, (q, k), (gq, gk))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_its_definition(name, dtype, device):
    if dtype is torch.bfloat16 and device == "cpu" and K.backend_in_force() == "triton":
        pytest.skip("the interpreter knows no bf16")
    given = case(name, device, dtype)
    for got, expected in zip(outcome(*given), by_definition(*given), strict=True):
        assert got.dtype is dtype and got.shape == expected.shape
        # Two products and a sum in fp32, then one rounding.
        error = (got.detach().cpu().double() - expected).abs()
        assert (error <= (2**-22 if dtype is torch.float32 else 2**-8) * (expected.abs() + 4)).all()


def test_a_single_gradient_is_enough(device):
    q, k, cos, sin, gq, _ = case("batch", device)
    [alone] = torch.autograd.grad(K.rotary(q, k.detach(), cos, sin)[0], q, gq)
    assert torch.equal(alone, outcome(q, k, cos, sin, gq, torch.zeros_like(k))[2])


def test_wrong_arguments_are_named():
    q, k, cos, sin, *_ = case("batch")
    for change, name in (({"k": k[:, :, :2]}, "k"), ({"cos": cos[:1]}, "cos"), ({"q": q[0]}, "q"), ({"sin": sin.long()}, "sin")):
        with pytest.raises(ValueError, match=name):
            K.rotary(**(dict(q=q, k=k, cos=cos, sin=sin) | change))


@pytest.mark.skipif(not INTERPRETED, reason="checked on a CPU, under the interpreter")
def test_the_operator_is_registered_as_torch_wants_it():
    from aot_fast.kernels import rotary_triton  # noqa: F401

    q, k, cos, sin, *_ = case("batch")
    torch.library.opcheck(torch.ops.aot_fast.rotary.default, (q, k, cos, sin, False))
