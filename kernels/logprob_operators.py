"""What the Triton and the C++ operators of logprob return where nothing is computed: shapes and dtypes, for tracing."""

import torch
from torch import Tensor


def empty_stats(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of row_stats, not yet written: the fields of RowStats."""
    logp, entropy, highest, log_sum = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(4))
    return logp, entropy, logits.new_empty(logits.shape[0], dtype=torch.bool), highest, log_sum


def fake_logit_gradient(logits, targets, logp, entropy, valid, highest, log_sum, dlogp, dentropy, temperature, dtype):
    return torch.empty(logits.shape, dtype=dtype, device=logits.device)


def fake_in_place(logits, targets, logp, entropy, valid, highest, log_sum, dlogp, dentropy, temperature, dtype):
    return None
