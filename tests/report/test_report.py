"""Promises of the report: self-contained, true in its words, failures included, and useful of a run at any stage."""

import base64
import io
import json
import os
import re
from pathlib import Path

import pytest
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from aot_fast.evaluation.summary import measure
from aot_fast.evaluation.tables import Edit, Prediction, edits_path, image_path, predictions_path, write_table
from aot_fast.report import build_report, run_files
from aot_fast.report.attacks import attack_types
from aot_fast.report.cards import edit_card
from aot_fast.report.curves import HEALTH, LEARNING, player_series, smooth
from aot_fast.report.gallery import curated_cards, failures, gallery, hardest, read_attack
from aot_fast.report.headline import FEW, clock, direction, headlines, phase_seconds, tally
from aot_fast.report.page import HERE
from aot_fast.report.run_files import read_run
from tests.report.synthetic_run import write_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "synthetic", num_questions=40)


def mixed(folder: Path, on: str):
    """Cards of a gallery that shows nothing but the mix, and the Attacker's counts."""
    found = gallery(read_run(folder), on, (0, 0, 12))
    return found.groups[-1].cards, found.attack.counts


@pytest.fixture(scope="module")
def page(run_folder):
    path = build_report(run_folder)
    assert path == run_folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_outside(page):
    assert not re.search(r"<script|<link|<iframe|@import|url\(", page)
    assert all(source.startswith("data:image/") for source in re.findall(r'(?:src|srcset|href)="([^"]*)"', page))
    assert "default-src 'none'" in page


def test_every_picture_in_the_page_decodes(page):
    contents = re.findall(r'"data:image/(?:png|jpeg);base64,([^"]*)"', page)
    assert len(contents) > 4 + 3 * 6
    for content in contents:
        Image.open(io.BytesIO(base64.b64decode(content))).load()


def test_the_page_shows_matrix_curves_galleries_time_and_settings(page, run_folder):
    summary = json.loads((run_folder / "summary.json").read_text())
    for row in summary["seeds"][0]["attack_success"].values():
        for value in row.values():
            assert f"{100 * value:.1f} %" in page
    for text in (
        "attacker_2",
        "defender_2",
        "Curves of the Attacker",
        "Curves of the Defender",
        "Round 2",
        "1 min 40 s",
        "q_low: 0.6",
        "torch ",
    ):
        assert text in page
    run = read_run(run_folder)
    shown = [gallery(run, f"attacker_{i}", counts) for i, counts in ((2, (3, 3, 6)), (1, (2, 2, 3)), (0, (2, 2, 3)))]
    num_cards = sum(len(group.cards) for found in shown for group in found.groups)
    assert page.count('<article class="card edit">') == num_cards + sum(len(curated_cards(run, round)) for round in (1, 2)) >= 20
    assert "<rect x=" in page
    assert "finished" in page and "Not in this run folder yet" not in page
    assert page.count("edits in the training set") == 2 and "How do the Attackers attack?" in page


def test_light_and_dark_screens_have_their_own_curves(page):
    assert "prefers-color-scheme: dark" in page
    dark, light = re.search(r'srcset="(data:[^"]*)" media="\(prefers-color-scheme: dark\)"><img src="(data:[^"]*)"', page).groups()
    assert dark != light


def test_an_empty_run_says_what_is_missing(tmp_path):
    page = build_report(tmp_path).read_text()
    for text in ("Nothing can be compared yet", "no optimizer step is logged yet", "nothing is evaluated yet", "settings are unknown"):
        assert text in page


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere: there is no such run folder"):
        build_report(tmp_path / "nowhere")


def test_an_unfinished_run_shows_what_there_is(tmp_path):
    write_table(predictions_path(tmp_path, 0, "clean"), [Prediction("a", "clean", "t", "A", True, "A")])
    row = {"index": 0, "phase": "attack", "round": 1, "step": 1, "seconds": 2.0, "reward": "NaN", "loss": 0.5, "applied": 0.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + '\n{"index": 1, "pha')
    (tmp_path / "exit.json").write_text('{"code": 143, "reason": "a signal asked to stop"}')
    (tmp_path / "bad_samples.jsonl").write_text('{"id": "x", "image": "x.png", "reason": "the file is empty"}\n')
    page = build_report(tmp_path).read_text()
    assert "not finished; the last logged step is attack 1 of round 1; it ended with: a signal asked to stop" in page
    assert "100.0 %" in page
    assert "only one Defender is evaluated" in page
    assert "1 optimizer steps were skipped as not finite: attack 1 of round 1" in page
    assert "quarantined: x (x.png): the file is empty" in page


def test_how_an_earlier_launch_ended_is_forgotten_once_the_run_goes_on(tmp_path):
    (tmp_path / "exit.json").write_text('{"code": 143, "reason": "a signal asked to stop"}')
    os.utime(tmp_path / "exit.json", (1, 1))
    assert "a signal asked to stop" in build_report(tmp_path).read_text()
    (tmp_path / "metrics.jsonl").touch()
    assert "a signal asked to stop" not in build_report(tmp_path).read_text()


def test_the_report_of_the_last_evaluation_does_not_call_the_run_unfinished(tmp_path):
    (tmp_path / "config.yaml").write_text("game: {rounds: 1}")
    for defender, status in ((0, "not finished"), (1, "all rounds are played")):
        write_table(predictions_path(tmp_path, defender, "clean"), [Prediction("a", "clean", "t", "A", True, "A")])
        assert status in build_report(tmp_path).read_text()
    (tmp_path / "FINISHED").touch()
    assert "· finished" in build_report(tmp_path).read_text()


def test_texts_of_data_and_models_cannot_become_markup(tmp_path):
    evil = '<script>alert("x")</script>'
    (tmp_path / "data").mkdir()
    record = {"id": evil, "image": "a.png", "question": evil, "options": [evil, "b"], "answer": "A", "target_boxes": [[0, 0, 5, 5]]}
    (tmp_path / "data" / "heldout.jsonl").write_text('{"images": "nowhere"}\n' + json.dumps(record) + "\n")
    write_table(edits_path(tmp_path, "attacker_0"), [Edit(evil, 0.9)])
    for on in ("clean", "roundtrip", "attacker_0"):
        write_table(predictions_path(tmp_path, 0, on), [Prediction(evil, on, evil, evil, False, evil, evil)])
    page = build_report(tmp_path).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4


def difference(value, low, high, n=100):
    return {"value": value, "low": low, "high": high, "n": n}


@pytest.mark.parametrize(
    "found, went",
    [
        (difference(0.2, 0.1, 0.3), "up"),
        (difference(-0.2, -0.3, -0.1), "down"),
        (difference(0.2, -0.01, 0.4), "unclear"),
        (difference(0.2, 0.0, 0.4), "unclear"),
        (difference(0.0, 0.0, 0.0), "unclear"),
        (difference(1.0, 1.0, 1.0, n=FEW - 1), "few"),
    ],
)
def test_a_direction_is_claimed_only_beyond_noise(found, went):
    assert direction(found) == went


@pytest.mark.parametrize(
    "found, words, mood",
    [
        (difference(0.2, 0.1, 0.3), "withstands this Attacker better", "good"),
        (difference(-0.2, -0.3, -0.1), "withstands this Attacker worse", "bad"),
        (difference(0.1, -0.1, 0.3), "no clear change", "unclear"),
        (difference(0.9, 0.8, 1.0, n=5), "nothing should be concluded", "unclear"),
    ],
)
def test_the_headline_stays_true_whichever_way_it_went(run_folder, found, words, mood):
    run = read_run(run_folder)
    run.figures["difference_of_defenders"]["attacker_2"] = found
    headline = headlines(run)[0]
    assert headline.title == "Accuracy on the edits of attacker_2"
    assert words in headline.text and headline.mood == mood
    assert f"n = {found['n']}" in headline.change


def test_a_fall_of_clean_accuracy_is_called_the_price(run_folder):
    run = read_run(run_folder)
    run.figures["difference_of_defenders"]["clean"] = difference(-0.1, -0.15, -0.05)
    assert any("Clean accuracy fell" in headline.text and headline.mood == "bad" for headline in headlines(run))


