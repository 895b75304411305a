"""The equations once more, in fp64 with loops and autograd, sharing nothing with the code under test.

Tolerances. u = 2^-24 is the rounding error of fp32. Inputs are exact: the oracle gets the same fp32 (or bf16) numbers.
- logprob: z - m is off by u |z - m| and e^(z - m) relatively by as much; sums are fp64. With |z - m| < 80 where e^z matters at all
  (e^-80 is nothing), logp and each gradient entry are off by < 80 u = 5e-6.
- policy losses: one subtraction, one exp, about ten products: ratio relative error < (|d| + 12) u < 32 u = 2e-6, |d| <= 20.
- flow: x' - mean is off by about 2 u |mean| against S: relatively 2 u |mean| / S <= 3e-6 for |mean| / S <= 25, which the cases here keep.
So 1e-5 (norm-relative for tensors) holds for fp32 inputs with room, and a wrong coefficient does not pass it. bf16 inputs with gradients
rounded to bf16: u = 2^-9, one rounding of an entry, so 2^-9 norm-relative; 2e-2 where two GEMMs round as well.
"""

import math
import struct

import torch

FP32 = 1e-5
BF16 = 2e-2


def error(actual, expected) -> float:
    """Norm-relative error in fp64; absolute where the expectation is zero."""
    actual, expected = (torch.as_tensor(t).detach().double() for t in (actual, expected))
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = expected.norm().item()
    return ((actual - expected).norm() / (scale if scale > 0 else 1.0)).item()


def leaf(tensor):
    """An fp64 copy that collects a gradient."""
    return tensor.detach().double().clone().requires_grad_()


def logprob(logits, targets, temperature=1.0):
    """Row by row; logits fp64 with a graph."""
    logps, entropies = [], []
    for row, target in zip(logits, targets.tolist()):
        z = row / temperature
        if not 0 <= target < len(row) or z[target].item() == -math.inf:
            logps.append(row.new_zeros(()))
            entropies.append(row.new_zeros(()))
            continue
        z = z[z > -math.inf] if bool((z == -math.inf).any()) else z
        lse = torch.logsumexp(z, 0)
        logps.append(row[target] / temperature - lse)
        entropies.append(-(torch.exp(z - lse) * (z - lse)).sum())
    return torch.stack(logps), torch.stack(entropies)


def group_advantage(rewards, sizes, eps=1e-6, std="group", ddof=1):
    """Lists of Python floats in, (values, degenerate) out."""

    def deviation(values, mean):
        return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(len(values) - ddof, 1))

    everything = [r for r in rewards if math.isfinite(r)]
    values, degenerate, start = [], [], 0
    for size in sizes:
        group = rewards[start : start + size]
        start += size
        finite = [r for r in group if math.isfinite(r)]
        flat = len(finite) < 2 or max(finite) == min(finite)
        degenerate.append(flat)
        if flat:
            values += [0.0] * size
            continue
        mean = math.fsum(finite) / len(finite)
        if std == "group":
            scale = deviation(finite, mean) + eps
        elif std == "batch":
            scale = deviation(everything, math.fsum(everything) / len(everything)) + eps
        else:
            scale = 1.0
        values += [(r - mean) / scale if math.isfinite(r) else 0.0 for r in group]
    return values, degenerate


def _clamp(value, low, high):
    return torch.clamp(value, low, high)


def policy_loss(
    logp,
    advantages,
    old,
    ref,
    mask,
    seq_ids,
    loss,
    clip_low,
    clip_high,
    dual_clip,
    beta,
    kl,
    agg,
    num_tokens=None,
    num_sequences=None,
    max_length=None,
    entropy=None,
    entropy_coef=0.0,
):
    """logp (and entropy) fp64 with a graph, the rest fp64 or lists; returns (loss, metrics)."""
    tokens = [i for i in range(len(logp)) if mask[i]]
    sequences = {}
    for i in tokens:
        sequences.setdefault(int(seq_ids[i]), []).append(i)
    own = {s: torch.exp(_clamp(sum(logp[i] - old[i] for i in rows) / len(rows), -20, 20)) for s, rows in sequences.items()}
    num_tokens = max(len(tokens), 1) if num_tokens is None else num_tokens
    num_sequences = max(len(sequences), 1) if num_sequences is None else num_sequences
    total = logp.new_zeros(())
    m = dict.fromkeys(
        (
            "count/tokens",
            "sum/ratio",
            "max/ratio_deviation",
            "count/clip_low",
            "count/clip_high",
            "count/clip_dual",
            "sum/kl_k1",
            "sum/kl_k3",
        ),
        0.0,
    )
    m |= {"sum/advantage": 0.0, "sum/advantage_squared": 0.0, "sum/kl_ref": 0.0}
    for i in tokens:
        a = float(advantages[i])
        d = _clamp(logp[i] - old[i], -20, 20)
        r = own[int(seq_ids[i])] if loss == "gspo" else torch.exp(d)
        clipped = _clamp(r, 1 - clip_low, 1 + clip_high)
        if loss == "cispo":
            u = clipped.detach() * a * logp[i]
        else:
            u = r * a if (r * a).item() <= (clipped * a).item() else clipped * a
            if loss == "ppo" and dual_clip is not None and a < 0 and u.item() < dual_clip * a:
                u = logp.new_tensor(dual_clip * a)
        q = _clamp(ref[i] - logp[i], -20, 20)
        divergence = {"k1": -q, "k2": q * q / 2, "k3": torch.exp(q) - q - 1}[kl]
        term = -u + beta * divergence
        if entropy is not None:
            term = term - entropy_coef * entropy[i]
        length = len(sequences[int(seq_ids[i])])
        weight = {"token": 1 / num_tokens, "seq_mean": 1 / (length * num_sequences)}.get(agg)
        total = total + term * (1 / (num_sequences * max_length) if weight is None else weight)
        r, d = r.item(), d.item()
        m["count/tokens"] += 1
        m["sum/ratio"] += r
        m["max/ratio_deviation"] = max(m["max/ratio_deviation"], abs(r - 1))
        m["count/clip_low"] += a < 0 and r < 1 - clip_low
        m["count/clip_high"] += a > 0 and r > 1 + clip_high
        m["count/clip_dual"] += loss == "ppo" and dual_clip is not None and a < 0 and r > dual_clip
        m["sum/kl_k1"] += -d
        m["sum/kl_k3"] += math.exp(d) - 1 - d
        m["sum/advantage"] += a
        m["sum/advantage_squared"] += a * a
        m["sum/kl_ref"] += divergence.item()
    return total, m


