"""What makes the Attacker fast changes nothing: shared prefixes, kept encodings, full micro-batches. Its operations are counted right."""

import json
from dataclasses import replace

import pytest
import torch

from aot_fast.attacker import flops
from aot_fast.attacker.counters import counters, tokens_of
from aot_fast.attacker.encoding import encode
from aot_fast.attacker.encoding_cache import Encodings
from aot_fast.attacker.replay import Item, replay_batches
from aot_fast.attacker.rollout import rollout
from aot_fast.attacker.sampler import sample, schedule, strides
from aot_fast.attacker.velocity import velocity
from aot_fast.config import AttackerConfig
from tests.attacker.rollouts import examples, gradients, scored
from tests.attacker.tiny_pipeline import LORA, TRANSFORMER, picture

PLACE = {"seed": 0, "round": 1, "step": 0}


def far(one, other):
    return float((one - other).norm() / other.norm().clamp_min(1e-12))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_steps_before_the_window_are_taken_once_for_a_group(guidance, base_config, load, monkeypatch):
    """The window starts at step 2 of 4. Two pictures of different sizes, so that a prefix must not be another group's."""
    attacker = load(replace(base_config, window=1, window_range=(2, 3), guidance=guidance, lora=LORA), seed=1)
    plain = replace(attacker, config=replace(attacker.config, shared_prefix=False))
    rows = []
    forward = attacker.player.module.forward

    def counted(*, hidden_states, **rest):
        rows.append(len(hidden_states))
        return forward(hidden_states=hidden_states, **rest)

    monkeypatch.setattr(attacker.player.module, "forward", counted)
    made = {}
    for name, player in (("shared", attacker), ("plain", plain)):
        rows.clear()
        groups = rollout(player, examples(2), **PLACE)
        made[name] = [s for g in groups for s in g.samples], sum(rows) // (2 if guidance > 1 else 1)
        assert all(len(g.samples) == 4 for g in groups)
    for ours, theirs in zip(made["shared"][0], made["plain"][0], strict=True):
        # Prefixes in another batch round otherwise: a few units of 2^-24 a step.
        assert far(ours.latents, theirs.latents) < 1e-5 and abs(ours.steps[0].logp - theirs.steps[0].logp) < 1e-5
    assert made["plain"][1] == 8 * 4 and made["shared"][1] == 2 * 2 + 8 * 2


def test_a_prefix_is_of_one_picture_and_one_start(base_config, load):
    """Equal start noise for two pictures, and two starts for one."""
    attacker = load(replace(base_config, lora=LORA), seed=1)
    plain = replace(attacker, config=replace(attacker.config, shared_prefix=False))
    one, other = encode(attacker, [picture(0), picture(1)], ["Add a cat"] * 2)
    made = []
    for player in (attacker, plain):
        with player.player.gathered():
            made.append(sample(player, [one, other, one, one], [5, 5, 6, 5], [1, 2, 3, 4], (1, 2)))
    assert all(far(a.latents, b.latents) < 1e-5 for a, b in zip(*made, strict=True))
    assert far(made[0][0].latents, made[0][1].latents) > 1e-3 and far(made[0][0].latents, made[0][2].latents) > 1e-3


def test_gradients_are_those_of_the_plain_path(base_config, load):
    """Encodings, prefix and replay for every sample and step by itself, against all at once."""
    attacker = load(replace(base_config, window=2, window_range=(1, 3), lora=LORA, rollout_batch=8, tokens_per_microbatch=4096), seed=1)
    plain = replace(
        attacker, config=replace(attacker.config, encode_once=False, shared_prefix=False, tokens_per_microbatch=0, microbatch=1)
    )
    found = [gradients(player, scored(rollout(player, examples(2), **PLACE)))[1] for player in (attacker, plain)]
    norm = torch.cat([x.flatten() for x in found[1].values()]).norm()
    assert norm > 0 and max(float((found[0][name] - x).norm() / norm) for name, x in found[1].items()) < 1e-5


