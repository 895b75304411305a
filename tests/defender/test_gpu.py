"""The Defender on a GPU: decoding as a CUDA graph, and packed updates in bf16."""

import dataclasses

import pytest
import torch

import aot_fast.kernels as K
from aot_fast.defender.drawing import Sampling
from aot_fast.defender.head import trainer_logp
from aot_fast.defender.model import load_frozen
from aot_fast.defender.packing import Row, collate, pack, response_logits
from aot_fast.defender.prompt import encode
from aot_fast.defender.rollout import sample
from aot_fast.engine import Runtime
from tests.models import answers_to, defender_config_of, scene_examples

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def loaded(folder, dtype, **changes):
    return load_frozen(folder, defender_config_of(folder, **changes), Runtime(0, 1, torch.device("cuda", 0), dtype))


def configured(defender, **changes):
    return dataclasses.replace(defender, config=dataclasses.replace(defender.config, **changes))


@pytest.mark.parametrize("slots", [2, 7, 100])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rollout_as_a_graph_draws_what_the_plain_one_draws(defender_folder, slots, temperature, monkeypatch):
    defender = loaded(defender_folder, torch.float32)
    examples, sampling = scene_examples(5), Sampling(3, temperature, 1.0, 40)
    monkeypatch.setattr(defender.core.generation_config, "eos_token_id", list(range(0, 640, 8)))
    plain = answers_to(configured(defender, shared_prefix=False, rollout_batch=100), examples, range(5), sampling)
    made = [
        answers_to(configured(defender, rollout_batch=slots, tokens_per_microbatch=250, cuda_graph=graph), examples, range(5), sampling)
        for graph in (True, False)
    ]
    for one, other in ((made[0], plain), (made[1], plain)):
        for a, b in zip([r for group in one for r in group], [r for group in other for r in group], strict=True):
            assert torch.equal(a.ids, b.ids) and (a.logp - b.logp).abs().max() < 2e-5 and a.truncated == b.truncated
    assert all(torch.equal(a.logp, b.logp) for x, y in zip(*made, strict=True) for a, b in zip(x, y, strict=True))


def rows_of(defender, num_prompts):
    prompts = [encode(defender, e) for e in scene_examples(num_prompts)]
    rows, made = [], torch.Generator().manual_seed(0)
    for prompt, group in zip(prompts, sample(defender, prompts, range(num_prompts), Sampling(4, 1.0, 1.0, 24))):
        for r in group:
            rows.append(Row(prompt, r.ids, r.logp, torch.randn((), generator=made).expand(len(r.ids)), len(rows)))
    return rows


def gradients(defender, batch):
    """Of sum of advantage log-prob, and the log-probs."""
    defender.model.requires_grad_(True)
    out = K.logprob(response_logits(defender.model, batch), batch.targets)
    made = torch.autograd.grad((out.logp * batch.advantages * batch.mask).sum(), list(defender.model.parameters()), allow_unused=True)
    return torch.cat([g.double().flatten() for g in made if g is not None]), out.logp.detach()[batch.mask]


def test_shared_prompts_in_bf16_are_as_near_to_fp32_as_unshared_ones(defender_folder):
    exact, half = loaded(defender_folder, torch.float32), loaded(defender_folder, torch.bfloat16)
    rows = rows_of(half, 6)
    expected, expected_logp = gradients(exact, collate(exact, rows))
    shared, padded = gradients(half, pack(half, rows)), gradients(half, collate(half, rows))
    far = [float((g - expected).norm() / expected.norm()) for g, _ in (shared, padded)]
    far_logp = [float((logp - expected_logp).norm()) for _, logp in (shared, padded)]
    print("gradient", far, "logp", far_logp)
    # Both are sums of roundings that differ: a tenth is what their sizes vary by.
    assert far[0] < 1.1 * far[1] and far_logp[0] < 1.1 * far_logp[1]


def test_log_probs_of_the_rollout_are_as_near_to_the_trainers_as_a_padded_batch_is(defender_folder):
    """All three round hidden states to bf16 in other places."""
    defender = loaded(defender_folder, torch.bfloat16)
    defender.player = defender.model  # what answers is what trains
    rows = rows_of(defender, 6)
    packed, padded = pack(defender, rows), collate(defender, rows)
    logp = trainer_logp(defender, packed)
    again = trainer_logp(defender, padded)[padded.mask]
    apart = [float((x - logp).square().mean().sqrt()) for x in (packed.logp, again)]
    print("root mean square: rollout, padded", apart)
    assert apart[0] < 1.2 * apart[1]
