"""Settings: files, overrides, and errors that name field, value, rule and fix."""

import pytest

from aot_fast.settings import CONFIGS, SettingsError, config_hash, differences, load, to_yaml

NFT = ["--attacker.variant", "nft", "--attacker.dynamics", "ode", "--attacker.beta", "0"]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_configuration_loads_and_is_named_after_its_file(name):
    assert load(name).run.name == name


def test_overrides_of_both_spellings():
    config = load("tiny", ["--defender.optimizer.lr", "1e-5", "--attacker.window_range=[0,3]", "--defender.dual_clip", "null"])
    assert config.defender.optimizer.lr == 1e-5
    assert config.attacker.window_range == (0, 3) and config.defender.dual_clip is None


def test_saved_configuration_is_read_back_unchanged(tmp_path):
    config = load("tiny", ["--run.seed", "3"])
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load(str(tmp_path / "saved.yaml")) == config


def test_off_is_a_word_and_false_is_none(tmp_path):
    (tmp_path / "words.yaml").write_text("reward: {judge: off}\ndata: {train: world}\nrun: {name: trueish, deterministic: false}\n")
    config = load(str(tmp_path / "words.yaml"))
    assert (config.reward.judge, config.run.name, config.run.deterministic) == ("off", "trueish", False)
    judge = ["--reward.judge", "off", "--reward.judge_model", "", "--reward.judge_answers", "false"]
    config = load("tiny", [*judge, "--run.deterministic", "true"])
    assert (config.reward.judge, config.reward.judge_model, config.run.deterministic) == ("off", "", True)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (["--defender.grop_size", "3"], ["defender.grop_size", "3", "did you mean 'defender.group_size'"]),
        (["--defender.lr", "3"], ["did you mean 'defender.optimizer.lr'"]),
        (["--defendr.microbatch", "3"], ["did you mean"]),
        (["--defender.group_size", "many"], ["defender.group_size", "int", "many"]),
        (["--game.arm", "both"], ["game.arm", "coevolution", "both"]),
        (["--defender", "3"], ["defender", "section"]),
        (["--defender.lora", "null"], ["defender.lora", "section"]),
        (["--defender.lora.rank"], ["defender.lora.rank", "value is missing"]),
        (["tiny"], ["--section.field"]),
        (["--attacker.window", "9"], ["attacker.window", "9", "window_range"]),
        (["--attacker.window_range", "[0,10]"], ["attacker.window_range", "last step"]),
        (["--attacker.beta", "0.1", "--attacker.lora.rank", "0"], ["attacker.beta", "lora.rank"]),
        (["--reward.q_low", "0.9"], ["reward.q_low", "q_high"]),
        (["--reward.judge", "off"], ["reward.judge_model", "asset:tiny/judge", "leave it empty"]),
        (["--reward.judge_model", ""], ["reward.judge_answers", "first Defender", "judge_model"]),
        (["--reward.judge", "off", "--reward.judge_model", ""], ["reward.judge_answers", "judge off", "set it to false"]),
        (["--attacker.context_pixels", "4096"], ["attacker.context_pixels", "4096", "no context", "attacker.region window"]),
        (["--attacker.compile_blocks", "true", "--attacker.gather", "block"], ["attacker.compile_blocks", "block", "gather update"]),
        (["--attacker.compile_blocks", "true", "--engine.offload", "all"], ["attacker.compile_blocks", "offload all", "offload optimizer"]),
        (NFT + ["--attacker.steps_per_rollout", "2"], ["attacker.steps_per_rollout", "weights that sampled", "use 1"]),
        (["--attacker.tail_steps", "-1"], ["attacker.tail_steps", "not be negative"]),
        (["--attacker.context_pixels", "-1"], ["attacker.context_pixels", "-1", "not be negative"]),
        (["--attacker.probe_edits", "1"], ["attacker.probe_edits", "at least 2"]),
        (["--attacker.probe_share", "0"], ["attacker.probe_share", "more than 0"]),
        (["--data.train", "q.jsonl", "--defender.model", "mine"], ["reward.judge_model", "small world", "leave it empty"]),
        (["--defender.microbatch", "0"], ["defender.microbatch", "positive"]),
        (["--curation.clean_share", "1.5"], ["curation.clean_share", "[0, 1]"]),
        (["--defender.group_size", "1"], ["defender.group_size", "at least 2"]),
        (
            ["--defender.lora.rank", "8", "--defender.lora.targets", "[q_proj,lm_head]"],
            ["defender.lora.targets", "lm_head", "leave it out"],
        ),
        (["--defender.temperature", "0"], ["defender.temperature", "positive"]),
        (["--run.name", "../elsewhere"], ["run.name", "folder name"]),
        (["--data.train", "questions.csv"], ["data.train", ".jsonl"]),
        (["--data.heldout", "world:valid"], ["data.heldout", "'world:valid'", "did you mean 'world:validation'"]),
        (["--data.heldout", "held.jsonl"], ["data.heldout", "data.train is `world`", "leave it empty"]),
        (["--data.train", "q.jsonl", "--data.heldout", "world:validation"], ["data.heldout", "'world:validation'", ".jsonl"]),
        (["--evaluation.rounds", "first"], ["evaluation.rounds", "last", "first"]),
    ],
)
def test_wrong_settings_are_named_with_rule_and_fix(override, says):
    with pytest.raises(SettingsError) as error:
        load("tiny", override)
    for part in says:
        assert part in str(error.value)


def test_heldout_questions_of_the_world_come_from_the_split_that_is_asked_for(tmp_path, runtime):
    from aot_fast.data.sets import open_data

    pictures = {}
    for heldout in ("", "world:validation"):
        config = load("tiny", ["--data.num_train", "3", "--data.num_heldout", "2", "--data.heldout", heldout or "''"])
        train, split = open_data(config.data, tmp_path / (heldout or "default"), 0, runtime)
        pictures[heldout] = [question.id.split("-")[0] for question in split.questions]
        assert {question.id.split("-")[0] for question in train.questions} == {"train"}
    assert pictures == {"": ["heldout"] * 2, "world:validation": ["validation"] * 2}


def test_unknown_configuration_names_the_nearest():
    with pytest.raises(SettingsError, match="did you mean 'tiny'"):
        load("tinny")


def test_hash_and_differences_leave_out_what_does_not_change_the_run():
    a, b, c = load("tiny"), load("tiny", ["--run.stop_after", "3", "--metrics.every", "5"]), load("tiny", ["--attacker.eta", "0.5"])
    assert config_hash(a) == config_hash(b) != config_hash(c)
    assert differences(a, b) == [] and differences(a, c) == ["attacker.eta: 1.0 -> 0.5"]
