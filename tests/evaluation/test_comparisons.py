"""The comparisons of a study against an example worked out by hand, and their intervals against a truth that is known."""

import numpy as np
import pytest

from aot_fast.evaluation import statistics
from aot_fast.evaluation.comparisons import GAME, comparisons, joined
from aot_fast.evaluation.statistics import (
    clustered_difference,
    clustered_median_difference,
    mean_over_seeds,
    paired_difference,
)
from aot_fast.evaluation.tables import Edit, Prediction, Tables

Q_LOW, N = 0.6, 2
IDS = "abcdefgh"

# R right, w wrong, in the order of IDS; by (Defender, picture). Two rounds.
GAME_ANSWERS = {
    (0, "clean"): "RRRRRRRR",
    (0, "roundtrip"): "RRRRRRRw",
    (0, "attacker_0"): "RRRRRwww",
    (0, "attacker_1"): "wwwRRRww",
    (0, "attacker_2"): "wwwwRRww",
    (1, "clean"): "RRRRRRRw",
    (1, "attacker_1"): "RRRRRRww",
    (1, "attacker_2"): "wwwRRRww",
    (2, "clean"): "RRRRRRww",
    (2, "attacker_1"): "RRRRwRww",
    (2, "attacker_2"): "RRRRRRww",
}
CLEAN_ANSWERS = {(2, "attacker_1"): "wRRRRRRw", (2, "attacker_2"): "wwRRRRRw"}
EDITS = {
    # q, audit
    "attacker_0": [(0.9, True)] * 8,
    "attacker_1": [(0.9, True)] * 6 + [(0.5, True), (0.7, None)],  # g has lost its target
    "attacker_2": [(0.8, True)] * 5 + [(0.9, False), (0.5, True), (0.7, None)],  # f is not true any more, g has lost its target
}


def tables_of(answers, edits=EDITS):
    tables = Tables()
    for (j, on), marks in answers.items():
        rows = {id: Prediction(id, on, "", "A", mark == "R", "A") for id, mark in zip(IDS, marks)}
        tables.predictions.setdefault(j, {})[on] = rows
    for on, rows in edits.items():
        tables.edits[on] = {id: Edit(id, q, (q,), "", audit) for id, (q, audit) in zip(IDS, rows)}
    return tables


def figures(runs):
    """What each comparison says of the pooled pairs: (new, old, difference, pairs) and whether the goal is reached."""
    found = {}
    for row in (comparison.to_json() for comparison in comparisons(runs, Q_LOW, N)):
        pooled = row["pooled"]
        values = (pooled["new"], pooled["old"], pooled["difference"]["value"])
        found[row["key"]] = (*(pytest.approx(value) for value in values), pooled["difference"]["n"], row["reached"])
    return found


def test_figures_of_the_hand_computed_example():
    found = figures({GAME: {0: tables_of(GAME_ANSWERS)}, "clean": {0: tables_of(CLEAN_ANSWERS)}})
    assert found == {
        # Attackable by both (right on the round trip, fair): a to f. Attacker 1 fools a b c, attacker 0 f.
        "attacker_learns": (3 / 6, 1 / 6, 2 / 6, 6, True),
        # Medians of all eight: .9 and .9.
        "attacker_keeps_targets": (0.9, 0.9, 0.0, 8, True),
        # Audit-valid, a lost target or not: all eight of attacker 1, all but f of attacker 2.
        "defender_1_adapts": (6 / 8, 3 / 8, 3 / 8, 8, True),
        "defender_2_adapts": (5 / 7, 2 / 7, 3 / 7, 7, True),
        "clean_accuracy_kept": (6 / 8, 8 / 8, -2 / 8, 8, False),
        # The best earlier one is Defender 1 with 6 of 8.
        "forgetting": (5 / 8, 6 / 8, -1 / 8, 8, None),
        # Fair: a b c d e h of attacker 2. The game 5, the control 3.
        "hardened_vs_clean": (5 / 6, 3 / 6, 2 / 6, 6, False),
        # And a to f and h of attacker 1: the game 5 of 7, the control 5 of 7; together 10 and 8 of 13.
        "hardened_vs_clean_all_attackers": (10 / 13, 8 / 13, 2 / 13, 13, False),
    }


def test_goal_of_the_arms_asks_for_an_interval_clear_of_zero():
    """The difference of 2 in 6 above is over the goal of 0.05, but may be chance; nine times as many questions say the same."""
    many = [f"{id}{i}" for i in range(9) for id in IDS]
    runs = {arm: {0: tables_of(answers)} for arm, answers in ((GAME, GAME_ANSWERS), ("clean", CLEAN_ANSWERS))}
    for tables in (runs[GAME][0], runs["clean"][0]):
        for of_defender in tables.predictions.values():
            of_defender.update({on: {id: rows[id[0]] for id in many} for on, rows in of_defender.items()})
        tables.edits.update({on: {id: rows[id[0]] for id in many} for on, rows in tables.edits.items()})
    new, old, difference, n, reached = figures(runs)["hardened_vs_clean"]
    assert (difference, n, reached) == (pytest.approx(2 / 6), 54, True)


