"""A value whose gradient is known before the backward pass.

The losses here form dL/dinput together with L. The backward pass then only scales it by the upstream scalar, on the device and out of
place, so that a graph kept with retain_graph gives the same gradient again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def attach_gradients(
    value: Tensor, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None], into: Sequence[Tensor | None] | None = None
) -> Tensor:
    """Returns value (0-d) with d value / d inputs[i] = gradients[i]; None where an input has no gradient.

    into[i], where given, is a buffer of the gradient's shape that the backward pass adds to instead of returning a gradient for inputs[i].
    """
    into = [None] * len(inputs) if into is None else into
    known = [(i, g, b) for i, g, b in zip(inputs, gradients, into) if i is not None and g is not None]
    if not known or not torch.is_grad_enabled():
        return value
    return _KnownGradient.apply(value, [b for _, _, b in known], *(i for i, _, _ in known), *(g for _, g, _ in known))


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, into: list[Tensor | None], *inputs_and_gradients: Tensor) -> Tensor:
        ctx.into = into
        ctx.dtypes = [t.dtype for t in inputs_and_gradients[: len(into)]]
        ctx.save_for_backward(*inputs_and_gradients[len(into) :])
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        scaled: list[Tensor | None] = []
        for gradient, dtype, buffer in zip(ctx.saved_tensors, ctx.dtypes, ctx.into):
            if buffer is None:  # a 0-d factor is not rounded to the gradient's dtype
                scaled.append(torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype)))
            else:
                buffer.addcmul_(gradient, upstream.to(gradient.dtype))
                scaled.append(None)
        return None, None, *scaled, *(None for _ in scaled)
