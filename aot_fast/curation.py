"""From the frozen Attacker's edits to what the Defender trains on: the questions that can be attacked, and the curated set.

Everything a person would want to look at is written to `curated/round_NNN/`: images/, edits.jsonl (an audited verdict a line), set.jsonl.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from aot_fast.attacker.encoding import roundtrip
from aot_fast.attacker.flow_grpo import judged
from aot_fast.attacker.reward import score, solvable
from aot_fast.attacker.rollout import rollout
from aot_fast.config import CurationConfig
from aot_fast.data.audit import audit
from aot_fast.data.schema import Example, Verdict
from aot_fast.data.sets import Picture, Pictures
from aot_fast.defender.answers import answerer, likelihood
from aot_fast.evaluation.tables import safe_name
from aot_fast.game import Game, judge_of
from aot_fast.metrics import atomic_write_text

CHUNK = 64
"""Questions looked at between two collectives, on all ranks together: pictures of one chunk are in memory at a time."""


def folder_of(game: Game, round: int) -> Path:
    return game.folder / "curated" / f"round_{round:03d}"


def attackable(game: Game) -> Pictures:
    """Training questions that the frozen Defender answers rightly on the clean picture and on its round trip (MATH.md section 4).

    As many as this round's attack and curation need, in an order drawn for the round; kept in `attackable.json`. A collective.
    Raises ValueError when there is none.
    """
    config, examples = game.config, game.train.examples()
    path = folder_of(game, game.cursor.round) / "attackable.json"
    wanted = max(config.curation.num_questions, config.game.attacker_steps * config.attacker.prompts_per_step)
    if not game.runtime.broadcast(path.is_file()):
        order = list(range(len(examples)))
        random.Random(game.seed("attackable")).shuffle(order)
        found: list[int] = []
        while order and len(found) < wanted:
            game.check_stop()
            chunk, order = order[:CHUNK], order[CHUNK:]
            found += _solvable_of(game, examples, chunk)
        if game.runtime.rank == 0:
            atomic_write_text(path, json.dumps(found))
    game.runtime.barrier()
    numbers = json.loads(path.read_text())
    if not numbers:
        raise ValueError(
            f"round {game.cursor.round}: the Defender answers none of {len(examples)} training questions rightly on both the clean picture "
            f"and its round trip through the Attacker's VAE ({config.reward.solvable_trials} trials each): there is "
            "nothing to attack; use easier questions, or a VAE or attacker.target_pixels that keeps the picture"
        )
    return Pictures([examples.rows[i] for i in numbers], game.train)


def _solvable_of(game: Game, examples: Pictures, chunk: list[int]) -> list[int]:
    """The solvable ones of `chunk`, in its order, on every rank."""
    if not game.config.reward.solvable_trials:
        return chunk
    mine = [chunk[i] for i in game.runtime.mine(len(chunk))]
    pictures = [examples[i] for i in mine]
    coded = roundtrip(game.attacker, pictures)
    with game.defender.whole():
        right = solvable(pictures, coded, game.config.reward, answerer(game.defender), game.seed("solvable"))
    kept = {i for part in game.runtime.gather([i for i, good in zip(mine, right) if good]) for i in part}
    return [i for i in chunk if i in kept]


def promising(game: Game, questions: Pictures) -> Pictures:
    """The share of `questions` on which the Attacker, as it is now, earns the most different rewards: the others' groups would teach
    nothing. As DAPO's dynamic sampling, but before the round. All of them without `attacker.probe_edits`; kept in `promising.json`.
    A collective."""
    config = game.config.attacker
    if not config.probe_edits:
        return questions
    path = folder_of(game, game.cursor.round) / "promising.json"
    if not game.runtime.broadcast(path.is_file()):
        spreads: dict[str, float] = {}
        for start in range(0, len(questions), CHUNK):
            game.check_stop()
            own = _spreads(game, questions[start : start + CHUNK])
            for part in game.runtime.gather(own):
                spreads |= part
        if game.runtime.rank == 0:
            atomic_write_text(path, json.dumps(widest([row.question_id for row in questions.rows], spreads, config.probe_share)))
    game.runtime.barrier()
    kept = set(json.loads(path.read_text()))
    return Pictures([row for row in questions.rows if row.question_id in kept], game.train)


def widest(ids: Sequence[str], spreads: Mapping[str, float], share: float) -> list[str]:
    """The `share` of `ids` with the largest spreads, in the order given; of equals the first, whichever rank probed them."""
    best = set(sorted(ids, key=lambda id: -spreads[id])[: math.ceil(len(ids) * share)])
    return [id for id in ids if id in best]


def _spreads(game: Game, chunk: Sequence[Example]) -> dict[str, float]:
    """Greatest minus least reward of the probes of this rank's questions."""
    config = game.config
    place = {"seed": game.seed("probe"), "round": game.cursor.round, "step": 0}
    groups = rollout(game.attacker, chunk, **place, group_size=config.attacker.probe_edits, train=False)
    with game.defender.whole():
        scored = judged(groups, config.reward, answerer(game.defender), judge_of(game), likelihood(game.defender))
    rewards = {part.verdicts[0].question_id: [v.reward for v in part.verdicts if math.isfinite(v.reward)] for part in scored}
    return {question: max(row) - min(row) if row else 0.0 for question, row in rewards.items()}


