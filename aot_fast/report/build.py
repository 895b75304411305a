"""From a run folder to one self-contained page: no script, no external resource, everything inside as data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from aot_fast.evaluation.summary import versions
from aot_fast.metrics import atomic_write_text
from aot_fast.report.curves import PLAYERS, plot_player
from aot_fast.report.gallery import attacker_cards, curated_cards
from aot_fast.report.headline import clock, cost, headlines, percent, phase_seconds
from aot_fast.report.pictures import data_uri
from aot_fast.report.run_files import RunFiles, read_run

HERE = Path(__file__).parent
OUTCOMES = {
    "fooled": "valid edit; right without the attack, wrong on the edit",
    "resisted": "valid edit; still right",
    "rejected": "a target is damaged (q too low) or the true answer has changed",
    "void": "wrong already without the attack, so it counts neither way",
}


def _curves(run: RunFiles) -> list[dict[str, Any]]:
    """Each player's curves, once for light and once for dark screens."""
    found = []
    for player, phases in PLAYERS.items():
        rows = [row for row in run.rows if row.get("phase") in phases]
        if rows:
            pictures = {theme: plot_player(rows, player, theme) for theme in ("light", "dark")}
            found.append({"player": player, **{theme: data_uri(png, "png") if png else "" for theme, png in pictures.items()}})
    return found


def _matrix(run: RunFiles, name: str) -> list[tuple[str, list[Mapping[str, Any] | None]]]:
    """Rows of a heat map: (attacker_i, its cell for each Defender)."""
    cells = run.figures["details"][name]
    return [(on, [cells.get(on, {}).get(f"defender_{j}") for j in run.tables.defenders]) for on in run.tables.attackers]


def _line(run: RunFiles, name: str) -> list[Mapping[str, Any] | None]:
    return [run.figures["details"][name].get(f"defender_{j}") for j in run.tables.defenders]


def _status(run: RunFiles) -> str:
    if run.finished:
        return "finished"
    if run.all_played:
        return "all rounds are played"
    last = run.rows[-1] if run.rows else None
    where = f"; the last logged step is {last['phase']} {last['step']} of round {last['round']}" if last else ""
    return f"not finished{where}" + (f"; it ended with: {run.exit['reason']}" if run.exit.get("reason") else "")


def _troubles(run: RunFiles) -> list[str]:
    """What went wrong, in words."""
    troubles = []
    skipped = [row for row in run.rows if float(row.get("applied", 1)) == 0]
    if skipped:
        where = ", ".join(f"{row['phase']} {row['step']} of round {row['round']}" for row in skipped[:5])
        troubles.append(f"{len(skipped)} optimizer steps were skipped as not finite: {where}{' ...' if len(skipped) > 5 else ''}")
    for row in run.bad_samples[:10]:
        troubles.append(f"quarantined: {row.get('id')} ({row.get('image')}): {row.get('reason')}")
    if len(run.bad_samples) > 10:
        troubles.append(f"... and {len(run.bad_samples) - 10} more in bad_samples.jsonl")
    if run.exit.get("code"):
        troubles.append(f"exit code {run.exit['code']}: {run.exit.get('reason', '')}")
    return troubles


def _galleries(run: RunFiles) -> list[dict[str, Any]]:
    galleries = []
    for on in reversed(run.tables.attackers):
        cards, counts, opponent = attacker_cards(run, on)
        galleries.append({"title": on, "cards": cards, "counts": counts, "opponent": opponent})
    return galleries


def _context(run: RunFiles) -> dict[str, Any]:
    phases = phase_seconds(run.seconds)
    return {
        "run": run,
        "name": run.folder.resolve().name,
        "status": _status(run),
        "headlines": headlines(run),
        "cost": list(cost(run)),
        "defenders": [f"defender_{j}" for j in run.tables.defenders],
        "success": _matrix(run, "attack_success"),
        "under_attack": _matrix(run, "accuracy_under_attack"),
        "clean": _line(run, "clean_accuracy"),
        "roundtrip": _line(run, "roundtrip_accuracy"),
        "curves": _curves(run),
        "galleries": _galleries(run),
        "outcomes": OUTCOMES,
        "curated": [{"round": round, "edits": made.edits, "cards": curated_cards(run, round)} for round, made in run.curated.items()],
        "phases": phases,
        "total_seconds": sum(total for total, _ in phases.values()),
        "troubles": _troubles(run),
        "versions": run.summary.get("versions") or versions(),
        "style": (HERE / "style.css").read_text(encoding="utf-8"),
    }


def build_report(run_folder: Path | str) -> Path:
    """Write `report.html` into a run folder, finished or not, and return its path; NotADirectoryError if there is no such folder."""
    run = read_run(run_folder)
    # Autoescape: questions, answers and ids come from data files and models.
    page = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"percent": percent, "clock": clock}
    path = run.folder / "report.html"
    atomic_write_text(path, page.get_template("template.html").render(_context(run)))
    return path
