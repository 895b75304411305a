"""Photographs as people have them go through rollout, edit, reward and update; what is wrong with them is said, and nothing is lost."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from aot_fast.metrics import read_rows
from tests.conftest import ROOT, launch

SHORT = """
--game.warmup_steps 1 --game.rounds 1 --game.attacker_steps 1 --game.defender_steps 1 --attacker.prompts_per_step 2
--attacker.group_size 2 --attacker.num_steps 4 --attacker.window 1 --attacker.window_range [0,2] --curation.num_questions 3
--curation.edits_per_question 1 --defender.prompts_per_step 2 --defender.prompts_per_try 4 --defender.max_generation_batches 1
--reward.trials 2 --reward.solvable_trials 0 --reward.poor_codec warn --reward.q_low -1 --reward.q_high -0.9 --metrics.trackers []
--data.heldout_fraction 0.25 --data.num_train 0 --data.num_heldout 0
""".split()


@pytest.fixture
def photos(tmp_path):
    """The four photographs (10 to 12 megapixels, one MPO), and copies of them: rotated by EXIF, transparent, grey, a JPEG named .png."""
    source = Path(os.environ.get("AOT_FAST_DATA", ROOT.parent / "shared" / "data")) / "photos"
    if not source.is_dir():
        pytest.skip(f"no photographs in {source}; set AOT_FAST_DATA to a folder that has photos/questions.jsonl")
    folder = tmp_path / "photos"
    shutil.copytree(source, folder)
    os.chmod(folder, 0o755)
    lines = [json.loads(line) for line in (source / "questions.jsonl").read_text().splitlines()]
    first = lines[0]
    image = Image.open(source / first["image"])
    upright = image.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees; a viewer turns it back
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "rotated.jpg", exif=exif)
    upright.copy().resize((800, 600)).convert("RGBA").save(folder / "transparent.png")
    upright.convert("L").save(folder / "grey.jpg")
    upright.save(folder / "really_a_jpeg.png", format="JPEG")
    for name in ("rotated.jpg", "transparent.png", "grey.jpg", "really_a_jpeg.png"):
        scale = (800 / upright.width, 600 / upright.height) if name == "transparent.png" else (1, 1)
        boxes = [[x * scale[0], y * scale[1], w * scale[0], h * scale[1]] for x, y, w, h in first["target_boxes"]]
        lines.append(first | {"id": name, "image": name, "target_boxes": boxes})
    write(folder, lines)
    return folder, lines


def write(folder, lines):
    path = folder / "mine.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")


def play(folder, *more):
    words = ["--data.train", str(folder / "mine.jsonl"), "--data.images", str(folder)]
    return launch(1, "-m", "aot_fast", "run", "tiny", "--run.folder", str(folder / "runs"), *words, *SHORT, *more, timeout_s=280)


def test_photographs_are_played_and_a_broken_one_is_quarantined(photos):
    folder, lines = photos
    (folder / "broken.jpg").write_bytes((folder / lines[0]["image"]).read_bytes()[:200_000])
    write(folder, [*lines, lines[0] | {"id": "broken", "image": "broken.jpg"}])
    done = play(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    run = folder / "runs" / "tiny"
    bad = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in bad] == ["broken"] and bad[0]["reason"]
    played = {
        json.loads(line)["id"] for name in ("train", "heldout") for line in (run / "data" / f"{name}.jsonl").read_text().splitlines()[1:]
    }
    assert played == {line["id"] for line in lines}
    rows = read_rows(run / "metrics.jsonl")
    assert [row["phase"] for row in rows] == ["warmup", "attack", "defend"]
    assert all(row.get("applied", 1) == 1 for row in rows)
    assert (run / "curated" / "round_001" / "edits.jsonl").read_text() and (run / "report.html").stat().st_size > 0


def test_a_bad_line_is_named_and_no_run_begins(photos):
    folder, lines = photos
    write(folder, [lines[0], lines[1] | {"answer": "Z"}, "{not json", *lines[2:]])
    done = play(folder)
    assert done.returncode == 1
    assert "mine.jsonl:2: answer" in done.stderr and "mine.jsonl:3: line" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "runs" / "tiny" / "checkpoints").exists()
