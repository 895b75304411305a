"""Promises of image loading: every kind a user has comes out upright 8-bit RGB; what cannot be used is quarantined with a reason."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aot_fast.data.images import BadImage, ImageStore, load_image, upright_size
from aot_fast.data.questions import read_questions
from aot_fast.data.schema import Question

CAP = 1_000_000
ORIENTATION = 0x0112
PHOTOS = Path(os.environ.get("AOT_FAST_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data") / "photos"


def gradient(width: int = 40, height: int = 20) -> Image.Image:
    """Red grows to the right, green downwards, so that a turned picture is told from an upright one."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 99)], -1).astype(np.uint8))


def difference(a: Image.Image, b: Image.Image) -> int:
    assert (a.mode, a.size) == (b.mode, b.size)
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that stores an upright picture under this orientation
    upright = gradient()
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert difference(load_image(tmp_path / "a.png", CAP), upright) == 0
    assert upright_size(tmp_path / "a.png", CAP) == upright.size


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_over_white(tmp_path, mode):
    picture = gradient().convert("RGBA")
    picture.putalpha(Image.new("L", picture.size, 0))
    picture = picture.quantize().convert("RGBA") if mode == "PA" else picture.convert(mode)
    picture.save(tmp_path / "a.png")
    assert set(load_image(tmp_path / "a.png", CAP).tobytes()) == {255}


def test_transparent_colour_of_a_palette_becomes_white(tmp_path):
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 200, 10, 10])
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "a.png", transparency=0)
    loaded = load_image(tmp_path / "a.png", CAP)
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((1, 1)) == (200, 10, 10)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_colour_modes_become_rgb(tmp_path, mode):
    picture = gradient().convert(mode)
    name = "a.jpg" if mode == "CMYK" else "a.png"
    picture.save(tmp_path / name, **({"quality": 100, "subsampling": 0} if mode == "CMYK" else {}))
    assert difference(load_image(tmp_path / name, CAP), picture.convert("RGB")) <= 6


def test_16_bit_greyscale_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert [pixel[0] for pixel in np.asarray(load_image(tmp_path / "a.png", CAP))[0]] == [0, 1, 128, 255]


def test_first_frame_of_a_multi_picture_file_is_taken(tmp_path):
    frames = [gradient(), Image.new("RGB", (40, 20), "blue")]
    frames[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:], quality=100, subsampling=0)
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(tmp_path / "a.jpg").n_frames == 2
    assert difference(load_image(tmp_path / "a.jpg", CAP), frames[0]) <= 6
    assert difference(load_image(tmp_path / "a.webp", CAP), frames[0]) == 0


