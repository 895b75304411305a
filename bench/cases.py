"""What is measured: every operator at sizes that matter, ours against eager torch, torch.compile and the peers that are installed.

A case makes its inputs once; a provider is a function of them that returns the tensors which must agree between providers. Shapes: N rows,
V vocabulary, H hidden, B samples, n elements of a sample.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from aot_fast.kernels.policy_loss import PolicySettings, TokenBatch, token_batch
from torch import Tensor

import aot_fast.kernels as K
from aot_fast.kernels import row_loss_cuda

Provider = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """An operator at one size."""

    name: str
    inputs: Callable[[str], dict[str, Tensor]]
    """device -> tensors."""
    providers: dict[str, Provider]
    """The first is the operator under test."""
    floor_bytes: int = 0
    """Least traffic to device memory."""
    floor_flops: float = 0.0
    """Least matrix operations."""
    exact: Provider | None = None
    """The same in fp64, where that is affordable; otherwise the first provider is compared with `eager`."""
    tolerance: float = 2e-2
    """Norm-relative error allowed to every provider; above it no speed is reported. bf16 outputs round at 2^-9."""
    compiled: tuple[str, ...] = field(default=("eager",))
    """Providers that are measured under torch.compile as well."""


def _random(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


# logprob


def _logit_inputs(num_rows: int, vocabulary: int, dtype: torch.dtype) -> Callable[[str], dict[str, Tensor]]:
    def make(device: str) -> dict[str, Tensor]:
        g = _random(device, 0)
        logits = (3 * torch.randn(num_rows, vocabulary, device=device, generator=g, dtype=torch.float32)).to(dtype)
        return {
            "logits": logits.requires_grad_(),
            "targets": torch.randint(0, vocabulary, (num_rows,), device=device, generator=g),
            "up": torch.randn(num_rows, device=device, generator=g),
        }

    return make


def _ours_logprob(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    out = K.logprob(x["logits"].detach(), x["targets"])
    return out.logp, out.entropy


def _eager_logprob(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    logp = torch.log_softmax(x["logits"].detach().float(), -1)
    return logp.gather(1, x["targets"][:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def _ours_logprob_training(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    out = K.logprob(x["logits"], x["targets"])
    return out.logp.detach(), *torch.autograd.grad(out.logp, x["logits"], x["up"])


def _eager_logprob_training(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    logp = torch.log_softmax(x["logits"].float(), -1).gather(1, x["targets"][:, None])[:, 0]
    return logp.detach(), *torch.autograd.grad(logp, x["logits"], x["up"])


def _ours_scored(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    out = K.logprob(x["logits"], x["targets"])
    (gradient,) = torch.autograd.grad((out.logp * x["up"]).sum() + 0.1 * out.entropy.sum(), x["logits"])
    return out.logp.detach(), out.entropy.detach(), gradient


def _eager_scored(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    log_p = torch.log_softmax(x["logits"].float(), -1)
    logp, entropy = log_p.gather(1, x["targets"][:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (gradient,) = torch.autograd.grad((logp * x["up"]).sum() + 0.1 * entropy.sum(), x["logits"])
    return logp.detach(), entropy.detach(), gradient


def scored_cases(num_rows: int, vocabulary: int) -> list[Case]:
    inputs, size = _logit_inputs(num_rows, vocabulary, torch.float32), 4 * num_rows * vocabulary
    name = f"logprob with entropy forward + backward, {num_rows} x {vocabulary} fp32"
    return [Case(name, inputs, {"ours": _ours_scored, "eager": _eager_scored}, 3 * size, tolerance=1e-5)]


def logprob_cases(num_rows: int, vocabulary: int) -> list[Case]:
    inputs, size = _logit_inputs(num_rows, vocabulary, torch.bfloat16), 2 * num_rows * vocabulary
    shape = f"{num_rows} x {vocabulary} bf16"
    return [
        Case(f"logprob forward, {shape}", inputs, {"ours": _ours_logprob, "eager": _eager_logprob}, size),
        Case(f"logprob forward + backward, {shape}", inputs, {"ours": _ours_logprob_training, "eager": _eager_logprob_training}, 3 * size),
    ]


# linear_policy_loss and linear_logprob

SEQUENCE = 512
"""Tokens of a response."""


def _head_inputs(num_rows: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> Callable[[str], dict[str, Tensor]]:
    def make(device: str) -> dict[str, Tensor]:
        g = _random(device, 1)
        h = torch.randn(num_rows, hidden, device=device, generator=g, dtype=torch.float32).to(dtype)
        w = (torch.randn(vocabulary, hidden, device=device, generator=g, dtype=torch.float32) / math.sqrt(hidden)).to(dtype)
        targets = torch.randint(0, vocabulary, (num_rows,), device=device, generator=g)
        with torch.no_grad():
            old = K.linear_logprob(h, w, targets).logp + 0.05 * torch.randn(num_rows, device=device, generator=g)
        advantages = torch.randn(num_rows // SEQUENCE, device=device, generator=g).repeat_interleave(SEQUENCE)  # Liger takes one a sequence
        return {"hidden": h.requires_grad_(), "weight": w.requires_grad_(), "targets": targets, "old": old, "advantages": advantages}

    return make


def _ours_head(x: dict[str, Tensor], chunk_rows: int = 4096) -> tuple[Tensor, ...]:
    tokens = x["hidden"], x["weight"], x["targets"], x["advantages"]
    loss = K.linear_policy_loss(*tokens, old_logp=x["old"], dual_clip=None, chunk_rows=chunk_rows).loss
    return loss.detach(), *torch.autograd.grad(loss, (x["hidden"], x["weight"]))


def _chunk_loss(h: Tensor, w: Tensor, targets: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """The loss of a chunk in eager torch, summed over tokens (DAPO: clip 0.2 and 0.28)."""
    logp = torch.log_softmax((h @ w.T).float(), -1).gather(1, targets[:, None])[:, 0]
    ratio = torch.exp((logp - old).clamp(-20, 20))
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages).sum()


def _checkpointed_head(x: dict[str, Tensor], chunk_rows: int = 4096) -> tuple[Tensor, ...]:
    """Four GEMMs: each chunk's logits are formed again in the backward pass, as torchtitan's chunked loss does."""
    total = x["hidden"].new_zeros((), dtype=torch.float32)
    for rows in torch.arange(len(x["hidden"]), device="cpu").split(chunk_rows):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        pieces = x["hidden"][part], x["weight"], x["targets"][part], x["old"][part], x["advantages"][part]
        total = total + torch.utils.checkpoint.checkpoint(_chunk_loss, *pieces, use_reentrant=False)
    loss = total / len(x["hidden"])
    return loss.detach(), *torch.autograd.grad(loss, (x["hidden"], x["weight"]))


def _liger_head(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """LigerFusedLinearGRPOLoss as its users call it: compiled, one sequence a chunk."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    peer = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.28, loss_type="dapo")
    hidden, targets, old, advantages = (x[name].unflatten(0, (-1, SEQUENCE)) for name in ("hidden", "targets", "old", "advantages"))
    mask = torch.ones_like(targets)
    loss, _ = peer(hidden, x["weight"], targets, mask, advantages[:, 0], old_per_token_logps=old)
    return loss.detach(), *torch.autograd.grad(loss, (x["hidden"], x["weight"]))


