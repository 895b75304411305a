"""Matrix products of the head: half types multiplied, fp32 summed and kept, without a copy of the weight where the library can do so."""

import torch
from torch import Tensor

from .arguments import compute_dtype


def gemm_operand(weight: Tensor) -> Tensor:
    """The weight as the products take it: itself on a GPU; elsewhere in fp32 (fp64), converted once and not in every chunk."""
    return weight if weight.is_cuda else weight.to(compute_dtype(weight))


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, summed in fp32 (fp64 for fp64); of half types into a half type as the library sums them."""
    if a.is_cuda and a.dtype == b.dtype:
        if dtype == a.dtype:
            return torch.mm(a, b)
        if dtype == torch.float32 and a.dtype.itemsize == 2:
            return torch.mm(a, b, out_dtype=dtype)
    wide = compute_dtype(a, b)
    return (a.to(wide) @ b.to(wide)).to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in place; total is fp32 (fp64)."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