def curate(game: Game) -> None:
    """Write this round's training set of the Defender, by the arm that is played (MATH.md section 5). A collective."""
    makers = {"coevolution": _edits, "random_edit": _edits, "roundtrip": _roundtrips, "clean": lambda game: []}
    made = makers[game.config.game.arm](game)
    if game.runtime.rank == 0:
        rows = _mix(game, made)
        Pictures(rows, game.train).save(folder_of(game, game.cursor.round) / "set.jsonl")
        shares = {source: sum(row.source == source for row in rows) for source in ("clean", "roundtrip", "edit")}
        game.tracker.say(f"r{game.cursor.round} curate | " + " ".join(f"{source} {count}" for source, count in shares.items()))
    game.runtime.barrier()


def read_curated(game: Game) -> Pictures:
    """This round's curated set."""
    return Pictures.read(folder_of(game, game.cursor.round) / "set.jsonl", game.train)


def _edits(game: Game) -> list[Picture]:
    """Edit and check: the frozen Attacker edits attackable questions; rows of those the verdicts accept (all ranks' on rank 0)."""
    config, folder = game.config.curation, folder_of(game, game.cursor.round)
    questions = attackable(game)[: config.num_questions]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records: list[dict] = []
    for start in range(0, len(questions), CHUNK):
        game.check_stop()
        chunk = questions[start : start + CHUNK]
        own = _edit_and_check(game, chunk, folder)
        records += [record for part in game.runtime.gather(own) for record in part]
    records.sort(key=lambda record: record["image"])  # the same file whatever the number of ranks
    if game.runtime.rank == 0:
        atomic_write_text(folder / "edits.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    taken = _choose([record for record in records if record["accepted"]], config.hard_share, game.seed("choose"))
    return [Picture(r["question_id"], "edit", r["attacker_round"], str(folder / r["image"])) for r in taken]


def _edit_and_check(game: Game, chunk: Sequence[Example], folder: Path) -> list[dict]:
    """This rank's edits of the chunk, saved, with their verdicts."""
    config = game.config
    place = {"seed": game.seed("curate"), "round": game.cursor.round, "step": 0}
    groups = rollout(game.attacker, chunk, **place, group_size=config.curation.edits_per_question, train=False)
    edits = [edit for group in groups for edit in group.edits]
    with game.defender.whole():
        trials = replace(config.reward, efficacy="fraction") if config.reward.efficacy == "likelihood" else config.reward
        verdicts = score(edits, trials, answerer(game.defender), judge_of(game))
    records, numbers = [], {}
    for edit, verdict in zip(edits, verdicts):
        k = numbers[verdict.question_id] = numbers.get(verdict.question_id, -1) + 1
        name = f"images/{safe_name(verdict.question_id)}_{k}.png"
        edit.image.save(folder / name)
        # Written down, never asked: `accepted` is the reward's own word, and the audit is what that word is checked against.
        found = audit(edit.example.question, edit.example.image, edit.image)
        audited = {"audit": found and found.valid, "likely": found and found.likely, "attack": found.kind if found else ""}
        records.append(as_record(verdict) | audited | {"image": name})
    return records


def as_record(verdict: Verdict) -> dict:
    """A verdict as JSON can hold it: NaN becomes None."""
    return json.loads(json.dumps(asdict(verdict) | {"q": verdict.q}).replace("NaN", "null"))


def _choose(accepted: list[dict], hard_share: float, seed: int) -> list[dict]:
    """All accepted edits, with those that fooled every trial (e = 1) cut to `hard_share` of the result, for the curriculum."""
    hard, rest = [r for r in accepted if r["efficacy"] >= 1], [r for r in accepted if r["efficacy"] < 1]
    limit = len(hard) if hard_share >= 1 or not rest else round(len(rest) * hard_share / (1 - hard_share))
    random.Random(seed).shuffle(hard)
    return rest + hard[: max(limit, 1)]


def _roundtrips(game: Game) -> list[Picture]:
    """The control without edits: the same questions, through the Attacker's codec only."""
    folder, questions = folder_of(game, game.cursor.round), attackable(game)[: game.config.curation.num_questions]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in game.runtime.mine(len(questions)):
        name = folder / "images" / f"{safe_name(questions.rows[i].question_id)}_0.png"
        roundtrip(game.attacker, [questions[i]])[0].save(name)
    paths = [folder / "images" / f"{safe_name(row.question_id)}_0.png" for row in questions.rows]
    return [Picture(row.question_id, "roundtrip", -1, str(path)) for row, path in zip(questions.rows, paths)]


def _mix(game: Game, made: list[Picture]) -> list[Picture]:
    """`made` among clean pictures and earlier rounds' edits, by the configured shares; all clean when nothing was made."""
    if not made and game.config.game.arm != "clean":
        game.tracker.say(f"warning: round {game.cursor.round} has no accepted edit; the Defender trains on clean pictures")
    earlier = []
    for round in range(1, game.cursor.round if made else 0):
        earlier += [row for row in Pictures.read(folder_of(game, round) / "set.jsonl", game.train).rows if row.attacker_round == round]
    return mixed(made, earlier, game.train.examples().rows, game.config.curation, random.Random(game.seed("mix")))


def mixed(
    made: Sequence[Picture], earlier: Sequence[Picture], clean: Sequence[Picture], config: CurationConfig, chance: random.Random
) -> list[Picture]:
    """The set's pictures: `made` and `earlier` up to their shares, and clean ones for the rest."""
    own_share = max(1e-9, 1 - config.clean_share - config.replay_share)
    total = config.num_pictures or int(len(made) / own_share) or config.num_questions
    rows = chance.sample(made, min(len(made), math.ceil(total * own_share - 1e-6)))  # 320 * 0.3 is 96.00000000000001
    rows += chance.sample(earlier, min(len(earlier), int(total * config.replay_share)))
    return rows + chance.sample(clean, min(len(clean), total - len(rows)))
