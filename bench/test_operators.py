"""The operators under pytest-benchmark, at CPU sizes: `make bench`, or `pytest bench -k "logprob and ours"`."""

from __future__ import annotations

import pytest

pytest.importorskip("pytest_benchmark")
from cases import all_cases

CASES = [(case, provider) for case in all_cases("cpu") for provider in case.providers]


@pytest.mark.parametrize(("case", "provider"), CASES, ids=[f"{case.name}-{provider}" for case, provider in CASES])
def test_operator(benchmark, case, provider):
    inputs = case.inputs("cpu")
    benchmark.group = case.name
    benchmark.pedantic(case.providers[provider], args=(inputs,), rounds=3, warmup_rounds=1)
