"""Which implementation of an operator runs.

IMPLEMENTATIONS names every one of them: backend -> operator -> "module:function" beside this file. The modules are imported on first use.
By default CUDA tensors go to triton and all others to the reference. Triton has no fp64: such inputs go to the reference on every device.
"""

import contextlib
import contextvars
import importlib
import importlib.util
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

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
    "triton": {
        "logprob": "logprob_triton:logprob_triton",
        "linear_logprob": "linear_triton:linear_logprob_triton",
        "linear_policy_loss": "linear_triton:linear_policy_loss_triton",
        "group_advantage": "group_advantage_triton:group_advantage_triton",
        "policy_loss": "policy_loss_triton:policy_loss_triton",
        "guided_velocity": "guidance_triton:guided_velocity_triton",
        "flow_step": "flow_step_triton:flow_step_triton",
        "flow_logp": "flow_step_triton:flow_logp_triton",
        "flow_policy_loss": "flow_policy_loss_triton:flow_policy_loss_triton",
    },
}

fallbacks: Counter[tuple[str, str]] = Counter()
"""(backend, operator) -> how often the reference ran because the forced backend has no such operator."""

HAS_TRITON = importlib.util.find_spec("triton") is not None

_loaded: dict[str, Callable] = {}

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


def implementation(operator: str, *inputs: Tensor | None) -> Callable:
    """The function that runs `operator` on these inputs under the backend in force.

    Raises ValueError where triton is forced on a device that it cannot run on.
    """
    name = backend_in_force()
    given = [t for t in inputs if t is not None]
    if name == "auto":
        name = "triton" if HAS_TRITON and given and given[0].is_cuda else "reference"
    if name == "triton":
        if any(t.dtype == torch.float64 for t in given):
            name = "reference"
        elif given and not given[0].is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"backend: given 'triton' for a tensor on {given[0].device}, expected a CUDA tensor (or TRITON_INTERPRET=1)")
    path = IMPLEMENTATIONS[name].get(operator)
    if path is None:
        if not fallbacks[name, operator]:
            warnings.warn(f"backend {name!r} has no {operator}: the reference runs instead (said once, counted in fallbacks)", stacklevel=3)
        fallbacks[name, operator] += 1
        path = IMPLEMENTATIONS["reference"][operator]
    return _load(path)


def _constant(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, whose call alone would import the whole compiler (1.5 s, and triton)."""
    function._dynamo_marked_constant = True
    return function


@_constant  # the tracer cannot read a context variable: a compiled function keeps the backend it was traced with
def backend_in_force() -> str:
    """A key of IMPLEMENTATIONS, or "auto": what `backend` or AOT_FAST_BACKEND asks for."""
    return _forced.get() or _known(os.environ.get("AOT_FAST_BACKEND") or "auto", "AOT_FAST_BACKEND")


def _load(path: str) -> Callable:
    if torch.compiler.is_compiling():
        _load_all()
    elif path not in _loaded:
        _import(path)
    return _loaded[path]


@_constant  # nor can it import, nor see what is added to a dict that it has looked at
def _load_all() -> bool:
    for table in IMPLEMENTATIONS.values():
        with contextlib.suppress(ImportError):  # triton, on a machine without it
            for path in table.values():
                _import(path)
    return True


def _import(path: str) -> None:
    module, function = path.split(":")
    _loaded[path] = getattr(importlib.import_module(f".{module}", __package__), function)


def _known(name: str, source: str) -> str:
    if name != "auto" and name not in IMPLEMENTATIONS:
        raise ValueError(f"{source}: given {name!r}, expected one of {['auto', *IMPLEMENTATIONS]}")
    return name
