"""The sum that every reduction over a sample or a row goes through."""

import math

import pytest
import torch
from aot_fast.kernels.fixed_order import fixed_order_sum


@pytest.mark.parametrize("length", (0, 1, 5, 4096, 4097, 9000, 40_961))  # below, at and just above whole blocks of 4,096
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_every_addition_is_in_fp64(length, dtype):
    x = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(0)).to(dtype)
    if length:
        x[..., length // 2] = 1e6  # fp32 additions would leave 0.03 of error beside it
    got = fixed_order_sum(x)
    assert got.dtype == torch.float64 and got.shape == (2, 3)
    exact = [math.fsum(row) for row in x.reshape(6, length).double().tolist()]
    # pairwise: log2(length) roundings of 2^-53 of at most 1e6 + length
    assert got.flatten().tolist() == pytest.approx(exact, rel=1e-14, abs=1e-8)


def test_a_row_has_the_same_fp64_bits_alone_and_in_a_batch_and_on_two_threads():
    # 40,001: above the size at which torch.sum splits a lone row over threads. fp64 inputs and fp64 bits: rounding to fp32 hides an order.
    x = torch.randn(5, 40_001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = fixed_order_sum(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(fixed_order_sum(x), whole)
        assert torch.equal(torch.stack([fixed_order_sum(row) for row in x]), whole)
        assert torch.equal(fixed_order_sum(x.flip(0)), whole.flip(0))
    finally:
        torch.set_num_threads(threads)
