"""Philox against the published known answers and a Python version; normals by their moments."""

import pytest
import torch

import aot_fast.kernels as K

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


def test_errors():
    with pytest.raises(ValueError, match="seeds: given torch.int32"):
        K.philox_normal(torch.arange(2).int(), 4)
    with pytest.raises(ValueError, match="count: given -1"):
        K.philox_normal(torch.arange(2), -1)
    assert K.philox_normal(torch.arange(0), 4).shape == (0, 4)
