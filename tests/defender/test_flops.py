"""FLOPs from shapes against those that torch counts while tiny models run, and against cases small enough for pencil and paper."""

from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from aot_fast.defender.flops import Flops, GroupShape, forward_flops, mfu, rollout_flops, update_flops

IMAGE = 60
TOKENS = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,  # keys narrower than queries
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
}
VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 56, "num_heads": 2, "out_hidden_size": 48, "patch_size": 4}
WINDOWED = {"window_size": 18, "fullatt_block_indexes": [1, 9]}
"""18 px of patches of 4 px merged by 2: windows of 2 tokens, which is 4 patches, although 18 px hold 4.5. Block 9 does not exist."""
GRIDS = [(1, 10, 14), (1, 8, 12), (1, 2, 6)]
"""Windows cut short on both sides; a multiple of the window on both; one that no window fills."""
NUM_IMAGE_TOKENS = 35 + 24 + 3


def tiny_config(family="qwen2_5_vl"):
    if family == "qwen2_5_vl":
        return Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION | WINDOWED, attn_implementation="eager", **TOKENS)
    text = TEXT | {"head_dim": 16, "rope_parameters": TEXT["rope_parameters"] | {"mrope_section": [4, 2, 2]}}  # 6 * 16 is not hidden_size
    vision = VISION | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]}
    return Qwen3VLConfig(text_config=text, vision_config=vision, attn_implementation="eager", **TOKENS)


def tiny_model(config):
    torch.manual_seed(0)
    classes = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}
    return classes[config.model_type](config)