def test_seeds_stand_by_themselves_and_are_pooled_by_question():
    other = tables_of(GAME_ANSWERS | {(0, "attacker_1"): "RRRRRwww"})  # there Attacker 1 does what Attacker 0 does
    [row] = [c.to_json() for c in comparisons({GAME: {5: other, 2: tables_of(GAME_ANSWERS)}}, Q_LOW, N) if c.key == "attacker_learns"]
    assert [(seed["seed"], seed["difference"]["value"]) for seed in row["per_seed"]] == [(2, pytest.approx(1 / 3)), (5, 0.0)]
    assert row["per_seed"][1]["difference"]["low"] == row["per_seed"][1]["difference"]["high"] == 0.0
    assert (row["pooled"]["difference"]["value"], row["pooled"]["difference"]["n"]) == (pytest.approx(1 / 6), 12)
    # Mean 1/6, standard deviation 0.2357, t of one degree of freedom 12.706.
    over = row["pooled"]["over_seeds"]
    assert (over["mean"], over["n"]) == (pytest.approx(1 / 6), 2)
    assert over["high"] - over["mean"] == pytest.approx(12.706 * 0.235702 / 2**0.5, rel=1e-4)


def test_what_is_not_finished_is_left_out():
    assert comparisons({}, Q_LOW, N) == []
    assert comparisons({"clean": {0: tables_of(CLEAN_ANSWERS)}}, Q_LOW, N) == []
    only_seed_1 = comparisons({GAME: {0: tables_of(GAME_ANSWERS)}, "clean": {1: tables_of(CLEAN_ANSWERS)}}, Q_LOW, N)
    assert not [c.key for c in only_seed_1 if c.key.startswith("hardened")]
    first_round = {key: marks for key, marks in GAME_ANSWERS.items() if key[0] < 2 and key[1] != "attacker_2"}
    edits = {on: rows for on, rows in EDITS.items() if on != "attacker_2"}
    keys = [c.key for c in comparisons({GAME: {0: tables_of(first_round, edits)}}, Q_LOW, N)]
    assert keys == ["attacker_learns", "attacker_keeps_targets", "defender_1_adapts"]


# The intervals


def test_clusters_of_one_are_the_paired_difference():
    new, old = ({f"{i}": (i * k) % 3 == 0 for i in range(90)} for k in (1, 2))
    new["5"] = True
    assert clustered_difference({id: [(float(new[id]), float(old[id]))] for id in new}) == paired_difference(new, old)


def test_pairs_of_a_question_repeated_in_every_seed_make_no_interval_narrower():
    """Five seeds that all say the same know no more than one."""
    chance = np.random.default_rng(1)
    one = {f"{i}": [(float(chance.random() < 0.6), float(chance.random() < 0.4))] for i in range(80)}
    single, five = clustered_difference(one), clustered_difference(joined([one] * 5))
    assert (five.value, five.n) == (pytest.approx(single.value), 400)
    assert (five.low, five.high) == pytest.approx((single.low, single.high))


def test_median_difference_is_of_medians_and_its_resamples_are_numpys():
    values = [(0.9, 0.5), (0.2, 0.4), (0.8, 0.9), (0.7, 0.1)]
    clusters = {"a": values[:1], "b": values[1:3], "c": [], "d": values[3:]}
    found = clustered_median_difference(clusters)
    assert (found.value, found.n) == (pytest.approx(0.75 - 0.45), 4)
    chance, medians = np.random.default_rng(3), []
    for _ in range(4000):
        drawn = [pair for i in chance.integers(0, 3, 3) for pair in (clusters["a"], clusters["b"], clusters["d"])[i]]
        medians.append(float(np.subtract(*np.median(drawn, axis=0))))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(medians, [2.5, 97.5])), abs=0.02)


def simulated(chance, seeds, questions, effect):
    """Questions differ in how hard they are, and how much the new Defender helps with them is the same question's in every seed."""
    gain = np.clip(chance.normal(effect, 0.3, questions), -0.35, 0.35 + 2 * effect)
    clusters = {}
    for i in range(questions):
        old, new = 0.4 - gain[i] / 2, 0.4 + gain[i] / 2
        clusters[f"{i}"] = [(float(chance.random() < new), float(chance.random() < old)) for _ in range(seeds)]
    return clusters


def test_pooled_interval_holds_the_truth_as_often_as_it_says(monkeypatch):
    """400 studies of 3 seeds and 150 questions. Drawn pair by pair, as if seeds were other questions, the interval holds it less often."""
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 1000)  # a tenth of the time, and the ends move by little
    chance, effect = np.random.default_rng(0), 0.1
    truth = np.clip(np.random.default_rng(9).normal(effect, 0.3, 10**6), -0.35, 0.35 + 2 * effect).mean()
    held = {"clusters": 0, "pairs": 0}
    for _ in range(400):
        clusters = simulated(chance, 3, 150, effect)
        apart = {f"{id}/{k}": [pair] for id, pairs in clusters.items() for k, pair in enumerate(pairs)}
        for name, found in (("clusters", clustered_difference(clusters)), ("pairs", clustered_difference(apart))):
            held[name] += found.low <= truth <= found.high
    # 0.95 of 400 is 380 with a standard deviation of 4.4.
    assert 366 <= held["clusters"] <= 394 and held["pairs"] < held["clusters"]


def test_interval_over_seeds_holds_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0.1, 0.03, (2000, 3))
    held = sum(found.low <= 0.1 <= found.high for found in map(mean_over_seeds, draws))
    assert 0.935 <= held / 2000 <= 0.965  # standard deviation 0.005
    assert mean_over_seeds([0.2]).low is None and mean_over_seeds([]).mean is None