def test_the_content_decides_not_the_name(tmp_path):
    gradient().save(tmp_path / "a.png", format="JPEG", quality=100, subsampling=0)
    assert difference(load_image(tmp_path / "a.png", CAP), gradient()) <= 6


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header says so many pixels, with next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def half_of(format: str, tmp_path: Path) -> bytes:
    path = tmp_path / f"whole.{format}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path, format=format)
    return path.read_bytes()[: path.stat().st_size // 2]


def test_unusable_files_are_refused_with_a_reason(tmp_path):
    gradient().save(tmp_path / "a.gif")
    cases = {
        "empty": (b"", "empty"),
        "text": (b"<html>404</html>", "not an image"),
        "gif": ((tmp_path / "a.gif").read_bytes(), "not an image of the formats PNG, JPEG, WEBP"),
        "thin": (bomb(2000, 10), "2000 x 10 is thinner than 1 : 100"),
        "over the cap": (bomb(1001, 1000), "1001 x 1000 is over the cap of 1000000 pixels"),
        "bomb": (bomb(60_000, 60_000), "60000 x 60000|decompression bomb"),
        "half a png": (half_of("png", tmp_path), "cannot be decoded|not an image"),
        "half a jpeg": (half_of("jpeg", tmp_path), "truncated"),
        "half a webp": (half_of("webp", tmp_path), "cannot be decoded|not an image"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadImage, match=reason):
            load_image(tmp_path / name, CAP)


def test_missing_files_folders_and_pipes_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("nowhere.png", ".", "pipe"):
        with pytest.raises(BadImage, match="no such file"):
            load_image(tmp_path / name, CAP)


def test_the_size_is_read_from_the_header_before_decoding(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(bomb(2000, 2000))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="over the cap"):
        load_image(tmp_path / "a.png", CAP)


def ask(image: str, box: tuple[float, ...] = (0, 0, 10, 10), id: str = "") -> Question:
    return Question(id=id or image, image=image, question="?", answer="x", target_boxes=(box,))


def fill(folder: Path, num_good: int, num_bad: int) -> list[Question]:
    for i in range(num_good):
        gradient().save(folder / f"good-{i}.png")
    for i in range(num_bad):
        (folder / f"bad-{i}.png").write_bytes(b"")
    return [ask(path.name) for path in sorted(folder.glob("*.png"))]


def reasons(path: Path) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in map(json.loads, path.read_text().splitlines())}


def test_bad_images_are_quarantined_and_the_others_kept(tmp_path):
    questions = fill(tmp_path, num_good=3, num_bad=2)
    usable = ImageStore(tmp_path, CAP).check(questions, tmp_path / "bad_samples.jsonl", 0.01)
    assert [q.id for q in usable] == ["good-0.png", "good-1.png", "good-2.png"]
    assert reasons(tmp_path / "bad_samples.jsonl") == {"bad-0.png": "the file is empty", "bad-1.png": "the file is empty"}


def test_boxes_outside_the_image_after_rotation_are_quarantined(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    gradient(40, 20).save(tmp_path / "turned.jpg", exif=exif)  # upright: 20 wide, 40 high
    questions = [
        ask("turned.jpg", (0, 20, 20, 20), "inside"),
        ask("turned.jpg", (20, 0, 20, 20), "outside"),
        ask("turned.jpg", (0, 0, 30, 10), "partly outside"),
        ask("turned.jpg", (-0.5, 0, 21, 10), "rounded"),
    ]
    usable = ImageStore(tmp_path, CAP).check(questions, tmp_path / "bad.jsonl", 1.0)
    assert {q.id: q.target_boxes for q in usable} == {"inside": ((0, 20, 20, 20),), "rounded": ((0, 0, 20, 10),)}
    assert set(reasons(tmp_path / "bad.jsonl")) == {"outside", "partly outside"}
    assert "[20, 0, 20, 20] lies outside the image of 20 x 40 pixels" in reasons(tmp_path / "bad.jsonl")["outside"]


def test_ten_bad_images_never_abort_and_eleven_do(tmp_path):
    questions = fill(tmp_path, num_good=1, num_bad=11)
    store = ImageStore(tmp_path, CAP)
    assert len(store.check(questions[1:], tmp_path / "bad.jsonl", 0.01)) == 1
    with pytest.raises(
        ValueError, match=r"11 of 12 images cannot be used, over 0.01; the first: bad-0.png: the file is empty; all in .*bad.jsonl"
    ):
        store.check(questions, tmp_path / "bad.jsonl", 0.01)
    assert len(store.check(questions, tmp_path / "bad.jsonl", 0.95)) == 1


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no question is left"):
        ImageStore(tmp_path, CAP).check(fill(tmp_path, num_good=0, num_bad=2), tmp_path / "bad.jsonl", 1.0)


def test_two_data_sets_share_a_quarantine_file_and_a_mended_image_leaves_it(tmp_path):
    questions = fill(tmp_path, num_good=2, num_bad=2)
    store, path = ImageStore(tmp_path, CAP), tmp_path / "bad_samples.jsonl"
    store.check([questions[0], questions[2]], path, 1.0)
    store.check([questions[1], questions[3]], path, 1.0)
    assert set(reasons(path)) == {"bad-0.png", "bad-1.png"}
    gradient().save(tmp_path / "bad-0.png")
    store.check([questions[0], questions[2]], path, 1.0)
    assert set(reasons(path)) == {"bad-1.png"}


def test_each_image_is_decoded_once(tmp_path, monkeypatch):
    fill(tmp_path, num_good=1, num_bad=0)
    loaded = []
    monkeypatch.setattr("aot_fast.data.images.load_image", lambda path, cap: loaded.append(path) or gradient())
    store = ImageStore(tmp_path, CAP)
    store.check([ask("good-0.png", id=str(i)) for i in range(5)], tmp_path / "bad.jsonl", 1.0)
    assert len(loaded) == 1
    assert store.load(ask("good-0.png")) is store.load(ask("good-0.png"))
    assert len(loaded) == 2


def test_the_store_forgets_the_oldest_beyond_its_bytes(tmp_path):
    questions = fill(tmp_path, num_good=3, num_bad=0)
    store = ImageStore(tmp_path, CAP, cache_bytes=2 * 3 * 40 * 20)
    first, second = store.load(questions[0]), store.load(questions[1])
    assert store.load(questions[0]) is first
    store.load(questions[2])
    assert store.load(questions[0]) is first
    assert store.load(questions[1]) is not second


def test_photographs_as_people_have_them(tmp_path):
    if not PHOTOS.exists():
        pytest.skip(f"{PHOTOS} is not there")
    questions = read_questions(PHOTOS / "questions.jsonl", PHOTOS)
    store = ImageStore(PHOTOS, 64_000_000)
    assert store.check(questions, tmp_path / "bad.jsonl", 0.0) == questions
    assert not (tmp_path / "bad.jsonl").exists()
    assert store.load(questions[2]).mode == "RGB"