def inputs_of(num_text, num_response):
    """The images of GRIDS, then text, then a response; and the group's shape."""
    ids = [i for t, h, w in GRIDS for i in (62, *[IMAGE] * (t * h * w // 4), 63)] + [2] * (num_text + num_response)
    ids, grid = torch.tensor([ids]), torch.tensor(GRIDS)
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4)
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(), "pixel_values": pixels, "image_grid_thw": grid}
    return inputs, GroupShape.of(grid, ids.shape[1] - num_response, [num_response])


def counted(run):
    """FLOPs of run() by module name without the model's own: "visual", "language_model.layers.0.mlp", "lm_head"; "" for all of it."""
    with FlopCounterMode(display=False) as counter:
        run()
    flops = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    names = {name: name.partition(".")[2].removeprefix("model.") for name in flops if "." in name}
    return {short: flops[name] for name, short in names.items()} | {"": flops["Global"]}


def split(flops, config):
    """The text model's linear layers and attention: what self_attn multiplies beyond its four projections."""
    layers = [f"language_model.layers.{i}." for i in range(config.text_config.num_hidden_layers)]
    projections = sum(flops[f"{layer}self_attn.{x}_proj"] for layer in layers for x in "qkvo")
    mlp = sum(flops[f"{layer}mlp"] for layer in layers)
    return projections + mlp, sum(flops[f"{layer}self_attn"] for layer in layers) - projections


def pair_flops(config):
    """FLOPs of the text model for one query and one key."""
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * 2 * text.num_attention_heads * head_dim * text.num_hidden_layers


def beyond_causal(config, num_tokens):
    """FLOPs of eager attention above the diagonal, which is computed and masked: never ours."""
    return pair_flops(config) * num_tokens * (num_tokens - 1) // 2


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_each_part_of_the_forward_is_what_torch_counts(family):
    config = tiny_config(family)
    inputs, group = inputs_of(num_text=7, num_response=5)
    num_tokens = group.prompt + 5
    rows = torch.arange(group.prompt - 1, num_tokens - 1)
    flops = counted(lambda: tiny_model(config)(**inputs, logits_to_keep=rows, use_cache=False))
    ours = forward_flops(config, [group])
    linear, attention = split(flops, config)
    assert (ours.vision, ours.linear, ours.head) == (flops["visual"], linear, flops["lm_head"])
    assert ours.attention == attention - beyond_causal(config, num_tokens)
    # Frequencies times positions is a product for torch and no work for us.
    assert ours.total == flops[""] - flops["language_model.rotary_emb"] - beyond_causal(config, num_tokens)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_frames_see_only_themselves_in_the_tower_too(family):
    config, grid = tiny_config(family), [(3, 6, 10), (2, 4, 4)]
    num_patches = 3 * 60 + 2 * 16
    tower = tiny_model(config).model.visual
    flops = counted(lambda: tower(torch.randn(num_patches, 96), grid_thw=torch.tensor(grid)))
    assert forward_flops(config, [GroupShape.of(grid, num_patches // 4, [1])]).vision == flops[""]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_rollout_is_what_torch_counts_token_by_token(family):
    config, lengths = tiny_config(family), [4, 1, 6]
    model = tiny_model(config)
    inputs, group = inputs_of(num_text=7, num_response=0)
    shape = GroupShape.of(GRIDS, group.prompt, lengths)

    def sample():
        """One prefill, then every response on top of it; no attention matrix but the prompt's has anything to mask."""
        cache = DynamicCache(config=config.get_text_config())
        model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for length in lengths:
            for i in range(length - 1):
                position = torch.full((3, 1, 1), group.prompt + i)
                model(input_ids=torch.tensor([[2]]), position_ids=position, past_key_values=cache, use_cache=True)
            cache.crop(group.prompt)

    flops = counted(sample)
    ours = rollout_flops(config, [shape])
    linear, attention = split(flops, config)
    assert astuple(ours) == (flops["visual"], linear, attention - beyond_causal(config, group.prompt), flops["lm_head"])
    apart = rollout_flops(config, shape.unshared())
    assert rollout_flops(config, [shape], shared=False) == apart
    assert apart.vision == 3 * ours.vision and apart.head - ours.head == 2 * 2 * 48 * 64


def test_causal_pairs_are_those_of_reading_token_by_token():
    config, cache, num_tokens = tiny_config(), DynamicCache(), 9
    text = tiny_model(config).model.language_model
    ids = torch.full((1, 1), 2)

    def read():
        for i in range(num_tokens):
            text(input_ids=ids, position_ids=torch.full((3, 1, 1), i), past_key_values=cache, use_cache=True)

    by_module = {f"language_model.{name}": n for name, n in counted(read).items()}
    assert split(by_module, config)[1] == forward_flops(config, [GroupShape((), 4, (5,))]).attention


def train_all(model):
    model.requires_grad_(True)


def train_text(model):
    model.model.visual.requires_grad_(False)


def train_no_matrix(model):
    """In place of adapters: norms and biases need gradients everywhere, and no product of their own."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)


def train_no_matrix_of_the_text(model):
    train_no_matrix(model)
    train_text(model)


@pytest.mark.parametrize(
    "freeze, options",
    [
        (train_all, {}),
        (train_text, {"train_vision": False}),
        (train_no_matrix, {"lora": True}),
        (train_no_matrix_of_the_text, {"lora": True, "train_vision": False}),
    ],
)
def test_update_is_what_torch_counts_forward_and_backward(freeze, options):
    config = tiny_config()
    model = tiny_model(config)
    freeze(model)
    inputs, group = inputs_of(num_text=7, num_response=5)
    num_tokens = group.prompt + 5
    rows = torch.arange(group.prompt - 1, num_tokens - 1)

    flops = counted(lambda: model(**inputs, logits_to_keep=rows, use_cache=False).logits.sum().backward())
    ours = update_flops(config, [group], **options)
    rotary = flops["language_model.rotary_emb"]
    assert ours.total == flops[""] - rotary - 3 * beyond_causal(config, num_tokens)


def test_training_costs_three_forwards_less_the_gradient_of_the_pixels():
    config, groups = tiny_config(), [GroupShape.of(GRIDS, 90, [5, 9]), GroupShape((), 20, (3,))]
    once = forward_flops(config, groups)
    embedding = 2 * (140 + 96 + 12) * 96 * 32
    thrice = Flops(3 * once.vision - embedding, 3 * once.linear, 3 * once.attention, 3 * once.head)
    assert update_flops(config, groups) == thrice
    assert update_flops(config, groups, train_vision=False) == Flops(once.vision, *astuple(thrice)[1:])
    frozen = update_flops(config, groups, train_vision=False, lora=True)
    assert frozen == Flops(once.vision, 2 * once.linear, 3 * once.attention, 2 * once.head)


def by_hand():
    """A text model of one layer: hidden 4, 2 heads and 1 of keys, MLP 10, vocabulary 7; a tower of a full block and one of windows."""
    text = SimpleNamespace(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=10, vocab_size=7
    )
    vision = SimpleNamespace(
        depth=2,
        hidden_size=2,
        intermediate_size=3,
        out_hidden_size=4,
        in_channels=1,
        patch_size=1,
        temporal_patch_size=1,
        spatial_merge_size=2,
        window_size=2,
        fullatt_block_indexes=[0],
    )
    return SimpleNamespace(model_type="qwen2_5_vl", text_config=text, vision_config=vision)


def test_group_by_hand():
    group = GroupShape(((1, 2, 6),), prompt=5, responses=(2, 3))
    per_patch = 2 * (4 * 2 * 2 + 3 * 2 * 3) * 2  # q, k, v, projection; gate, up, down; both blocks
    embedding, merger = 2 * 12 * 2, 2 * 3 * (8 * 8 + 8 * 4)
    attention = 2 * 2 * 2 * (12 * 12 + 3 * 4 * 4)  # one image, then three windows of 2 x 2
    vision = embedding + 12 * per_patch + merger + attention
    per_token = 2 * (4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 10)
    pairs = 15 + (2 * 5 + 3) + (3 * 5 + 6)
    once = Flops(vision, 10 * per_token, 2 * 2 * 4 * pairs, 5 * 2 * 4 * 7)
    assert forward_flops(by_hand(), [group]) == once
    unshared = Flops(2 * vision, 15 * per_token, 2 * 2 * 4 * (pairs + 15), 5 * 2 * 4 * 7)
    assert forward_flops(by_hand(), [group], shared=False) == unshared
    drawn = Flops(vision, 8 * per_token, 2 * 2 * 4 * (15 + (5 + 1) + (2 * 5 + 3)), 4 * 2 * 4 * 7)
    assert rollout_flops(by_hand(), [group]) == drawn
    assert forward_flops(by_hand(), [group, group]) == once + once


@pytest.mark.parametrize("count", [forward_flops, update_flops, rollout_flops])
def test_a_group_of_one_shares_nothing(count):
    groups = [GroupShape.of(GRIDS, 90, [5]), GroupShape((), 3, (9,))]
    assert count(tiny_config(), groups) == count(tiny_config(), groups, shared=False)


@pytest.mark.parametrize("count", [forward_flops, update_flops, rollout_flops])
def test_nominal_over_shared_approaches_the_group_size_as_prompts_grow(count):
    config, size = tiny_config(), 8
    groups = [GroupShape.of([(1, side, side)], side**2 // 4 + 20, [30] * size) for side in (4, 40, 400)]
    ratios = [count(config, [g], shared=False).total / count(config, [g]).total for g in groups]
    assert 1 < ratios[0] < ratios[1] < ratios[2] < size
    assert ratios[2] == pytest.approx(size, rel=0.01)


def test_seven_billion_weights_from_the_configuration_alone():
    """Qwen2.5-VL-7B: 6.53 B weights in the text model's layers (its 7.6 B less embedding and head), 13.05 GFLOP a token."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    config = Qwen2_5_VLConfig(text_config=text | {"vocab_size": 152064}, vision_config={"hidden_size": 1280})
    flops = forward_flops(config, [GroupShape((), 1, (1,))])
    assert flops.linear / 2 == pytest.approx(13.05e9, rel=1e-3)
    assert flops.head == 2 * 3584 * 152064


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_mfu_is_the_share_of_the_cards_peak(name, peak):
    assert mfu(peak, 2.0, name) == 0.5


@pytest.mark.parametrize("name", ["cpu", "", "NVIDIA GeForce RTX 4090", "NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
def test_mfu_is_none_where_the_peak_is_unknown(name):
    assert mfu(1e12, 1.0, name) is None


@pytest.mark.parametrize(
    "group, message",
    [
        (GroupShape(((1, 3, 4),), 9, (1,)), "spatial_merge_size = 2"),
        (GroupShape(((1, 4, 4),), 3, (1,)), "at least 4 tokens"),
        (GroupShape((), 0, (1,)), "at least 1 tokens"),
        (GroupShape((), 3, ()), "one response or more"),
        (GroupShape((), 3, (2, 0)), "one token or more"),
    ],
)
@pytest.mark.parametrize("count", [forward_flops, update_flops, rollout_flops])
def test_lengths_that_do_not_fit_are_refused(count, group, message):
    with pytest.raises(ValueError, match=message):
        count(tiny_config(), [group])


def test_what_would_be_counted_wrong_is_refused():
    moe = SimpleNamespace(model_type="qwen3_vl_moe")
    with pytest.raises(ValueError, match="qwen3_vl_moe.*qwen2_5_vl, qwen3_vl only"):
        forward_flops(moe, [])
    sliding = Qwen2_5_VLConfig(text_config=TEXT | {"use_sliding_window": True, "max_window_layers": 1}, vision_config=VISION, **TOKENS)
    with pytest.raises(ValueError, match="use_sliding_window"):
        forward_flops(sliding, [])
