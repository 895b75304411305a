"""Published recipes are settings that can be used."""

import pytest

from aot_fast.attacker.model import _check
from aot_fast.attacker.recipes import RECIPES, arguments, main
from aot_fast.config import AttackerConfig
from aot_fast.settings import load


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_arguments_give_its_settings(name):
    config = load("tiny", arguments(name)).attacker
    assert {field: getattr(config, field) for field in RECIPES[name].settings} == dict(RECIPES[name].settings)
    _check(config)


def test_the_published_edit_recipe_trains_every_step_but_the_last():
    config = AttackerConfig(**RECIPES["flow_grpo_edit"].settings)
    assert config.window == config.num_steps - 1


def test_an_unknown_recipe_is_named(capsys):
    with pytest.raises(SystemExit, match="given nothing_such, expected some of flow_grpo_edit"):
        main(["nothing_such"])
    main(["mixgrpo"])
    assert "--attacker.window_order slide" in capsys.readouterr().out
