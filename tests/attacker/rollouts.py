"""Questions, scored groups and whole gradients for the Attacker's tests."""

import torch
import torch.distributed as dist

from aot_fast.attacker.flow_grpo import ScoredGroup, update
from aot_fast.data.schema import Example, Question, Verdict
from aot_fast.engine import StepResult
from tests.attacker.tiny_pipeline import picture


def question(i):
    return Question(f"q{i}", f"{i}.png", f"Is the ball {'left ' * i}of the cube?", "A", ("Yes", "No"), ((8, 8, 24, 24),))


def examples(count=2, sizes=((64, 64), (96, 64))):
    """Questions of different lengths about pictures of different sizes."""
    return [Example(question(i), picture(i, sizes[i % len(sizes)])) for i in range(count)]


def verdict(question_id, reward):
    return Verdict(question_id, "", 0, 1, (1.0,), 1.0, 1.0, 0.5, (), reward, True)


def scored(groups, reward=lambda i, j: float(j % 2) + 0.1 * i * j):
    """Groups with reward(number in the question's id, sample)."""
    names = [group.edits[0].example.question.id for group in groups]
    return [ScoredGroup(g, tuple(verdict(n, reward(int(n[1:]), j)) for j in range(len(g.edits)))) for g, n in zip(groups, names)]


def take_gradients(player):
    """The whole accumulated gradient of each trained parameter by name, which is then cleared. A collective."""
    optimizer, found = player.engine.optimizer, {}
    partitions = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    for name, parameter in player.module.named_parameters():
        if parameter.requires_grad:
            partition = partitions[optimizer.get_param_id(parameter)]
            slices = [torch.empty_like(partition) for _ in range(player.runtime.world)]
            dist.all_gather(slices, partition.contiguous())
            found[name] = torch.cat(slices)[: parameter.ds_numel].view(parameter.ds_shape)
            partition.zero_()
    optimizer.zero_grad()
    return found


def gradients(attacker, groups):
    """Metrics of an update whose optimizer step only reads the gradient, and that gradient."""
    found = {}

    def read(healthy):
        assert healthy
        found.update(take_gradients(attacker.player))
        return StepResult(False, 0.0, 0.0)

    attacker.player.step = read
    try:
        return update(attacker, groups), found
    finally:
        del attacker.player.step
