"""A study folder as `aot-fast run --seeds --arms` leaves it, of synthetic runs.

python -m tests.report.synthetic_study FOLDER    # four arms, three seeds, 120 questions: a page to look at
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aot_fast.evaluation.statistics import paired_difference
from aot_fast.evaluation.tables import Tables, read_tables
from aot_fast.metrics import write_json
from aot_fast.report import build_report, build_study_report
from tests.report.synthetic_run import write_run

GAME = "coevolution"
STRENGTHS = {GAME: 0.16, "clean": 0.02, "roundtrip": 0.03, "random_edit": 0.08}
"""How much a round of each arm lowers the chance of being fooled."""


def right(tables: Tables, defender: int, on: str) -> dict[str, bool]:
    return {id: row.correct for id, row in tables.predictions[defender][on].items()}


def comparison(key: str, title: str, names: tuple[str, str], goal: float | None, pairs: dict[int, tuple[dict, dict]]) -> dict[str, Any]:
    """A comparison of accuracies with the schema of `summary.json`; `pairs`: (new, old) by seed."""

    def figures(new: dict[str, bool], old: dict[str, bool]) -> dict[str, Any]:
        means = (sum(answers.values()) / len(answers) for answers in (new, old))
        return {**dict(zip(("new", "old"), means)), "difference": paired_difference(new, old).to_json()}

    per_seed = [{"seed": seed, **figures(*pair)} for seed, pair in pairs.items()]
    all_new, all_old = ({f"{s} {id}": value for s, pair in pairs.items() for id, value in pair[k].items()} for k in (0, 1))
    values = [row["difference"]["value"] for row in per_seed]
    mean, half = sum(values) / len(values), 0.06
    over_seeds = {"mean": mean, "low": mean - half, "high": mean + half, "n": len(values)} if len(values) > 1 else None
    pooled = {**figures(all_new, all_old), "over_seeds": over_seeds or {"mean": mean, "low": None, "high": None, "n": 1}}
    reached = None if goal is None else pooled["difference"]["value"] >= goal
    words = {"key": key, "title": title, "what": "accuracy", "new": names[0], "old": names[1], "goal": goal, "reached": reached}
    return {**words, "per_seed": per_seed, "pooled": pooled}


def comparisons(tables: dict[str, dict[int, Tables]], rounds: int) -> list[dict[str, Any]]:
    game, last = tables[GAME], f"attacker_{rounds}"
    hardened = {s: (right(t, rounds, last), right(t, 0, last)) for s, t in game.items()}
    clean = {s: (right(t, rounds, "clean"), right(t, 0, "clean")) for s, t in game.items()}
    found = [
        comparison("adapts", "The last Defender withstands the last Attacker", (f"defender_{rounds}", "defender_0"), 0.10, hardened),
        comparison("far", "The same with a goal out of reach", (f"defender_{rounds}", "defender_0"), 0.90, hardened),
        comparison("clean", "The game costs no accuracy on clean pictures", (f"defender_{rounds}", "defender_0"), -0.02, clean),
        comparison("open", "What happens to clean accuracy, without a goal", (f"defender_{rounds}", "defender_0"), None, clean),
    ]
    for arm in tables:
        if arm != GAME:
            pairs = {s: (right(game[s], rounds, last), right(t, rounds, last)) for s, t in tables[arm].items()}
            names = (f"defender_{rounds} of {GAME}", f"defender_{rounds} of {arm}")
            found.append(comparison(f"vs_{arm}", f"Under attack, the game's Defender against that of {arm}", names, 0.05, pairs))
    return found


def write_study(
    folder: Path, arms: Sequence[str] = tuple(STRENGTHS), seeds: Sequence[int] = (0, 1, 2), num_questions: int = 12, rounds: int = 2
) -> Path:
    runs, figures, tables = ({arm: {} for arm in arms} for _ in range(3))
    for arm in arms:
        for seed in seeds:
            run = write_run(folder / f"{arm}_seed{seed}", num_questions, rounds, strength=STRENGTHS[arm], seed=seed, arm=arm)
            entry = json.loads((run / "summary.json").read_text())["seeds"][0]
            phases = {"load": 5.0, "attack": 300.0 if arm == GAME else 0.1, "curate": 40.0, "defend": 250.0 + 5 * seed, "evaluate": 90.0}
            spent = {"seconds": sum(phases.values()), "seconds_by_phase": phases, "answers_generated": 6400, "optimizer_steps": 40}
            runs[arm][str(seed)] = {"folder": run.name, "finished": True, **spent}
            figures[arm][str(seed)] = entry
            tables[arm][seed] = read_tables(run)
    summary = {"name": folder.name, "config_hash": "0123456789ab", "versions": {"torch": "2.11"}, "arms": list(arms), "seeds": list(seeds)}
    write_json(folder / "summary.json", {**summary, "runs": runs, "comparisons": comparisons(tables, rounds), "figures": figures})
    (folder / "study.yaml").write_text("arms: [coevolution]\nconfig: {reward: {q_low: 0.6}}\n")
    return folder


if __name__ == "__main__":
    made = write_study(Path(sys.argv[1]), num_questions=120)
    for run in sorted(made.glob("*_seed*")):
        build_report(run)
    print(build_study_report(made))
