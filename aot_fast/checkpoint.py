"""The pair of players as one atomic unit (RELIABILITY.md, "Checkpoint of the pair").

A checkpoint is a folder `round_003_defend_step_000120` with attacker/, defender/ (DeepSpeed's files), extra tensors and state.json;
it exists from the moment its MANIFEST.json, written last, is there with the size and hash of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from aot_fast.engine import Runtime

SCHEMA = 1
MANIFEST = "MANIFEST.json"
CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Cursor:
    """Where the game stands: the next optimizer step (or the whole, for phases without steps) to be done."""

    round: int
    phase: str
    step: int = 0

    @property
    def folder(self) -> str:
        return f"round_{self.round:03d}_{self.phase}_step_{self.step:06d}"


class BadCheckpoint(RuntimeError):
    """A checkpoint's manifest, sizes or hashes do not hold."""


def save_pair(
    folder: Path, cursor: Cursor, runtime: Runtime, write: Callable[[Path], None], state: dict[str, Any], keep: int, keep_always: str = ""
) -> Path | None:
    """Write the checkpoint of `cursor` below `folder`, then prune to the `keep` newest (and `keep_always`).

    `write(stage)` is called on every rank and puts the players' files into the staging folder; `state` must be JSON.
    An error on any rank costs this checkpoint only: it is said, and None returned. A collective.
    """
    target, stage = folder / cursor.folder, folder / f".tmp-{cursor.folder}"
    error = ""
    if runtime.rank == 0:
        try:
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True)
        except OSError as failed:
            error = str(failed)
    error = runtime.broadcast(error)
    if not error:
        try:
            write(stage)
            torch.save(torch.get_rng_state(), stage / f"rng_rank_{runtime.rank:05d}.pt")
        except (OSError, RuntimeError) as failed:  # a full disk is a RuntimeError of torch.save
            error = f"rank {runtime.rank}: {failed}"
    error = "; ".join(filter(None, runtime.gather(error)))
    if runtime.rank == 0 and not error:
        try:
            _commit(stage, target, cursor, runtime.world, state)
        except OSError as failed:
            error = str(failed)
    error = runtime.broadcast(error)
    if error:
        if runtime.rank == 0:
            print(f"checkpoint {cursor.folder} was not written: {error}; the run goes on", flush=True)
            shutil.rmtree(stage, ignore_errors=True)
        return None
    if runtime.rank == 0:
        _prune(folder, max(2, keep), {target.name, keep_always})
    return target


def _commit(stage: Path, target: Path, cursor: Cursor, world: int, state: dict[str, Any]) -> None:
    (stage / "state.json").write_text(json.dumps(state, indent=1))
    files = {}
    for path in sorted(p for p in stage.rglob("*") if p.is_file()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(stage))] = [path.stat().st_size, sha256(path)]
    if target.exists():  # the same cursor again, after a resume: the older one is complete and is replaced as a whole
        shutil.rmtree(target)
    stage.rename(target)
    manifest = {"schema": SCHEMA, "world": world, "cursor": asdict(cursor), "files": files, "torch": torch.__version__}
    staged = target / f".{MANIFEST}"
    with staged.open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, target / MANIFEST)
    for parent in (target, target.parent):
        descriptor = os.open(parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all have their size and hash. Raises BadCheckpoint with the reason."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise BadCheckpoint(f"no valid {MANIFEST}: {error}") from error
    if manifest.get("schema") != SCHEMA:
        raise BadCheckpoint(f"schema {manifest.get('schema')}, this version reads {SCHEMA}")
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise BadCheckpoint(f"{name} is missing")
        if file.stat().st_size != size or sha256(file) != digest:
            raise BadCheckpoint(f"{name} is not what was written (size or hash)")
    return manifest


def find_newest(folder: Path, runtime: Runtime) -> tuple[Path, dict[str, Any]] | None:
    """The newest good checkpoint and its manifest, agreed on by all ranks; bad ones are renamed `*.corrupt`. A collective."""
    found = None
    if runtime.rank == 0 and folder.is_dir():
        for stale in folder.glob(".tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        for path in _newest_first(folder):
            try:
                found = (path, read_manifest(path))
                break
            except BadCheckpoint as why:
                print(f"checkpoint {path.name} is left aside: {why}", flush=True)
                path.rename(_free_name(path))
    found = runtime.broadcast(found)
    if found and found[1]["world"] != runtime.world:
        raise ValueError(
            f"the checkpoint {found[0]} was written by {found[1]['world']} processes and this launch has {runtime.world}; "
            f"use --nproc_per_node {found[1]['world']}, or --fresh to start anew"
        )
    return found


def _newest_first(folder: Path) -> list[Path]:
    """Checkpoints by the time of their manifest; those without one come first, so that they are found out."""
    paths = [p for p in folder.iterdir() if p.is_dir() and p.name.startswith("round_") and ".corrupt" not in p.name]

    def age(path: Path) -> tuple[int, float]:
        manifest = path / MANIFEST
        return (1, manifest.stat().st_mtime_ns) if manifest.exists() else (2, 0.0)

    return sorted(paths, key=age, reverse=True)


def _free_name(path: Path) -> Path:
    for n in range(1000):
        name = path.with_name(f"{path.name}.corrupt" + (f".{n}" if n else ""))
        if not name.exists():
            return name
    raise OSError(f"{path}: a thousand corrupt copies of one checkpoint")


def _prune(folder: Path, keep: int, always: set[str]) -> None:
    for path in _newest_first(folder)[keep:]:
        if path.name not in always:
            shutil.rmtree(path, ignore_errors=True)
