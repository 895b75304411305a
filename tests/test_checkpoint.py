"""The pair checkpoint: whole or not there, and checked before it is used."""

import json

import pytest
import torch

from aot_fast.checkpoint import MANIFEST, BadCheckpoint, Cursor, find_newest, read_manifest, save_pair


def write(stage):
    (stage / "attacker").mkdir()
    (stage / "defender").mkdir()
    torch.save(torch.arange(100), stage / "attacker" / "weights.pt")
    torch.save(torch.arange(50), stage / "defender" / "weights.pt")


def save(folder, runtime, step, keep=3):
    return save_pair(folder, Cursor(1, "attack", step), runtime, write, {"step": step}, keep)


def empty(path):
    (path / MANIFEST).write_text("")


def truncate(path):
    file = path / "attacker" / "weights.pt"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_byte(path):
    file = path / "defender" / "weights.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def remove_a_file(path):
    (path / "state.json").unlink()


def kill_before_the_manifest(path):
    (path / MANIFEST).unlink()


@pytest.mark.parametrize("damage", [empty, truncate, flip_a_byte, remove_a_file, kill_before_the_manifest])
def test_damaged_newest_falls_back_to_the_older(tmp_path, runtime, damage, capsys):
    save(tmp_path, runtime, 1)
    damage(save(tmp_path, runtime, 2))
    path, manifest = find_newest(tmp_path, runtime)
    assert path.name == Cursor(1, "attack", 1).folder and manifest["cursor"]["step"] == 1
    assert list(tmp_path.glob("*.corrupt")) and "left aside" in capsys.readouterr().out
    with pytest.raises(BadCheckpoint):
        read_manifest(next(tmp_path.glob("*.corrupt")))


def test_manifest_lists_every_file_with_size_and_hash(tmp_path, runtime):
    path = save(tmp_path, runtime, 1)
    files = json.loads((path / MANIFEST).read_text())["files"]
    on_disk = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != MANIFEST}
    assert set(files) == on_disk and "rng_rank_00000.pt" in files
    assert read_manifest(path)["world"] == 1


@pytest.mark.parametrize("kind", [OSError, RuntimeError])  # torch.save turns a full disk into a RuntimeError
def test_failed_write_costs_that_checkpoint_only(tmp_path, runtime, capsys, kind):
    save(tmp_path, runtime, 1)

    def disk_full(stage):
        write(stage)
        raise kind("No space left on device")

    assert save_pair(tmp_path, Cursor(1, "attack", 2), runtime, disk_full, {}, 2) is None
    assert "No space left" in capsys.readouterr().out
    assert find_newest(tmp_path, runtime)[1]["cursor"]["step"] == 1
    assert not list(tmp_path.glob(".tmp-*"))


def test_pruning_keeps_at_least_two(tmp_path, runtime):
    for step in range(1, 6):
        save(tmp_path, runtime, step, keep=1)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["4", "5"]


def test_another_world_size_is_refused_with_the_fix(tmp_path, runtime):
    path = save(tmp_path, runtime, 1)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"world": 4}))
    with pytest.raises(ValueError, match="nproc_per_node 4"):
        find_newest(tmp_path, runtime)


def test_no_checkpoint_is_no_error(tmp_path, runtime):
    assert find_newest(tmp_path / "absent", runtime) is None