def coefficients(dynamics, s, s_next, eta, sigma_max=None):
    """(a, b, S, g) of one sample in Python floats."""
    dt = s_next - s
    if dynamics == "ode" or eta == 0 or s_next == 0:
        return 1.0, dt, 0.0, 0.0
    if dynamics == "cps":
        c = s_next * math.cos(eta * math.pi / 2)
        std = s_next * math.sin(eta * math.pi / 2)
        return (1 - s_next) + c, -s * (1 - s_next) + (1 - s) * c, std, std
    g = eta
    if dynamics == "flow_sde":
        g = eta * math.sqrt(s / (1 - (sigma_max if s == 1 else s)))
    return 1 + g * g * dt / (2 * s), dt * (1 + g * g * (1 - s) / (2 * s)), g * math.sqrt(-dt), g


def guided(v, v_uncond, w, rescale):
    """v, v_uncond: [tokens, channels] fp64 with a graph."""
    u = v_uncond + w * (v - v_uncond)
    if not rescale:
        return u
    return torch.stack([u_t * (v_t.square().sum().sqrt() / u_t.square().sum().sqrt()) for u_t, v_t in zip(u, v)])


def flow_score(x, v, x_next, step, published, flow_grpo_kl=False, v_ref=None, v_old=None):
    """(logp, kl, drift) of one sample; v is guided, fp64, with a graph."""
    a, b, std, g = step
    mean = a * x + b * v
    zero = (v * 0).sum()
    if std == 0:
        logp = kl = zero
    else:
        residual = (x_next - mean).square()
        logp = -residual.mean() if published else (-residual / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2).mean()
        kl = zero if v_ref is None else (mean - (a * x + b * v_ref)).square().mean() / (2 * (g if flow_grpo_kl else std) ** 2)
    drift = zero if v_old is None else (mean - (a * x + b * v_old)).square().mean()
    return logp, kl, drift


def flow_policy_loss(
    logp, old, advantages, mask, clip, variant="grpo", kl=None, beta=0.0, drift=None, std=None, dt=None, tau=1e-5, adv_clip=5.0, count=None
):
    """logp, kl, drift fp64 with a graph; returns (loss, number of dropped samples)."""
    samples = [i for i in range(len(logp)) if mask[i]]
    total, dropped = logp.new_zeros(()), 0
    for i in samples:
        a = min(max(float(advantages[i]), -adv_clip), adv_clip)
        d = logp[i] - old[i]
        if variant == "guard":
            d = (d + drift[i] / (2 * std[i] ** 2)) * std[i]
        r = torch.exp(_clamp(d, -20, 20))
        if variant == "dppo":
            away = (a > 0 and r.item() > 1) or (a < 0 and r.item() < 1)
            drop = away and (drift[i] / (2 * std[i] ** 2)).item() >= tau
            dropped += drop
            term = 0 * r if drop else -a * r
        else:
            inside, outside = -a * r, -a * _clamp(r, 1 - clip, 1 + clip)
            term = inside if inside.item() >= outside.item() else outside
            if variant == "guard":
                term = term / -dt[i]
        total = total + term + (beta * kl[i] if beta else 0.0)
    return total / (max(len(samples), 1) if count is None else count), dropped


def philox4x32(counter, key):
    """Ten rounds on Python integers (Salmon et al. 2011, section 3.3)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def _fp32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def philox_normal(seed, count):
    """Box-Muller on the integers above, in Python floats."""
    normals = []
    for block in range((count + 3) // 4):
        k = philox4x32((block % 2**32, block >> 32, 0, 0), (seed % 2**32, (seed >> 32) % 2**32))
        for first, second in (k[:2], k[2:]):
            # u is an fp32 number: near 1 its rounding shows in the radius
            radius = math.sqrt(-2 * math.log(_fp32(_fp32(first) / 2**32 + 2.0**-33)))
            angle = 2 * math.pi * (second >> 8) / 2**24
            normals += [radius * math.cos(angle), radius * math.sin(angle)]
    return normals[:count]
