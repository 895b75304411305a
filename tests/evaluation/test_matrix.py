"""The figures of the game against an example worked out by hand, and the summary made of them."""

import json

import pytest

from aot_fast.config import Config, RunConfig
from aot_fast.evaluation import matrix
from aot_fast.evaluation.summary import measure, summarise
from aot_fast.evaluation.tables import (
    Edit,
    Prediction,
    edits_path,
    image_path,
    predictions_path,
    read_edits,
    read_predictions,
    read_tables,
    safe_name,
    write_table,
)
from aot_fast.settings import config_hash

Q_LOW = 0.6

# Six held-out questions. R right, w wrong, in the order a b c d e f.
ANSWERS = {
    (0, "clean"): "RRRRRw",
    (0, "roundtrip"): "RRRRwR",
    (0, "attacker_0"): "RRwwww",
    (0, "attacker_1"): "wwwwRw",
    (1, "clean"): "RRRRww",
    (1, "roundtrip"): "RRRRRR",
    (1, "attacker_0"): "RRRwww",
    (1, "attacker_1"): "RwRRRw",
}
ATTACKS = {"attacker_0": ["added", "added", "subtle", "added", "", "subtle"]}
"""Types that the audit gave; attacker_1's edits are of an older table, without any."""
EDITS = {
    # q, audit: c has lost its target, d is no longer true, e was never audited
    "attacker_0": [(0.9, True), (0.8, True), (0.5, True), (0.9, False), (0.7, None), (0.6, True)],
    "attacker_1": [(0.9, True), (0.9, True), (0.9, True), (0.2, True), (0.7, None), (0.9, False)],
    "roundtrip": [(0.95, None)] * 6,
}


@pytest.fixture
def run_folder(tmp_path):
    for (defender, on), marks in ANSWERS.items():
        rows = [
            Prediction(id, on, "text", "A", mark == "R", "A", "relation" if id in "ab" else "counting") for id, mark in zip("abcdef", marks)
        ]
        write_table(predictions_path(tmp_path, defender, on), rows)
    for on, edits in EDITS.items():
        attacks = ATTACKS.get(on, [""] * 6)
        rows = [Edit(id, q, (q, 1.0), f"{id}.png", audit, attack) for id, (q, audit), attack in zip("abcdef", edits, attacks)]
        write_table(edits_path(tmp_path, on), rows)
    return tmp_path


def test_figures_of_the_hand_computed_example(run_folder):
    found = measure(run_folder, Q_LOW)
    assert found["clean_accuracy"] == {"defender_0": 5 / 6, "defender_1": 4 / 6}
    assert found["roundtrip_accuracy"] == {"defender_0": 5 / 6, "defender_1": 1.0}
    # attacker_0, fair: a b e f. Defender 0 answers a b f rightly on the round trip (e never counts) and fails on f: 1 of 3.
    # Defender 1 answers all four rightly there and fails on e and f: 2 of 4.
    # attacker_1, fair: a b c e. Defender 0: of a b c all three fail. Defender 1: of a b c e only b fails.
    assert found["attack_success"] == {
        "attacker_0": {"defender_0": 1 / 3, "defender_1": 2 / 4},
        "attacker_1": {"defender_0": 1.0, "defender_1": 1 / 4},
    }
    # All audit-valid edits, a lost target or not: a b c e f under attacker_0, a b c d e under attacker_1.
    assert found["accuracy_under_attack"] == {
        "attacker_0": {"defender_0": 2 / 5, "defender_1": 3 / 5},
        "attacker_1": {"defender_0": 1 / 5, "defender_1": 4 / 5},
    }
    # Audited edits with intact targets: a b d f of attacker_0, a b c f of attacker_1.
    assert found["label_valid"] == {"attacker_0": 3 / 4, "attacker_1": 3 / 4}


