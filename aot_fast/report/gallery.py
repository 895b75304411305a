"""Which edits a page shows: the hardest, the failures, and the first of each outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

from aot_fast.evaluation.matrix import attackable, fair_edits
from aot_fast.evaluation.tables import Edit
from aot_fast.report.cards import Card, Witness, curated_card, edit_card, witness
from aot_fast.report.run_files import RunFiles, read_questions_of

OUTCOMES = {
    "fooled": "fair edit; answered rightly without it, wrongly with it",
    "resisted": "fair edit; still answered rightly",
    "rejected": "not a fair edit: a target is damaged (q too low) or the true answer has changed",
    "void": "answered wrongly even without the edit, so it counts neither way",
}
Others = Callable[[str, str], Iterable[Witness]]
"""More Defenders that saw the same edit, by (attacker_i, question id)."""


@dataclass(frozen=True)
class Attack:
    """One Attacker's held-out edits and what every Defender made of them."""

    on: str
    edits: Mapping[str, Edit]
    old: int | None
    """The Defender that this Attacker trained against if it is evaluated, else the first one; None if there is none."""
    new: int | None
    """The Defender that then trained on its edits, if it is evaluated; attacker_0 and the controls have none."""
    last: int | None
    """The last Defender of the run."""
    outcomes: Mapping[str, str]
    """By question: what became of the edit against `old`, see OUTCOMES."""
    fooled: Mapping[str, tuple[int, ...]]
    """By question, fair edits only: the Defenders that are right on the round trip and wrong on the edit."""

    @property
    def counts(self) -> dict[str, int]:
        found = list(self.outcomes.values())
        return {name: found.count(name) for name in OUTCOMES}


@dataclass(frozen=True)
class Group:
    """Cards shown under one heading."""

    title: str
    note: str
    cards: list[Card]


@dataclass(frozen=True)
class Gallery:
    """What a page shows of one Attacker."""

    attack: Attack
    groups: list[Group]


def _fooled(run: RunFiles, on: str, id: str) -> tuple[int, ...]:
    """Defenders that answer question `id` rightly on the round trip and wrongly on the (fair) edit."""
    edit, found = {id: run.tables.edits[on][id]}, []
    for j in run.tables.defenders:
        rows = run.tables.predictions[j]
        row = rows.get(on, {}).get(id)
        if row and not row.correct and attackable(rows.get("roundtrip", {}), edit, run.q_low):
            found.append(j)
    return tuple(found)


def _outcome(run: RunFiles, on: str, edit: Edit, opponent: int | None) -> str:
    """fooled | resisted | rejected | void of an edit, seen by the Attacker's opponent."""
    alone = {edit.question_id: edit}
    if not fair_edits(alone, run.q_low):
        return "rejected"
    rows = run.tables.predictions.get(opponent, {})
    row = rows.get(on, {}).get(edit.question_id)
    if row is None or not attackable(rows.get("roundtrip", {}), alone, run.q_low):
        return "void"
    return "resisted" if row.correct else "fooled"


def read_attack(run: RunFiles, on: str) -> Attack:
    """An Attacker's edits with their outcomes, from the tables of the run."""
    attacker, edits, defenders = int(on.removeprefix("attacker_")), run.tables.edits[on], run.tables.defenders
    wanted = [max(attacker - 1, 0)] if run.arm == "coevolution" else []
    old = next((j for j in (*wanted, *defenders) if j in defenders), None)
    new = attacker if run.arm == "coevolution" and attacker > 0 and attacker in defenders else None
    outcomes = {id: _outcome(run, on, edit, old) for id, edit in edits.items()}
    fooled = {id: _fooled(run, on, id) for id in sorted(fair_edits(edits, run.q_low))}
    return Attack(on, edits, old, new, defenders[-1] if defenders else None, outcomes, fooled)


def hardest(attack: Attack) -> list[str]:
    """Fair edits that fool the last Defender: those that fool the most Defenders first, then those with the most intact targets."""
    ids = [id for id, fooled in attack.fooled.items() if attack.last in fooled]
    return sorted(ids, key=lambda id: (-len(attack.fooled[id]), -attack.edits[id].q, id))


def failures(attack: Attack, q_low: float) -> dict[str, list[str]]:
    """Questions by what failed: the Attacker damaged a target, or changed the truth; or the Defender that trained on it still fails."""
    return {
        "damaged": [id for id, edit in attack.edits.items() if edit.q < q_low],
        "untrue": [id for id, edit in attack.edits.items() if edit.audit is False],
        "unlearned": [id for id, fooled in attack.fooled.items() if attack.new is not None and attack.new in fooled],
    }


def failure_labels(attack: Attack, id: str, q_low: float) -> tuple[str, ...]:
    """What failed on an edit, in words."""
    words = {
        "damaged": f"damaged a target: q {attack.edits[id].q:.2f} is under {q_low:g}",
        "untrue": "changed the truth: the given answer no longer holds",
        "unlearned": f"not learned: defender_{attack.new} trained on these edits and still fails",
    }
    return tuple(words[name] for name, ids in failures(attack, q_low).items() if id in ids)


