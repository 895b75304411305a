"""Questions as JSON lines: read strictly, written, and split by image.

A line is {"id", "image", "question", "answer", "target_boxes", and optionally "options", "target_names", "kind", "scene"}; what each
means stands at `Question` in `schema.py`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aot_fast.data.images import resolve_inside
from aot_fast.data.schema import LETTERS, Question
from aot_fast.metrics import atomic_write_text

SPECIAL_TOKEN = re.compile(r"<\|[A-Za-z_]+\|>")
MAX_ERRORS = 10
"""Errors said at once."""


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_text(value: Any) -> bool:
    # JSON can spell half a surrogate pair, which no file or hash can take later.
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_number(value: Any) -> bool:
    # The bound refuses NaN and infinity too, and, unlike math.isfinite, survives an integer of 400 digits.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value)) and value[2] > 0 and value[3] > 0


def _check_text(value: Any) -> str:
    return "" if _is_text(value) else "must be a string that is not empty"


def _check_spoken(value: Any) -> str:
    """Texts that go into a prompt: a special token there would pass for a picture or another turn."""
    texts = value if isinstance(value, list) else [value]
    found = next((match[0] for text in texts if isinstance(text, str) and (match := SPECIAL_TOKEN.search(text))), None)
    return f"holds the special token {found}; take it out" if found else ""


def _check_options(value: Any) -> str:
    if not isinstance(value, list) or not all(map(_is_text, value)):
        return "must be a list of strings that are not empty; leave the key out for an open question"
    if value and not 2 <= len(value) <= len(LETTERS):
        return f"must hold 2 to {len(LETTERS)} options; leave the key out for an open question"
    return "" if len(set(value)) == len(value) else "must differ from each other; merge the options that are the same"


def _check_boxes(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return "must be a list of at least one box [x, y, w, h]; give the objects that decide the answer, or the whole image"
    wrong = next((box for box in value if not _is_box(box)), None)
    if wrong is None:
        return ""
    return f"{_show(wrong)} must be four finite numbers [x, y, w, h] in pixels with w > 0 and h > 0; mend or leave out the box"


def _check_names(value: Any) -> str:
    return "" if isinstance(value, list) and all(map(_is_text, value)) else "must be a list of strings that are not empty"


def _check_kind(value: Any) -> str:
    return "" if isinstance(value, str) else "must be a string"


def _check_scene(value: Any) -> str:
    return "" if value is None or isinstance(value, dict) else "must be an object or null"


FIELDS: dict[str, Callable[[Any], str]] = {
    "id": _check_text,
    "image": _check_text,
    "question": _check_text,
    "answer": _check_text,
    "target_boxes": _check_boxes,
    "options": _check_options,
    "target_names": _check_names,
    "kind": _check_kind,
    "scene": _check_scene,
}
"""Rule of each key: the broken rule and its fix in words, or nothing."""
SPOKEN = ("question", "options", "target_names")
"""Keys whose texts go into a prompt."""
REQUIRED = ("id", "image", "question", "answer", "target_boxes")


def _field_errors(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in record.keys() - FIELDS.keys():
        nearest = difflib.get_close_matches(key, FIELDS, 1)
        yield key, "is not a known key; " + (f"did you mean `{nearest[0]}`?" if nearest else f"known are {', '.join(FIELDS)}")
    for key in REQUIRED:
        if key not in record:
            yield key, "is missing; every line needs it"
    for key, check in FIELDS.items():
        if key in record and (rule := check(record[key]) or (key in SPOKEN and _check_spoken(record[key]))):
            yield key, f"{_show(record[key])} {rule}"


def _answer_errors(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """With options the answer is a letter; asked only of a record whose fields are right by themselves."""
    letters = LETTERS[: len(record.get("options", ()))]
    answer = record["answer"]
    if not letters or (len(answer) == 1 and answer in letters):
        return
    options = record["options"]
    fix = f'; write "{letters[options.index(answer)]}"' if answer in options else "; write the letter of the right option"
    yield "answer", f"{_show(answer)} must be one of the letters {letters[0]} to {letters[-1]} of its {len(letters)} options{fix}"


def _image_errors(record: dict[str, Any], images: Path) -> Iterator[tuple[str, str]]:
    try:
        resolve_inside(images, record["image"])
    except (ValueError, OSError) as error:
        yield "image", f"{_show(record['image'])} is {error}"


def _parse(line: str, images: Path, first_lines: dict[str, int]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The record of a line and its errors as (field, value with rule and fix)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, [("line", f"{_show(line.strip())} is not JSON ({error}); write one object a line")]
    if not isinstance(record, dict):
        return {}, [("line", f"{_show(record)} must be a JSON object {{...}}")]
    errors = list(_field_errors(record))
    if not errors:
        errors = [*_answer_errors(record), *_image_errors(record, images)]
    if isinstance(name := record.get("id"), str) and name in first_lines:
        errors.append(("id", f"{_show(name)} stands in line {first_lines[name]} already; ids must be unique, rename one"))
    return record, errors


def _to_question(record: dict[str, Any]) -> Question:
    lists = {key: tuple(record.get(key, ())) for key in ("options", "target_names")}
    return Question(**{**record, **lists, "target_boxes": tuple(map(tuple, record["target_boxes"]))})


def _lines(path: Path) -> list[str]:
    try:
        # Windows editors put a byte order mark first, which `utf-8-sig` takes off.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the path of a JSONL file of questions") from None


def read_questions(path: Path | str, images: Path | str) -> list[Question]:
    """Questions of a JSONL file whose images lie in the folder `images`; their paths stay relative to it.

    Raises one ValueError with up to 10 errors as `file:line: field: value, rule, fix`. Whether the images exist and decode is
    `ImageStore.check`'s to find out.
    """
    path, images = Path(path), Path(images)
    questions: list[Question] = []
    errors: list[str] = []
    first_lines: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        record, found = _parse(line, images, first_lines)
        errors += [f"{path}:{number}: {field}: {text}" for field, text in found]
        if len(errors) >= MAX_ERRORS:
            errors = [*errors[:MAX_ERRORS], f"stopped after {MAX_ERRORS} errors"]
            break
        if isinstance(record.get("id"), str):
            first_lines.setdefault(record["id"], number)
        if not found:
            questions.append(_to_question(record))
    if errors:
        raise ValueError("\n".join(errors))
    if not questions:
        raise ValueError(f"{path}: holds no question; write one JSON object a line")
    return questions


def write_questions(path: Path | str, questions: Iterable[Question]) -> None:
    """Write questions in the form that `read_questions` reads, whole or not at all."""
    atomic_write_text(Path(path), "".join(json.dumps(asdict(question), ensure_ascii=False) + "\n" for question in questions))


def split_heldout(questions: Sequence[Question], fraction: float, seed: int) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions, all of one image on one side, about `fraction` of the images (at least one) held out.

    The split depends on the image paths and the seed only, not on the order of the file. ValueError if there are fewer than 2 images.
    """
    images = sorted({question.image for question in questions}, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    if len(images) < 2:
        raise ValueError(f"data.heldout_fraction: {len(images)} image(s) cannot be split into two; add images or give data.heldout")
    heldout = set(images[: min(max(1, round(fraction * len(images))), len(images) - 1)])
    return [q for q in questions if q.image not in heldout], [q for q in questions if q.image in heldout]
