"""Another run's held-out edits, answered instead of one's own: copied whole, or refused with the reason."""

import json
from dataclasses import replace

import pytest

from aot_fast.config import Config
from aot_fast.evaluation.attacks_from import copy_attacks
from aot_fast.evaluation.tables import Edit, Prediction, edits_path, image_path, predictions_path, read_tables, write_table
from aot_fast.settings import load, to_yaml

IDS = ["a", "b/ä", "c"]
ATTACKED = IDS[:2]


def write_questions(folder, ids, answer="A"):
    (folder / "data").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"images": str(folder)})] + [json.dumps({"id": id, "answer": answer}) for id in ids]
    (folder / "data" / "heldout.jsonl").write_text("\n".join(lines) + "\n")


def control(**changes):
    """Settings of a run that answers the edits of the run in `game`."""
    return load("tiny_study", [word for key, value in changes.items() for word in (f"--{key.replace('__', '.')}", str(value))])


@pytest.fixture
def game(tmp_path):
    """A finished run with ten rounds' Attackers, to see that they are not sorted as text."""
    folder = tmp_path / "game"
    write_questions(folder, IDS)
    (folder / "config.yaml").write_text(to_yaml(load("tiny_study")))
    (folder / "FINISHED").touch()
    for on, ids in {"clean": IDS, "roundtrip": IDS, "attacker_0": ATTACKED, "attacker_2": ATTACKED, "attacker_10": ATTACKED}.items():
        for id in ids:
            path = image_path(folder, on, id)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{on} {id}".encode())
        if on != "clean":
            write_table(edits_path(folder, on), [Edit(id, 0.9, (0.9,), f"images/{on}/{id}.png", True) for id in ids])
        for j in (0, 1):
            write_table(predictions_path(folder, j, on), [Prediction(id, on, "A", "A", True, "A") for id in ids])
    return folder


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "mine"
    write_questions(folder, IDS)
    return folder


def test_tables_and_pictures_are_copied_and_the_other_folder_is_needed_no_more(game, mine):
    names = copy_attacks(control(evaluation__attacks_from=game), mine, IDS, ATTACKED)
    assert names == ["attacker_0", "attacker_2", "attacker_10"]
    for on in ("roundtrip", *names):
        assert edits_path(mine, on).read_text() == edits_path(game, on).read_text()
        for id in IDS if on == "roundtrip" else ATTACKED:
            assert image_path(mine, on, id).read_bytes() == f"{on} {id}".encode()
            assert image_path(mine, "clean", id).read_bytes() == f"clean {id}".encode()


def test_the_untrained_defenders_answers_are_copied_but_no_trained_ones(game, mine):
    copy_attacks(control(evaluation__attacks_from=game), mine, IDS, ATTACKED)
    assert set(read_tables(mine).predictions) == {0}
    assert set(read_tables(mine).predictions[0]) == {"clean", "roundtrip", "attacker_0", "attacker_2", "attacker_10"}


@pytest.mark.parametrize("change", [{"game__warmup_steps": 2}, {"defender__model": "other"}, {"engine__precision": "bf16"}])
def test_a_first_defender_that_may_answer_otherwise_is_asked(change, game, mine):
    copy_attacks(control(evaluation__attacks_from=game, **change), mine, IDS, ATTACKED)
    assert read_tables(mine).predictions == {}


def test_what_is_there_is_kept(game, mine):
    config = control(evaluation__attacks_from=game)
    copy_attacks(config, mine, IDS, ATTACKED)
    edits_path(game, "attacker_0").write_text("")
    assert copy_attacks(config, mine, IDS, ATTACKED) == ["attacker_0", "attacker_2", "attacker_10"]
    assert read_tables(mine).edits["attacker_0"].keys() == set(ATTACKED)


def test_a_copy_that_was_cut_short_leaves_no_table_without_its_pictures(game, mine):
    image_path(game, "attacker_2", "a").unlink()
    with pytest.raises(ValueError, match="evaluation.attacks_from = .*cannot be copied"):
        copy_attacks(control(evaluation__attacks_from=game), mine, IDS, ATTACKED)
    assert edits_path(mine, "attacker_0").is_file() and not edits_path(mine, "attacker_2").exists()


def refused(game, mine, attacked=ATTACKED, **change):
    with pytest.raises(ValueError) as error:
        copy_attacks(control(evaluation__attacks_from=game, **change), mine, IDS, attacked)
    assert "evaluation.attacks_from = " in str(error.value) and not read_tables(mine).edits.get("attacker_0")
    return str(error.value)


def test_other_questions_are_refused(game, mine):
    write_questions(mine, ["a", "b/ä", "d"])
    assert "other held-out questions: 2 of 4 differ, the first is 'd'" in refused(game, mine)
    write_questions(mine, IDS, answer="B")
    assert "3 of 3 differ" in refused(game, mine)


def test_another_number_of_attacked_questions_is_refused(game, mine):
    assert "edits_attacker_0.jsonl has 2 held-out questions, this run 3, 2 of them common" in refused(game, mine, attacked=IDS)


def test_another_q_low_is_refused(game, mine):
    assert "reward.q_low = 0.8, this run 0.5" in refused(game, mine, reward__q_low=0.5)


def test_an_unfinished_run_and_a_folder_that_is_none_are_refused(game, mine, tmp_path):
    (game / "FINISHED").unlink()
    assert "not finished" in refused(game, mine)
    assert "holds no config.yaml" in refused(tmp_path, mine)


def test_last_leaves_the_middle_defenders_out():
    from aot_fast.evaluation.heldout import defenders_due

    config = Config()
    config = replace(config, game=replace(config.game, rounds=3))
    assert [defenders_due(config, round) for round in range(4)] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    last = replace(config, evaluation=replace(config.evaluation, rounds="last"))
    assert [defenders_due(last, round) for round in range(4)] == [[0], [], [], [0, 3]]
