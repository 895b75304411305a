"""Philox against the published known answers and a Python version, also inside Triton kernels; normals by their moments."""

import math

import pytest
import torch
import triton
import triton.language as tl

import aot_fast.kernels as K
from aot_fast.kernels import philox_triton

from . import oracle

# Random123's known-answer file, philox4x32-10: counter, key, result
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter, key, result):
    def words(values):
        return tuple(torch.tensor([v], dtype=torch.int64) for v in values)

    assert tuple(int(w) for w in K.philox4x32(words(counter), words(key))) == result
    assert oracle.philox4x32(counter, key) == result


@pytest.mark.parametrize("seed", (0, 1, -1, 2**63 - 1, -(2**63), 1234567890123))
def test_normals_match_box_muller_in_python(seed):
    ours = K.philox_normal(torch.tensor([seed]), 103)[0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), torch.tensor(oracle.philox_normal(seed, 103), dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_row_depends_on_its_seed_alone_and_a_shorter_one_is_its_prefix():
    seeds = torch.tensor([3, 9, 3])
    rows = K.philox_normal(seeds, 1001)
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    assert torch.equal(K.philox_normal(seeds[1:2], 1001)[0], rows[1])
    assert torch.equal(K.philox_normal(seeds, 998), rows[:, :998])


def test_normals_are_standard():
    z = K.philox_normal(torch.arange(8), 65_536).double()
    n = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # of the moment's estimate, n times
        assert abs((z**power).mean().item() - moment) < 5 * (variance / n) ** 0.5
    lag = [(z[:, k:] * z[:, : z.shape[1] - k]).mean().item() for k in (1, 2, 3, 4)]
    assert max(map(abs, lag)) < 5 / n**0.5
    assert abs((z[0] * z[1]).mean().item()) < 5 / 65_536**0.5
    assert 4 < z.abs().max().item() < 6.8


@triton.jit
def philox_kernel(words, out):
    c0, c1, c2, c3 = tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    k0, k1 = tl.load(words + 4), tl.load(words + 5)
    c0, c1, c2, c3 = c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
    r0, r1, r2, r3 = philox_triton.philox4x32(c0, c1, c2, c3, k0.to(tl.uint32), k1.to(tl.uint32))
    tl.store(out, r0.to(tl.int64))
    tl.store(out + 1, r1.to(tl.int64))
    tl.store(out + 2, r2.to(tl.int64))
    tl.store(out + 3, r3.to(tl.int64))


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers_in_triton(counter, key, result, each_backend):
    if each_backend in ("reference", "csrc"):
        pytest.skip("for Triton")
    out = torch.empty(4, dtype=torch.int64)
    philox_kernel[(1,)](torch.tensor([*counter, *key]), out)
    assert tuple(out.tolist()) == result


@triton.jit
def box_muller_kernel(words, out, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    k0, k1 = tl.load(words + index, mask=inside, other=0), tl.load(words + count + index, mask=inside, other=0)
    z0, z1 = philox_triton.box_muller(k0.to(tl.uint32), k1.to(tl.uint32))
    tl.store(out + index, z0, mask=inside)
    tl.store(out + count + index, z1, mask=inside)


def test_triton_normals_are_right_at_the_ends_of_their_range(each_backend):
    if each_backend in ("reference", "csrc"):
        pytest.skip("for Triton")
    # u from 2^-33 to 1 and near 2/3, where its exponent changes; angles at the octants, where the polynomials meet
    ends = [*range(8), 127, 128, 129, *(2**k + d for k in range(8, 32) for d in (-1, 0, 1)), *range(2**32 - 300, 2**32, 7), 2**32 - 1]
    radii = torch.tensor(ends + [2 * 2**32 // 3 + d for d in range(-400, 400, 13)])
    angles = torch.tensor(
        [(k * 2**21 + d) % 2**24 * 256 + 255 for k in range(9) for d in (-2, -1, 0, 1, 2)] + list(range(77, 2**32, 10**8))
    )
    k0, k1 = (w.flatten() for w in torch.meshgrid(radii, angles, indexing="ij"))
    out = torch.empty(2, len(k0))
    box_muller_kernel[(triton.cdiv(len(k0), 4096),)](torch.stack([k0, k1]), out, len(k0), BLOCK=4096)
    u = (k0.float() * 2.0**-32 + 2.0**-33).double()
    radius, angle = torch.sqrt(-2 * torch.log(u)), 2 * math.pi * (k1 >> 8).double() * 2.0**-24
    exact = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)])
    assert (out - exact).abs().max() <= 1e-6 and out.abs().max() > 6.7
    assert out[:, u == 1].abs().max() < 1e-12


@pytest.mark.parametrize("count", (1, 5, 1024, 1031))  # less than a block of four, a remainder, a whole program, one more
def test_triton_normals_match_the_reference(count, each_backend):
    if each_backend in ("reference", "csrc"):
        pytest.skip("for Triton")
    seeds = torch.tensor([0, -1, 2**63 - 1, 1234567890123])
    normals = philox_triton.philox_normal_triton(seeds, count)
    assert (normals - K.philox_normal(seeds, count)).abs().max() <= 1e-6
    assert torch.equal(philox_triton.philox_normal_triton(seeds[2:3], count)[0], normals[2])


def test_errors():
    with pytest.raises(ValueError, match="seeds: given torch.int32"):
        K.philox_normal(torch.arange(2).int(), 4)
    with pytest.raises(ValueError, match="count: given -1"):
        K.philox_normal(torch.arange(2), -1)
    assert K.philox_normal(torch.arange(0), 4).shape == (0, 4)
