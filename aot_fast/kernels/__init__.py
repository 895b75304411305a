"""The operators of both reinforcement-learning losses, usable alone: `import aot_fast.kernels as K` needs torch only.

Defender: logprob, linear_logprob, group_advantage, policy_loss, linear_policy_loss, decode_attention, rotary.
Attacker: flow_step, flow_logp, flow_policy_loss, guided_velocity, flow_coefficients, philox_normal.
Each operator's docstring has its equation, shapes and errors. `backend("reference")` or AOT_FAST_BACKEND chooses the implementation.

From a checkout the modules are in the top-level folder kernels/; a wheel has them beside this file. The folder is no package of its own:
the Hugging Face package `kernels` has that name.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "dispatch.py").is_file():
    __path__.append(str(_here.parents[1] / "kernels"))

from .decode_attention import decode_attention  # noqa: E402
from .dispatch import backend, backend_in_force, backend_on, fallbacks  # noqa: E402
from .flow_dynamics import FlowCoefficients, flow_coefficients  # noqa: E402
from .flow_policy_loss import flow_policy_loss  # noqa: E402
from .flow_step import FlowLogProb, FlowStep, flow_logp, flow_step  # noqa: E402
from .group_advantage import Advantage, group_advantage  # noqa: E402
from .guidance import guided_velocity  # noqa: E402
from .linear_logprob import linear_logprob  # noqa: E402
from .linear_policy_loss import linear_policy_loss  # noqa: E402
from .logprob import LogProb, logprob  # noqa: E402
from .metrics import PolicyLoss, combine_metrics  # noqa: E402
from .philox import philox4x32, philox_normal  # noqa: E402
from .policy_loss import policy_loss  # noqa: E402
from .rotary import rotary  # noqa: E402

__all__ = [
    "Advantage",
    "FlowCoefficients",
    "FlowLogProb",
    "FlowStep",
    "LogProb",
    "PolicyLoss",
    "backend",
    "backend_in_force",
    "backend_on",
    "combine_metrics",
    "decode_attention",
    "fallbacks",
    "flow_coefficients",
    "flow_logp",
    "flow_policy_loss",
    "flow_step",
    "group_advantage",
    "guided_velocity",
    "linear_logprob",
    "linear_policy_loss",
    "logprob",
    "philox4x32",
    "philox_normal",
    "policy_loss",
    "rotary",
]
