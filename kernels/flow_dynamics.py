"""One denoising step of a rectified flow as an affine map (MATH section 3).

    mean = a x + b v,   x_next = mean + S z,   z ~ N(0, I),   dt = sigma_next - sigma < 0

    flow_sde  g = eta sqrt(sigma / (1 - s~)), s~ = sigma, or sigma_max where sigma = 1
              a = 1 + g^2 dt / (2 sigma),  b = dt (1 + g^2 (1 - sigma) / (2 sigma)),  S = g sqrt(-dt)
    dance     as above with g = eta
    cps       a = (1 - sigma_next) + c,  b = -sigma (1 - sigma_next) + (1 - sigma) c,  c = sigma_next cos(eta pi / 2),
              S = sigma_next sin(eta pi / 2)
    ode       a = 1,  b = dt,  S = 0;  also where eta = 0 and where sigma_next = 0: the last step is never stochastic

B samples. Everything is [B] in fp64 on sigma's own device, without a host synchronisation.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import require, require_choice

DYNAMICS = ("flow_sde", "dance", "cps", "ode")
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
    device = next((v.device for v in given.values() if isinstance(v, Tensor)), torch.device("cpu"))
    values = {name: _per_sample(name, value, batch, device) for name, value in given.items()}
    if device.type == "cpu":
        _check_ranges(values, needs_sigma_max=dynamics == "flow_sde" and sigma_max is None)
    s, s_next, e = values["sigma"], values["sigma_next"], values["eta"]
    if dynamics == "cps":
        a, b, std, g = _cps(s, s_next, e)
    elif dynamics == "ode":
        a, b, std, g = torch.ones_like(s), s_next - s, torch.zeros_like(s), torch.zeros_like(s)
    else:
        below_one = s if dynamics == "flow_sde" and sigma_max is None else torch.where(s >= 1, values["sigma_max"], s)
        g = e * torch.sqrt(s / (1 - below_one)) if dynamics == "flow_sde" else e
        a, b, std = _stochastic(s, s_next, g)
    deterministic = (e == 0) | (s_next == 0)
    return FlowCoefficients(
        torch.where(deterministic, 1, a),
        torch.where(deterministic, s_next - s, b),
        torch.where(deterministic, 0, std),
        torch.where(deterministic, 0, g),
    )


def _stochastic(s: Tensor, s_next: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dt = s_next - s
    half = g.square() / (2 * s)
    return 1 + half * dt, dt * (1 + half * (1 - s)), g * torch.sqrt(-dt)


def _cps(s: Tensor, s_next: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = s_next * torch.cos(eta * (math.pi / 2))
    std = s_next * torch.sin(eta * (math.pi / 2))
    return (1 - s_next) + c, -s * (1 - s_next) + (1 - s) * c, std, std


def _per_sample(name: str, value: Scalar, batch: int, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((batch,), float(value), dtype=torch.float64, device=device)
    require(value.shape in ((), (batch,)), name, f"shape {tuple(value.shape)}", f"a float, or shape () or ({batch},)")
    return value.detach().to(device, torch.float64, non_blocking=True).expand(batch)


def _check_ranges(values: dict[str, Tensor], needs_sigma_max: bool) -> None:
    s, s_next, eta, s_max = values.values()
    require(bool(((s > 0) & (s <= 1)).all()), "sigma", s.tolist(), "values in (0, 1]")
    require(bool(((s_next >= 0) & (s_next <= s)).all()), "sigma_next", s_next.tolist(), f"values in [0, sigma], sigma {s.tolist()}")
    require(bool((eta >= 0).all()), "eta", eta.tolist(), "values of at least 0")
    require(bool(((s_max > 0) & (s_max < 1)).all()), "sigma_max", s_max.tolist(), "values in (0, 1)")
    require(
        not needs_sigma_max or bool((s < 1).all()),
        "sigma_max",
        None,
        "the schedule's second sigma: flow_sde divides by 1 - sigma, and sigma is 1",
    )
