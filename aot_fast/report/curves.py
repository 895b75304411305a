"""Curves of both players from metrics.jsonl: one picture a player and theme, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

PLAYERS = {"Attacker": ("attack",), "Defender": ("warmup", "defend")}
"""Phases in which each player trains."""
LEARNING = {
    "reward": "reward",
    "accuracy": "accuracy of sampled answers",
    "e": "e: sampled answers that are wrong",
    "q": "q: how intact the targets are",
    "u": "u: edits without a second target",
    "entropy": "entropy of the answers",
}
"""Title of each metric that tells what a player learns, in the order shown; one that a phase does not log is left out."""
HEALTH = {
    "loss": "loss",
    "ratio": "ratio, new to old policy",
    "kl": "KL, old to new policy",
    "clip": "clipped share",
    "grad_norm": "gradient norm",
    "groups/degenerate": "groups without a signal",
    "response/tokens": "response tokens",
    "lr": "learning rate",
}
"""The same of metrics that tell whether training is sound."""
THEMES = {
    "light": {"ink": "#3d4451", "grid": "#e3e6eb", "Attacker": "#c2410c", "Defender": "#0f766e"},
    "dark": {"ink": "#b6bdc9", "grid": "#343b47", "Attacker": "#fb923c", "Defender": "#2dd4bf"},
}
COLUMNS = 3


@dataclass(frozen=True)
class Series:
    """A metric over the optimizer steps of a player, all rounds end to end."""

    title: str
    steps: list[int]
    values: list[float]


def player_series(
    rows: list[dict[str, Any]], phases: tuple[str, ...], panels: Mapping[str, str]
) -> tuple[list[Series], list[tuple[int, str]]]:
    """The player's metrics named in `panels`, and where each of its phases begins (step, label)."""
    starts: list[tuple[int, str]] = []
    series = {name: Series(title, [], []) for name, title in panels.items()}
    begin, last = 0, None
    for row in rows:
        if row["phase"] not in phases:
            continue
        if last is None or (row["phase"], row["round"]) != (last["phase"], last["round"]):
            begin += last["step"] if last else 0
            starts.append((begin, "warm-up" if row["phase"] == "warmup" else f"round {row['round']}"))
        last = row
        for name in series.keys() & row.keys():
            series[name].steps.append(begin + row["step"])
            series[name].values.append(float(row[name]))
    return [found for found in series.values() if np.isfinite(found.values).any()], starts


def smooth(values: list[float], width: int) -> np.ndarray:
    """Mean over the last `width` values, gaps (NaN) left out."""
    padded = np.concatenate([np.full(width - 1, np.nan), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    counts = np.isfinite(windows).sum(1)
    return np.divide(np.where(np.isfinite(windows), windows, 0).sum(1), counts, out=np.full(len(values), np.nan), where=counts > 0)


def _draw(axes: Axes, series: Series, starts: list[tuple[int, str]], color: str, theme: dict[str, str]) -> None:
    width = max(1, len(series.values) // 12)
    values = np.where(np.isfinite(series.values), series.values, np.nan)
    axes.plot(series.steps, values, color=color, alpha=0.35 if width > 1 else 1.0, linewidth=1.2, marker="." if width == 1 else "")
    if width > 1:
        axes.plot(series.steps, smooth(series.values, width), color=color, linewidth=2)
    for step, label in starts:
        axes.axvline(step + 0.5, color=theme["ink"], alpha=0.5, linewidth=0.8, linestyle=":")
        axes.text(step + 0.5, 1.0, f" {label}", transform=axes.get_xaxis_transform(), va="bottom", fontsize=7, color=theme["ink"])
    axes.set_title(series.title, loc="left", fontsize=10, fontweight="bold", color=theme["ink"], pad=14)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.5g}")
    axes.tick_params(colors=theme["ink"], labelsize=8, length=0)
    axes.grid(color=theme["grid"], linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.set_facecolor("none")


def plot_player(rows: list[dict[str, Any]], player: str, theme_name: str, panels: Mapping[str, str]) -> bytes | None:
    """PNG of a player's curves on a transparent ground; None if it has logged none. A bold line is the mean of the last twelfth."""
    series, starts = player_series(rows, PLAYERS[player], panels)
    if not series:
        return None
    theme = THEMES[theme_name]
    num_rows = -(-len(series) // COLUMNS)
    figure, grid = plt.subplots(num_rows, COLUMNS, figsize=(3.6 * COLUMNS, 2.2 * num_rows), squeeze=False, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)
    for axes, found in zip(grid.flat, series):
        _draw(axes, found, starts, theme[player], theme)
    for axes in grid.flat[len(series) :]:
        axes.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, transparent=True)
    plt.close(figure)
    return buffer.getvalue()
