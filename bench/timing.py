"""Time and memory of a function on either device: medians, on a GPU by events, with a cold or a warm L2 cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FLUSH_BYTES = 256 << 20
"""Written before a cold run: five times an H100's L2 cache."""


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median_ms(run: Callable[[], object], device: str, seconds: float = 0.4, cold: bool = True) -> float:
    """Median time of a call in ms, after two warm-up calls; 5 to 200 calls. cold: the cache is overwritten before each."""
    for _ in range(2):
        run()
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    calls = min(200, max(5, int(seconds / max(1e-6, time.perf_counter() - start))))
    if device != "cuda":
        return statistics.median(_wall_ms(run) for _ in range(calls))
    flush = torch.empty(FLUSH_BYTES if cold else 1, dtype=torch.int8, device=device)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for first, last in marks:
        flush.zero_()
        first.record()
        run()
        last.record()
    synchronize(device)
    return statistics.median(first.elapsed_time(last) for first, last in marks)


def graph_ms(run: Callable[[], object]) -> float | None:
    """Median time of a replay of the call as a CUDA graph: the device's own time, without the host's; None where it cannot be captured."""
    stream = torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        torch.cuda.synchronize()
    except (RuntimeError, AssertionError):
        torch.cuda.synchronize()
        return None
    return median_ms(graph.replay, "cuda")


def _wall_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((arguments, options)) if isinstance(t, torch.Tensor)}
        out = operator(*arguments, **(options or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given:
                storage = t.untyped_storage()
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Memory that a call takes beside what is there before it; on a CPU that of the tensors, without the libraries' own."""
    if device != "cuda":
        with _LiveBytes() as live:
            run()
        return live.peak
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak
