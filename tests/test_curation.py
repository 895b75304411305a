"""The mix of the curated set."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from aot_fast.config import CurationConfig
from aot_fast.curation import mixed, widest
from aot_fast.data.sets import Picture


def pictures(source: str, num: int, round: int = -1) -> list[Picture]:
    return [Picture(f"{source}-{round}-{i}", source, round, "") for i in range(num)]


CLEAN = pictures("clean", 1000)


@pytest.mark.parametrize(
    ("num_made", "num_earlier", "settings", "expected"),
    [
        (47, 0, {"clean_share": 0.8, "replay_share": 0.1}, (47, 0, 423)),  # no earlier round yet: clean pictures in its place
        (47, 99, {"clean_share": 0.8, "replay_share": 0.1}, (47, 47, 376)),
        (60, 99, {"num_pictures": 320, "clean_share": 0.6, "replay_share": 0.1}, (60, 32, 228)),
        (30, 99, {"num_pictures": 320, "clean_share": 0.6, "replay_share": 0.1}, (30, 32, 258)),
        (200, 99, {"num_pictures": 320, "clean_share": 0.6, "replay_share": 0.1}, (96, 32, 192)),
        (10, 0, {"clean_share": 0.0, "replay_share": 0.0}, (10, 0, 0)),
        (0, 0, {"num_questions": 50}, (0, 0, 50)),
        (0, 0, {"num_pictures": 320, "num_questions": 50}, (0, 0, 320)),
        (300, 0, {"num_pictures": 2000, "clean_share": 0.1, "replay_share": 0.1}, (300, 0, 1000)),  # there are no more
    ],
)
def test_shares(num_made, num_earlier, settings, expected):
    made, earlier = pictures("edit", num_made, 2), pictures("edit", num_earlier, 1)
    rows = mixed(made, earlier, CLEAN, CurationConfig(**settings), random.Random(0))
    counts = Counter((row.source, row.attacker_round) for row in rows)
    assert (counts["edit", 2], counts["edit", 1], counts["clean", -1]) == expected
    assert len({row.question_id for row in rows}) == len(rows)


def test_the_widest_spreads_are_kept_in_order_and_ties_do_not_depend_on_who_probed():
    spreads = {"d": 0.5, "b": 0.9, "a": 0.0, "c": 0.5, "e": 0.1}
    assert widest("abcde", spreads, 0.4) == ["b", "c"]
    assert widest("abcde", dict(reversed(spreads.items())), 0.4) == ["b", "c"]
    assert widest("abcde", spreads, 0.41) == ["b", "c", "d"] and widest("abcde", spreads, 1.0) == [*"abcde"]
