"""Promises of a study's page: verdicts that say what was reached, costs, spread over seeds, and usefulness at any stage."""

import json
import re
import shutil
from pathlib import Path

import pytest

from aot_fast.evaluation.tables import Prediction, predictions_path, write_table
from aot_fast.metrics import write_json
from aot_fast.report import build_study_report
from aot_fast.report.averages import keys_of, mean_types, over_seeds
from aot_fast.report.plots import Scale, scale_of
from aot_fast.report.study_files import read_study
from aot_fast.report.study_gallery import galleries
from aot_fast.report.verdicts import tally, verdict
from tests.report.synthetic_study import write_study

ARMS, SEEDS, NUM_QUESTIONS = ("coevolution", "clean"), (0, 1), 14
MAX_BYTES = 3_000_000


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("studies") / "small", ARMS, SEEDS, NUM_QUESTIONS, rounds=1)
    (folder / "clean_seed0" / "report.html").write_text("a run's page")
    return folder


@pytest.fixture(scope="module")
def page(study_folder):
    path = build_study_report(study_folder)
    assert path == study_folder / "report.html"
    return path.read_text(encoding="utf-8")


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def rebuilt(folder: Path, summary: dict) -> str:
    write_json(folder / "summary.json", summary)
    return build_study_report(folder).read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_outside(page):
    assert not re.search(r"<script|<link|<iframe|@import|url\(|https?:", page)
    assert "default-src 'none'" in page
    assert all(source.startswith("data:image/") for source in re.findall(r'(?:src|srcset)="([^"]*)"', page))
    assert set(re.findall(r'href="([^"#]+)"', page)) == {"clean_seed0/report.html"}


def test_the_page_begins_with_the_verdicts_and_their_price(page):
    order = ["What was found", "goals reached", "The price, mean over seeds", "What it cost", "Accuracy under attack, by arm"]
    order += ["Attackers against Defenders", "How do the Attackers attack?", "Hardest edits", "Failures", "Each run", "Where the time went"]
    assert [page.index(text) for text in order] == sorted(page.index(text) for text in order)
    assert page.count('class="card verdict') == 5
    assert page.count("seed 0</span>") == page.count("all questions</span>") == 5
    assert "q_low: 0.6" in page and "torch 2.11" in page and "6400" in page


def test_forty_cards_stay_within_three_megabytes(page):
    cards = page.count('<article class="card edit">')
    assert 0 < cards and len(page) / cards * 40 < MAX_BYTES


def claim(value, low, high, goal, reached, what="accuracy", n=100, seeds=((0, 0.1), (1, 0.2))):
    """A comparison; `seeds`: (seed, difference)."""

    def figures(v, lo, hi):
        return {"new": 0.5 + v, "old": 0.5, "difference": {"value": v, "low": lo, "high": hi, "n": n}}

    per_seed = [{"seed": seed, **figures(v, v - 0.1, v + 0.1)} for seed, v in seeds]
    over = {"mean": value, "low": low - 0.1, "high": high + 0.1, "n": len(per_seed)}
    pooled = {**figures(value, low, high), "over_seeds": over}
    words = {"key": "k", "title": "A claim", "what": what, "new": "new one", "old": "old one", "goal": goal, "reached": reached}
    return {**words, "per_seed": per_seed, "pooled": pooled}


@pytest.mark.parametrize(
    "comparison, label, mood, words",
    [
        (claim(0.2, 0.12, 0.3, 0.1, True), "reached", "good", "at least +10 points. The new figure is higher, beyond chance"),
        (claim(0.12, 0.02, 0.2, 0.1, True), "reached", "good", "the interval reaches below it, so that this may be chance"),
        (claim(0.05, 0.01, 0.09, 0.1, False), "not reached", "bad", "at least +10 points. The new figure is higher, beyond chance"),
        (claim(0.05, -0.02, 0.12, 0.1, False), "not reached", "bad", "the interval still includes the goal"),
        (claim(0.12, -0.02, 0.2, 0.1, False), "not reached", "bad", "with an interval clear of zero"),
        (claim(-0.3, -0.4, -0.2, 0.1, False), "not reached", "bad", "The new figure is lower, beyond chance"),
        (claim(0.0, -0.1, 0.1, 0.1, None), "unclear", "unclear", "no clear change"),
        (claim(0.3, 0.2, 0.4, None, None), "no goal set", "unclear", "It rises in all 2 seeds"),
        (claim(0.3, 0.2, 0.4, 0.1, True, n=5), "reached", "good", "nothing should be concluded"),
    ],
)
def test_a_verdict_says_what_was_reached_and_how_sure_it_is(comparison, label, mood, words):
    found = verdict(comparison)
    assert (found.label, found.mood) == (label, mood)
    assert words in " ".join(found.sentences)


