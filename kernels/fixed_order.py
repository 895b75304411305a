"""A sum whose order depends on the length alone.

torch.sum chooses its order by the whole tensor's shape and the thread count, so that a sample's sum changes with the batch it is in. Here
only elementwise additions are used: halves of a block of 4,096 are added until one number is left, then the block sums in the same way.
Every addition is in fp64, so that the error is that of the inputs.
"""

import torch
from torch import Tensor

BLOCK = 4096


def fixed_order_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, in fp64: x [..., E] -> [...]. The bits depend on the E numbers only."""
    length = x.shape[-1]
    if length > BLOCK:
        x = torch.nn.functional.pad(x, (0, -length % BLOCK)).unflatten(-1, (-1, BLOCK))
        x = _halve(x)
    return _halve(x).double()


def _halve(x: Tensor) -> Tensor:
    """Pairwise sum over the last dimension."""
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1], dtype=torch.float64)
    while x.shape[-1] > 1:
        half = (x.shape[-1] + 1) // 2
        low, high = x[..., :half].double(), x[..., half:]
        if high.shape[-1] < half:
            high = torch.nn.functional.pad(high, (0, 1))
        x = low + high
    return x[..., 0]
