"""The same tests for every backend that can run here: the reference, C++, Triton under its interpreter, Triton on a GPU."""

import os

import pytest
import torch

import aot_fast.kernels as K
from aot_fast.kernels import dispatch, native

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CSRC = ["csrc"] if native.problem() is None else []  # test_native.py fails where a compiler is there and it is not built
BACKENDS = ["reference", *CSRC, *(["triton"] if INTERPRETED else []), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def unwritten_is_nan():
    """torch.empty gives NaN (the largest integer): what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def operators(each_backend):
    """The registered operators of the backend; the reference has none."""
    if each_backend == "reference":
        pytest.skip("plain torch")
    dispatch._load_all()  # an operator is registered when its module is imported
    return torch.ops.aot_fast_cpu if each_backend == "csrc" else torch.ops.aot_fast


@pytest.fixture(params=BACKENDS)
def each_backend(request, monkeypatch, unwritten_is_nan):
    """Runs the test once under each backend; its value is the backend's name. cuda: tensors are made on the GPU by default."""
    torch._dynamo.reset()  # a compiled function keeps the backend that it was traced with
    if request.param != "cuda":
        with K.backend(request.param):
            yield request.param
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")

    def drawn_on_the_cpu(draw):
        """The same numbers as in the other runs: some tests need a token that is clipped, say."""

        def drawn(*sizes, requires_grad=False, **options):
            return draw(*sizes, **options | {"device": "cpu"}).to("cuda").requires_grad_(requires_grad)

        return drawn

    for name in ("randn", "rand", "randint", "randperm"):
        monkeypatch.setattr(torch, name, drawn_on_the_cpu(getattr(torch, name)))
    with torch.device("cuda"), K.backend("triton"):
        yield "cuda"


@pytest.fixture(params=[b for b in BACKENDS if b != "csrc"])
def device(request, unwritten_is_nan):
    """Runs the test under each backend of an operator that C++ has not; its value is the device for its tensors."""
    name = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with K.backend("triton" if name == "cuda" else name):
        yield "cuda" if name == "cuda" else "cpu"
