"""Folders in, folders out: any Qwen2.5-VL that plain transformers saved, trained, and loaded by plain transformers or peft again."""

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from aot_fast.bootstrap.folders import build_tokenizer, save_processor
from aot_fast.bootstrap.model import defender_config
from aot_fast.config import EngineConfig, LoraConfig
from aot_fast.defender import dapo
from aot_fast.defender.model import export_defender, load_defender, load_frozen
from aot_fast.defender.prompts import Prompts
from aot_fast.engine import adapter_off
from tests.defender.recorded import NUM_EXAMPLES, recorded_groups
from tests.models import defender_config_of, scene_examples

ENGINE = EngineConfig(timeout_s=60)


def logits_of(model):
    ids = torch.arange(30, 50)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


def trained(folder, runtime, **changes):
    defender = load_defender(defender_config_of(folder, **changes), ENGINE, runtime)
    dapo.update(defender, Prompts(defender, scene_examples(NUM_EXAMPLES)), recorded_groups(folder, runtime))
    return defender


def test_full_export_loads_in_plain_transformers_with_the_trained_weights(defender_folder, runtime, tmp_path):
    defender = trained(defender_folder, runtime)
    export_defender(defender, tmp_path)
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with defender.whole() as live:
        assert torch.equal(logits_of(model), logits_of(live))
    start = Qwen2_5_VLForConditionalGeneration.from_pretrained(defender_folder)
    assert not torch.equal(logits_of(model), logits_of(start))


def test_lora_export_loads_in_plain_peft_and_adapter_off_is_the_base(defender_folder, runtime, tmp_path):
    from peft import PeftModel

    defender = trained(defender_folder, runtime, lora=LoraConfig(rank=4, alpha=8))
    export_defender(defender, tmp_path)
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(defender_folder)
    base_logits = logits_of(base)
    with defender.whole() as live:
        live_logits = logits_of(live)
        with adapter_off(live):
            assert torch.equal(logits_of(live), base_logits)
    assert not torch.equal(live_logits, base_logits)
    assert torch.allclose(logits_of(PeftModel.from_pretrained(base, tmp_path).eval()), live_logits, atol=1e-6)
    frozen = load_frozen(tmp_path, defender.config, runtime)  # what a later round evaluates
    assert torch.allclose(logits_of(frozen.model), live_logits, atol=1e-5)


def test_folder_of_other_sizes_saved_by_transformers_loads_and_trains(runtime, tmp_path):
    sizes = defender_config(build_tokenizer()).to_dict()
    text = {**sizes["text_config"], "hidden_size": 64, "num_hidden_layers": 2, "layer_types": None}
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [2, 3, 3]}
    vision = {**sizes["vision_config"], "depth": 2, "fullatt_block_indexes": [1], "out_hidden_size": 64}
    config = Qwen2_5_VLConfig(**{**sizes, "text_config": text, "vision_config": vision})
    torch.manual_seed(1)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(tmp_path)
    save_processor(tmp_path)
    defender = load_defender(defender_config_of(tmp_path), ENGINE, runtime)
    metrics = dapo.update(defender, Prompts(defender, scene_examples(NUM_EXAMPLES)), recorded_groups(tmp_path, runtime))
    assert metrics["applied"] == 1 and metrics["grad_norm"] > 0


def test_frozen_vision_tower_does_not_move(defender_folder, runtime):
    defender = load_defender(defender_config_of(defender_folder, train_vision=False), ENGINE, runtime)
    assert not any("visual" in name for name, p in defender.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}])
def test_gradient_checkpointing_gives_the_same_step(defender_folder, runtime, changes):
    plain, saved = (trained(defender_folder, runtime, **c) for c in ({}, changes))
    with plain.whole() as a, saved.whole() as b:
        assert torch.allclose(logits_of(a), logits_of(b), atol=1e-6)


def test_missing_folder_is_a_clear_error(runtime):
    with pytest.raises(ValueError, match="defender.revision"):
        load_defender(defender_config_of("/nowhere/Qwen2.5-VL"), ENGINE, runtime)


def test_frozen_vision_tower_gets_no_adapter_to_train(defender_folder, runtime):
    config = defender_config_of(defender_folder, train_vision=False, lora=LoraConfig(rank=4, alpha=8))
    defender = load_defender(config, ENGINE, runtime)
    trained_names = [name for name, p in defender.model.named_parameters() if p.requires_grad]
    assert trained_names and not any("visual" in name for name in trained_names)
