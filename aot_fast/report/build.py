"""From a run folder to one self-contained page: no script, no external resource, everything inside as data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aot_fast.evaluation.summary import versions
from aot_fast.report.attacks import TYPES, attack_types
from aot_fast.report.curves import HEALTH, LEARNING, PLAYERS, plot_player
from aot_fast.report.gallery import OUTCOMES, Gallery, curated_cards, gallery
from aot_fast.report.headline import cost, headlines, phase_seconds, tally
from aot_fast.report.page import write_page
from aot_fast.report.pictures import data_uri
from aot_fast.report.run_files import RunFiles, read_run

AIMS = {
    "coevolution": "This page shows one such game: does the Defender become harder to fool, and at what price?",
    "clean": "This is a control: the Defender trains on unedited pictures only.",
    "roundtrip": "This is a control: the Defender trains on pictures that only went through the editor's codec.",
    "random_edit": "This is a control: the Defender trains on edits of the Attacker as it was before the game.",
}


def _both_themes(run: RunFiles, player: str, panels: Mapping[str, str]) -> dict[str, str]:
    """A picture of curves, once for light and once for dark screens; empty where nothing is logged."""
    pictures = {theme: plot_player(run.rows, player, theme, panels) for theme in ("light", "dark")}
    return {theme: data_uri(png, "png") if png else "" for theme, png in pictures.items()}


def _curves(run: RunFiles) -> list[dict[str, Any]]:
    """What each player learns, and whether its training is sound."""
    kinds = {"learning": LEARNING, "health": HEALTH}
    found = [{"player": player} | {kind: _both_themes(run, player, panels) for kind, panels in kinds.items()} for player in PLAYERS]
    return [item for item in found if item["learning"]["light"] or item["health"]["light"]]


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


def _galleries(run: RunFiles) -> list[Gallery]:
    """The last Attacker first; of earlier ones half as many edits."""
    few = max(2, run.num_gallery // 2)
    attackers = list(reversed(run.tables.attackers))
    counts = [run.num_gallery if k == 0 else few for k in range(len(attackers))]
    return [gallery(run, on, (max(2, count // 2), max(2, count // 2), count)) for on, count in zip(attackers, counts)]


def _curated(run: RunFiles) -> list[dict[str, Any]]:
    """What each round's curation made; `valid` and `likely`: the shares of true answers, where it was audited."""
    valid, likely = (run.figures["details"].get(f"curated_label_{name}") or {} for name in ("valid", "likely"))

    def item(round: int) -> dict[str, Any]:
        shares = {"valid": valid.get(f"round_{round}"), "likely": likely.get(f"round_{round}")}
        return {"round": round, "edits": run.curated[round].edits, "cards": curated_cards(run, round), **shares}

    return [item(round) for round in run.curated]


def _context(run: RunFiles) -> dict[str, Any]:
    phases, found = phase_seconds(run.seconds), headlines(run)
    return {
        "run": run,
        "name": run.folder.resolve().name,
        "aim": AIMS.get(run.arm, ""),
        "status": _status(run),
        "headlines": found,
        "tally": tally(found),
        "cost": list(cost(run)),
        "defenders": [f"defender_{j}" for j in run.tables.defenders],
        "success": _matrix(run, "attack_success"),
        "under_attack": _matrix(run, "accuracy_under_attack"),
        "clean": _line(run, "clean_accuracy"),
        "roundtrip": _line(run, "roundtrip_accuracy"),
        "curves": _curves(run),
        "galleries": _galleries(run),
        "outcomes": OUTCOMES,
        "attack_types": attack_types(run.figures),
        "types": TYPES,
        "curated": _curated(run),
        "phases": phases,
        "total_seconds": sum(total for total, _ in phases.values()),
        "troubles": _troubles(run),
        "versions": run.summary.get("versions") or versions(),
    }


def build_report(run_folder: Path | str) -> Path:
    """Write `report.html` into a run folder, finished or not, and return its path; NotADirectoryError if there is no such folder."""
    run = read_run(run_folder)
    return write_page(run.folder / "report.html", "run.html", _context(run))
