"""torchrun --nproc_per_node 2 -m tests.unequal_forwards: ranks answer unequally often before and between steps, and do not hang."""

import torch
from torch import nn

from aot_fast.config import EngineConfig, OptimizerConfig, RunConfig
from aot_fast.engine import build_player, close_runtime, open_runtime

runtime = open_runtime(EngineConfig(timeout_s=30), RunConfig(threads=1))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
player = build_player("toy", model, OptimizerConfig(lr=1e-2), EngineConfig(timeout_s=30, persistence_threshold=0), runtime)
x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
for _ in range(3):
    with player.gathered() as whole:  # before the first step too, when DeepSpeed is still recording the order of modules
        for _ in range(5 * runtime.rank):
            whole(x)
    for _ in range(2):
        player.backward(player(x).square().sum())
    assert player.step().applied
print("done")
runtime.barrier()
close_runtime()  # gloo aborts a process that ends with its group still open
