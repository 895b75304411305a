"""One rank and two give the same weights, edits, losses and gradients."""

import pytest
import torch

from tests.attacker.ranks import scenario
from tests.conftest import launch


@pytest.fixture(scope="module")
def worlds(folders, runtime, tmp_path_factory):
    """Results of one rank (in this process) and of two."""
    path = tmp_path_factory.mktemp("ranks") / "two.pt"
    # A deadlock fails by gloo's own limit of 60 s; this one only bounds a busy machine.
    done = launch(2, "-m", "tests.attacker.ranks", str(folders["plus"]), str(path), timeout_s=240)
    assert done.returncode == 0, done.stderr[-6000:]
    return scenario(folders["plus"], runtime), torch.load(path)


def test_each_rank_holds_its_share_and_the_whole_is_the_saved_model(worlds, folders):
    from diffusers import QwenImageTransformer2DModel

    plain = QwenImageTransformer2DModel.from_pretrained(folders["plus"] / "transformer").state_dict()
    for world in worlds:
        assert world["largest_share"] == 1
        assert world["weights"].keys() == plain.keys() and all(torch.equal(world["weights"][name], plain[name]) for name in plain)


@pytest.mark.parametrize("count", [3, 1])  # 3: uneven shares; 1: a rank with no group of its own
def test_edits_and_gradients_are_the_same(worlds, count):
    one, two = (world[count] for world in worlds)
    same_edits(one["edits"], two["edits"])
    assert len(one["edits"]) == count
    scale = max(float(gradient.abs().max()) for gradient in one["gradients"].values())
    assert scale > 0
    for name, gradient in one["gradients"].items():
        assert (gradient - two["gradients"][name]).abs().max() < 1e-5 * scale
    assert one["metrics"].keys() == two["metrics"].keys()
    assert two["metrics"].pop("masked") > one["metrics"].pop("masked")  # the short rank ran blank items, of weight zero
    for name, value in one["metrics"].items():
        assert value == pytest.approx(two["metrics"][name], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("gather", ["block", "rollout"])
@pytest.mark.parametrize("count", [3, 1])
def test_where_weights_are_gathered_changes_nothing(worlds, gather, count):
    for world in worlds:
        plain, other = world[count], world[gather, count]
        same_edits(plain["edits"], other["edits"])
        assert other["metrics"]["logp_mismatch"] <= 1e-5
        scale = max(float(gradient.abs().max()) for gradient in plain["gradients"].values())
        for name, gradient in plain["gradients"].items():
            # Whole weights come with fused adapters, and their products are summed in another order.
            assert (gradient - other["gradients"][name]).abs().max() < 1e-5 * scale


def same_edits(one, two):
    assert one.keys() == two.keys()
    for key, samples in one.items():
        for (seed, logps, latents), (other_seed, other_logps, other_latents) in zip(samples, two[key], strict=True):
            assert seed == other_seed and logps == pytest.approx(other_logps, abs=1e-5)
            assert (latents - other_latents).abs().max() < 1e-5


def test_the_step_and_the_averages_are_the_same(worlds):
    one, two = worlds
    assert one["update"]["applied"] == 1
    assert one["update"]["grad_norm"] == pytest.approx(two["update"]["grad_norm"], rel=1e-4)
    assert one["update"]["logp_mismatch"] <= 1e-5
    for name in one["averages"]:
        assert torch.allclose(one["averages"][name], two["averages"][name], atol=1e-4)


def test_averaged_weights_are_used_and_taken_back(worlds):
    for world in worlds:
        after, restored, averages = (world[name] for name in ("weights_after", "weights_restored", "averages"))
        assert all(torch.equal(after[name], restored[name]) for name in after)
        assert any(not torch.equal(after[name], averages[name]) for name in after)
    assert len(worlds[0]["averaged_edits"]) == 2


def test_ranks_with_unequally_many_groups_do_not_wait_for_each_other(torchrun, folders):
    out = torchrun(2, "-m", "tests.attacker.unequal_groups", str(folders["edit"]))
    assert out.strip().endswith("came through")
