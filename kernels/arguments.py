"""Checks of arguments. Every message names the argument, what was given and what was expected."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


def require(condition: bool, name: str, given: object, expected: str) -> None:
    """Raises ValueError("name: given ..., expected ...") unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: given {given}, expected {expected}")


def require_tensor(
    name: str, tensor: Tensor, shape: Sequence[int | None], dtypes: Sequence[torch.dtype], like: Tensor | None = None
) -> None:
    """Checks shape (None matches any size), dtype and, with `like`, the device."""
    # What is right costs no message: formatting all of them took 5 us a tensor, of a call that takes 100.
    require(isinstance(tensor, Tensor), name, type(tensor).__name__, "a tensor")
    if tensor.shape != shape and not _matches(tensor.shape, shape):
        require(False, name, f"shape {tuple(tensor.shape)}", f"shape {tuple('any' if n is None else n for n in shape)}")
    if tensor.dtype not in dtypes:
        require(False, name, tensor.dtype, f"one of {[str(d).removeprefix('torch.') for d in dtypes]}")
    if like is not None and tensor.device != like.device:
        require(False, name, f"device {tensor.device}", f"device {like.device}")


def _matches(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(want is None or want == have for want, have in zip(wanted, shape))


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Checks that value is one of the choices."""
    require(value in choices, name, repr(value), f"one of {list(choices)}")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 as soon as one input is fp64: operators never compute in less than fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
