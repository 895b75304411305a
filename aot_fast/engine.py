"""torchrun and DeepSpeed ZeRO-3 for both players: one `Runtime` a process, one `Player` a model.

The rules of DESIGN.md section 4 that live here: every rank does the same number of forward and backward passes (5), the loss is
already normalised over the whole optimizer step (7), and the only host synchronisation of a step is one read of its health (8).
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aot_fast.config import AttackerConfig, DefenderConfig, EngineConfig, OptimizerConfig, RunConfig

if not torch.cuda.is_available():  # read by DeepSpeed when it is imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

T = TypeVar("T")
REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def seed_of(*parts: object) -> int:
    """63-bit seed derived from (base, role, round, step, sample, ...): the same whatever the world size or batch (DESIGN.md rule 6)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Runtime:
    """This process among the others."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    """Compute dtype of both players."""

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """`x` reduced over ranks (op: sum, max, min) in a new tensor, the same on every rank."""
        x = x.clone()
        dist.all_reduce(x, REDUCE[op])
        return x

    def gather(self, item: T) -> list[T]:
        """The picklable `item` of every rank, in rank order, on every rank."""
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def broadcast(self, item: T) -> T:
        """Rank 0's `item`."""
        items = [item]
        dist.broadcast_object_list(items, src=0)
        return items[0]

    def barrier(self) -> None:
        dist.barrier()

    def mine(self, count: int) -> range:
        """The indices of `count` items that this rank works on."""
        return range(self.rank, count, self.world)