def test_every_outcome_and_every_failure_is_shown(run_folder):
    run = read_run(run_folder)
    cards, counts = mixed(run_folder, "attacker_2")
    assert sum(counts.values()) == 40 and len(cards) == 12
    assert {card.outcome for card in cards} == {name for name, count in counts.items() if count}
    failed = next(group for group in gallery(run, "attacker_2", (0, 9, 0)).groups if group.title == "Failures")
    labels = " ".join(label for card in failed.cards for label in card.labels)
    assert all(words in labels for words in ("damaged a target", "changed the truth", "not learned: defender_2"))
    assert {card.outcome for card in curated_cards(run, 1)} == {"accepted", "rejected"}


def write_outcomes(folder: Path, edits: list[Edit], wrong: dict[tuple[int, str], set[str]], attacker: int = 1) -> None:
    """Tables in which Defender j answers everything rightly but what `wrong` has under (j, kind of picture)."""
    on = f"attacker_{attacker}"
    write_table(edits_path(folder, on), edits)
    for defender, shown in {(j, shown) for j, _ in wrong for shown in ("roundtrip", on)}:
        failed = wrong.get((defender, shown), set())
        rows = [Prediction(edit.question_id, shown, "t", "A", edit.question_id not in failed, "A") for edit in edits]
        write_table(predictions_path(folder, defender, shown), rows)


def test_outcomes_of_edits(tmp_path):
    ids = ["fooled", "resisted", "rejected", "untrue", "void"]
    edits = [Edit(id, 0.3 if id == "rejected" else 0.9, audit=False if id == "untrue" else None) for id in ids]
    write_outcomes(tmp_path, edits, {(0, "roundtrip"): {"void"}, (0, "attacker_1"): {"fooled", "void"}})
    cards, counts = mixed(tmp_path, "attacker_1")
    assert {card.id: card.outcome for card in cards} == {**{id: id for id in ids}, "untrue": "rejected"}
    assert counts == {"fooled": 1, "resisted": 1, "rejected": 2, "void": 1}


def test_hardest_edits_fool_the_last_defender_and_the_most_of_them_then_by_q(tmp_path):
    qs = {"all-low": 0.7, "all-high": 0.9, "two": 0.99, "last": 0.95, "not-last": 0.97, "damaged": 0.5, "untrue": 0.9, "none": 0.9}
    everyone = {"all-low", "all-high", "damaged", "untrue"}
    wrong = {(0, "attacker_1"): everyone | {"two", "not-last"}, (1, "attacker_1"): everyone | {"not-last"}}
    wrong[2, "attacker_1"] = everyone | {"two", "last"}
    write_outcomes(tmp_path, [Edit(id, q, audit=id != "untrue") for id, q in qs.items()], wrong)
    assert hardest(read_attack(read_run(tmp_path), "attacker_1")) == ["all-high", "all-low", "two", "last"]
    hard = gallery(read_run(tmp_path), "attacker_1", (3, 0, 0)).groups[0]
    assert [(card.id, *card.labels) for card in hard.cards] == [
        ("all-high", "fools 3 of 3 Defenders, the last one included"),
        ("all-low", "fools 3 of 3 Defenders, the last one included"),
        ("two", "fools 2 of 3 Defenders, the last one included"),
    ]


def test_a_defender_that_fails_without_the_attack_is_not_fooled(tmp_path):
    write_outcomes(tmp_path, [Edit("a", 0.9)], {(0, "roundtrip"): {"a"}, (0, "attacker_1"): {"a"}})
    found = gallery(read_run(tmp_path), "attacker_1", (3, 3, 3))
    assert found.groups[0].cards == []
    assert "No fair edit of attacker_1 fools defender_0" in found.groups[0].note


def test_failures_are_told_apart_and_not_shown_twice(tmp_path):
    edits = [Edit("damaged", 0.2), Edit("untrue", 0.9, audit=False), Edit("unlearned", 0.9), Edit("learned", 0.9)]
    write_outcomes(tmp_path, edits, {(0, "attacker_1"): {"unlearned", "learned"}, (1, "attacker_1"): {"unlearned"}})
    run = read_run(tmp_path)
    assert failures(read_attack(run, "attacker_1"), run.q_low) == {name: [name] for name in ("damaged", "untrue", "unlearned")}
    groups = gallery(run, "attacker_1", (5, 5, 5)).groups
    assert [[card.id for card in group.cards] for group in groups] == [["unlearned"], ["damaged", "untrue"], ["learned"]]


