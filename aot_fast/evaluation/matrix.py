"""The figures of MATH.md section 5 as pure functions of the tables.

I is a clean image, I° its round trip through the Attacker's codec. attacker_0 is the cold-started Attacker, attacker_n the one after round
n; defender_0 is the first Defender.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from aot_fast.evaluation.statistics import Difference, Share, paired_difference, share
from aot_fast.evaluation.tables import Edit, Prediction, Tables

Predictions = Mapping[str, Prediction]
Edits = Mapping[str, Edit]


@dataclass(frozen=True)
class Integrity:
    """How well the target objects survive."""

    median: float | None
    p5: float | None
    """5th percentile."""
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        return asdict(self)


def integrity(edits: Edits) -> Integrity:
    """Median and 5th percentile of q; of the round trips it is the codec's floor."""
    if not edits:
        return Integrity(None, None, 0)
    median, p5 = np.percentile([edit.q for edit in edits.values()], [50, 5])
    return Integrity(float(median), float(p5), len(edits))


def audit_valid(edits: Edits) -> set[str]:
    """Questions whose true answer still holds on the edit, as far as an audit can tell."""
    return {id for id, edit in edits.items() if edit.audit is not False}


def fair_edits(edits: Edits, q_low: float) -> set[str]:
    """Questions whose edit may count as an attack: audit-valid, and the targets intact (q >= q_low)."""
    return {id for id in audit_valid(edits) if edits[id].q >= q_low}


def accuracy(predictions: Predictions, among: Collection[str] | None = None) -> Share:
    """Share of right answers, of all questions or of those in `among`."""
    return share(row.correct for id, row in predictions.items() if among is None or id in among)


def attackable(roundtrip: Predictions, edits: Edits, q_low: float) -> set[str]:
    """Questions on which an attack can succeed or fail: answered rightly on I°, so that the codec is not to blame, and fairly edited."""
    return {id for id in fair_edits(edits, q_low) if id in roundtrip and roundtrip[id].correct}


def attack_success(roundtrip: Predictions, attacked: Predictions, edits: Edits, q_low: float) -> Share:
    """attack_success[i][j]: share of the attackable questions that Defender j answers wrongly on Attacker i's edit."""
    among = attackable(roundtrip, edits, q_low)
    return share(not row.correct for id, row in attacked.items() if id in among)


def label_valid(edits: Edits, q_low: float) -> Share:
    """Share of the edits with intact targets whose true answer surely is still true; only audited edits count."""
    return share(edit.audit for edit in edits.values() if edit.audit is not None and edit.q >= q_low)


def label_likely(edits: Edits, q_low: float) -> Share:
    """The same by the best reading of each edit."""
    return share(edit.likely for edit in edits.values() if edit.likely is not None and edit.q >= q_low)


def attack_types(tables: Tables, q_low: float) -> dict[str, dict[str, dict]]:
    """By Attacker and attack type: `share` of all its edits, and `attack_success` of these against each Defender; {} of untyped edits."""

    def success(j: int, on: str, edits: Edits) -> Share:
        rows = tables.predictions[j]
        return attack_success(rows.get("roundtrip", {}), rows[on], edits, q_low)

    def figures(on: str, attack: str) -> dict:
        edits = {id: edit for id, edit in tables.edits[on].items() if edit.attack == attack}
        seen = [j for j in tables.defenders if on in tables.predictions[j]]
        return {
            "share": share(edit.attack == attack for edit in tables.edits[on].values()),
            "attack_success": {f"defender_{j}": success(j, on, edits) for j in seen},
        }

    found = {on: sorted({edit.attack for edit in tables.edits[on].values()} - {""}) for on in tables.attackers}
    return {on: {attack: figures(on, attack) for attack in attacks} for on, attacks in found.items() if attacks}


def of_kind(predictions: Predictions, kind: str) -> dict[str, Prediction]:
    """The rows of the questions of one kind."""
    return {id: row for id, row in predictions.items() if row.kind == kind}


def kinds(tables: Tables) -> list[str]:
    """Kinds of question that occur; empty if questions have none."""
    rows = (row for tables_of in tables.predictions.values() for table in tables_of.values() for row in table.values())
    return sorted({row.kind for row in rows} - {""})


def shares(tables: Tables, q_low: float, kind: str | None = None) -> dict[str, dict]:
    """The accuracies and attack successes as `Share`s, in the tree that summary.json has; of the questions of `kind` if given."""

    def rows(defender: int, on: str) -> Predictions:
        table = tables.predictions[defender].get(on, {})
        return table if kind is None else of_kind(table, kind)

    def seen(on: str) -> dict[str, int]:
        return {f"defender_{j}": j for j in tables.defenders if rows(j, on)}

    def success(j: int, on: str) -> Share:
        return attack_success(rows(j, "roundtrip"), rows(j, on), tables.edits[on], q_low)

    def under_attack(j: int, on: str) -> Share:
        return accuracy(rows(j, on), audit_valid(tables.edits[on]))

    return {
        "clean_accuracy": {name: accuracy(rows(j, "clean")) for name, j in seen("clean").items()},
        "roundtrip_accuracy": {name: accuracy(rows(j, "roundtrip")) for name, j in seen("roundtrip").items()},
        "attack_success": {on: {name: success(j, on) for name, j in seen(on).items()} for on in tables.attackers},
        "accuracy_under_attack": {on: {name: under_attack(j, on) for name, j in seen(on).items()} for on in tables.attackers},
    }


def forgetting(tables: Tables) -> dict[str, float]:
    """Best accuracy of an earlier Defender minus the last one's, on clean images and under each Attacker; positive is lost.

    The best of several is picked by its luck too, so that small positive values are to be expected.
    """
    lost = {}
    for on in ("clean", *tables.attackers):
        among = audit_valid(tables.edits[on]) if on in tables.edits else None
        seen = [accuracy(tables.predictions[j][on], among).value for j in tables.defenders if on in tables.predictions[j]]
        if len(seen) > 1 and None not in seen:
            lost[on] = max(seen[:-1]) - seen[-1]
    return lost


def _outcomes(predictions: Predictions, among: Collection[str]) -> dict[str, bool]:
    return {id: row.correct for id, row in predictions.items() if id in among}


def defender_differences(tables: Tables) -> dict[str, Difference]:
    """Accuracy of the last Defender minus the first one's over the same questions, on each kind of picture."""
    if len(tables.defenders) < 2:
        return {}
    first, last = (tables.predictions[tables.defenders[end]] for end in (0, -1))
    differences = {}
    for on in ("clean", "roundtrip", *tables.attackers):
        if on in first and on in last:
            among = audit_valid(tables.edits[on]) if on in tables.edits and on != "roundtrip" else first[on].keys()
            differences[on] = paired_difference(_outcomes(last[on], among), _outcomes(first[on], among))
    return differences


def attacker_difference(tables: Tables, q_low: float) -> Difference | None:
    """attack_success of the last Attacker minus attacker_0's against the first Defender, over questions attackable by both."""
    if len(tables.attackers) < 2 or not tables.defenders:
        return None
    first, last = tables.attackers[0], tables.attackers[-1]
    rows = tables.predictions[tables.defenders[0]]
    if not {"roundtrip", first, last} <= rows.keys():
        return None
    among = attackable(rows["roundtrip"], tables.edits[first], q_low) & attackable(rows["roundtrip"], tables.edits[last], q_low)
    new, old = ({id: not right for id, right in _outcomes(rows[on], among).items()} for on in (last, first))
    return paired_difference(new, old)
