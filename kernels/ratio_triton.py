"""What the Triton kernels of policy_loss and flow_policy_loss make of a log-ratio."""

import triton
import triton.language as tl

from .policy_loss import LOG_RATIO_LIMIT

LIMIT = tl.constexpr(LOG_RATIO_LIMIT)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def clamp(x, low, high):
    """A NaN stays one."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def exp_minus(d):
    """e^d - 1 and e^d - 1 - d: by their series where |d| < 1/2, since both differences cancel near 0. Error under 1e-6 relative."""
    t = 1.0 + d * (1.0 / 9)
    for k in tl.static_range(8, 2, -1):
        t = 1.0 + d * t * (1.0 / k)
    t = 0.5 * d * d * t
    direct = tl.exp2(d * LOG2E) - 1.0
    near = tl.abs(d) < 0.5
    return tl.where(near, d + t, direct), tl.where(near, t, direct - d)
