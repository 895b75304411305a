"""The comparisons of a study: arms and seeds of one configuration, on the same held-out questions (MATH.md section 5).

Every comparison is a list of pairs (new, old), one for each question of each seed (and Attacker). A seed's interval is over its questions;
the pooled one is over questions too, with all pairs of a question drawn together; `over_seeds` is over the seeds' own differences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from aot_fast.evaluation.matrix import accuracy, attackable, audit_valid, fair_edits
from aot_fast.evaluation.statistics import Clusters, Difference, clustered_difference, clustered_median_difference, mean_over_seeds
from aot_fast.evaluation.tables import Tables

GAME, CONTROLS = "coevolution", ("clean", "roundtrip", "random_edit")
Runs = Mapping[str, Mapping[int, Tables]]
"""[arm][seed] tables of the finished runs."""


@dataclass(frozen=True)
class Comparison:
    """Two things measured on the same questions."""

    key: str
    title: str
    what: str
    """attack_success | accuracy | q."""
    new: str
    old: str
    pairs: Mapping[int, Clusters]
    """By seed; seeds that cannot be compared are empty."""
    goal: float | None = None
    """Least difference that counts as a success."""
    clear: bool = False
    """The goal is reached only if the pooled interval is clear of zero as well."""

    def difference(self, clusters: Clusters) -> Difference:
        return clustered_median_difference(clusters) if self.what == "q" else clustered_difference(clusters)

    def to_json(self) -> dict[str, Any]:
        pairs = {seed: clusters for seed, clusters in sorted(self.pairs.items()) if clusters}
        per_seed = [{"seed": seed, **self._figures(clusters)} for seed, clusters in pairs.items()]
        pooled = self._figures(joined(pairs.values()))
        over_seeds = mean_over_seeds([row["difference"]["value"] for row in per_seed])
        names = ("key", "title", "what", "new", "old", "goal")
        return {
            **{name: getattr(self, name) for name in names},
            "reached": self._reached(pooled["difference"]),
            "per_seed": per_seed,
            "pooled": {**pooled, "over_seeds": over_seeds.to_json()},
        }

    def _figures(self, clusters: Clusters) -> dict[str, Any]:
        values = [pair for pairs in clusters.values() for pair in pairs]
        new, old = (np.median if self.what == "q" else np.mean)(values, axis=0).tolist()
        return {"new": new, "old": old, "difference": self.difference(clusters).to_json()}

    def _reached(self, pooled: Mapping[str, Any]) -> bool | None:
        return None if self.goal is None else pooled["value"] >= self.goal and (not self.clear or pooled["low"] > 0)


def joined(parts: Iterable[Clusters]) -> Clusters:
    """All pairs of all parts, by question."""
    together: dict[str, list[tuple[float, float]]] = {}
    for clusters in parts:
        for id, pairs in clusters.items():
            together.setdefault(id, []).extend(pairs)
    return together


def paired(new: Mapping[str, float], old: Mapping[str, float], among: Iterable[str] | None = None) -> Clusters:
    """One pair for each question that both have (of those in `among`)."""
    common = new.keys() & old.keys()
    return {id: [(float(new[id]), float(old[id]))] for id in (common if among is None else common & set(among))}


def right(tables: Tables, defender: int, on: str) -> dict[str, bool]:
    """Whether the Defender's answers are right; empty if it was not asked."""
    return {id: row.correct for id, row in tables.predictions.get(defender, {}).get(on, {}).items()}


def valid(tables: Tables, on: str) -> set[str]:
    return audit_valid(tables.edits.get(on, {}))


def success_pairs(tables: Tables, q_low: float, new: str, old: str) -> Clusters:
    """Attack success of two Attackers against the first Defender, over the questions that both could attack."""
    if not {new, old} <= tables.edits.keys():
        return {}
    roundtrip = tables.predictions.get(0, {}).get("roundtrip", {})
    among = attackable(roundtrip, tables.edits[new], q_low) & attackable(roundtrip, tables.edits[old], q_low)
    wrong = [{id: not correct for id, correct in right(tables, 0, on).items()} for on in (new, old)]
    return paired(*wrong, among)


def integrity_pairs(tables: Tables, new: str, old: str) -> Clusters:
    """q of two Attackers' edits of the same pictures."""
    return paired(*({id: edit.q for id, edit in tables.edits.get(on, {}).items()} for on in (new, old)))