def test_seeds_that_disagree_are_said():
    found = verdict(claim(0.05, 0.01, 0.09, None, None, seeds=((0, 0.2), (1, -0.1), (2, 0.0))))
    assert "It rises in 1 and falls in 1 of 3 seeds; mean over seeds +5.0 points" in found.sentences[-1]
    assert "that interval includes zero, so other seeds may differ" in found.sentences[-1]
    assert (
        verdict(claim(0.1, 0.0, 0.2, None, None, seeds=((0, 0.2),))).sentences[-1] == "One seed only: nothing is known about other seeds."
    )


def test_similarity_is_not_shown_as_a_percentage():
    found = verdict(claim(-0.012, -0.02, -0.005, 0.0, False, what="q"))
    assert (found.old, found.new, found.difference) == ("0.500", "0.488", "−0.012")


def test_a_missed_goal_is_stated_on_the_page(study_folder, tmp_path):
    missed = claim(0.02, -0.05, 0.09, 0.1, False)
    page = rebuilt(tmp_path, {"name": "s", "comparisons": [missed, claim(0.2, 0.12, 0.3, 0.1, True)]})
    assert "1 of 2 goals reached; 1 not reached." in page
    assert page.count('<span class="badge bad">not reached</span>') == 2
    assert tally([verdict(missed)]) == "0 of 1 goals reached; 1 not reached."


def test_the_forest_holds_zero_the_goal_and_every_interval():
    plot = verdict(claim(0.2, 0.12, 0.3, 0.6, False)).plot
    assert [row.kind for row in plot.rows] == ["seed", "seed", "pooled", "seeds"]
    assert 0 < plot.zero < plot.rows[0].at < plot.rows[1].at < plot.goal < 100
    assert all(row.low < row.at < row.high for row in plot.rows)
    assert plot.goal_text == "goal +60" and ("0" in [text for _, text in plot.ticks])


def test_an_interval_over_few_seeds_does_not_flatten_the_rest():
    wide = claim(0.2, 0.12, 0.3, None, None)
    wide["pooled"]["over_seeds"] |= {"low": -9.0, "high": 9.0}
    plot = verdict(wide).plot
    assert (plot.rows[-1].low, plot.rows[-1].high) == (0, 100)
    assert plot.rows[2].high - plot.rows[2].low > 20


@pytest.mark.parametrize("low, high", [(-0.05, 0.42), (0.0, 1e-6), (-3.0, 70.0), (0.0, 0.0)])
def test_an_axis_has_round_ticks(low, high):
    scale = scale_of([low, high])
    ticks = scale.ticks()
    assert 3 <= len(ticks) <= 7 and all(scale.low <= tick <= scale.high for tick in ticks)
    assert Scale(0.0, 1.0).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_means_are_over_the_seeds_that_have_the_figure():
    by_seed = {"0": {"a": {"x": 0.2}}, "1": {"a": {"x": {"value": 0.4, "n": 9}}}, "2": {"a": {"x": None}}, "3": {}}
    found = over_seeds(by_seed, "a", "x")
    assert (found.mean, found.low, found.high, len(found.values)) == (pytest.approx(0.3), 0.2, 0.4, 2)
    assert over_seeds(by_seed, "a", "y") is None
    assert keys_of({"0": {"a": {"attacker_10": 1, "attacker_2": 1}}}, "a") == ["attacker_2", "attacker_10"]


