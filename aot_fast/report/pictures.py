"""Pictures as they stand in the page: small, inside it as data, with boxes drawn over them by the browser."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops

from aot_fast.data.images import BadImage, load_image, upright_size

MAX_PIXELS = 64_000_000
THUMBNAIL_PX = 320
PIXEL_ART_PX = 128
"""Pictures up to this side are embedded as they are and enlarged by the browser, pixel by pixel."""
GAIN = 4
"""Differences are shown so many times larger."""


@dataclass(frozen=True)
class Picture:
    """An image as it stands in the page."""

    title: str
    uri: str
    """data: URI; empty if the image cannot be had."""
    pixel_art: bool = False
    """Small enough to be enlarged pixel by pixel."""
    width: int = 1
    height: int = 1
    """Of the original: the coordinate system of `boxes`."""
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    reason: str = ""
    """Why there is no image."""


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(image: Image.Image, exact: bool = True) -> str:
    """data: URI of a picture small enough to stand in a page by the dozen; pixel art is kept to the bit if `exact`."""
    buffer = io.BytesIO()
    if max(image.size) <= PIXEL_ART_PX and exact:
        image.save(buffer, format="PNG")
        return data_uri(buffer.getvalue(), "png")
    small = image.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    small.save(buffer, format="JPEG", quality=85)
    return data_uri(buffer.getvalue(), "jpeg")


def size_of(path: Path) -> tuple[int, int] | None:
    """Upright size of an image; None if it cannot be read."""
    try:
        return upright_size(path, MAX_PIXELS)
    except BadImage:
        return None


def load_first(paths: Iterable[Path]) -> Image.Image | str:
    """The first of the files that exists, decoded; else the reason."""
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return "not kept by this run"
    try:
        return load_image(path, MAX_PIXELS)
    except BadImage as error:
        return str(error)


def _picture(title: str, image: Image.Image | str, size: tuple[int, int], boxes: Iterable[Iterable[float]], exact: bool = True) -> Picture:
    if isinstance(image, str):
        return Picture(title, "", reason=image)
    return Picture(title, thumbnail(image, exact), max(image.size) <= PIXEL_ART_PX, *size, tuple(tuple(box) for box in boxes))


def before_after(
    before: Image.Image | str, after: Image.Image | str, boxes: Iterable[Iterable[float]], size: tuple[int, int] | None
) -> tuple[Picture, ...]:
    """Before, after and difference, each of its own size.

    `boxes` are in pixels of the original of `size`, which may be larger than what is shown; of unknown size (None), they are left out.
    """
    shown = [image for image in (before, after) if not isinstance(image, str)]
    boxes, size = tuple(boxes) if size else (), size or (1, 1)
    difference: Image.Image | str = "needs both pictures"
    if len(shown) == 2:
        difference = ImageChops.difference(before.resize(after.size, Image.Resampling.LANCZOS), after).point(lambda value: value * GAIN)
    return (
        _picture("before", before, size, boxes),
        _picture("after", after, size, boxes),
        # Amplified noise is the largest of the three as PNG, and nobody reads it pixel by pixel.
        _picture(f"difference × {GAIN}", difference, size, boxes, exact=False),
    )
