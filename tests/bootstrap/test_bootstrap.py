"""The three trainings continue to the bit where they were killed; shared rows equal separate ones; the driver leaves loadable folders."""

import random
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image

from aot_fast.bootstrap import attacker, defender, edits, training, vae
from aot_fast.bootstrap import exchanges as exchanges_module
from aot_fast.bootstrap.answers import chat_inputs
from aot_fast.bootstrap.exchanges import draw_asked
from aot_fast.bootstrap.folders import build_tokenizer, image_processor
from aot_fast.bootstrap.instructions import instruct
from aot_fast.bootstrap.integrity import box_integrity, ssim
from aot_fast.bootstrap.model import build_defender
from aot_fast.bootstrap.probe import WithProbe
from aot_fast.bootstrap.rows import answer_logits, pack_rows, patchify, pictures_of, prefix_text
from aot_fast.bootstrap.run import bootstrap
from aot_fast.data.scenes import make_question, render

SHORT = {"steps": 5, "warmup_steps": 2, "save_every": 100, "log_every": 1}
STOP = 3


def _vae(folder, stop_at=None):
    return vae.train_vae(folder, replace(vae.PLAN, **SHORT), num_scenes=8, stop_at=stop_at)


def _defender(folder, stop_at=None):
    return defender.train_defender(folder, _plans(), stop_at)


def _judge(folder, stop_at=None):
    return defender.train_judge(folder, _plans(), stop_at)


def _plans():
    return defender.Plans(**{name: replace(plan, **SHORT) for name, plan in vars(defender.Plans()).items()})


def _reader(folder, stop_at=None):
    plans = (replace(plan, **SHORT) for plan in (defender.SIGHT_PLAN, defender.FACTS_PLAN))
    return defender.train_reader(folder, *plans, stop_at=stop_at)


def _attacker(folder, stop_at=None):
    torch.manual_seed(0)
    codec, encoder = vae.use_image_convolutions(AutoencoderKLQwenImage(**vae.CONFIG)), build_defender(0).eval()
    plans = (replace(attacker.BASE_PLAN, **SHORT), replace(attacker.PLAN, **SHORT))
    return attacker.train_attacker(codec, encoder, folder, plans, num_pairs=6, stop_at=stop_at)


@pytest.fixture
def small_batches(monkeypatch):
    sizes = [(vae, "BATCH"), (defender, "SIGHT_PICTURES"), (attacker, "BATCH")]
    sizes += [(exchanges_module, "PICTURES"), (exchanges_module, "FACTS_PICTURES")]
    for module, name in sizes:
        monkeypatch.setattr(module, name, 4)


@pytest.mark.parametrize(("train", "last"), [(_vae, ""), (_reader, "facts"), (_defender, "asked"), (_judge, "alike"), (_attacker, "")])
def test_a_killed_training_continues_to_the_bit(train, last, tmp_path, small_batches):
    whole = train(tmp_path / "whole").state_dict()
    train(tmp_path / "parts", stop_at=STOP)
    assert torch.load(tmp_path / "parts" / last / "state.pt")["step"] == STOP
    continued = train(tmp_path / "parts").state_dict()
    assert all(torch.equal(value, continued[name]) for name, value in whole.items())


def test_a_finished_training_is_not_repeated(tmp_path, small_batches):
    first = _vae(tmp_path).state_dict()
    lines = (tmp_path / "train.jsonl").read_text()
    assert all(torch.equal(value, first[name]) for name, value in _vae(tmp_path).state_dict().items())
    assert (tmp_path / "train.jsonl").read_text() == lines


