"""Promises of the JSONL reader: errors that say where and how to mend, nothing outside the image folder, splits by image."""

import json
from pathlib import Path

import pytest

from aot_fast.data.questions import read_questions, split_heldout, write_questions
from aot_fast.data.schema import Question

GOOD = {
    "id": "one",
    "image": "a/one.jpg",
    "question": "What color is the mug?",
    "options": ["Pink", "Black"],
    "answer": "B",
    "target_boxes": [[1, 2, 30.5, 40]],
    "target_names": ["mug"],
    "kind": "attribute",
}


def write_lines(folder: Path, *lines: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_good_line_becomes_a_question(tmp_path):
    [question] = read_questions(write_lines(tmp_path, GOOD), tmp_path)
    assert question == Question(
        id="one",
        image="a/one.jpg",
        question="What color is the mug?",
        options=("Pink", "Black"),
        answer="B",
        target_boxes=((1, 2, 30.5, 40),),
        target_names=("mug",),
        kind="attribute",
    )


def test_what_is_written_is_read_back(tmp_path):
    open_question = Question(
        id="o", image="b.png", question="Who?", answer="Ödön\u2028the painter", target_boxes=((0, 0, 5, 5),), scene={"x": 1}
    )
    questions = [*read_questions(write_lines(tmp_path, GOOD), tmp_path), open_question]
    write_questions(tmp_path / "again.jsonl", questions)
    assert read_questions(tmp_path / "again.jsonl", tmp_path) == questions


def test_byte_order_mark_windows_line_ends_and_blank_lines_are_taken(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert len(read_questions(path, tmp_path)) == 1


BAD_LINES = {
    "unknown key": ({"optoins": ["a", "b"]}, "optoins: is not a known key; did you mean `options`?"),
    "wrong type": ({"question": 3}, "question: 3 must be a string that is not empty"),
    "empty question": ({"question": "  "}, 'question: "  " must be a string that is not empty'),
    "half a surrogate pair": ({"id": "\ud800"}, "must be a string"),
    "answer letter outside the options": ({"answer": "C"}, 'answer: "C" must be one of the letters A to B of its 2 options'),
    "answer in words": ({"answer": "Black"}, 'write "B"'),
    "small letter": ({"answer": "b"}, "must be one of the letters"),
    "one option": ({"options": ["Pink"]}, "must hold 2 to 26 options"),
    "equal options": ({"options": ["Pink", "Pink"]}, "must differ from each other"),
    "options not a list": ({"options": "Pink"}, "must be a list of strings"),
    "no boxes": ({"target_boxes": []}, "at least one box"),
    "zero width": ({"target_boxes": [[1, 2, 3, 4], [1, 2, 0, 4]]}, "[1, 2, 0, 4] must be four finite numbers"),
    "negative height": ({"target_boxes": [[1, 2, 3, -4]]}, "must be four finite numbers"),
    "three numbers": ({"target_boxes": [[1, 2, 3]]}, "must be four finite numbers"),
    "NaN": ({"target_boxes": [[1, 2, 3, float("nan")]]}, "must be four finite numbers"),
    "infinite": ({"target_boxes": [[float("inf"), 2, 3, 4]]}, "must be four finite numbers"),
    "integer of 400 digits": ({"target_boxes": [[10**400, 2, 3, 4]]}, "must be four finite numbers"),
    "true as a number": ({"target_boxes": [[True, 2, 3, 4]]}, "must be four finite numbers"),
    "names not strings": ({"target_names": [1]}, "target_names: [1] must be a list of strings"),
    "scene not an object": ({"scene": [1]}, "scene: [1] must be an object"),
    "absolute path": ({"image": "/etc/passwd"}, 'image: "/etc/passwd" is an absolute path'),
    "path out of the folder": ({"image": "a/../../secret.png"}, "is a path with `..`"),
    "null byte": ({"image": "a\0.png"}, "image:"),
}


@pytest.mark.parametrize("change, message", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_field_is_named_with_its_line(tmp_path, change, message):
    path = write_lines(tmp_path, {**GOOD, "id": "fine"}, {**GOOD, **change})
    with pytest.raises(ValueError) as error:
        read_questions(path, tmp_path)
    assert f"{path}:2: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "change", [{"question": "a <|image_pad|> b"}, {"options": ["red", "<|im_end|>"]}, {"target_names": ["<|im_start|>"]}]
)
def test_special_tokens_in_what_is_said_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match="special token"):
        read_questions(write_lines(tmp_path, {**GOOD, **change}), tmp_path)


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', "[" * 100_000], ids=["torn", "list", "string", "deeply nested"])
def test_a_line_that_is_no_object_is_an_error(tmp_path, line):
    with pytest.raises(ValueError, match=":1: line: "):
        read_questions(write_lines(tmp_path, line), tmp_path)


def test_missing_keys_are_named(tmp_path):
    with pytest.raises(ValueError) as error:
        read_questions(write_lines(tmp_path, {"id": "one"}), tmp_path)
    for key in ("image", "question", "answer", "target_boxes"):
        assert f":1: {key}: is missing" in str(error.value)


def test_duplicate_ids_name_both_lines(tmp_path):
    with pytest.raises(ValueError, match=r':3: id: "one" stands in line 1 already'):
        read_questions(write_lines(tmp_path, GOOD, {**GOOD, "id": "two"}, GOOD), tmp_path)


def test_ten_errors_come_in_one_message(tmp_path):
    with pytest.raises(ValueError) as error:
        read_questions(write_lines(tmp_path, *[{**GOOD, "id": str(i), "answer": "Z"} for i in range(30)]), tmp_path)
    assert str(error.value).count(" must be one of the letters") == 10
    assert str(error.value).endswith("stopped after 10 errors")


def test_a_symlink_out_of_the_folder_is_refused_and_one_inside_is_not(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "secret.png").touch()
    (images / "real.png").touch()
    (images / "out.png").symlink_to(tmp_path / "secret.png")
    (images / "in.png").symlink_to(images / "real.png")
    assert read_questions(write_lines(tmp_path, {**GOOD, "image": "in.png"}), images)
    with pytest.raises(ValueError, match="symbolic link out of the image folder"):
        read_questions(write_lines(tmp_path, {**GOOD, "image": "out.png"}), images)


def test_an_image_folder_that_is_itself_a_symlink_is_fine(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert read_questions(write_lines(tmp_path, GOOD), tmp_path / "link")


@pytest.mark.parametrize("content, message", [(b"", "holds no question"), (b"\n\n", "holds no question"), (b"\xff\xfe{", "not UTF-8")])
def test_a_file_without_questions_is_an_error(tmp_path, content, message):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_questions(path, tmp_path)


def test_a_missing_file_is_a_value_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="nowhere.jsonl: cannot be read"):
        read_questions(tmp_path / "nowhere.jsonl", tmp_path)


def make_questions(num_images: int, per_image: int = 3) -> list[Question]:
    return [Question(id=f"{i}-{k}", image=f"{i}.png", question="?", answer="x") for i in range(num_images) for k in range(per_image)]


def test_heldout_split_is_by_image_and_complete():
    questions = make_questions(50)
    train, heldout = split_heldout(questions, 0.2, seed=1)
    assert sorted(q.id for q in train + heldout) == sorted(q.id for q in questions)
    assert not {q.image for q in train} & {q.image for q in heldout}
    assert len({q.image for q in heldout}) == 10


def test_heldout_split_depends_on_the_seed_but_not_on_the_order():
    questions = make_questions(50)
    ids = {q.id for q in split_heldout(questions, 0.2, seed=1)[1]}
    assert ids == {q.id for q in split_heldout(questions[::-1], 0.2, seed=1)[1]}
    assert ids != {q.id for q in split_heldout(questions, 0.2, seed=2)[1]}


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.999, 1.0])
def test_both_sides_of_a_split_have_an_image(fraction):
    train, heldout = split_heldout(make_questions(2), fraction, seed=0)
    assert train and heldout


def test_one_image_cannot_be_split():
    with pytest.raises(ValueError, match="data.heldout"):
        split_heldout(make_questions(1), 0.5, seed=0)