def test_microbatches_are_filled_to_their_tokens(base_config, load):
    attacker = load(replace(base_config, lora=LORA, tokens_per_microbatch=1100))
    groups = rollout(attacker, examples(1), **PLACE)
    items = [Item(g.encoding, step, torch.zeros(())) for g in groups for s in g.samples for step in s.steps]
    each = items[0].encoding.num_tokens
    sizes = [len(batch) for batch in replay_batches(attacker, items)]
    assert each == 64 + 64 + len(items[0].encoding.prompt) and max(sizes) == 1100 // each > 1 and sum(sizes) == len(items)


# Fewer steps after the window


def test_strides_reach_the_picture():
    config = AttackerConfig(num_steps=10)
    whole = [(k, k + 1) for k in range(10)]
    for tail, stop in ((0, 4), (6, 4), (9, 4), (3, 0)):  # off; as many as are left; more; no window
        assert strides(replace(config, tail_steps=tail), stop) == whole
    assert strides(replace(config, tail_steps=2), 4) == [*whole[:4], (4, 7), (7, 10)]
    assert strides(replace(config, tail_steps=1), 9) == whole
    assert strides(replace(config, tail_steps=4), 3)[3:] == [(3, 5), (5, 7), (7, 8), (8, 10)]


def test_a_shorter_tail_leaves_what_is_trained_alone(base_config, load):
    """Window [0, 2) of 4 steps, then one stride for two: it goes straight from the window's end to the picture."""
    attacker = load(replace(base_config, window=2, window_range=(0, 2), lora=LORA), seed=1)
    short = replace(attacker, config=replace(attacker.config, tail_steps=1))
    [whole], [cut] = (rollout(player, examples(1), **PLACE) for player in (attacker, short))
    sigmas = schedule(attacker, whole.encoding.size[0] * whole.encoding.size[1])
    for one, other in zip(whole.samples, cut.samples, strict=True):
        assert all(torch.equal(a.x_next, b.x_next) and torch.equal(a.logp, b.logp) for a, b in zip(one.steps, other.steps, strict=True))
        x = one.steps[-1].x_next
        with attacker.player.gathered() as module:
            v = velocity(module, [cut.encoding], x[None], [sigmas[2]], False).v[0]
        assert far(other.latents, x - sigmas[2] * v) < 1e-5 and far(other.latents, one.latents) > 1e-4
    assert (whole.num_steps, cut.num_steps) == (4, 3)
    ratio = counters(short, [cut], 1.0)["rollout/tflop"] / counters(attacker, [whole], 1.0)["rollout/tflop"]
    assert ratio == pytest.approx(3 / 4)
    untrained = [rollout(player, examples(1), **PLACE, train=False)[0] for player in (attacker, short)]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(*(g.samples for g in untrained), strict=True))


# Kept encodings


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("prompt", "reference")) and (
        one.shapes,
        one.height,
        one.width,
    ) == (other.shapes, other.height, other.width)


def test_kept_encodings_are_the_fresh_ones(base_config, load, folders, tmp_path):
    attacker = load(replace(base_config, guidance=2.0))
    images, prompts = [picture(0), picture(1, (96, 64)), picture(0)], ["Add a cat", "Add a dog", "Add a cat"]
    fresh = encode(attacker, images, prompts)
    kept = Encodings(attacker.config, folders["edit"], attacker.runtime.dtype, tmp_path)
    for number_made, number_found in ((2, 0), (2, 2)):
        got = kept(attacker, images, prompts)
        assert all(map(same, got, fresh)) and got[0] is got[2] and torch.equal(got[1].negative, fresh[1].negative)
        assert (kept.num_made, kept.num_found) == (number_made, number_found)
    another = Encodings(attacker.config, folders["edit"], attacker.runtime.dtype, tmp_path)  # another rank, or the next run
    assert all(map(same, another(attacker, images, prompts), fresh)) and (another.num_made, another.num_found) == (0, 2)
    cut = next(tmp_path.rglob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-100])
    repaired = Encodings(attacker.config, folders["edit"], attacker.runtime.dtype, tmp_path)
    assert all(map(same, repaired(attacker, images, prompts), fresh)) and (repaired.num_made, repaired.num_found) == (1, 1)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".safetensors"]