def forgetting_pairs(tables: Tables, last: int, on: str) -> Clusters:
    """The last Defender against the best earlier one on the audit-valid edits of `on`."""
    among = valid(tables, on)
    earlier = [j for j in tables.defenders if j < last and right(tables, j, on).keys() & among]
    if not earlier:
        return {}
    best = max(earlier, key=lambda j: accuracy(tables.predictions[j][on], among).value)
    return paired(right(tables, last, on), right(tables, best, on), among)


def attacked_pairs(game: Tables, control: Tables, q_low: float, last: int, attackers: Iterable[str]) -> Clusters:
    """The last Defenders of the game and of a control on the same fair edits of the game's Attackers."""
    parts = []
    for on in attackers:
        among = fair_edits(game.edits.get(on, {}), q_low)
        parts.append(paired(right(game, last, on), right(control, last, on), among))
    return joined(parts)


def comparisons(runs: Runs, q_low: float, rounds: int) -> list[Comparison]:
    """All comparisons that at least one seed allows; `rounds`: the last round n."""
    game, n = runs.get(GAME, {}), rounds
    found = [*_of_attackers(game, q_low), *_of_defenders(game, n), *_of_arms(runs, q_low, n)]
    return [comparison for comparison in found if any(comparison.pairs.values())]


def _of_attackers(game: Mapping[int, Tables], q_low: float) -> list[Comparison]:
    new, old = "attacker_1", "attacker_0"
    return [
        Comparison(
            key="attacker_learns",
            title="Attacker 1 fools Defender 0 more often than Attacker 0 does",
            what="attack_success",
            new="attacker_1 against defender_0",
            old="attacker_0 against defender_0",
            pairs={seed: success_pairs(tables, q_low, new, old) for seed, tables in game.items()},
            goal=0.10,
        ),
        Comparison(
            key="attacker_keeps_targets",
            title="Attacker 1 leaves the targets as intact as Attacker 0 does (median q)",
            what="q",
            new="edits of attacker_1",
            old="edits of attacker_0",
            pairs={seed: integrity_pairs(tables, new, old) for seed, tables in game.items()},
            goal=0.0,
        ),
    ]


def _of_defenders(game: Mapping[int, Tables], n: int) -> list[Comparison]:
    def pairs(new: int, old: int, on: str) -> dict[int, Clusters]:
        return {s: paired(right(t, new, on), right(t, old, on), None if on == "clean" else valid(t, on)) for s, t in game.items()}

    adapts = [
        Comparison(
            key=f"defender_{k}_adapts",
            title=f"Defender {k} answers the edits it was trained against better than Defender {k - 1}",
            what="accuracy",
            new=f"defender_{k} on attacker_{k}'s audit-valid edits",
            old=f"defender_{k - 1} on the same edits",
            pairs=pairs(k, k - 1, f"attacker_{k}"),
            goal=0.10,
        )
        for k in range(1, n + 1)
    ]
    clean = Comparison(
        key="clean_accuracy_kept",
        title="The game costs no accuracy on clean pictures",
        what="accuracy",
        new=f"defender_{n} on clean pictures",
        old="defender_0 on clean pictures",
        pairs=pairs(n, 0, "clean"),
        goal=-0.02,
    )
    forgetting = Comparison(
        key="forgetting",
        title="What the last Defender has forgotten of Attacker 1",
        what="accuracy",
        new=f"defender_{n} on attacker_1's audit-valid edits",
        old="the best earlier Defender of each seed on the same edits",
        pairs={seed: forgetting_pairs(tables, n, "attacker_1") for seed, tables in game.items()},
    )
    return [*adapts, clean, *([forgetting] if n > 1 else [])]  # after one round nothing can have been forgotten


def _of_arms(runs: Runs, q_low: float, n: int) -> list[Comparison]:
    game, found = runs.get(GAME, {}), []
    trained = [f"attacker_{i}" for i in range(1, n + 1)]
    for arm in CONTROLS:
        common = [(seed, game[seed], tables) for seed, tables in runs.get(arm, {}).items() if seed in game]
        sets = [("", trained[-1:], f"attacker_{n}'s"), ("_all_attackers", trained, "all trained Attackers'")]
        for suffix, attackers, words in sets[:n]:  # after one round the two are the same
            found.append(
                Comparison(
                    key=f"hardened_vs_{arm}{suffix}",
                    title=f"Under attack, the game's Defender against that of the arm {arm}, on {words} edits",
                    what="accuracy",
                    new=f"defender_{n} of {GAME} on {words} audit-valid edits with q >= q_low",
                    old=f"defender_{n} of {arm} on the same edits",
                    pairs={seed: attacked_pairs(mine, theirs, q_low, n, attackers) for seed, mine, theirs in common},
                    goal=0.05,
                    clear=True,
                )
            )
    return found