def test_the_first_attacker_has_no_defender_that_trained_on_its_edits(tmp_path):
    write_outcomes(tmp_path, [Edit("a", 0.9)], {(0, "attacker_0"): {"a"}, (1, "attacker_0"): {"a"}}, attacker=0)
    run = read_run(tmp_path)
    assert failures(read_attack(run, "attacker_0"), run.q_low)["unlearned"] == []
    (card,) = gallery(run, "attacker_0", (1, 0, 0)).groups[0].cards
    assert [one.role for one in card.witnesses] == ["old: the first Defender", "last Defender of this run"]


def test_the_round_trip_is_told_only_where_the_codec_costs_an_answer(tmp_path):
    write_outcomes(tmp_path, [Edit("a", 0.9), Edit("b", 0.9)], {(0, "roundtrip"): {"b"}, (0, "attacker_1"): {"a"}})
    assert {card.id: card.shown for card in mixed(tmp_path, "attacker_1")[0]} == {"a": ["edit"], "b": ["round trip", "edit"]}


@pytest.mark.parametrize("audit, words", [(True, ">unchanged</b>"), (False, ">changed</b>"), (None, "not audited")])
def test_a_card_tells_the_type_of_attack_and_the_audit(tmp_path, audit, words):
    card = edit_card(read_run(tmp_path), "attacker_0", Edit("a", 0.9, audit=audit, attack="removed"), {}, "fooled", ())
    macros = Environment(loader=FileSystemLoader(HERE), autoescape=True).get_template("cards.html").module
    shown = str(macros.edit(card))
    assert "type-removed" in shown and words in shown


def test_a_control_is_not_said_to_have_trained_against_the_attacker(tmp_path):
    (tmp_path / "config.yaml").write_text("game: {arm: clean}")
    write_outcomes(tmp_path, [Edit("a", 0.9)], {(0, "attacker_1"): {"a"}, (2, "attacker_1"): {"a"}})
    groups = gallery(read_run(tmp_path), "attacker_1", (1, 0, 0)).groups
    roles = {(one.name, one.role) for one in groups[0].cards[0].witnesses}
    assert roles == {("defender_0", "old: the first Defender"), ("defender_2", "last Defender of this run")}


def test_old_and_new_defender_answer_on_every_card(run_folder):
    for card in gallery(read_run(run_folder), "attacker_1", (3, 3, 3)).groups[-1].cards:
        assert [one.name for one in card.witnesses] == ["defender_0", "defender_1", "defender_2"]
        assert [one.role.split(":")[0] for one in card.witnesses] == ["old", "new", "last Defender of this run"]


def test_a_long_answer_is_cut_and_a_plain_one_not_repeated(tmp_path):
    write_table(edits_path(tmp_path, "attacker_0"), [Edit("a", 0.9), Edit("b", 0.9)])
    for on in ("roundtrip", "attacker_0"):
        rows = [Prediction("a", on, "x" * 5000, "A", True, "A"), Prediction("b", on, "\\boxed{A}", "A", True, "A")]
        write_table(predictions_path(tmp_path, 0, on), rows)
    long, plain = mixed(tmp_path, "attacker_0")[0]
    assert [len(text) for _, text in long.raws] == [604] and plain.raws == []


TYPED = {
    "attacker_0": {
        "hybrid": {"share": 0.25, "attack_success": {"defender_0": 0.5}},
        "added": {"share": {"value": 0.75, "n": 4, "low": 0.3, "high": 0.9}, "attack_success": {"defender_0": None}},
        "removed": {"share": 0.0},
    }
}


def test_types_of_attack_are_shown_where_the_run_tells_them(tmp_path, monkeypatch):
    assert attack_types({}) == {}
    write_table(predictions_path(tmp_path, 0, "clean"), [Prediction("a", "clean", "t", "A", True, "A")])
    assert "How do the Attackers attack?" not in build_report(tmp_path).read_text()
    monkeypatch.setattr(run_files, "measure", lambda *a: {**measure(*a), "attack_types": TYPED})
    assert 'class="type-added" style="width: 75.00%"' in build_report(tmp_path).read_text()
    rows = attack_types({"attack_types": TYPED})["attacker_0"]
    assert [(row.name, row.share, dict(row.success)) for row in rows] == [
        ("added", 0.75, {"defender_0": None}),
        ("hybrid", 0.25, {"defender_0": 0.5}),
    ]