def test_a_folder_that_takes_no_files_costs_the_run_nothing(base_config, load, folders, tmp_path):
    attacker = load(base_config)
    (tmp_path / "file").write_text("in the way")
    kept = Encodings(attacker.config, folders["edit"], torch.float32, tmp_path / "file")
    with pytest.warns(UserWarning, match="encoding_folder"):
        first = kept(attacker, [picture(0)], ["Add a cat"])
    assert same(first[0], kept(attacker, [picture(0)], ["Add a cat"])[0]) and kept.num_made == 1


def test_windows_are_not_kept_and_have_their_own_size(base_config, load, folders, tmp_path):
    attacker = load(base_config)
    kept = Encodings(attacker.config, folders["edit"], torch.float32, tmp_path)
    for _ in range(2):
        whole, window = kept(attacker, [picture(0, (96, 48))] * 2, ["Add a cat"] * 2, [False, True])
        assert (window.height, window.width) == (48, 96) != (whole.height, whole.width)
    assert (kept.num_made, kept.num_found) == (3, 1) and len(list(tmp_path.rglob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"condition_pixels": 32 * 32},
        {"reference_pixels": 32 * 32},
        {"context_pixels": 32 * 32},
        {"guidance": 3.0},
        {"still_vae": False},
    ],
)
def test_other_settings_make_other_encodings(changes, base_config, load, folders):
    attacker = load(base_config)
    keys = {
        Encodings(replace(attacker.config, **some), folders["edit"], torch.float32).key(picture(0), "Add a cat") for some in ({}, changes)
    }
    assert len(keys) == 2


def test_memory_for_encodings_is_bounded(base_config, load, folders):
    attacker = load(base_config)
    size = sum(x.nbytes for x in (lambda e: (e.prompt, e.reference))(encode(attacker, [picture(0)], ["Add a cat"])[0]))
    kept = Encodings(replace(attacker.config, encoding_bytes=int(2.5 * size)), folders["edit"], torch.float32)
    for i in (0, 1, 2, 2, 0):
        kept(attacker, [picture(i)], ["Add a cat"])
    assert (kept.num_made, kept.num_found) == (4, 1)  # the first was given up for the third


# Counters


def test_operations_are_what_torch_counts():
    from diffusers import QwenImageTransformer2DModel
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = QwenImageTransformer2DModel(**TRANSFORMER)
    inputs = {"hidden_states": torch.randn(1, 64 + 36, 64), "encoder_hidden_states": torch.randn(1, 21, 32)}
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**inputs, timestep=torch.tensor([0.5]), encoder_hidden_states_mask=None, img_shapes=[[(1, 8, 8), (1, 6, 6)]])
    width, blocks = 64, TRANSFORMER["num_layers"]
    modulation = 2 * (blocks * 2 * 6 * width**2 + 256 * width + width**2 + 2 * width**2)  # of the time, once a sample: not counted
    assert counter.get_total_flops() - modulation == flops.forward_flops(model.config, flops.Tokens(64, 36, 21)).total


def test_a_steps_operations_add_up():
    tokens, settings = flops.Tokens(64, 36, 21, 9), dict(TRANSFORMER, in_channels=64, out_channels=16, patch_size=2)
    one = flops.forward_flops(settings, tokens)
    assert one.total == sum(flops.forward_flops(settings, flops.Tokens(64, 36, n)).total for n in (21, 9))
    work = flops.Work(3, 8, tokens, steps=9, shared_steps=1, trained_steps=2, lora=True, checkpointing=True, reference_pass=True)
    done = flops.step_flops(settings, work, encoding=5, decoding=7)
    assert done.encode == 15 and done.decode == 24 * 7 and done.denoise == (24 * 9 + 3) * one.total
    assert done.update == 48 * (3 * one.linear + 4 * one.attention) and done.recomputed == 48 * one.total


