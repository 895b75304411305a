"""The prompts of a phase: decoded, resized and cut into patches by threads ahead of time, once a rank for both rollout and training."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from types import TracebackType
from typing import NamedTuple

from aot_fast.data.schema import Example, Question
from aot_fast.defender.model import Defender
from aot_fast.defender.prompt import Prompt, encode


class Seen(NamedTuple):
    """What is kept of a prompt for good."""

    question: Question
    key: str
    tokens: int
    images: tuple[tuple[int, int, int], ...]


class Prompts:
    """prompts[i] is the prompt of examples[i]. Half of `defender.prefetch_bytes` is for prompts that nobody has asked for yet, half for
    those that may be asked for again, the oldest given up first.

    A context manager: leaving it ends the threads. An error in one of them is raised where its prompt is asked for.
    """

    def __init__(self, defender: Defender, examples: Sequence[Example]):
        self.examples = examples
        self._defender = defender
        self._pool = ThreadPoolExecutor(defender.config.prefetch_workers) if defender.config.prefetch_workers else None
        self._kept: dict[int, Future[Prompt]] = {}
        self._asked: OrderedDict[int, int] = OrderedDict()
        """Bytes of those that were asked for, the last one asked for at the end."""
        self._asked_bytes = 0
        self._wanted: deque[int] = deque()
        self._ahead: set[int] = set()
        """Not asked for yet."""
        self._seen: dict[int, Seen] = {}
        self._lock = Lock()
        self.num_encoded = 0
        self._bytes_encoded = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Prompt:
        self._ahead.discard(index)
        future = self._start(index)
        self._fill()
        prompt = future.result()
        if index not in self._asked:
            self._asked[index] = prompt.num_bytes
            self._asked_bytes += prompt.num_bytes
        self._asked.move_to_end(index)
        self._give_up_oldest()
        return prompt

    @property
    def kept(self) -> list[int]:
        """Of which prompts the pictures are in memory, or on their way there."""
        return list(self._kept)

    def seen(self, index: int) -> Seen:
        """Question, key and length of a prompt that was asked for before."""
        return self._seen[index]

    def prefetch(self, indices: Iterable[int]) -> None:
        """Encode these next, in the background and as far as they fit; without threads nothing happens."""
        if self._pool is not None:
            self._wanted.extend(indices)
            self._fill()

    def __enter__(self) -> Prompts:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _fill(self) -> None:
        """Start what is wanted, as far as it fits; before the first one is there nobody knows how much that is."""
        half, workers = self._defender.config.prefetch_bytes / 2, self._defender.config.prefetch_workers
        while self._wanted:
            mean = self._bytes_encoded / max(1, self.num_encoded)
            if (len(self._ahead) + 1) * mean > half or (not mean and len(self._ahead) >= workers):
                break
            index = self._wanted.popleft()
            if index not in self._kept:
                self._ahead.add(index)
                self._start(index)

    def _start(self, index: int) -> Future[Prompt]:
        future = self._kept.get(index)
        if future is None:
            if self._pool is None:
                future = Future()
                future.set_result(self._encode(index))
            else:
                future = self._pool.submit(self._encode, index)
            self._kept[index] = future
        return future

    def _encode(self, index: int) -> Prompt:
        example = self.examples[index]
        prompt = encode(self._defender, example)
        with self._lock:
            self._seen[index] = Seen(example.question, prompt.key, len(prompt.ids), tuple(map(tuple, prompt.grid.tolist())))
            self.num_encoded += 1
            self._bytes_encoded += prompt.num_bytes
        return prompt.pinned() if self._defender.runtime.device.type == "cuda" else prompt

    def _give_up_oldest(self) -> None:
        while self._asked_bytes > self._defender.config.prefetch_bytes / 2 and len(self._asked) > 1:
            index, size = self._asked.popitem(last=False)
            del self._kept[index]
            self._asked_bytes -= size