def test_a_type_of_attack_that_a_seed_never_shows_counts_as_none_of_its_edits():
    by_seed = {
        "0": {"attack_types": {"attacker_0": {"added": {"share": 1.0}}}},
        "1": {"attack_types": {"attacker_0": {"added": {"share": 0.5}, "removed": {"share": 0.5}}}},
        "2": {},
    }
    assert [(row.name, row.share) for row in mean_types(by_seed)["attacker_0"]] == [("added", 0.75), ("removed", 0.25)]


def test_controls_answer_on_the_cards_only_where_they_saw_the_same_picture(study_folder, tmp_path):
    folder = shutil.copytree(study_folder, tmp_path / "study")

    def seen(arm_says: str) -> set[str]:
        groups = galleries(read_study(folder))[1][0].groups
        return {card.id for group in groups for card in group.cards for one in card.witnesses if one.role == arm_says}

    shown = seen("of the clean control")
    assert shown
    id = sorted(shown)[0]
    other = folder / "clean_seed0" / "evaluation" / "images" / "attacker_1" / f"{id}.png"
    shutil.copyfile(other.parents[1] / "clean" / f"{id}.png", other)
    assert seen("of the clean control") == shown - {id}


def test_an_empty_folder_says_that_nothing_is_measured(tmp_path):
    page = build_study_report(tmp_path).read_text()
    assert "nothing is measured yet" in page and "Nothing can be compared yet" in page
    with pytest.raises(NotADirectoryError, match="nowhere: there is no such study folder"):
        build_study_report(tmp_path / "nowhere")


def test_an_unfinished_study_shows_what_there_is(study_folder, tmp_path):
    summary = summary_of(study_folder)
    summary["runs"]["clean"]["1"] = {"folder": "clean_seed1", "finished": False}
    del summary["runs"]["coevolution"]["1"], summary["figures"]["clean"], summary["figures"]["coevolution"]["1"]
    summary["comparisons"] = [{"key": "a", "goal": 0.1, "reached": None, "per_seed": [], "pooled": {}}, {"key": "b"}]
    summary["warnings"] = ["warning: the arms did not do the same work"]
    page = rebuilt(tmp_path, summary)
    assert "clean: seed 1 of 2 not finished" in page and "coevolution: seed 1 of 2 not finished" in page
    assert "2 of 4 runs finished" in page and "not measured" in page and "no goal set" in page
    assert "not begun" in page and "the arms did not do the same work" in page and "warning:" not in page


@pytest.mark.parametrize("folder", ["coevolution_seed0", "runs/small/coevolution_seed0", "/absolute"])
def test_run_folders_are_found_however_they_are_given(study_folder, tmp_path, folder):
    there = study_folder / "coevolution_seed0"
    write_json(tmp_path / "summary.json", {"runs": {"coevolution": {"0": {"folder": str(there) if folder == "/absolute" else folder}}}})
    (tmp_path / "coevolution_seed0").symlink_to(there)
    assert read_study(tmp_path).run_folder("coevolution", "0").resolve() == there.resolve()
    assert read_study(tmp_path).run_folder("clean", "0") is None


def test_texts_of_data_and_models_cannot_become_markup(tmp_path):
    evil = '"><script>alert("x")</script>'
    run = tmp_path / "javascript:alert(1)"
    write_table(predictions_path(run, 0, "clean"), [Prediction(evil, "clean", evil, evil, False, evil, evil)])
    (run / "report.html").write_text("")
    summary = {"name": evil, "arms": [evil], "seeds": [evil], "versions": {evil: evil}, "config_hash": evil, "warnings": [evil]}
    summary["runs"] = {evil: {evil: {"folder": run.name, "finished": True, "seconds_by_phase": {evil: 1.0}}}}
    summary["comparisons"] = [{"title": evil, "new": evil, "old": evil, "per_seed": [{"seed": evil}]}]
    found = {"clean_accuracy": {evil: 0.5}, "attack_success": {evil: {evil: 0.5}}, "accuracy_under_attack": {evil: {evil: 0.5}}}
    found |= {"integrity": {evil: {"median": 0.9}}, "attack_types": {evil: {evil: 0.5}}, "curated_label_valid": {evil: 0.9}}
    summary["figures"] = {evil: {evil: found}, "coevolution": {evil: found}}
    page = rebuilt(tmp_path, summary)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 10
    assert 'href="javascript:' not in page and "javascript%3Aalert%281%29/report.html" in page