def _peers(module: str, **providers: Provider) -> dict[str, Provider]:
    """The providers, where their module is installed."""
    return providers if importlib.util.find_spec(module) else {}


def _ours_linear_logprob(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (K.linear_logprob(x["hidden"], x["weight"], x["targets"]).logp,)


def _eager_linear_logprob(x: dict[str, Tensor], chunk_rows: int = 4096) -> tuple[Tensor, ...]:
    with torch.no_grad():
        parts = zip(x["hidden"].split(chunk_rows), x["targets"].split(chunk_rows))
        logps = [torch.log_softmax((h @ x["weight"].T).float(), -1).gather(1, t[:, None])[:, 0] for h, t in parts]
        return (torch.cat(logps),)


def head_cases(num_rows: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16, chunk_rows: int = 4096) -> list[Case]:
    inputs, flops = _head_inputs(num_rows, hidden, vocabulary, dtype), 2.0 * num_rows * hidden * vocabulary
    shape = f"{num_rows} x {hidden} x {vocabulary} {str(dtype)[6:]}"
    ours, eager = (partial(provider, chunk_rows=chunk_rows) for provider in (_ours_head, _checkpointed_head))
    return [
        Case(
            f"linear_policy_loss forward + backward, {shape}",
            inputs,
            {"ours": ours, "eager": eager, **_peers("liger_kernel", liger=_liger_head)},
            floor_flops=3 * flops,
            tolerance=3e-2,
        ),
        Case(
            f"linear_logprob forward, {shape}",
            inputs,
            {"ours": _ours_linear_logprob, "eager": _eager_linear_logprob},
            floor_flops=flops,
            tolerance=3e-2,
            compiled=(),
        ),
    ]


# The rows of a chunk inside linear_policy_loss: statistics, loss, dlogits in the logits' own memory


def _row_inputs(num_rows: int, vocabulary: int) -> Callable[[str], dict[str, Tensor]]:
    def make(device: str) -> dict[str, Tensor]:
        g = _random(device, 7)
        logits = 3 * torch.randn(num_rows, vocabulary, device=device, generator=g)
        targets = torch.randint(0, vocabulary, (num_rows,), device=device, generator=g)
        advantages, moved = torch.randn(2, num_rows, device=device, generator=g)
        old = K.logprob(logits, targets).logp + 0.1 * moved
        return {"logits": logits, "targets": targets, "advantages": advantages, "old": old}

    return make


ROW_SETTINGS = PolicySettings("ppo", 0.2, 0.28, 3.0, 0.0, "k3", "token", None, None, None, 0.0)


def _row_batch(x: dict[str, Tensor]) -> TokenBatch:
    mask = torch.ones_like(x["targets"], dtype=torch.bool)
    return token_batch(ROW_SETTINGS, torch.float32, x["advantages"], x["old"], None, mask, None)


def _triton_rows(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    from aot_fast.kernels import logprob_triton, policy_loss_triton

    logits = x["logits"].clone()
    stats = logprob_triton.row_stats(logits, x["targets"], 1.0)
    _, dlogp, _, _ = policy_loss_triton.loss_and_gradients_triton(stats.logp, stats.entropy, _row_batch(x), ROW_SETTINGS)
    return stats.logp, logprob_triton.consumed_gradient(logits, x["targets"], stats, dlogp, None, 1.0, torch.bfloat16)


def _cluster_rows(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    logp, _, _, gradient = row_loss_cuda.row_loss(x["logits"].clone(), x["targets"], _row_batch(x), ROW_SETTINGS, 1.0, torch.bfloat16)
    return logp, gradient


def _eager_rows(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    logits = x["logits"].clone().requires_grad_()
    logp = torch.log_softmax(logits, -1).gather(1, x["targets"][:, None])[:, 0]
    ratio = torch.exp((logp - x["old"]).clamp(-20, 20))
    u = torch.minimum(ratio * x["advantages"], ratio.clamp(0.8, 1.28) * x["advantages"])
    u = torch.where(x["advantages"] < 0, torch.maximum(u, 3 * x["advantages"]), u)
    return logp.detach(), torch.autograd.grad(-u.mean(), logits)[0].bfloat16()


def row_cases(num_rows: int, vocabulary: int) -> list[Case]:
    providers = {"triton": _triton_rows, "eager": _eager_rows}
    if row_loss_cuda.problem() is None:
        providers = {"csrc": _cluster_rows, **providers}
    size = num_rows * vocabulary
    # Every provider copies the logits first, which it would overwrite; then 1 read, and 1 write of bf16
    name = f"rows of a chunk, {num_rows} x {vocabulary} fp32 (copy included)"
    return [Case(name, _row_inputs(num_rows, vocabulary), providers, size * (4 + 4 + 4 + 2), compiled=())]


# group_advantage + policy_loss


def _token_inputs(num_groups: int, group_size: int, tokens: int) -> Callable[[str], dict[str, Tensor]]:
    def make(device: str) -> dict[str, Tensor]:
        g = _random(device, 2)
        num = num_groups * group_size
        logp = -torch.rand(num * tokens, device=device, generator=g)
        return {
            "rewards": torch.randint(0, 2, (num,), device=device, generator=g).float(),
            "sizes": torch.full((num_groups,), group_size, dtype=torch.int64, device=device),
            "row": torch.arange(num, device=device).repeat_interleave(tokens),
            "logp": logp.requires_grad_(),
            "old": logp.detach() + 0.1 * torch.randn(num * tokens, device=device, generator=g),
            "mask": torch.rand(num * tokens, device=device, generator=g) > 0.1,
        }

    return make


def _ours_policy(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    advantages = K.group_advantage(x["rewards"], x["sizes"]).values[x["row"]]
    loss = K.policy_loss(x["logp"], advantages, old_logp=x["old"], mask=x["mask"]).loss
    return loss.detach(), *torch.autograd.grad(loss, x["logp"])


def _eager_policy(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The loss alone: no metrics, equal groups."""
    grouped = x["rewards"].view(len(x["sizes"]), -1)
    deviation = grouped.std(1, keepdim=True)
    normed = torch.where(deviation > 0, (grouped - grouped.mean(1, keepdim=True)) / (deviation + 1e-6), 0)
    advantages = normed.flatten()[x["row"]]
    ratio = torch.exp((x["logp"] - x["old"]).clamp(-20, 20))
    u = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    u = torch.where(advantages < 0, torch.maximum(u, 3 * advantages), u)
    loss = -torch.where(x["mask"], u, 0).sum() / x["mask"].sum()
    return loss.detach(), *torch.autograd.grad(loss, x["logp"])


def policy_cases(num_groups: int, group_size: int, tokens: int) -> list[Case]:
    num = num_groups * group_size * tokens
    name = f"group_advantage + policy_loss forward + backward, {num_groups} groups of {group_size}, {num} tokens"
    inputs = _token_inputs(num_groups, group_size, tokens)
    # logp, old, advantage, mask read; the gradient written, and scaled in the backward pass
    return [Case(name, inputs, {"ours": _ours_policy, "eager": _eager_policy}, num * (4 + 4 + 4 + 1 + 4 + 4 + 4), tolerance=1e-5)]


def _tokens_only(num: int) -> Callable[[str], dict[str, Tensor]]:
    def make(device: str) -> dict[str, Tensor]:
        g = _random(device, 6)
        logp = -torch.rand(num, device=device, generator=g)
        old, advantages = logp + 0.1 * torch.randn(num, device=device, generator=g), torch.randn(num, device=device, generator=g)
        mask = torch.rand(num, device=device, generator=g) > 0.1
        return {"logp": logp.requires_grad_(), "old": old, "advantages": advantages, "mask": mask}

    return make


def _ours_token_loss(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    loss = K.policy_loss(x["logp"], x["advantages"], old_logp=x["old"], mask=x["mask"]).loss
    return loss.detach(), *torch.autograd.grad(loss, x["logp"])


def _eager_token_loss(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """With the metrics of ours that cost a pass, as trainers log them."""
    mask, advantages, count = x["mask"], x["advantages"], x["mask"].sum()
    d = (x["logp"] - x["old"]).clamp(-20, 20)
    ratio = torch.exp(d)
    u = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    u = torch.where(advantages < 0, torch.maximum(u, 3 * advantages), u)
    loss = -torch.where(mask, u, 0).sum() / count
    with torch.no_grad():
        low, high = (advantages < 0) & (ratio < 0.8), (advantages > 0) & (ratio > 1.28)
        metrics = [(mask & low).sum(), (mask & high).sum(), (mask & (advantages < 0) & (ratio > 3)).sum()]
        sums = ratio, -d, torch.expm1(d) - d, advantages, advantages.square()
        metrics += [torch.where(mask, value, 0).sum() for value in sums] + [torch.where(mask, (ratio - 1).abs(), 0).amax()]
    return loss.detach(), *torch.autograd.grad(loss, x["logp"])


def _bare_token_loss(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The loss alone."""
    ratio, advantages = torch.exp((x["logp"] - x["old"]).clamp(-20, 20)), x["advantages"]
    u = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    u = torch.where(advantages < 0, torch.maximum(u, 3 * advantages), u)
    loss = -torch.where(x["mask"], u, 0).sum() / x["mask"].sum()
    return loss.detach(), *torch.autograd.grad(loss, x["logp"])


def token_cases(num: int) -> list[Case]:
    providers = {"ours": _ours_token_loss, "eager": _eager_token_loss, "eager, no metrics": _bare_token_loss}
    name, compiled = f"policy_loss forward + backward, {num} tokens", ("eager", "eager, no metrics")
    return [Case(name, _tokens_only(num), providers, num * 25, tolerance=1e-5, compiled=compiled)]


# flow_step and flow_logp


def replay_cases(batch: int, tokens: int, channels: int) -> list[Case]:
    num = batch * tokens * channels
    name = f"flow_logp + kl forward + backward, {batch} x {tokens} x {channels} fp32"
    inputs = _flow_inputs(batch, tokens, channels, torch.float32)
    return [Case(name, inputs, {"ours": _ours_replay, "eager": _eager_replay}, num * 36, tolerance=1e-5)]


def _flow_inputs(batch: int, tokens: int, channels: int, dtype: torch.dtype) -> Callable[[str], dict[str, Tensor]]:
    def make(device: str) -> dict[str, Tensor]:
        g = _random(device, 3)
        x, v, v_ref = (torch.randn(batch, tokens, channels, device=device, generator=g).to(dtype) for _ in range(3))
        sigma, following = torch.full((batch,), 0.8, device=device), torch.full((batch,), 0.7, device=device)
        seeds = torch.arange(batch, device=device) + 12345
        step = K.flow_step(x, v, sigma, following, eta=0.7, seeds=seeds)
        given = {"x": x, "v": v.requires_grad_(), "v_ref": v_ref, "x_next": step.x_next, "sigma": sigma, "next": following, "seeds": seeds}
        given["up_kl"] = torch.full((batch,), 0.04, device=device)
        return given | {"up": torch.randn(batch, device=device, generator=g), "noise": torch.randn(x.shape, device=device, generator=g)}

    return make


def _ours_step(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    step = K.flow_step(x["x"], x["v"].detach(), x["sigma"], x["next"], eta=0.7, noise=x["noise"])
    return step.x_next, step.logp


def _ours_step_seeds(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (K.flow_step(x["x"], x["v"].detach(), x["sigma"], x["next"], eta=0.7, seeds=x["seeds"]).logp,)


def _coefficients(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    s, dt = x["sigma"].view(-1, 1, 1), (x["next"] - x["sigma"]).view(-1, 1, 1)
    g = 0.7 * torch.sqrt(s / (1 - s))
    half = g.square() / (2 * s)
    return 1 + half * dt, dt * (1 + half * (1 - s)), g * torch.sqrt(-dt)


def _log_density(residual: Tensor, std: Tensor) -> Tensor:
    return (-residual.square() / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)).mean((1, 2))


def _eager_step(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """As flow_grpo writes it, in fp32."""
    a, b, std = _coefficients(x)
    mean = a * x["x"].float() + b * x["v"].detach().float()
    stored = (mean + std * x["noise"]).to(x["x"].dtype)
    return stored, _log_density(stored.float() - mean, std)


def _eager_step_random(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    a, b, std = _coefficients(x)
    mean = a * x["x"].float() + b * x["v"].detach().float()
    stored = (mean + std * torch.randn_like(mean)).to(x["x"].dtype)
    return (_log_density(stored.float() - mean, std),)


def _ours_replay(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    out = K.flow_logp(x["x"], x["v"], x["x_next"], x["sigma"], x["next"], dynamics="flow_sde", eta=0.7, v_ref=x["v_ref"])
    return out.logp.detach(), out.kl.detach(), *torch.autograd.grad((out.logp, out.kl), x["v"], (x["up"], x["up_kl"]))


def _eager_replay(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    a, b, std = _coefficients(x)
    mean = a * x["x"].float() + b * x["v"].float()
    mean_ref = a * x["x"].float() + b * x["v_ref"].float()
    logp = _log_density(x["x_next"].float() - mean, std)
    kl = ((mean - mean_ref) ** 2).mean((1, 2)) / (2 * std.flatten() ** 2)
    return logp.detach(), kl.detach(), *torch.autograd.grad((logp, kl), x["v"], (x["up"], x["up_kl"]))


def _guidance_inputs(batch: int, tokens: int, channels: int, dtype: torch.dtype) -> Callable[[str], dict[str, Tensor]]:
    def make(device: str) -> dict[str, Tensor]:
        g = _random(device, 4)
        v, v_uncond, up = (torch.randn(batch, tokens, channels, device=device, generator=g) for _ in range(3))
        return {"v": v.to(dtype).requires_grad_(), "v_uncond": v_uncond.to(dtype).requires_grad_(), "up": up}

    return make


def _ours_guidance(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    u = K.guided_velocity(x["v"], x["v_uncond"], guidance=4.0)
    return u.detach(), *torch.autograd.grad(u, (x["v"], x["v_uncond"]), x["up"])


def _eager_guidance(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """As diffusers' QwenImageEditPipeline writes it, in fp32."""
    v, v_uncond = x["v"].float(), x["v_uncond"].float()
    mixed = v_uncond + 4.0 * (v - v_uncond)
    u = mixed * (v.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))
    return u.detach(), *torch.autograd.grad(u, (x["v"], x["v_uncond"]), x["up"])


def _sample_inputs(batch: int) -> Callable[[str], dict[str, Tensor]]:
    def make(device: str) -> dict[str, Tensor]:
        g = _random(device, 5)
        old, advantages, kl = (torch.randn(batch, device=device, generator=g) for _ in range(3))
        moved = old + 2e-4 * torch.randn(batch, device=device, generator=g)
        return {"logp": moved.requires_grad_(), "old": old, "advantages": advantages, "kl": kl.abs().requires_grad_()}

    return make


def _ours_flow_loss(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    loss = K.flow_policy_loss(x["logp"], x["old"], x["advantages"], clip=1e-4, kl=x["kl"], beta=0.04).loss
    return loss.detach(), *torch.autograd.grad(loss, (x["logp"], x["kl"]))


def _eager_flow_loss(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The loss alone, no metrics, as flow_grpo writes it."""
    ratio, advantages = torch.exp(x["logp"] - x["old"]), x["advantages"].clamp(-5, 5)
    terms = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - 1e-4, 1 + 1e-4))
    loss = terms.mean() + 0.04 * x["kl"].mean()
    return loss.detach(), *torch.autograd.grad(loss, (x["logp"], x["kl"]))


def flow_cases(batch: int, tokens: int, channels: int) -> list[Case]:
    inputs, num = _flow_inputs(batch, tokens, channels, torch.bfloat16), batch * tokens * channels
    shape = f"{batch} x {tokens} x {channels} bf16"
    return [
        # x, v and fp32 noise read, x_next written
        Case(f"flow_step, noise given, {shape}", inputs, {"ours": _ours_step, "eager": _eager_step}, num * (2 + 2 + 4 + 2)),
        # The noise differs between the two, and so does the log-prob: a mean over 262,144 squares of normals, 0.3 % apart
        Case(
            f"flow_step, seeds, {shape}", inputs, {"ours": _ours_step_seeds, "eager": _eager_step_random}, num * (2 + 2 + 2), tolerance=0.02
        ),
        # x, v, x_next, v_ref read twice, dv written
        Case(f"flow_logp + kl forward + backward, {shape}", inputs, {"ours": _ours_replay, "eager": _eager_replay}, num * (8 + 8 + 2)),
        # v, v_uncond read and fp32 u written; both and the fp32 gradient read, two gradients written
        Case(
            f"guided_velocity forward + backward, {shape}",
            _guidance_inputs(batch, tokens, channels, torch.bfloat16),
            {"ours": _ours_guidance, "eager": _eager_guidance},
            num * (2 + 2 + 4 + 2 + 2 + 4 + 2 + 2),
        ),
        # A launch: there is next to nothing to move
        Case(
            f"flow_policy_loss forward + backward, {64 * batch} samples",
            _sample_inputs(64 * batch),
            {"ours": _ours_flow_loss, "eager": _eager_flow_loss},
            64 * batch * (4 * 4 + 2 * 4),
            tolerance=1e-4,
        ),
    ]


def all_cases(device: str) -> list[Case]:
    """The published sizes on a GPU (KERNELS: Qwen2.5-VL-7B's head, Qwen-Image's latents of 1,024 px), small ones on a CPU."""
    if device == "cuda":
        return [
            *logprob_cases(8192, 152_064),
            *head_cases(8192, 3584, 152_064),
            *policy_cases(64, 8, 512),
            *flow_cases(24, 4096, 64),
            *row_cases(4096, 152_064),
        ]
    return [
        *logprob_cases(512, 32_000),
        *head_cases(2048, 1024, 32_000, torch.float32, chunk_rows=512),
        *policy_cases(64, 8, 512),
        *flow_cases(4, 1024, 64),
        *scored_cases(512, 32_000),
        *(case for num in (4096, 262_144) for case in token_cases(num)),
        *replay_cases(1, 64, 64),
        *replay_cases(4, 1024, 64),
    ]
