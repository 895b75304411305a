"""Which implementation of an operator runs.

IMPLEMENTATIONS names every one of them: backend -> operator -> "module:function" beside this file. The modules are imported on first use.
"""

import contextlib
import contextvars
import functools
import importlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "reference": {
        "logprob": "logprob:logprob_reference",
        "linear_logprob": "linear_logprob:linear_logprob_reference",
        "group_advantage": "group_advantage:group_advantage_reference",
        "policy_loss": "policy_loss:policy_loss_reference",
        "linear_policy_loss": "linear_policy_loss:linear_policy_loss_reference",
        "guided_velocity": "guidance:guided_velocity_reference",
        "flow_step": "flow_step:flow_step_reference",
        "flow_logp": "flow_step:flow_logp_reference",
        "flow_policy_loss": "flow_policy_loss:flow_policy_loss_reference",
    },
}

fallbacks: Counter[tuple[str, str]] = Counter()
"""(backend, operator) -> how often the reference ran because the forced backend has no such operator."""

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("aot_fast_backend", default=None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces a backend inside the block (in this thread), whatever AOT_FAST_BACKEND says.

    name: a key of IMPLEMENTATIONS, or "auto" for the choice by device. Raises ValueError on any other name.
    """
    token = _forced.set(_known(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def implementation(operator: str) -> Callable:
    """The function that runs `operator` under the backend in force."""
    name = _forced.get() or _known(os.environ.get("AOT_FAST_BACKEND") or "auto", "AOT_FAST_BACKEND")
    if name == "auto":
        name = "reference"
    path = IMPLEMENTATIONS[name].get(operator)
    if path is None:
        if not fallbacks[name, operator]:
            warnings.warn(f"backend {name!r} has no {operator}: the reference runs instead (said once, counted in fallbacks)", stacklevel=3)
        fallbacks[name, operator] += 1
        path = IMPLEMENTATIONS["reference"][operator]
    return _load(path)


@functools.cache
def _load(path: str) -> Callable:
    module, function = path.split(":")
    return getattr(importlib.import_module(f".{module}", __package__), function)


def _known(name: str, source: str) -> str:
    if name != "auto" and name not in IMPLEMENTATIONS:
        raise ValueError(f"{source}: given {name!r}, expected one of {['auto', *IMPLEMENTATIONS]}")
    return name