def test_counters_of_a_step(base_config, load):
    """Two groups of different sizes; the window starts at step 1 of 4, and two of its steps are trained."""
    attacker = load(replace(base_config, window=2, window_range=(1, 3), lora=LORA))
    groups = rollout(attacker, examples(2), **PLACE)
    counted = counters(attacker, groups, update_seconds=2.0)
    one = [flops.forward_flops(attacker.player.module.config, tokens_of(g)) for g in groups]
    assert counted["rollout/tflop"] == pytest.approx(sum(f.total * (4 * 3 + 1) for f in one) / 1e12)
    assert counted["update/tflop"] == pytest.approx(sum(8 * (2 * f.linear + 3 * f.attention) for f in one) / 1e12)
    stages = [counted[f"{name}/seconds"] for name in ("encode", "denoise", "decode")]
    assert min(stages) > 0 and counted["images_per_s"] == pytest.approx(8 / (sum(stages) + 2.0))


def test_counters_of_nft(base_config, load):
    """Two noise levels of each sample are trained, of the conditional velocity alone."""
    config = replace(base_config, variant="nft", dynamics="ode", window=2, window_range=(0, 3), guidance=3.0, lora=LORA)
    attacker = load(config)
    [group] = rollout(attacker, examples(1), **PLACE)
    one = flops.forward_flops(attacker.player.module.config, tokens_of(group)._replace(negative=0))
    counted = counters(attacker, [group], update_seconds=1.0)
    assert counted["update/tflop"] == pytest.approx(4 * 2 * (2 * one.linear + 3 * one.attention) / 1e12)


def test_the_vaes_operations_depend_on_its_convolutions():
    settings = dict(base_dim=4, dim_mult=[1, 1, 2], num_res_blocks=1, temperal_downsample=[False, True])
    whole, still = (flops.vae_flops(json.dumps(settings), 64, 64, True, still) for still in (False, True))
    assert 2 < whole / still < 3.1  # of three time slices one is left, and attention has none


# Compiled blocks


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_train_alike(backend, base_config, load, monkeypatch):
    """Every block a whole graph (no limit of recompilation is passed), for pictures of two sizes, batches of 4 and of 3 and the rest, with
    and without the adapter (beta). aot_eager takes no compiler's minute."""
    from diffusers import QwenImageTransformer2DModel

    compile_blocks = QwenImageTransformer2DModel.compile_repeated_blocks
    monkeypatch.setattr(
        QwenImageTransformer2DModel, "compile_repeated_blocks", lambda self: compile_blocks(self, backend=backend, fullgraph=True)
    )
    config = replace(base_config, lora=LORA, num_steps=3, window=1, window_range=(0, 2), microbatch=3, beta=0.1)
    made = []
    for compiled in (False, True):
        attacker = load(replace(config, compile_blocks=compiled), seed=1)
        groups = rollout(attacker, examples(2), **PLACE)
        metrics, found = gradients(attacker, scored(groups))
        assert metrics["logp_mismatch"] <= 1e-5
        made.append((torch.cat([s.latents.flatten() for g in groups for s in g.samples]), found))
    norm = torch.cat([x.flatten() for x in made[0][1].values()]).norm()
    assert far(made[1][0], made[0][0]) < 1e-5
    assert norm > 0 and max(float((made[1][1][name] - x).norm() / norm) for name, x in made[0][1].items()) < 1e-5


def test_blocks_are_not_compiled_around_zeros_hooks(base_config, load):
    with pytest.raises(ValueError, match="compile_blocks needs attacker.gather = update, not rollout"):
        load(replace(base_config, lora=LORA, compile_blocks=True, gather="rollout"))
