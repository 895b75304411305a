"""What both pages share: the template engine with its filters, and the style."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from aot_fast.metrics import atomic_write_text
from aot_fast.report.headline import clock, percent, points

HERE = Path(__file__).parent


def write_page(path: Path, template: str, context: Mapping[str, Any]) -> Path:
    """Fill a template of this folder and write the page whole; returns `path`."""
    # Autoescape: questions, answers and ids come from data files and models.
    engine = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    engine.filters |= {"percent": percent, "points": points, "clock": clock}
    style = (HERE / "style.css").read_text(encoding="utf-8")
    atomic_write_text(path, engine.get_template(template).render({**context, "style": style}))
    return path
