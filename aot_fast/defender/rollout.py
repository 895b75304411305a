"""Sampling answers: the prompt is prefilled once for its group, then one token at a time with a key-value cache.

Shapes: B prompts, G samples of each, N = B * G rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from aot_fast.data.schema import Example
from aot_fast.defender.head import rollout_logits
from aot_fast.defender.model import Defender
from aot_fast.defender.packing import left_pad
from aot_fast.defender.prompt import Prompt, encode
from aot_fast.engine import seed_of


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    num_samples: int
    temperature: float
    """0: greedy."""
    top_p: float
    max_tokens: int


@dataclass(frozen=True)
class Response:
    """One sampled answer, on the host."""

    ids: Tensor  # [R] int64, the stop token included
    logp: Tensor  # [R] float32, of the untruncated distribution at the sampling temperature
    text: str
    truncated: bool
    """No stop token came within the limit."""


def sample(defender: Defender, examples: Sequence[Example], seeds: Sequence[int], sampling: Sampling) -> list[list[Response]]:
    """`sampling.num_samples` responses to each example; sample j of example i draws from seed_of(seeds[i], j) whatever the batch.

    Must run inside `defender.whole()`. No collectives.
    """
    per_batch = max(1, defender.config.rollout_batch // sampling.num_samples)
    groups = []
    with rollout_logits(defender):
        for i in range(0, len(examples), per_batch):
            prompts = [encode(defender, example) for example in examples[i : i + per_batch]]
            groups += _sample_batch(defender, prompts, seeds[i : i + per_batch], sampling)
    return groups


def _sample_batch(defender: Defender, prompts: list[Prompt], seeds: Sequence[int], sampling: Sampling) -> list[list[Response]]:
    num_rows = len(prompts) * sampling.num_samples
    device = defender.runtime.device
    logits, cache, mask = _prefill(defender, prompts, sampling.num_samples)
    position = torch.tensor([p.next_position for p in prompts], device=device).repeat_interleave(sampling.num_samples)
    uniforms = _uniforms([seed_of(seed, j) for seed in seeds for j in range(sampling.num_samples)], sampling.max_tokens).to(device)
    stop = torch.tensor(defender.stop_ids, device=device)
    done = torch.zeros(num_rows, dtype=torch.bool, device=device)
    tokens, logps = [], []
    for t in range(sampling.max_tokens):
        token, logp = draw(logits, uniforms[:, t], sampling, defender.banned_ids)
        tokens.append(torch.where(done, stop[0], token))
        logps.append(logp)
        done = done | torch.isin(token, stop)
        if t + 1 == sampling.max_tokens or bool(done.all()):
            break
        mask = torch.cat([mask, mask.new_ones(num_rows, 1)], 1)
        step = {"input_ids": tokens[-1][:, None], "attention_mask": mask, "position_ids": (position + t).expand(3, -1)[..., None]}
        logits = defender.core(**step, past_key_values=cache, use_cache=True).logits[:, -1]
    responses = _responses(defender, torch.stack(tokens, 1).cpu(), torch.stack(logps, 1).cpu())
    return [responses[i : i + sampling.num_samples] for i in range(0, num_rows, sampling.num_samples)]


def _prefill(defender: Defender, prompts: list[Prompt], num_samples: int) -> tuple[Tensor, DynamicCache, Tensor]:
    """Next-token logits [N, V], the cache of all rows, and their attention mask [N, P]: one forward a prompt, not a sample."""
    device = defender.runtime.device
    ids, mask, positions = (x.to(device) for x in left_pad(prompts, defender.tokenizer.pad_token_id))
    cache = DynamicCache(config=defender.core.config.get_text_config())
    out = defender.core(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        mm_token_type_ids=(ids == defender.core.config.image_token_id).int(),
        pixel_values=torch.cat([p.pixels for p in prompts]).to(device),
        image_grid_thw=torch.cat([p.grid for p in prompts]).to(device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(num_samples)
    return out.logits[:, -1].repeat_interleave(num_samples, 0), cache, mask.repeat_interleave(num_samples, 0)


def _uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """[N, count] fp64 uniforms, a row's own whatever the batch; drawn on the host so that every device samples alike."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling, banned: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Token [N] and its log-prob [N] fp32 by inverting the cumulative distribution at `uniform` [N].

    The log-prob is that of the model's own distribution at the temperature, before banning and top-p: what the trainer recomputes.
    """
    scaled = logits.float() / (sampling.temperature or 1.0)
    logp = torch.log_softmax(scaled, -1)
    allowed = logp.clone()
    allowed[:, list(banned)] = -torch.inf
    if sampling.temperature == 0:
        token = allowed.argmax(-1)
    else:
        # fp64: over 152,064 tokens a cumulative sum in fp32 loses the tail.
        p = torch.softmax(allowed.double(), -1)
        if sampling.top_p < 1:
            sorted_p, order = p.sort(-1, descending=True)
            kept = sorted_p.cumsum(-1) - sorted_p < sampling.top_p
            p = torch.zeros_like(p).scatter(-1, order, sorted_p * kept)
        cumulative = p.cumsum(-1)
        token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
        token = token.clamp_max(logits.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None])[:, 0]


def _responses(defender: Defender, tokens: Tensor, logps: Tensor) -> list[Response]:
    stop = torch.tensor(defender.stop_ids)
    responses = []
    for row, logp in zip(tokens, logps):
        ends = torch.isin(row, stop).nonzero()
        length = int(ends[0]) + 1 if len(ends) else len(row)
        text = defender.tokenizer.decode(row[:length], skip_special_tokens=True).strip()
        responses.append(Response(row[:length].clone(), logp[:length].clone(), text, not len(ends)))
    return responses