def open_runtime(engine: EngineConfig, run: RunConfig) -> Runtime:
    """Join torchrun's process group, or make a group of one when there is no torchrun."""
    import deepspeed

    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    world = int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    torch.set_num_threads(run.threads or max(1, (os.cpu_count() or 1) // local_world))
    if run.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    # DeepSpeed's shared-memory collectives for CPUs are compiled at the first start: a minute, and a compiler, for nothing gained here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=timedelta(seconds=engine.timeout_s), auto_mpi_discovery=False)
    precision = {"auto": "bf16" if cuda else "fp32"}.get(engine.precision, engine.precision)
    return Runtime(dist.get_rank(), world, device, torch.bfloat16 if precision == "bf16" else torch.float32)


def on_rank_0(runtime: Runtime, work: Callable[[], T]) -> T:
    """Rank 0's result of `work` on every rank; a ValueError there is raised on all, so that none is left waiting."""
    result, error = None, None
    if runtime.rank == 0:
        try:
            result = work()
        except ValueError as raised:
            error = raised
    result, error = runtime.broadcast((result, error))
    if error is not None:
        raise error
    return result


def close_runtime() -> None:
    """Leave the process group: gloo may abort a process that ends while its group is open."""
    if dist.is_initialized():
        dist.destroy_process_group()


def zero_config(engine: EngineConfig, runtime: Runtime, optimizer: OptimizerConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a player; also given to `zero.Init` and `HfDeepSpeedConfig`."""
    host = {"device": "cpu", "pin_memory": runtime.device.type == "cuda"}
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": False,  # DeepSpeed refuses it together with unmanaged accumulation
        "stage3_param_persistence_threshold": engine.persistence_threshold,
        # Theirs is a function in Python, which adds the bias afterwards, so as to keep no cast copies of weights under autocast: here are
        # none, and it costs a tenth of a rollout's time on a CPU.
        "memory_efficient_linear": False,
    }
    if engine.offload in ("optimizer", "all"):
        zero["offload_optimizer"] = host
    if engine.offload == "all":
        zero["offload_param"] = host
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # The number of micro-batches changes from step to step: gradients accumulate until `step()` is called.
        "managed_gradient_accumulation": False,
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
    if runtime.dtype is torch.bfloat16:
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return config


class TooManyBadSteps(RuntimeError):
    """The loss or the gradients were non-finite in `engine.max_bad_steps` consecutive optimizer steps."""


@dataclass(frozen=True)
class StepResult:
    """What became of one optimizer step."""

    applied: bool
    """False: something was not finite on some rank; the weights are untouched."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    lr: float


class Player:
    """One DeepSpeed ZeRO-3 engine around one model; trains the parameters that require a gradient."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: OptimizerConfig,
        engine: EngineConfig,
        runtime: Runtime,
        groups: list[dict] | None = None,
    ):
        import deepspeed

        self.name, self.runtime, self.config, self.limits = name, runtime, optimizer, engine
        self.version = 0
        self.bad_steps = 0
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(
            groups or self.trainable, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
        )
        self.engine = deepspeed.initialize(model=model, optimizer=adamw, config=zero_config(engine, runtime, optimizer))[0]
        self.module: nn.Module = self.engine.module
        self.base_lrs = [group["lr"] for group in self.engine.optimizer.param_groups]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward through the engine. A collective: every rank calls it equally often."""
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss` = local sum / global normaliser of the optimizer step (DESIGN.md rule 7)."""
        # DeepSpeed averages gradients over ranks; the normaliser is global already, so the sum is wanted.
        self.engine.backward(loss * self.runtime.world, scale_wrt_gas=False)

    def step(self, healthy: Tensor | bool = True) -> StepResult:
        """Apply the accumulated gradient if loss, rewards (`healthy`) and gradient are finite on every rank, else drop it.

        Raises TooManyBadSteps after `engine.max_bad_steps` dropped steps in a row.
        """
        square = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for gradient in self._gradients():
            square += gradient.to(self.runtime.device).double().square().sum()
        # One collective and one host read: a non-finite flag becomes a NaN in the summed square.
        square = torch.where(torch.as_tensor(healthy, device=square.device), square, torch.nan)
        norm = self.runtime.all_reduce(square).sqrt().item()
        applied = norm == norm and norm != float("inf")
        lr = self._set_lr()
        if applied:
            self.engine.step()
            self.version += 1
            self.bad_steps = 0
        else:
            self.engine.optimizer.zero_grad()
            self.bad_steps += 1
        for gradient in self._gradients():
            gradient.zero_()  # a parameter unused in the next step must not see this gradient again
        if self.bad_steps >= self.limits.max_bad_steps:
            raise TooManyBadSteps(
                f"{self.name}: loss or gradient was not finite in {self.bad_steps} optimizer steps in a row (engine.max_bad_steps); "
                f"lower {self.name}.optimizer.lr or look at metrics.jsonl; the last checkpoint is good"
            )
        return StepResult(applied, norm, lr)

    def _gradients(self) -> list[Tensor]:
        """This rank's accumulated gradient partitions. DeepSpeed has no public name for them before its own step."""
        return list(self.engine.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values())

    def _set_lr(self) -> float:
        scale = min(1.0, (self.version + 1) / max(1, self.config.warmup_steps))
        for group, base in zip(self.engine.optimizer.param_groups, self.base_lrs):
            group["lr"] = base * scale
        return self.config.lr * scale

    @contextmanager
    def gathered(self, training: bool = False) -> Iterator[nn.Module]:
        """The module with whole weights and no ZeRO hooks: ranks may call it unequally often inside, without gradients.

        training: with gradients, through the engine as ever: one gather in place of two a micro-batch. The step is taken outside.
        """
        import deepspeed
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        hooks = self.engine.optimizer.parameter_offload
        was_training = self.module.training
        with torch.set_grad_enabled(training), deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            # All of them, the one at the start of the module's forward included: it is a collective, and ranks run unequally often here.
            for hook in (*hooks.forward_hooks, *hooks.backward_hooks, hooks.fwd_pre_hook):
                hook.remove()
            hooks.forward_hooks, hooks.backward_hooks = [], []
            self.module.train(training and was_training)
            try:
                yield self.module
            finally:
                self.module.train(was_training)
                for parameter in self.module.parameters():
                    parameter.ds_active_sub_modules.clear()
                hooks.setup_zero_stage3_hooks()
                FWD_MODULE_STACK.pop()  # which grows by the module at every set-up

    def offload(self) -> None:
        """Move Adam's moments to the host while the other player works (GPU only)."""
        self._move_moments(torch.device("cpu"))

    def reload(self) -> None:
        """Bring back what `offload` moved."""
        self._move_moments(self.runtime.device)

    def _move_moments(self, device: torch.device) -> None:
        # Not DeepSpeed's offload_states: it wants its own FusedAdam, and would move the weights that the idle player still answers with.
        if self.runtime.device.type != "cuda" or self.limits.offload != "none" or not self.limits.offload_idle:
            return
        for state in self.engine.optimizer.optimizer.state.values():
            for name, value in state.items():
                if torch.is_tensor(value) and value.dim():  # the step count stays where it is
                    state[name] = value.to(device)

    def save(self, folder: Path) -> None:
        """Write weights and optimizer states of all ranks below `folder` (frozen weights left out). A collective."""
        state = {"version": self.version, "bad_steps": self.bad_steps}
        self.engine.save_checkpoint(str(folder), tag="engine", client_state=state, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """Inverse of `save`, bitwise, at the same world size. Raises RuntimeError when the folder holds no such checkpoint."""
        path, state = self.engine.load_checkpoint(str(folder), tag="engine", load_module_strict=False)
        if path is None:
            raise RuntimeError(f"{self.name}: no DeepSpeed checkpoint in {folder}")
        self.version, self.bad_steps = state["version"], state["bad_steps"]


def build_player(
    name: str, model: nn.Module, optimizer: OptimizerConfig, engine: EngineConfig, runtime: Runtime, groups: list[dict] | None = None
) -> Player:
    """A `Player`; `groups` are AdamW parameter groups where parts of the model have rates of their own."""
    return Player(name, model, optimizer, engine, runtime, groups)


def whole_updates(config: AttackerConfig | DefenderConfig, engine: EngineConfig) -> bool:
    """Whether a player's weights are whole during its updates too: not where they are kept on the host to make room."""
    return config.gather == "update" and engine.offload != "all"


@contextmanager
def adapter_off(module: nn.Module) -> Iterator[None]:
    """The model without its LoRA adapter, bit for bit the base. Raises ValueError when it has none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    if not layers:
        raise ValueError("the model has no adapter to switch off; set lora.rank")
    for layer in layers:
        layer._disable_adapters = True  # peft's own switch also flips requires_grad, on which DeepSpeed has hung its hooks
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def microbatches(runtime: Runtime, items: Sequence[T], size: int) -> list[list[T]]:
    """This rank's items in micro-batches of `size`, as many as the rank with the most has. A collective."""
    return evened(runtime, [list(items[i : i + size]) for i in range(0, len(items), size)])


def evened(runtime: Runtime, batches: list[list[T]]) -> list[list[T]]:
    """This rank's micro-batches, then empty ones until it has as many as the rank with the most. A collective.

    An empty list stands for a micro-batch of zero weight that must still run forward and backward (ZeRO-3 waits for every rank).
    """
    most = int(runtime.all_reduce(torch.tensor(len(batches), device=runtime.device), "max"))
    return batches + [[] for _ in range(most - len(batches))]


def whole_state(player: Player, trainable_only: bool = False) -> dict[str, Tensor]:
    """Name to whole weight on the host of rank 0, an empty dict elsewhere; one parameter is gathered at a time. A collective."""
    import deepspeed

    state = {}
    for name, parameter in player.module.named_parameters():
        if trainable_only and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            if player.runtime.rank == 0:
                state[name] = parameter.detach().cpu().clone()
    if player.runtime.rank == 0 and not trainable_only:
        saved = player.module.state_dict().keys()  # buffers that are no part of the files (rotary tables) stay out
        state |= {name: buffer.detach().cpu().clone() for name, buffer in player.module.named_buffers() if name in saved}
    return state
