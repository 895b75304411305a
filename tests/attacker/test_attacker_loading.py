"""Loading partitioned, adapters, averages, and exports that plain diffusers reads."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aot_fast.attacker.loading import is_plus, read_range, without_hf_deepspeed
from aot_fast.attacker.model import export_attacker
from aot_fast.config import EngineConfig, LoraConfig
from aot_fast.engine import adapter_off, seed_of, whole_state, zero_config
from tests.attacker.rollouts import examples, scored
from tests.attacker.tiny_pipeline import LORA


def forward(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(getattr(module, "module", module).parameters()).dtype  # of a Player: its model's
    return module(
        hidden_states=torch.randn(2, 32, 64, generator=generator).to(dtype),
        timestep=torch.tensor([0.3, 0.8]).to(dtype),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator).to(dtype),
        img_shapes=[[(1, 4, 4), (1, 4, 4)]] * 2,
        return_dict=False,
    )[0]


def plain(folder, dtype=torch.float32):
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype).eval()


@pytest.mark.parametrize("kind", ["edit", "plus"])  # one file, and eight shards
def test_loaded_model_is_diffusers_own(kind, folders, base_config, load):
    attacker = load(replace(base_config, model=str(folders[kind])))
    reference = plain(folders[kind])
    state = whole_state(attacker.player)
    assert state.keys() == reference.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in reference.state_dict().items())
    with attacker.player.gathered() as module:
        assert torch.equal(forward(module), forward(reference))
    assert attacker.plus == (kind == "plus")


def test_half_precision_weights_are_cast(folders, base_config, load, tmp_path):
    """Bundled weights are fp16; a CPU trains in fp32."""
    folder = shutil.copytree(folders["edit"], tmp_path / "half")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(half, path)
    state = whole_state(load(replace(base_config, model=str(folder))).player)
    assert all(value.dtype is torch.float32 and torch.equal(value, half[name].float()) for name, value in state.items())


def test_bf16_base_with_fp32_adapter(folders, base_config, runtime):
    """What a GPU trains: the base in bf16 with exact rotary tables, adapters in fp32."""
    from aot_fast.attacker.model import load_attacker

    config = replace(base_config, lora=LORA)
    attacker = load_attacker(config, EngineConfig(), replace(runtime, dtype=torch.bfloat16))
    dtypes = {name: p.dtype for name, p in attacker.player.module.named_parameters()}
    assert all(dtype is (torch.float32 if "lora_" in name else torch.bfloat16) for name, dtype in dtypes.items())
    reference = plain(folders["edit"], torch.bfloat16)
    assert torch.equal(attacker.player.module.pos_embed.pos_freqs, reference.pos_embed.pos_freqs)
    for _ in range(2):
        attacker.player.backward(forward(attacker.player).float().square().mean())
        assert attacker.player.step().applied
    with torch.no_grad(), adapter_off(attacker.player.module):
        assert torch.equal(forward(attacker.player), forward(reference))
    assert not torch.equal(forward(attacker.player), forward(reference))


@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 1, 3), (1, 9)])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_slices_of_all_ranks_make_the_tensor(shape, world, tmp_path):
    tensor = torch.randn(shape)
    save_file({"t": tensor}, tmp_path / "t.safetensors")
    size = -(-tensor.numel() // world)
    with safe_open(tmp_path / "t.safetensors", "pt") as weights:
        slices = [read_range(weights, "t", rank * size, (rank + 1) * size) for rank in range(world)]
    assert torch.equal(torch.cat(slices), tensor.flatten())


def test_a_rank_reads_only_the_rows_of_its_slice(tmp_path):
    class Spy:
        def __init__(self, weights):
            self.weights, self.rows = weights, []

        def get_slice(self, name):
            view, rows = self.weights.get_slice(name), self.rows

            class View:
                get_shape = view.get_shape

                def __getitem__(self, key):
                    rows.append((key.start, key.stop))
                    return view[key]

            return View()

    save_file({"t": torch.randn(100, 10)}, tmp_path / "t.safetensors")
    with safe_open(tmp_path / "t.safetensors", "pt") as weights:
        spy = Spy(weights)
        read_range(spy, "t", 255, 505)
    assert spy.rows == [(25, 51)]


@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_wrong_weights_are_named(fault, folders, base_config, load, tmp_path):
    folder = shutil.copytree(folders["edit"], tmp_path / "bad")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = "transformer_blocks.0.attn.to_q.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "extra":
        name = "transformer_blocks.9.attn.to_q.weight"
        weights[name] = torch.zeros(2)
    else:
        weights[name] = weights[name][1:]
    save_file(weights, path)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load(replace(base_config, model=str(folder)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "Qwen/Qwen-Image-Edit"}, "revision"),
        ({"beta": 0.1}, "lora.rank"),
        ({"lora": replace(LORA, targets=("to_z",))}, "to_z"),
        ({"window_range": (0, 4), "lora": LORA}, "window_range"),
        ({"eta": 0.0, "lora": LORA}, "eta"),
        ({"context_pixels": 4096, "lora": LORA}, "context_pixels = 4096 needs attacker.region window.* use 0"),
        ({"context_pixels": 4096, "region": "window", "lora": LORA}, "context_pixels = 4096: .* is no Edit-Plus pipeline .* use 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message, base_config, load):
    with pytest.raises(ValueError, match=message):
        load(replace(base_config, **changes))


def test_other_pipelines_are_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="FluxPipeline"):
        is_plus(tmp_path)


def test_the_text_encoder_is_not_partitioned_under_the_defenders_config(base_config, load, runtime):
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    alive = HfDeepSpeedConfig(zero_config(EngineConfig(), runtime, base_config.optimizer))
    attacker = load(base_config)
    assert not any(hasattr(p, "ds_id") for p in attacker.text_encoder.parameters())
    assert is_deepspeed_zero3_enabled() and alive is not None  # and it is back afterwards
    with without_hf_deepspeed():
        assert not is_deepspeed_zero3_enabled()


def trained(config, load):
    """An Attacker after two updates on fixed rewards."""
    from aot_fast.attacker.flow_grpo import update
    from aot_fast.attacker.rollout import rollout

    attacker = load(replace(config, optimizer=replace(config.optimizer, lr=1e-2)))
    for step in range(2):
        update(attacker, scored(rollout(attacker, examples(1), seed=0, round=1, step=step)))
    return attacker


def test_adapter_switched_off_is_the_base_bit_for_bit(base_config, load, folders):
    attacker = trained(replace(base_config, lora=LORA), load)
    with torch.no_grad(), adapter_off(attacker.player.module):
        assert torch.equal(forward(attacker.player), forward(plain(folders["edit"])))
    on = forward(attacker.player)
    assert (on - forward(plain(folders["edit"]))).abs().max() > 1e-4
    assert all(p.requires_grad for p in attacker.player.trainable)


def test_without_an_adapter_there_is_no_reference(base_config, load):
    with pytest.raises(ValueError, match="adapter"), adapter_off(load(base_config).player.module):
        pass


def test_exported_adapter_loads_in_diffusers_and_peft(base_config, load, pipeline, tmp_path, folders):
    """alpha is not rank here: a loader that lost it would scale wrongly."""
    attacker = trained(replace(base_config, lora=LoraConfig(rank=4, alpha=12)), load)
    export_attacker(attacker, tmp_path)
    with attacker.player.gathered() as module:
        expected = forward(module)
    base = plain(folders["edit"])
    base.load_lora_adapter(str(tmp_path), use_safetensors=True)
    assert torch.allclose(forward(base), expected, atol=1e-6)

    whole = pipeline["edit"]
    whole.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    try:
        assert torch.allclose(forward(whole.transformer), expected, atol=1e-6)
    finally:
        whole.unload_lora_weights()


def test_exported_full_model_loads_in_diffusers(base_config, load, tmp_path):
    attacker = trained(base_config, load)
    export_attacker(attacker, tmp_path)
    with attacker.player.gathered() as module:
        assert torch.equal(forward(module), forward(plain(tmp_path)))


def test_averages_follow_the_weights_and_are_saved(base_config, load):
    attacker = trained(replace(base_config, lora=LORA, ema_decay=0.5), load)
    start = load(replace(base_config, lora=LORA, ema_decay=0.5))
    fresh, now = (whole_state(a.player, trainable_only=True) for a in (start, attacker))
    with attacker.ema.applied():
        averaged = whole_state(attacker.player, trainable_only=True)
    moved = [name for name in now if not torch.equal(now[name], fresh[name])]
    assert moved and all(not torch.equal(averaged[name], now[name]) for name in moved)
    start.load_extra(attacker.save_extra())
    with start.ema.applied():
        loaded = whole_state(start.player, trainable_only=True)
    assert all(torch.equal(loaded[name], averaged[name]) for name in averaged)
    with pytest.raises(ValueError, match="EMA"):
        start.load_extra({})


def test_average_is_the_exponential_one(base_config, load):
    attacker = load(replace(base_config, lora=LORA, ema_decay=0.75))
    name, parameter = next(iter(attacker.ema.trained.items()))
    first = parameter.ds_tensor.clone()
    parameter.ds_tensor.data.add_(1.0)
    attacker.ema.update()
    assert torch.allclose(attacker.ema.averages[name], first + 0.25)


def test_checkpoint_continues_bitwise(base_config, load, tmp_path):
    from aot_fast.attacker.flow_grpo import update
    from aot_fast.attacker.rollout import rollout

    def advance(attacker):
        update(attacker, scored(rollout(attacker, examples(1), seed=0, round=1, step=2)))
        return whole_state(attacker.player, trainable_only=True)

    config = replace(base_config, lora=LORA)
    attacker = trained(config, load)
    attacker.player.save(tmp_path)
    expected = advance(attacker)
    again = load(replace(config, optimizer=replace(config.optimizer, lr=1e-2)))
    again.player.load(tmp_path)
    found = advance(again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_adapters_start_alike_whatever_ran_before(base_config, load):
    states = []
    for _ in range(2):
        torch.randn(seed_of("any") % 7)
        states.append(whole_state(load(replace(base_config, lora=LORA)).player, trainable_only=True))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
