"""One denoising step of a rectified flow as an affine map (MATH section 3).

    mean = a x + b v,   x_next = mean + S z,   z ~ N(0, I),   dt = sigma_next - sigma < 0

    flow_sde  g = eta sqrt(sigma / (1 - s~)), s~ = sigma, or sigma_max where sigma = 1
              a = 1 + g^2 dt / (2 sigma),  b = dt (1 + g^2 (1 - sigma) / (2 sigma)),  S = g sqrt(-dt)
    dance     as above with g = eta
    cps       a = (1 - sigma_next) + c,  b = -sigma (1 - sigma_next) + (1 - sigma) c,  c = sigma_next cos(eta pi / 2),
              S = sigma_next sin(eta pi / 2)
    ode       a = 1,  b = dt,  S = 0;  also where eta = 0 and where sigma_next = 0: the last step is never stochastic

B samples. Everything is [B] in fp64 on sigma's own device, without a host synchronisation; values on the host stay there.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import require, require_choice

DYNAMICS = ("flow_sde", "dance", "cps", "ode")
HALF_PI = math.pi / 2
Scalar = float | Tensor


class FlowCoefficients(NamedTuple):
    """The step's scalars, [B] fp64 each."""

    a: Tensor
    b: Tensor
    std: Tensor
    """S: the standard deviation of x_next; 0 where the step is deterministic."""
    diffusion: Tensor
    """g, by which flow_grpo's KL divides; S where a dynamics has none (cps), and 0 where S is 0."""


def flow_coefficients(
    sigma: Scalar, sigma_next: Scalar, *, dynamics: str, eta: Scalar, sigma_max: Scalar | None = None, batch: int = 1
) -> FlowCoefficients:
    """a, b, S, g of each of `batch` samples.

    sigma, sigma_next, eta, sigma_max: float, 0-d or [batch] tensor; 0 < sigma <= 1, 0 <= sigma_next <= sigma, eta >= 0, 0 < sigma_max < 1.
    dynamics: "flow_sde", "dance", "cps" or "ode". The result is on sigma's device (a float's: that of the first tensor given, else the
    CPU). Raises ValueError on a wrong shape or choice and, where the values are on the host (floats, CPU tensors), on a wrong range, and
    for flow_sde with sigma = 1 and no sigma_max; on a GPU such a sample becomes non-finite instead.
    """
    require_choice("dynamics", dynamics, DYNAMICS)
    given = {"sigma": sigma, "sigma_next": sigma_next, "eta": eta, "sigma_max": 0.5 if sigma_max is None else sigma_max}
    for name, value in given.items():
        if isinstance(value, Tensor):
            require(value.shape in ((), (batch,)), name, f"shape {tuple(value.shape)}", f"a float, or shape () or ({batch},)")
    device = next((v.device for v in given.values() if isinstance(v, Tensor)), torch.device("cpu"))
    needs_sigma_max = dynamics == "flow_sde" and sigma_max is None
    if device.type == "cpu":
        return _on_host(*(_numbers(v, batch) for v in given.values()), dynamics, needs_sigma_max)
    return _on_device(*(_per_sample(v, batch, device) for v in given.values()), dynamics, needs_sigma_max)


def _on_device(s: Tensor, s_next: Tensor, eta: Tensor, s_max: Tensor, dynamics: str, needs_sigma_max: bool) -> FlowCoefficients:
    """All values [B] fp64."""
    if dynamics == "cps":
        a, b, std = _cps(s, s_next, torch.cos(eta * HALF_PI), torch.sin(eta * HALF_PI))
        g = std
    elif dynamics == "ode":
        a, b, std, g = torch.ones_like(s), s_next - s, torch.zeros_like(s), torch.zeros_like(s)
    else:
        below_one = s if needs_sigma_max else torch.where(s >= 1, s_max, s)
        g = eta * torch.sqrt(s / (1 - below_one)) if dynamics == "flow_sde" else eta
        a, b, std = _stochastic(s, s_next, g, torch.sqrt)
    deterministic = (eta == 0) | (s_next == 0)
    return FlowCoefficients(
        torch.where(deterministic, 1, a),
        torch.where(deterministic, s_next - s, b),
        torch.where(deterministic, 0, std),
        torch.where(deterministic, 0, g),
    )


def _on_host(
    s: list[float], s_next: list[float], eta: list[float], s_max: list[float], dynamics: str, needs_sigma_max: bool
) -> FlowCoefficients:
    """The same in Python: of small latents a step costs less than thirty operators on [B] would."""
    _check_ranges(s, s_next, eta, s_max, needs_sigma_max)
    turns = [None] * len(s)
    if dynamics == "cps":  # torch's cosine: the C library's differs in the last bit
        angles = torch.tensor(eta, dtype=torch.float64) * HALF_PI
        turns = zip(torch.cos(angles).tolist(), torch.sin(angles).tolist())
    rows = [_of_sample(*values, dynamics) for values in zip(s, s_next, eta, s_max, turns)]
    columns = list(zip(*rows)) or [()] * 4
    return FlowCoefficients(*torch.tensor(columns, dtype=torch.float64).unbind())


def _of_sample(
    s: float, s_next: float, eta: float, s_max: float, turn: tuple[float, float] | None, dynamics: str
) -> tuple[float, float, float, float]:
    """a, b, S, g; turn: cosine and sine of eta pi / 2, for cps."""
    if dynamics == "ode" or eta == 0 or s_next == 0:
        return 1.0, s_next - s, 0.0, 0.0
    if dynamics == "cps":
        a, b, std = _cps(s, s_next, *turn)
        return a, b, std, std
    g = eta * math.sqrt(s / (1 - (s_max if s >= 1 else s))) if dynamics == "flow_sde" else eta
    return *_stochastic(s, s_next, g, math.sqrt), g


def _stochastic(s: Scalar, s_next: Scalar, g: Scalar, sqrt: Callable) -> tuple[Scalar, Scalar, Scalar]:
    dt = s_next - s
    half = g * g / (2 * s)
    return 1 + half * dt, dt * (1 + half * (1 - s)), g * sqrt(-dt)


def _cps(s: Scalar, s_next: Scalar, cosine: Scalar, sine: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    c = s_next * cosine
    return (1 - s_next) + c, -s * (1 - s_next) + (1 - s) * c, s_next * sine


def _numbers(value: Scalar, batch: int) -> list[float]:
    if not isinstance(value, Tensor):
        return [float(value)] * batch
    numbers = value.tolist()
    return numbers if value.dim() else [numbers] * batch


def _per_sample(value: Scalar, batch: int, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((batch,), float(value), dtype=torch.float64, device=device)
    return value.detach().to(device, torch.float64, non_blocking=True).expand(batch)


def _check_ranges(s: list[float], s_next: list[float], eta: list[float], s_max: list[float], needs_sigma_max: bool) -> None:
    require(all(0 < x <= 1 for x in s), "sigma", s, "values in (0, 1]")
    require(all(0 <= y <= x for x, y in zip(s, s_next)), "sigma_next", s_next, f"values in [0, sigma], sigma {s}")
    require(all(x >= 0 for x in eta), "eta", eta, "values of at least 0")
    require(all(0 < x < 1 for x in s_max), "sigma_max", s_max, "values in (0, 1)")
    require(
        not needs_sigma_max or all(x < 1 for x in s),
        "sigma_max",
        None,
        "the schedule's second sigma: flow_sde divides by 1 - sigma, and sigma is 1",
    )
