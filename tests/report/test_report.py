"""Promises of the report: self-contained, true in its words, failures included, and useful of a run at any stage."""

import base64
import io
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from aot_fast.evaluation.tables import Edit, Prediction, edits_path, image_path, predictions_path, write_table
from aot_fast.report import build_report
from aot_fast.report.curves import player_series, smooth
from aot_fast.report.gallery import attacker_cards, curated_cards
from aot_fast.report.headline import FEW, clock, direction, headlines, phase_seconds
from aot_fast.report.run_files import read_run
from tests.report.synthetic_run import write_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "synthetic", num_questions=40)


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
    assert page.count('<article class="card edit">') == 3 * 6 + 2 * 2
    assert "<rect x=" in page
    assert "finished" in page and "Not in this run folder yet" not in page


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


def test_galleries_show_failures_too(run_folder):
    cards, counts, opponent = attacker_cards(read_run(run_folder), "attacker_2")
    assert opponent == "defender_1"
    assert sum(counts.values()) == 40
    assert {card.outcome for card in cards} == {name for name, count in counts.items() if count}
    assert len(cards) == 6
    assert {card.outcome for card in curated_cards(read_run(run_folder), 1)} == {"accepted", "rejected"}


def test_outcomes_of_edits(tmp_path):
    ids = ["fooled", "resisted", "rejected", "void", "unseen"]
    write_table(edits_path(tmp_path, "attacker_1"), [Edit(id, 0.3 if id == "rejected" else 0.9) for id in ids])
    for on, wrong in {"roundtrip": {"void"}, "attacker_1": {"fooled", "void"}}.items():
        rows = [Prediction(id, on, "t", "A", id not in wrong, "A") for id in ids if (on, id) != ("attacker_1", "unseen")]
        write_table(predictions_path(tmp_path, 0, on), rows)
    cards, counts, _ = attacker_cards(read_run(tmp_path), "attacker_1")
    assert {card.id: card.outcome for card in cards} == {**{id: id for id in ids}, "unseen": "void"}
    assert counts == {"fooled": 1, "resisted": 1, "rejected": 1, "void": 2}


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
    (card, _), _, _ = attacker_cards(read_run(tmp_path), "attacker_0")
    assert all(picture.uri.startswith("data:image/jpeg") for picture in card.pictures)
    assert {(picture.width, picture.height, picture.boxes) for picture in card.pictures} == {(400, 200, ((300, 50, 20, 10),))}
    (tmp_path / "a.png").unlink()
    (card, _), _, _ = attacker_cards(read_run(tmp_path), "attacker_0")
    assert all(picture.uri and not picture.boxes for picture in card.pictures)


def test_an_edit_of_another_size_is_compared_with_the_picture_brought_to_it(tmp_path):
    write_photo_run(tmp_path)
    (card, _), _, _ = attacker_cards(read_run(tmp_path), "attacker_0")
    difference = Image.open(io.BytesIO(base64.b64decode(card.pictures[2].uri.split(",")[1])))
    assert difference.size == (300, 150)
    assert difference.convert("L").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) < 5


def test_a_picture_that_was_not_kept_is_said(tmp_path):
    write_photo_run(tmp_path)
    (_, card), _, _ = attacker_cards(read_run(tmp_path), "attacker_0")
    assert [picture.reason for picture in card.pictures] == ["not kept by this run", "not kept by this run", "needs both pictures"]


def test_rounds_of_a_player_are_put_end_to_end():
    rows = [
        {"phase": phase, "round": round, "step": step, "reward": step}
        for round in (1, 2)
        for phase in ("attack", "defend")
        for step in (1, 2)
    ]
    rows.insert(0, {"phase": "warmup", "round": 0, "step": 1, "reward": "NaN", "lr": 1e-3})
    series, starts = player_series(rows, ("warmup", "defend"))
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
