"""The held-out evaluation after a round (MATH.md section 5): every Defender so far on every Attacker so far, each cell once.

Edits are stored as pictures, so an earlier Attacker never has to be loaded again, and a person can look at them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aot_fast.attacker.encoding import roundtrip
from aot_fast.attacker.integrity import integrity
from aot_fast.attacker.rollout import rollout
from aot_fast.config import Config
from aot_fast.data.audit import audit
from aot_fast.data.schema import Example
from aot_fast.data.sets import Picture, Pictures
from aot_fast.defender.answers import answerer
from aot_fast.defender.model import Defender
from aot_fast.engine import on_rank_0
from aot_fast.evaluation.attacks_from import copy_attacks
from aot_fast.evaluation.matrix import integrity as summary_of
from aot_fast.evaluation.summary import summarise
from aot_fast.evaluation.tables import Edit, Prediction, edits_path, image_path, predictions_path, read_edits, write_table
from aot_fast.game import Game

CHUNK = 64
"""Questions between two collectives, on all ranks together."""


def evaluate(game: Game) -> None:
    """Fill the cells of this round that are not there yet, then write `summary.json` and `report.html`. A collective."""
    round = game.cursor.round
    clean = game.heldout.examples()[: game.config.evaluation.num_questions or None]
    sources = pictures_of(game, clean)
    for j in defenders_due(game.config, round):
        missing = [on for on in sources if not game.runtime.broadcast(predictions_path(game.folder, j, on).is_file())]
        if missing:
            defender = game.defender if j == round else game.frozen_defender(j)
            for on in missing:
                predict(game, defender, j, on, sources[on])
            del defender  # before the next one is loaded whole
    publish(game)


def pictures_of(game: Game, clean: Pictures) -> dict[str, Pictures]:
    """All that Defenders answer after this round, by name: clean, roundtrip, attacker_0, ...; what is not on disk yet is made."""
    attacked = clean[: game.config.evaluation.num_attacked or None]
    last_attacker = game.cursor.round if game.config.game.arm == "coevolution" else 0
    attackers = [f"attacker_{i}" for i in range(last_attacker + 1)]
    if game.config.evaluation.attacks_from:
        ids = [[row.question_id for row in pictures.rows] for pictures in (clean, attacked)]
        attackers = on_rank_0(game.runtime, lambda: copy_attacks(game.config, game.folder, *ids))
    sources = {"clean": clean, "roundtrip": stored(game, clean, "roundtrip")}
    check_codec(game)
    return sources | {on: stored(game, attacked, on) for on in attackers}


def defenders_due(config: Config, round: int) -> list[int]:
    """The Defenders that answer after a round; with `evaluation.rounds` last, the first one and, at the end, the last one."""
    if config.evaluation.rounds == "all":
        return list(range(round + 1))
    return sorted({0, round}) if round in (0, config.game.rounds) else []


def publish(game: Game) -> None:
    """Write `summary.json` and `report.html` of what there is; a failing report is said and costs the report only. A collective."""
    if game.runtime.rank == 0:
        try:
            from aot_fast.report import build_report  # matplotlib, on the rank that draws

            summarise(game.folder, game.config, game.spans.totals())
            build_report(game.folder)
        except Exception as error:  # hours of training must not end in a plot
            game.tracker.say(f"warning: the report was not written: {type(error).__name__}: {error}; try `aot-fast report {game.folder}`")
    game.runtime.barrier()


def check_codec(game: Game) -> None:
    """Refuse a codec that breaks the targets by itself (MATH.md section 5). Raises ValueError, or warns, by `reward.poor_codec`."""
    floor, reward = summary_of(read_edits(edits_path(game.folder, "roundtrip"))), game.config.reward
    if floor.p5 >= reward.q_high or game.cursor.round:
        return
    text = (
        f"the Attacker's VAE alone breaks the targets: on {floor.n} held-out pictures its round trip has a 5th percentile of "
        f"q = {floor.p5:.3f}, under reward.q_high = {reward.q_high}; use a larger attacker.target_pixels or a better VAE, lower q_high, "
        "or set reward.poor_codec warn"
    )
    if reward.poor_codec == "refuse":
        raise ValueError(text)
    game.tracker.say(f"warning: {text}")


def stored(game: Game, clean: Pictures, on: str) -> Pictures:
    """The pictures of `on` (roundtrip | attacker_{i}) for the clean ones, made by this round's Attacker if they are not there."""
    attacker_round = -1 if on == "roundtrip" else int(on.removeprefix("attacker_"))
    if not game.runtime.broadcast(edits_path(game.folder, on).is_file()):
        for name in ("clean", on):
            image_path(game.folder, name, "x").parent.mkdir(parents=True, exist_ok=True)
        rows: list[Edit] = []
        for start in range(0, len(clean), CHUNK):
            game.check_stop()
            chunk = clean[start : start + CHUNK]
            rows += [row for part in game.runtime.gather(_make(game, chunk, on, attacker_round)) for row in part]
        if game.runtime.rank == 0:
            write_table(edits_path(game.folder, on), sorted(rows, key=lambda row: row.question_id))
        game.runtime.barrier()
    source = "roundtrip" if on == "roundtrip" else "edit"
    paths = [image_path(game.folder, on, row.question_id) for row in clean.rows]
    return Pictures([Picture(r.question_id, source, attacker_round, str(p)) for r, p in zip(clean.rows, paths)], clean.split)


def _make(game: Game, chunk: Sequence[Example], on: str, attacker_round: int) -> list[Edit]:
    """Pictures of this rank's share of the chunk, saved, with their integrity and their audit."""
    own = [chunk[i] for i in game.runtime.mine(len(chunk))]
    if on == "roundtrip":
        pictures = roundtrip(game.attacker, own)
    else:
        place = {"seed": game.config.run.seed, "round": attacker_round, "step": -1}
        groups = rollout(game.attacker, chunk, **place, group_size=1, train=False)
        pictures = [group.edits[0].image for group in groups]
    rows = []
    for example, picture in zip(own, pictures):
        path = image_path(game.folder, on, example.question.id)
        picture.save(path)
        clean = example.image.resize(picture.size)
        clean.save(image_path(game.folder, "clean", example.question.id))
        boxes = integrity(example.image, picture, example.question.target_boxes, game.config.reward.pad)
        found = audit(example.question, clean, picture) if on != "roundtrip" else None
        relative = str(path.relative_to(Path(game.folder) / "evaluation"))
        audited = {"audit": found.valid, "likely": found.likely, "attack": found.kind} if found else {}
        rows.append(Edit(example.question.id, min(boxes), boxes, relative, **audited))
    return rows


def predict(game: Game, defender: Defender, number: int, on: str, pictures: Pictures) -> None:
    """Greedy answers of Defender `number` to all pictures, written as one table. A collective."""
    answer, rows = answerer(defender), []
    with defender.whole():
        for start in range(0, len(pictures), CHUNK * game.runtime.world):
            game.check_stop()
            chunk = range(start, min(start + CHUNK * game.runtime.world, len(pictures)))
            own = [pictures[chunk[i]] for i in game.runtime.mine(len(chunk))]
            for example, (given,) in zip(own, answer(own, 1, 0.0, [0] * len(own))):
                question = example.question
                rows.append(Prediction(question.id, on, given.text, given.parsed, given.correct, question.answer, question.kind))
    everyone = [row for part in game.runtime.gather(rows) for row in part]
    if game.runtime.rank == 0:
        write_table(predictions_path(game.folder, number, on), sorted(everyone, key=lambda row: row.question_id))
    game.runtime.barrier()
