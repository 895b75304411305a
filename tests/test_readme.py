"""What the README shows can be run."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_operators_alone():
    names = {}
    exec(BLOCKS[0], names)
    assert names["loss"].isfinite() and names["hidden"].grad.norm() > 0 and names["v"].grad.norm() > 0


def test_policy_loss_in_a_trl_trainer():
    """The loss and its gradient are TRL's own, by its equation for loss_type "dapo"."""
    torch.manual_seed(0)
    logits = torch.randn(3, 12, 50, requires_grad=True)
    completions, mask = torch.randint(50, (3, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    inputs = {
        "prompt_ids": torch.zeros(3, 6, dtype=torch.long),
        "prompt_mask": torch.ones(3, 6, dtype=torch.long),
        "completion_ids": completions,
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "old_per_token_logps": torch.log_softmax(logits[:, -6:-1] / 0.9, -1).gather(2, completions[..., None])[..., 0].detach() - 0.3,
        "num_items_in_batch": torch.tensor(11),
    }
    Trainer = type("Trainer", (), {"__module__": __name__})
    names = {"trl": type("trl", (), {"GRPOTrainer": Trainer}), "torch": torch}
    exec("import aot_fast.kernels as K\n" + BLOCKS[1], names)
    trainer = names["Trainer"]()
    trainer.temperature, trainer.current_gradient_accumulation_steps = 0.9, 1
    trainer.args = type("args", (), {"steps_per_generation": 1})

    def model(tokens, attention_mask, logits_to_keep):
        assert tokens.shape == attention_mask.shape == (3, 11) and logits_to_keep == 6
        return type("out", (), {"logits": logits[:, -6:]})

    ours = trainer._compute_loss(model, inputs)
    logp = torch.log_softmax(logits[:, -6:-1] / 0.9, -1).gather(2, completions[..., None])[..., 0]
    ratio = torch.exp(logp - inputs["old_per_token_logps"])
    a = inputs["advantages"][:, None]
    theirs = (-torch.min(ratio * a, ratio.clamp(1 - 0.2, 1 + 0.28) * a) * mask).sum() / 11
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    mine, other = (torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs))
    assert (mine - other).norm() <= 1e-5 * other.norm()
