"""Which implementation of an operator runs.

IMPLEMENTATIONS names every one of them: backend -> operator -> "module:function" beside this file. The modules are imported on first use.
By default CUDA tensors go to triton, CPU tensors to csrc where it is built, and all others to the reference. Neither has fp64: such inputs
go to the reference on every device.
"""

import contextlib
import contextvars
import importlib
import importlib.util
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType

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
        "decode_attention": "decode_attention:decode_attention_reference",
        "rotary": "rotary:rotary_reference",
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
        "decode_attention": "decode_attention_triton:decode_attention_triton",
        "rotary": "rotary_triton:rotary_triton",
    },
    "csrc": {
        "logprob": "native:logprob_csrc",
        "linear_logprob": "native:linear_logprob_csrc",
        "linear_policy_loss": "native:linear_policy_loss_csrc",
        "group_advantage": "native:group_advantage_csrc",
        "policy_loss": "native:policy_loss_csrc",
        "guided_velocity": "native:guided_velocity_csrc",
        "flow_step": "native:flow_step_csrc",
        "flow_logp": "native:flow_logp_csrc",
        "flow_policy_loss": "native:flow_policy_loss_csrc",
    },
}

fallbacks: Counter[tuple[str, str]] = Counter()
"""(backend, operator) -> how often the reference ran because the forced backend has no such operator."""

HAS_TRITON = importlib.util.find_spec("triton") is not None

_loaded: dict[str, Callable] = {}
_modules: dict[str, ModuleType] = {}

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("aot_fast_backend", default=None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces a backend inside the block (in this thread), whatever AOT_FAST_BACKEND says.

    name: a key of IMPLEMENTATIONS, or "auto" for the choice by device. Raises ValueError on any other name, and on csrc if it is not built.
    """
    if name == "csrc":
        _require_csrc()
    token = _forced.set(_known(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def implementation(operator: str, *inputs: Tensor | None) -> Callable:
    """The function that runs `operator` on these inputs under the backend in force.

    Raises ValueError where triton or csrc is forced on a device that it cannot run on, and where csrc is forced but not built.
    """
    name = backend_in_force()
    given = [t for t in inputs if t is not None]
    forced = name != "auto"
    if not forced:
        name = _by_device(given[0].device) if given else "reference"
    if name != "reference" and any(t.dtype == torch.float64 for t in given):
        name = "reference"
    elif forced and given:
        _check_device(name, given[0])
    path = IMPLEMENTATIONS[name].get(operator)
    if path is None:
        if not fallbacks[name, operator]:
            warnings.warn(f"backend {name!r} has no {operator}: the reference runs instead (said once, counted in fallbacks)", stacklevel=3)
        fallbacks[name, operator] += 1
        path = IMPLEMENTATIONS["reference"][operator]
    return _load(path)


def backend_on(device: torch.device) -> str:
    """The backend in force for tensors on `device`, other than fp64."""
    name = backend_in_force()
    return _by_device(device) if name == "auto" else name


def _by_device(device: torch.device) -> str:
    if device.type == "cuda":
        return "triton" if HAS_TRITON else "reference"
    return "csrc" if device.type == "cpu" and csrc_problem() is None else "reference"


def _check_device(name: str, first: Tensor) -> None:
    if name == "triton" and not first.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend: given 'triton' for a tensor on {first.device}, expected a CUDA tensor (or TRITON_INTERPRET=1)")
    if name == "csrc" and first.device.type != "cpu":
        raise ValueError(f"backend: given 'csrc' for a tensor on {first.device}, expected a CPU tensor")
    if name == "csrc":
        _require_csrc()


def _require_csrc() -> None:
    if csrc_problem() is not None:
        raise ValueError(f"backend: given 'csrc', expected one that is there: {csrc_problem()}")


def _constant(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, whose call alone would import the whole compiler (1.5 s, and triton)."""
    function._dynamo_marked_constant = True
    return function


@_constant  # the tracer cannot read a context variable: a compiled function keeps the backend it was traced with
def backend_in_force() -> str:
    """A key of IMPLEMENTATIONS, or "auto": what `backend` or AOT_FAST_BACKEND asks for."""
    return _forced.get() or _known(os.environ.get("AOT_FAST_BACKEND") or "auto", "AOT_FAST_BACKEND")


@_constant
def csrc_problem() -> str | None:
    """Why the C++ operators cannot be used, or None."""
    if "native" not in _modules:  # an import statement costs 10 us even where the module is there
        _modules["native"] = importlib.import_module(".native", __package__)
    return _modules["native"].problem()


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
