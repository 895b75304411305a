"""The folder of a run: begun, continued, or refused; and how the process that works in it ends (RELIABILITY.md, "Process")."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from aot_fast.config import Config
from aot_fast.metrics import atomic_write_text, write_json
from aot_fast.settings import SettingsError, differences, load, to_yaml

FINISHED = "FINISHED"
"""Marks a folder whose run was played to its end."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def open_folder(config: Config, fresh: bool) -> tuple[Path, bool]:
    """(folder, finished) of the run, created if need be.

    Raises SettingsError when the folder cannot be written or belongs to another configuration. `fresh` moves an old one aside.
    """
    folder = Path(config.run.folder) / config.run.name
    saved = folder / "config.yaml"
    if saved.is_file() and fresh:
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        print(f"the earlier run is now in {aside}", flush=True)
    if saved.is_file():
        changed = differences(load(str(saved)), config)
        if changed:
            lines = "\n  ".join(changed)
            raise SettingsError(
                f"{folder} holds a run with other settings; give another --run.name, or --fresh to move it aside:\n  {lines}"
            )
        return folder, (folder / FINISHED).is_file()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(saved, to_yaml(config))
    except OSError as error:
        raise SettingsError(f"run.folder = {config.run.folder!r}: cannot be written: {error}") from error
    return folder, False


class StopFlag:
    """Raised by the first SIGTERM or SIGUSR1; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal = 0
        for number in SIGNALS:
            signal.signal(number, self._raise)

    def _raise(self, number: int, frame: object) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number


def write_exit(folder: Path, rank: int, code: int, reason: str) -> None:
    """torchrun's own exit code says nothing about the workers': what became of them stands in `exit.json`."""
    if rank == 0:
        write_json(folder / "exit.json", {"code": code, "reason": reason, "time": time.strftime("%Y-%m-%dT%H:%M:%S")})
