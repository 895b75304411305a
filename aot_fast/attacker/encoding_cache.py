"""Encodings that were made before: of a group's samples, of an earlier round, by another rank or in another run.

The text encoder (7 B parameters in Qwen-Image-Edit) sees a picture and its prompt once, and leaves the GPU when all that a step wants is
there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from aot_fast.attacker.encoding import NUMBERED, TEMPLATE, TEMPLATE_TOKENS, VISION, Encoding, Pictures, encode, rgb
from aot_fast.config import AttackerConfig

if TYPE_CHECKING:
    from aot_fast.attacker.model import Attacker

SETTINGS = ("target_pixels", "reference_pixels", "condition_pixels", "context_pixels", "still_vae", "negative_prompt")
"""Of the Attacker, on which an encoding depends; and whether there is guidance at all."""
FORMAT = 2
"""To be raised when an encoding is made otherwise than before."""


class Encodings:
    """Encodings by what they are of. `config.encoding_bytes` of them are kept in host memory, the oldest given up first; with `folder` all
    of them on disk, where other processes find them.
    """

    def __init__(self, config: AttackerConfig, pipeline: Path, dtype: torch.dtype, folder: Path | None = None):
        self.folder, self.max_bytes = folder, config.encoding_bytes
        settings = {name: getattr(config, name) for name in SETTINGS} | {"guided": config.guidance > 1, "dtype": str(dtype)}
        files = _files(pipeline, ("model_index.json", "vae", "text_encoder", "tokenizer", "processor"))
        self._salt = json.dumps([FORMAT, TEMPLATE, VISION, NUMBERED, TEMPLATE_TOKENS, settings, files]).encode()
        self._kept: OrderedDict[str, Encoding] = OrderedDict()
        self._bytes = 0
        self._refused = False
        self.num_made = self.num_found = 0

    def __call__(
        self, attacker: Attacker, images: Sequence[Pictures], prompts: Sequence[str], windows: Sequence[bool] = ()
    ) -> list[Encoding]:
        """As encoding.encode, on the Attacker's device; those already known are not made again. Windows are not kept: the next step's lies
        elsewhere."""
        images = [rgb(pictures) for pictures in images]
        flags = windows or [False] * len(images)
        keys = [self.key(*asked) for asked in zip(images, prompts, flags, strict=True)]
        known = {key: None if flag else self._find(key) for key, flag in dict(zip(keys, flags)).items()}
        missing = [keys.index(key) for key, encoding in known.items() if encoding is None]
        self.num_found += len(known) - len(missing)
        if missing:
            self.num_made += len(missing)
            with attacker.encoders():
                made = encode(attacker, *([xs[i] for i in missing] for xs in (images, prompts, flags)))
            for i, encoding in zip(missing, made):
                known[keys[i]] = encoding if flags[i] else self._keep(keys[i], encoding)
        device = attacker.runtime.device
        moved = {key: _to(encoding, device) for key, encoding in known.items()}
        return [moved[key] for key in keys]

    def key(self, pictures: Pictures, prompt: str, window: bool = False) -> str:
        """Hash of all pictures' pixels, the prompt, and all settings and weights that make an encoding."""
        digest, images = hashlib.sha256(self._salt), rgb(pictures)
        shape = repr(([image.size for image in images], window)).encode()
        for part in (shape, *(image.tobytes() for image in images), prompt.encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
        return digest.hexdigest()

    def _find(self, key: str) -> Encoding | None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            return self._remember(key, _read(path))
        except (SafetensorError, KeyError, ValueError, TypeError, OSError):
            return None  # cut short, or of another version: it is made and written again

    def _keep(self, key: str, encoding: Encoding) -> Encoding:
        encoding = _to(encoding, torch.device("cpu"))
        path = self._path(key)
        if path is not None and not self._refused:
            unfinished = path.with_suffix(f".{uuid4().hex}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(encoding, unfinished)
                os.replace(unfinished, path)  # whole or not at all, also where two ranks write the same one
            except (OSError, SafetensorError) as error:
                with contextlib.suppress(OSError):
                    unfinished.unlink()
                self._refused = True
                warnings.warn(
                    f"attacker.encoding_folder: {self.folder} takes no more files ({error}); the run goes on without", stacklevel=2
                )
        return self._remember(key, encoding)

    def _remember(self, key: str, encoding: Encoding) -> Encoding:
        self._kept[key] = encoding
        self._bytes += _size(encoding)
        while self._bytes > self.max_bytes and len(self._kept) > 1:
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        return encoding

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / f"{key}.safetensors"


def _files(pipeline: Path, parts: Sequence[str]) -> list[tuple[str, Any]]:
    """Names of files; of the small ones (configurations) what they hold, of the others size and date."""
    found: list[tuple[str, Any]] = [("folder", str(pipeline.resolve()))]
    for path in sorted(p for part in parts for p in (pipeline / part, *(pipeline / part).rglob("*")) if p.is_file()):
        stat = path.stat()
        known = hashlib.sha256(path.read_bytes()).hexdigest() if stat.st_size < 1 << 20 else (stat.st_size, stat.st_mtime_ns)
        found.append((str(path.relative_to(pipeline)), known))
    return found


def _tensors(encoding: Encoding) -> dict[str, torch.Tensor]:
    return {f.name: value for f in fields(encoding) if isinstance(value := getattr(encoding, f.name), torch.Tensor)}


def _size(encoding: Encoding) -> int:
    return sum(x.nbytes for x in _tensors(encoding).values())


def _to(encoding: Encoding, device: torch.device) -> Encoding:
    return replace(encoding, **{name: x.to(device) for name, x in _tensors(encoding).items()})


def _write(encoding: Encoding, path: Path) -> None:
    rest = {f.name: getattr(encoding, f.name) for f in fields(encoding) if f.name not in _tensors(encoding)}
    save_file({name: x.contiguous() for name, x in _tensors(encoding).items()}, path, {"rest": json.dumps(rest)})


def _read(path: Path) -> Encoding:
    with safe_open(path, "pt") as file:
        rest = {name: _tuples(x) for name, x in json.loads(file.metadata()["rest"]).items()}
        return Encoding(**rest, **{name: file.get_tensor(name) for name in file.keys()})


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were, at any depth."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
