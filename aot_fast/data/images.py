"""Images as people have them: decoded to upright 8-bit RGB, or refused with a reason and quarantined.

The content decides what a file is, never its name. Accepted are PNG, JPEG (also multi-picture MPO) and WEBP: every further decoder
is a further way in for a hostile file.
"""

from __future__ import annotations

import json
import math
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from aot_fast.data.schema import Box, Question
from aot_fast.metrics import atomic_write_text

FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats decoded; Pillow takes MPO for a JPEG."""
BOX_SLACK_PX = 1.0
"""A box may overshoot its image by so much (rounded annotations) and is then cut to it."""
MAX_ASPECT = 100
"""Side to side; Qwen2-VL's image processor refuses what is thinner than 1 : 200 after resizing."""
NUM_TOLERATED = 10
"""Bad samples that never end a run, however small the data set."""


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason."""


def resolve_inside(folder: Path, image: str) -> Path:
    """Path of `image` in `folder`; ValueError for an absolute path, a `..` and a symlink that lead out of it."""
    if os.path.isabs(image):
        raise ValueError("an absolute path; give the path relative to the image folder")
    if ".." in Path(image).parts:
        raise ValueError("a path with `..`; give a path inside the image folder")
    path = folder / image
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError("a symbolic link out of the image folder; copy the file into it")
    return path


def _open(path: Path, max_pixels: int) -> Image.Image:
    """The image with its header read and its size checked, nothing decoded."""
    with warnings.catch_warnings():
        # Pillow warns at a size of its own; the cap below is ours.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(path, formats=FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise BadImage(f"{width} x {height} is over the cap of {max_pixels} pixels (data.max_image_pixels)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        image.close()
        raise BadImage(f"{width} x {height} is thinner than 1 : {MAX_ASPECT}")
    return image


def upright_size(path: Path | str, max_pixels: int) -> tuple[int, int]:
    """(width, height) in pixels after EXIF rotation, from the header alone; BadImage if it cannot be read."""
    try:
        with _open(Path(path), max_pixels) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # 5 to 8 lie on their side
            return image.size[::-1] if turned else image.size
    except BadImage:
        raise
    except Exception as error:  # as in load_image
        raise BadImage(f"cannot be read: {type(error).__name__}: {error}") from None


def _scale_16_bit(image: Image.Image) -> Image.Image:
    """Greyscale of 16 bits to 8, scaled: Pillow's own conversion clips everything over 255 to white."""
    values = np.asarray(image).astype(np.float32) / 257.0
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _scale_16_bit(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def load_image(path: Path | str, max_pixels: int) -> Image.Image:
    """Decode the first frame of a file to upright RGB, transparency over white; BadImage with the reason if that cannot be done."""
    path = Path(path)
    try:
        if not path.is_file():
            raise BadImage("there is no such file")
        if path.stat().st_size == 0:
            raise BadImage("the file is empty")
        with _open(path, max_pixels) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not an image of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # a malformed file makes decoders raise nearly anything: OSError, SyntaxError, struct.error, zlib.error
        raise BadImage(f"cannot be decoded: {type(error).__name__}: {error}") from None


def fit_boxes(boxes: Iterable[Box], size: tuple[int, int]) -> tuple[Box, ...]:
    """Boxes cut to an image of `size` (width, height) pixels; BadImage where one lies outside by more than `BOX_SLACK_PX`."""
    width, height = size
    fitted = []
    for x, y, w, h in boxes:
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if max(left - x, top - y, x + w - right, y + h - bottom) > BOX_SLACK_PX or right <= left or bottom <= top:
            raise BadImage(f"box [{x:g}, {y:g}, {w:g}, {h:g}] lies outside the image of {width} x {height} pixels (after EXIF rotation)")
        fitted.append((left, top, right - left, bottom - top))
    return tuple(fitted)


class ImageStore:
    """Images of one folder, decoded when asked for; the last ones used stay in memory. Safe to use from several threads."""

    def __init__(self, folder: Path | str, max_pixels: int, cache_bytes: int = 2**29):
        self.folder = Path(folder)
        self.max_pixels = max_pixels
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[str, Image.Image] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def load(self, question: Question) -> Image.Image:
        """The question's image, upright RGB; shared with other callers, so copy it before drawing on it. Raises BadImage."""
        with self._lock:
            if question.image in self._cache:
                self._cache.move_to_end(question.image)
                return self._cache[question.image]
        image = load_image(self.folder / question.image, self.max_pixels)
        with self._lock:
            self._remember(question.image, image)
        return image

    def _remember(self, name: str, image: Image.Image) -> None:
        if name in self._cache:
            return
        self._cache[name] = image
        self._cached_bytes += 3 * math.prod(image.size)
        while self._cached_bytes > self.cache_bytes:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= 3 * math.prod(dropped.size)

    def check(self, questions: Sequence[Question], bad_samples_path: Path | str, max_bad_fraction: float) -> list[Question]:
        """Decode every image once; return the usable questions, their boxes cut to the image, and quarantine the others.

        Bad samples go to `bad_samples_path` as {id, image, reason}. ValueError if more than `max_bad_fraction` of the images (or, by
        their boxes, of the questions) and more than 10 are bad, or nothing is left.
        """
        sizes = self._sizes(sorted({question.image for question in questions}))
        usable, bad = [], []
        for question in questions:
            try:
                if isinstance(reason := sizes[question.image], BadImage):
                    raise reason
                usable.append(replace(question, target_boxes=fit_boxes(question.target_boxes, sizes[question.image])))
            except BadImage as error:
                bad.append({"id": question.id, "image": question.image, "reason": str(error)})
        _quarantine(Path(bad_samples_path), questions, bad)
        first = f"the first: {bad[0]['image']}: {bad[0]['reason']}; all in {bad_samples_path}" if bad else "no questions were given"
        bad_images = sum(isinstance(size, BadImage) for size in sizes.values())
        bad_boxes = len(bad) - sum(isinstance(sizes[question.image], BadImage) for question in questions)
        for what, num_bad, total in (("images", bad_images, len(sizes)), ("questions (by their boxes)", bad_boxes, len(questions))):
            if num_bad > NUM_TOLERATED and num_bad > max_bad_fraction * total:
                raise ValueError(f"data.max_bad_fraction: {num_bad} of {total} {what} cannot be used, over {max_bad_fraction:g}; {first}")
        if not usable:
            raise ValueError(f"no question is left: none of {len(sizes)} images in {self.folder} can be used; {first}")
        return usable

    def _sizes(self, names: list[str]) -> dict[str, tuple[int, int] | BadImage]:
        """Size in pixels, or the reason against it, of each image by a full decode; Pillow decodes outside the interpreter lock."""

        def size_of(name: str) -> tuple[int, int] | BadImage:
            try:
                return load_image(self.folder / name, self.max_pixels).size
            except BadImage as error:
                return error

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return dict(zip(names, pool.map(size_of, names), strict=True))


def _quarantine(path: Path, questions: Sequence[Question], bad: list[dict[str, str]]) -> None:
    """Write `bad`, keeping what other data sets put into the file; what an earlier check said of these questions is out of date."""
    checked = {(question.id, question.image) for question in questions}
    kept = []
    if path.exists() and path.stat().st_size:
        before = map(json.loads, path.read_text(encoding="utf-8").strip().split("\n"))
        kept = [row for row in before if (row["id"], row["image"]) not in checked]
    rows = kept + bad
    if rows or path.exists():
        atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