def test_image_convolutions_change_nothing():
    torch.manual_seed(0)
    codec, x = AutoencoderKLQwenImage(**vae.CONFIG).eval(), torch.rand(2, 3, 1, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = codec.encode(x).latent_dist.mode()
        picture = codec.decode(latents).sample
        vae.use_image_convolutions(codec)
        torch.testing.assert_close(codec.encode(x).latent_dist.mode(), latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(codec.decode(latents).sample, picture, rtol=1e-5, atol=1e-5)


def test_shared_rows_give_the_logits_of_separate_prompts():
    model, tokenizer = build_defender(0).eval(), build_tokenizer()
    scenes, exchanges = draw_asked(torch.Generator().manual_seed(0))
    scenes, exchanges = scenes[:2], exchanges[:2]
    rows = pack_rows(model, tokenizer, pictures_of(scenes), exchanges)
    with torch.no_grad():
        logits, targets, _ = answer_logits(model, rows)
        start = 0
        for scene, row in zip(scenes, exchanges):
            for asked, response in row:
                answer = tokenizer(response, return_tensors="pt").input_ids[0]
                text = prefix_text(1) + asked + response
                inputs = chat_inputs(tokenizer, [render(scene, 64)], [text], model.config.image_token_id)
                alone = model(**inputs).logits[0, -len(answer) - 1 : -1]
                assert torch.equal(targets[start : start + len(answer)], answer)
                torch.testing.assert_close(logits[start : start + len(answer)], alone, rtol=1e-4, atol=1e-5)
                start += len(answer)


def test_a_likeness_is_looked_at_from_the_start():
    """Queries start as keys: among unlike vectors, each attends most to its own copy elsewhere."""
    layer = build_defender(0).model.language_model.layers[0].self_attn
    words = torch.nn.functional.normalize(torch.randn(8, 128, generator=torch.Generator().manual_seed(0)), dim=-1) * 128**0.5
    with torch.no_grad():
        queries, keys = layer.q_proj(words).view(8, 4, 32), layer.k_proj(words).view(8, 2, 32).repeat_interleave(2, 1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys)
    assert (scores.argmax(-1) == torch.arange(8)).float().mean() > 0.9


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    model = WithProbe(build_defender(0))
    adamw, muon = defender.TAUGHT_PLAN.optimizers(model)
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, torch.optim.Muon)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden = {names[id(parameter)] for parameter in muon.param_groups[0]["params"]}
    assert hidden and all("proj" in name or "mlp" in name or "attn" in name for name in hidden)
    assert len(hidden) + len(adamw.param_groups[0]["params"]) == len(names)
    assert not any("embed" in name or "probe" in name for name in hidden)


def test_rates_warm_up_stay_and_fall():
    plan = training.Plan(steps=100, lr=1.0, warmup_steps=10, decay_share=0.5)
    assert [plan.rate_at(step) for step in (0, 9, 30, 50)] == pytest.approx([0.1, 1.0, 1.0, 1.0])
    assert plan.rate_at(75) == pytest.approx(0.5) and plan.rate_at(99) == pytest.approx(0.02)


def test_instructions_say_what_changed():
    for index in range(60):
        scene, _ = make_question("bootstrap", index, 64)
        made = instruct(scene, random.Random(index))
        verb, words = made.prompt.split()[0], set(made.prompt.rstrip(".").split())
        gone, new = (set(a.objects) - set(b.objects) for a, b in ((scene, made.scene), (made.scene, scene)))
        assert verb in ("Add", "Remove", "Replace") and len(new) <= 1 and len(gone) <= 1
        assert (verb == "Add") == (not gone) and (verb == "Remove") == (not new and bool(gone))
        for item in new:
            assert words & {item.shape, item.color}
        for item in gone:
            assert {item.shape, item.color} <= words


def test_patches_are_the_image_processors():
    picture = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    expected = image_processor()([Image.fromarray(picture[0].permute(1, 2, 0).numpy())], return_tensors="pt")
    pixels, grid = patchify(picture)
    assert torch.equal(pixels, expected["pixel_values"]) and torch.equal(grid, expected["image_grid_thw"])


def test_packing_is_the_pipelines():
    from diffusers import QwenImageEditPipeline

    latents = torch.randn(2, 16, 16, 16)
    assert torch.equal(edits.pack_latents(latents), QwenImageEditPipeline._pack_latents(latents, 2, 16, 16, 16))
    assert torch.equal(edits.unpack_latents(edits.pack_latents(latents)), latents)


def test_ssim_agrees_with_scikit_image():
    from skimage.metrics import structural_similarity

    a, b = torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(0)).double()
    b = 0.7 * a + 0.3 * b
    options = {"gaussian_weights": True, "sigma": 1.5, "win_size": 11, "use_sample_covariance": False, "data_range": 1.0, "channel_axis": 0}
    _, full = structural_similarity(a.numpy(), b.numpy(), full=True, **options)
    assert ssim(a[None], b[None]).item() == pytest.approx(full[:, 5:-5, 5:-5].mean(), abs=1e-9)


def test_integrity_sees_a_change_in_the_box_and_only_there():
    before = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    after = before.clone()
    after[:, 40:, 40:] = 0
    inside, outside, corner = box_integrity(before, after, [(44, 44, 12, 12), (4, 4, 12, 12), (61, 0, 3, 3)])
    assert inside < 0.3 and outside == pytest.approx(1) and corner == pytest.approx(1)


def test_the_driver_leaves_folders_that_plain_libraries_load(tmp_path, small_batches, monkeypatch):
    monkeypatch.setattr("aot_fast.bootstrap.run.FAST_STEPS", 2)
    card = bootstrap(tmp_path, seed=5, fast=True)
    loaded = AutoencoderKLQwenImage.from_pretrained(tmp_path / "attacker" / "vae")
    assert loaded.config.latents_mean != AutoencoderKLQwenImage(**vae.CONFIG).config.latents_mean
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "attacker").rglob("*.json"))
    assert {"vae", "defender", "judge", "editor", "attacker", "seed", "command", "commit"} <= set(card) and (tmp_path / "CARD.md").exists()
    for part in (
        "vae",
        "defender/sight",
        "defender/facts",
        "defender",
        "defender/asked",
        "defender/judges",
        "defender/alike",
        "attacker/base",
        "attacker",
    ):
        assert torch.load(tmp_path / "training" / part / "state.pt")["step"] == 2