def mix(outcomes: Mapping[str, str], count: int) -> list[str]:
    """Half of them fooled, a quarter resisted, the rest rejected or void, each the first in the table's order."""
    shares = {"fooled": count // 2, "resisted": count // 4, "rejected": max(1, count // 8), "void": max(1, count // 8)}
    chosen = [id for wanted, share in shares.items() for id in islice((id for id, found in outcomes.items() if found == wanted), share)]
    rest = (id for id in outcomes if id not in chosen)
    return sorted([*chosen, *islice(rest, max(0, count - len(chosen)))], key=lambda id: list(shares).index(outcomes[id]))[:count]


def _roles(run: RunFiles, attack: Attack) -> dict[int, str]:
    """The Defenders of a card, and what each has to do with the Attacker."""
    opponent = run.arm == "coevolution" and attack.on == f"attacker_{(attack.old or 0) + 1}"
    roles = {attack.old: "old: trained against by this Attacker" if opponent else "old: the first Defender"}
    roles.setdefault(attack.new, "new: then trained on such edits")
    roles.setdefault(attack.last, "last Defender of this run")
    return {defender: role for defender, role in roles.items() if defender is not None}


def _witnesses(run: RunFiles, attack: Attack, id: str, others: Others | None) -> Iterator[Witness]:
    for defender, role in _roles(run, attack).items():
        if found := witness(f"defender_{defender}", role, run.tables.predictions[defender], attack.on, id):
            yield found
    yield from others(attack.on, id) if others else ()


def _cards(run: RunFiles, attack: Attack, labels: Mapping[str, tuple[str, ...]], others: Others | None) -> list[Card]:
    """Cards of the questions in `labels`, in its order, each with its labels."""
    questions = read_questions_of(run.folder, set(labels))

    def card(id: str) -> Card:
        seen = tuple(_witnesses(run, attack, id, others))
        return edit_card(run, attack.on, attack.edits[id], questions.get(id, {}), attack.outcomes[id], seen, labels[id])

    return [card(id) for id in labels]


def _hardest(run: RunFiles, attack: Attack, count: int, others: Others | None) -> tuple[Group, set[str]]:
    found, total = hardest(attack), len(run.tables.defenders)
    ids = found[:count]
    labels = {id: (f"fools {len(attack.fooled[id])} of {total} Defenders, the last one included",) for id in ids}
    note = (
        f"{len(found)} fair edits fool defender_{attack.last}, the last Defender. Those that fool the most Defenders come first, "
        "then those that leave the targets most intact."
        if found
        else f"No fair edit of {attack.on} fools defender_{attack.last}, the last Defender."
    )
    return Group("Hardest edits", note, _cards(run, attack, labels, others)), set(ids)


def _failures(run: RunFiles, attack: Attack, count: int, seen: set[str], others: Others | None) -> tuple[Group, set[str]]:
    found = failures(attack, run.q_low)
    turns = chain.from_iterable(zip_longest(*found.values()))  # one of each kind in turn
    ids = list(islice(dict.fromkeys(id for id in turns if id and id not in seen), count))
    trained = f"; {len(found['unlearned'])} fair edits still fool defender_{attack.new}" if attack.new is not None else ""
    note = f"Of {len(attack.edits)} edits, {len(found['damaged'])} damaged a target and {len(found['untrue'])} changed the truth{trained}."
    note += " One of each kind in turn; edits shown above are left out." if any(found.values()) else ""
    labels = {id: failure_labels(attack, id, run.q_low) for id in ids}
    return Group("Failures", note, _cards(run, attack, labels, others)), set(ids)


def gallery(run: RunFiles, on: str, counts: Sequence[int], others: Others | None = None) -> Gallery:
    """The hardest edits of an Attacker, its failures, and the first of each outcome; `counts`: how many of each at most."""
    attack = read_attack(run, on)
    hard, seen = _hardest(run, attack, counts[0], others)
    failed, more = _failures(run, attack, counts[1], seen, others)
    left = {id: found for id, found in attack.outcomes.items() if id not in seen | more}
    labels = {id: () for id in mix(left, counts[2])}
    rest = Group("A mix of the rest", "The first of each outcome, in the order of the questions.", _cards(run, attack, labels, others))
    return Gallery(attack, [group for group, count in zip((hard, failed, rest), counts) if count])


def curated_cards(run: RunFiles, round: int) -> list[Card]:
    """Cards of a curated set: the first accepted and the first rejected edits, half of each where there are so many."""
    half, curated = max(1, run.num_gallery // 4), run.curated[round]
    rows = [row for row in curated.edits if "question_id" in row]
    chosen = [*islice((row for row in rows if row.get("accepted")), half), *islice((row for row in rows if not row.get("accepted")), half)]
    questions = read_questions_of(run.folder, {row["question_id"] for row in chosen})
    return [curated_card(run, curated.folder, row, questions.get(row["question_id"], {})) for row in chosen]
