"""The plain rollout: prompts padded to a batch, their keys and values copied for every sample, which all go on until the last one ends.

Shapes: B prompts, G samples of each, N = B * G rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers import DynamicCache

from aot_fast.defender.drawing import Response, Sampling, draw, response_of, uniforms
from aot_fast.defender.model import Defender
from aot_fast.defender.packing import left_pad, pictures_of
from aot_fast.defender.prompt import Prompt
from aot_fast.engine import seed_of


def sample(defender: Defender, prompts: Iterable[Prompt], seeds: Sequence[int], sampling: Sampling) -> list[list[Response]]:
    """As rollout.sample."""
    per_batch = max(1, defender.config.rollout_batch // sampling.num_samples)
    groups, coming = [], iter(prompts)
    for i in range(0, len(seeds), per_batch):
        groups += _sample_batch(defender, list(islice(coming, per_batch)), seeds[i : i + per_batch], sampling)
    return groups


def _sample_batch(defender: Defender, prompts: list[Prompt], seeds: Sequence[int], sampling: Sampling) -> list[list[Response]]:
    num_rows = len(prompts) * sampling.num_samples
    device = defender.runtime.device
    logits, cache, mask = _prefill(defender, prompts, sampling.num_samples)
    position = torch.tensor([p.next_position for p in prompts], device=device).repeat_interleave(sampling.num_samples)
    chance = uniforms([seed_of(seed, j) for seed in seeds for j in range(sampling.num_samples)], sampling.max_tokens).to(device)
    stop, banned = (torch.tensor(ids, device=device) for ids in (defender.stop_ids, defender.banned_ids))
    done = torch.zeros(num_rows, dtype=torch.bool, device=device)
    tokens, logps = [], []
    for t in range(sampling.max_tokens):
        token, logp = draw(logits, chance[:, t], sampling, banned)
        tokens.append(torch.where(done, stop[0], token))
        logps.append(logp)
        done = done | torch.isin(token, stop)
        if t + 1 == sampling.max_tokens or bool(done.all()):
            break
        mask = torch.cat([mask, mask.new_ones(num_rows, 1)], 1)
        step = {"input_ids": tokens[-1][:, None], "attention_mask": mask, "position_ids": (position + t).expand(3, -1)[..., None]}
        logits = defender.core(**step, past_key_values=cache, use_cache=True).logits[:, -1]
    drawn = zip(torch.stack(tokens, 1).cpu(), torch.stack(logps, 1).cpu())
    responses = [response_of(defender, ids, logp) for ids, logp in drawn]
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
        **pictures_of(defender, prompts),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(num_samples)
    return out.logits[:, -1].repeat_interleave(num_samples, 0), cache, mask.repeat_interleave(num_samples, 0)
