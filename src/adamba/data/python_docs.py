"""The embedded default text: Python's own documentation, `pydoc_data.topics`."""

import hashlib
import re
from functools import cache
from typing import Any

from adamba.errors import UserError

MAX_CHARACTERS = 1500
TEST_FRACTION_INVERSE = 8

_UNDERLINE = re.compile(r"^([*=\-~^\"'+#])\1{3,}$", re.MULTILINE)


@cache
def python_docs_rows(split: str) -> tuple[dict[str, Any], ...]:
    """Rows `{"text"}`: pieces of at most about 1,500 characters, in the order of the topics' names.

    A topic is in `test` by a hash of its name, so the split does not depend on the Python version. No paragraph of a
    test topic remains in a training row.

    Raises:
        UserError: this Python has no `pydoc_data.topics`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            "pydoc_topics: this Python has no module pydoc_data.topics; install your system's full Python "
            "(Debian and Ubuntu: python3-doc or libpython3-stdlib)"
        ) from error
    paragraphs = {name: _paragraphs(topics[name]) for name in sorted(topics)}
    held_out = {
        paragraph
        for name, parts in paragraphs.items()
        if _is_test(name)
        for paragraph in parts
        if len(paragraph) > 40  # "For example:" may stand everywhere
    }
    rows: list[dict[str, Any]] = []
    for name, parts in paragraphs.items():
        if (split == "test") != _is_test(name):
            continue
        if split != "test":
            parts = [paragraph for paragraph in parts if paragraph not in held_out]
        rows.extend({"text": text} for text in _pieces(parts))
    return tuple({row["text"]: row for row in rows}.values())  # topics repeat each other


def _is_test(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % TEST_FRACTION_INVERSE == 0


def _paragraphs(topic: str) -> list[str]:
    text = re.sub(r"[ \t]+$", "", _UNDERLINE.sub("", topic), flags=re.MULTILINE)
    return [paragraph for paragraph in re.split(r"\n{2,}", text.strip("\n")) if paragraph.strip()]


def _pieces(paragraphs: list[str]) -> list[str]:
    pieces: list[str] = []
    for paragraph in paragraphs:
        if pieces and len(pieces[-1]) + len(paragraph) <= MAX_CHARACTERS:
            pieces[-1] += "\n\n" + paragraph
        else:
            pieces.append(paragraph)
    return pieces