def test_attack_types_have_their_share_of_all_edits_and_their_own_success(run_folder):
    found = measure(run_folder, Q_LOW)
    # added: a b d, of which a b are fair. subtle: c f, of which f is fair: right on both round trips, wrong on both edits.
    assert found["attack_types"] == {
        "attacker_0": {
            "added": {"share": 3 / 6, "attack_success": {"defender_0": 0.0, "defender_1": 0.0}},
            "subtle": {"share": 2 / 6, "attack_success": {"defender_0": 1.0, "defender_1": 1.0}},
        }
    }
    detail = found["details"]["attack_types"]["attacker_0"]["added"]
    assert (detail["share"]["n"], detail["attack_success"]["defender_0"]["n"]) == (6, 2)
    assert "attack_types" not in found["by_kind"]["relation"]


def write_curated(run_folder, round, audits, rows):
    """`audits`: of all edits of the round, by name; `rows`: (source, round of the picture, name) of the set."""
    folder = run_folder / "curated" / f"round_{round:03d}"
    folder.mkdir(parents=True)
    # Another folder than the one that is read: runs are moved.
    path = "/where/it/was/made/curated/round_{:03d}/images/{}.png"
    made = [{"image": f"images/{name}.png", "audit": audit, "accepted": True} for name, audit in audits.items()]
    taken = [{"question_id": name, "source": source, "attacker_round": of, "path": path.format(of, name)} for source, of, name in rows]
    for name, lines in (("edits", made), ("set", taken)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curated_label_valid_counts_the_audited_edits_of_the_set(run_folder):
    assert measure(run_folder, Q_LOW)["curated_label_valid"] == {}
    write_curated(run_folder, 1, {"a": True, "b": False, "c": False}, [("edit", 1, "a"), ("edit", 1, "b"), ("roundtrip", 1, "c")])
    # a of round 1 is replayed; its namesake of this round is another picture. c is a photograph's.
    write_curated(run_folder, 2, {"a": False, "b": True, "c": None}, [("edit", 1, "a"), ("edit", 2, "b"), ("edit", 2, "c")])
    write_curated(run_folder, 3, {"a": None}, [("edit", 3, "a")])
    found = measure(run_folder, Q_LOW)
    assert found["curated_label_valid"] == {"round_1": 1 / 2, "round_2": 1.0}
    detail = found["details"]["curated_label_valid"]["round_2"]
    assert (detail["value"], detail["n"], detail["high"]) == (1.0, 2, 1.0)


def test_counts_intervals_and_kinds_stand_beside_the_figures(run_folder):
    found = measure(run_folder, Q_LOW)
    detail = found["details"]["attack_success"]["attacker_0"]["defender_0"]
    assert (detail["value"], detail["n"]) == (1 / 3, 3)
    assert (detail["low"], detail["high"]) == pytest.approx((0.061492, 0.792340), abs=1e-6)
    assert set(found["by_kind"]) == {"relation", "counting"}
    relation = found["by_kind"]["relation"]["attack_success"]["attacker_1"]
    assert [(relation[f"defender_{j}"]["value"], relation[f"defender_{j}"]["n"]) for j in (0, 1)] == [(1.0, 2), (0.5, 2)]


def test_integrity_and_the_codec_floor(run_folder):
    found = measure(run_folder, Q_LOW)["integrity"]
    assert found["roundtrip"] == {"median": 0.95, "p5": 0.95, "n": 6}
    assert found["attacker_0"]["median"] == pytest.approx(0.75)
    # Sorted .5 .6 .7 .8 .9 .9: a quarter of the way from the first to the second.
    assert found["attacker_0"]["p5"] == pytest.approx(0.525)


def test_forgetting_is_signed(run_folder):
    lost = matrix.forgetting(read_tables(run_folder))
    assert lost["clean"] == pytest.approx(1 / 6)
    assert lost["attacker_1"] == pytest.approx(-3 / 5)


def test_differences_are_paired(run_folder):
    tables = read_tables(run_folder)
    defenders = matrix.defender_differences(tables)
    assert {on: (round(found.value * found.n), found.n) for on, found in defenders.items()} == {
        "clean": (-1, 6),
        "roundtrip": (1, 6),
        "attacker_0": (1, 5),
        "attacker_1": (3, 5),
    }
    # Attackable by both Attackers, Defender 0 right on the round trip: a b. Neither fell to attacker_0, both to attacker_1.
    attackers = matrix.attacker_difference(tables, Q_LOW)
    assert (attackers.value, attackers.n) == (1.0, 2)


def test_an_unfinished_run_measures_what_there_is(tmp_path):
    assert measure(tmp_path, Q_LOW)["clean_accuracy"] == {}
    write_table(predictions_path(tmp_path, 0, "clean"), [Prediction("a", "clean", "t", "A", True, "A")])
    found = measure(tmp_path, Q_LOW)
    assert found["clean_accuracy"] == {"defender_0": 1.0}
    assert (found["attack_success"], found["difference_of_defenders"], found["difference_of_attackers"], found["by_kind"]) == (
        {},
        {},
        None,
        {},
    )
    write_table(edits_path(tmp_path, "attacker_0"), [Edit("a", 0.1)])
    write_table(predictions_path(tmp_path, 0, "attacker_0"), [Prediction("a", "attacker_0", "t", "A", True, "A")])
    assert measure(tmp_path, Q_LOW)["attack_success"] == {"attacker_0": {"defender_0": None}}


def test_attackers_come_in_the_order_of_the_rounds(tmp_path):
    for i in (10, 2, 0):
        write_table(edits_path(tmp_path, f"attacker_{i}"), [Edit("a", 1.0)])
    assert read_tables(tmp_path).attackers == ["attacker_0", "attacker_2", "attacker_10"]


def test_summary_holds_the_figures_steps_and_seconds(run_folder):
    rows = [{"phase": "attack", "round": round, "step": step, "seconds": 2.0} for round in (1, 2) for step in (1, 2, 3)]
    rows.append({"phase": "defend", "round": 1, "step": 5, "seconds": 1.0})
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(run=RunConfig(name="demo", seed=7))
    summary = summarise(run_folder, config)
    assert json.loads((run_folder / "summary.json").read_text()) == summary
    [entry] = summary["seeds"]
    assert (summary["name"], entry["seed"], entry["arm"]) == ("demo", 7, "coevolution")
    assert entry["clean_accuracy"]["defender_0"] == 5 / 6
    assert entry["attack_success"]["attacker_1"]["defender_0"] == 1.0
    assert entry["steps"] == {"attack": 6, "defend": 5}
    assert entry["seconds"] == {"attack": 12.0, "defend": 1.0}
    assert summarise(run_folder, config, {"attack/rollout": 3.5})["seeds"][0]["seconds"] == {"attack/rollout": 3.5}
    assert summary["versions"]["python"].startswith("3.")
    assert summary["config_hash"] == config_hash(config)


def test_tables_are_read_back_and_a_second_row_of_a_question_is_an_error(tmp_path):
    rows = [Prediction("ä/1", "clean", "x\u2028y", "A", True, "A", "kind"), Prediction("b", "clean", "", "", False, "B")]
    write_table(tmp_path / "p.jsonl", rows)
    assert list(read_predictions(tmp_path / "p.jsonl").values()) == rows
    edit = Edit("a", 0.5, (0.5, 0.7), "images/a.png", None)
    write_table(tmp_path / "e.jsonl", [edit])
    assert read_edits(tmp_path / "e.jsonl") == {"a": edit}
    write_table(tmp_path / "e.jsonl", [edit, edit])
    with pytest.raises(ValueError, match=r"e.jsonl:2: question_id: 'a' has a row already"):
        read_edits(tmp_path / "e.jsonl")


HOSTILE = ["../../etc/passwd", "a/b", "a_b", "", ".", "..", ".hidden", "x" * 300, "ä", "a b", "a\0b", "a\nb"]


def test_file_names_of_any_id_are_safe_and_distinct(tmp_path):
    names = [safe_name(id) for id in HOSTILE]
    assert len(set(names)) == len(HOSTILE)
    for name in names:
        (tmp_path / f"{name}.png").write_bytes(b"")
    assert len(list(tmp_path.iterdir())) == len(HOSTILE)
    assert safe_name("heldout-0000012") == "heldout-0000012"
    assert image_path("run", "clean", "a").as_posix() == "run/evaluation/images/clean/a.png"
