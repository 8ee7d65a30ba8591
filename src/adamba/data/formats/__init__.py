"""Formats: one small pure function each, from a row of a dataset's own schema to one of our three shapes.

`{"text"}`, `{"messages", "tools"}` with OpenAI-style tool calls, or `{"prompt", "chosen", "rejected"}`. A row that
does not parse raises `DroppedRow` with its reason; nothing is guessed.
"""

from collections.abc import Callable
from dataclasses import dataclass

from adamba.data.formats.conversation import DroppedRow, Row
from adamba.data.formats.glaive import glaive
from adamba.data.formats.plain import messages, text
from adamba.data.formats.preference import preference
from adamba.data.formats.sharegpt import sharegpt
from adamba.data.formats.single_turn import flan, metamath, openorca, question_answer
from adamba.data.formats.toolbench import toolbench


@dataclass(frozen=True)
class Format:
    """A conversion and the columns it cannot do without."""

    convert: Callable[[Row], Row]
    columns: tuple[str, ...]


FORMATS = {
    "text": Format(text, ("text",)),
    "messages": Format(messages, ("messages",)),
    "openorca": Format(openorca, ("question", "response")),
    "flan": Format(flan, ("inputs", "targets")),
    "metamath": Format(metamath, ("query", "response")),
    "question_answer": Format(question_answer, ("question", "answer")),
    "glaive": Format(glaive, ("system", "chat")),
    "toolbench": Format(toolbench, ("conversations",)),
    "sharegpt": Format(sharegpt, ("conversations",)),
    "preference": Format(preference, ("chosen", "rejected")),
}

__all__ = ["FORMATS", "DroppedRow", "Format", "Row"]