def test_a_run_that_improved_nothing_says_so(run_folder):
    run = read_run(run_folder)
    for on in run.figures["difference_of_defenders"]:
        run.figures["difference_of_defenders"][on] = difference(0.01, -0.02, 0.04)
    run.figures["difference_of_attackers"] = difference(-0.2, -0.3, -0.1)
    assert tally(headlines(run)) == "Nothing improved beyond chance in this run: 1 of 4 comparisons went down, 3 are unclear."


def halves(size: tuple[int, int]) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    return image


def write_photo_run(folder: Path) -> None:
    """Two questions on an original of 400 x 200; the picture of the first is kept at half and edited at three quarters of that size."""
    questions = [{"id": id, "image": f"{id}.png", "question": "?", "answer": "x", "target_boxes": [[300, 50, 20, 10]]} for id in "ab"]
    lines = [json.dumps(line) for line in ({"images": str(folder)}, *questions)]
    (folder / "data").mkdir()
    (folder / "data" / "heldout.jsonl").write_text("\n".join(lines) + "\n")
    write_table(edits_path(folder, "attacker_0"), [Edit("a", 0.9), Edit("b", 0.9)])
    pictures = {
        folder / "a.png": (400, 200),
        image_path(folder, "clean", "a"): (200, 100),
        image_path(folder, "attacker_0", "a"): (300, 150),
    }
    for path, size in pictures.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        halves(size).save(path)


def test_boxes_belong_to_the_original_whatever_the_size_of_the_pictures_shown(tmp_path):
    write_photo_run(tmp_path)
    (card, _), _ = mixed(tmp_path, "attacker_0")
    assert all(picture.uri.startswith("data:image/jpeg") for picture in card.pictures)
    assert {(picture.width, picture.height, picture.boxes) for picture in card.pictures} == {(400, 200, ((300, 50, 20, 10),))}
    (tmp_path / "a.png").unlink()
    (card, _), _ = mixed(tmp_path, "attacker_0")
    assert all(picture.uri and not picture.boxes for picture in card.pictures)


def test_an_edit_of_another_size_is_compared_with_the_picture_brought_to_it(tmp_path):
    write_photo_run(tmp_path)
    (card, _), _ = mixed(tmp_path, "attacker_0")
    difference = Image.open(io.BytesIO(base64.b64decode(card.pictures[2].uri.split(",")[1])))
    assert difference.size == (300, 150)
    assert difference.convert("L").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) < 5


def test_a_picture_that_was_not_kept_is_said(tmp_path):
    write_photo_run(tmp_path)
    (_, card), _ = mixed(tmp_path, "attacker_0")
    assert [picture.reason for picture in card.pictures] == ["not kept by this run", "not kept by this run", "needs both pictures"]


def test_rounds_of_a_player_are_put_end_to_end():
    rows = [
        {"phase": phase, "round": round, "step": step, "reward": step}
        for round in (1, 2)
        for phase in ("attack", "defend")
        for step in (1, 2)
    ]
    rows.insert(0, {"phase": "warmup", "round": 0, "step": 1, "reward": "NaN", "lr": 1e-3})
    series, starts = player_series(rows, ("warmup", "defend"), LEARNING | HEALTH)
    assert [(found.title, found.steps) for found in series] == [("reward", [1, 2, 3, 4, 5]), ("learning rate", [1])]
    assert starts == [(0, "warm-up"), (1, "round 1"), (3, "round 2")]


def test_smoothing_leaves_gaps_out():
    assert smooth([1.0, float("nan"), 3.0, 5.0], 2).tolist() == [1.0, 1.0, 3.0, 4.0]


def test_times_are_grouped_by_phase_the_longest_first():
    found = phase_seconds({"load": 1.0, "attack/rollout": 2.0, "attack/update": 3.0, "defend": 9.0, "defend/rollout": 4.0})
    assert list(found.items()) == [
        ("defend", (9.0, {"rollout": 4.0})),
        ("attack", (5.0, {"rollout": 2.0, "update": 3.0})),
        ("load", (1.0, {})),
    ]
    assert [clock(s) for s in (1.24, 42, 59.7, 61, 7500)] == ["1.2 s", "42 s", "1 min 00 s", "1 min 01 s", "2 h 05 min"]
