"""Glaive function calling v2: `system` with JSON functions, `chat` as one text of tagged turns."""

import json
import re
from typing import Any

from adamba.data.formats.conversation import (
    DroppedRow,
    Message,
    Row,
    column_text,
    conversation,
    function_schema,
    parse_json,
    read_call,
)

_TURN = re.compile(r"(?:^|\n)[ \t]*(USER|ASSISTANT|FUNCTION RESPONSE):")
_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_ACCESS = re.compile(r"\s*,?\s*with access to the following functions\.?\s*Use them if required\s*-?\s*$")
# Arguments are mostly a quoted JSON text, `"arguments": '{"a": 1}'`, which is no JSON.
_QUOTED_CALL = re.compile(r"""\{\s*"name"\s*:\s*"([^"]+)"\s*,\s*"arguments"\s*:\s*'(.*)'\s*\}""", re.DOTALL)


def glaive(row: Row) -> Row:
    """`system`, `chat` → messages with tool calls and the tools' schemas."""
    system, tools = _split_system(column_text(row, "system"))
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    pieces = _TURN.split(column_text(row, "chat"))
    if pieces[0].strip() or len(pieces) == 1:
        raise DroppedRow("text before the first turn")
    for tag, text in zip(pieces[1::2], pieces[2::2], strict=True):
        content = text.replace("<|endoftext|>", "").strip()
        message: Message = {"role": _ROLES[tag], "content": content}
        if tag == "ASSISTANT" and "<functioncall>" in content:
            said, *calls = content.split("<functioncall>")
            message |= {"content": said.strip(), "tool_calls": [parse_call(call.strip()) for call in calls]}
        messages.append(message)
    return conversation(messages, tools)


def parse_call(text: str) -> dict[str, Any]:
    """`{"name": "f", "arguments": …}` → a tool call; the arguments may be an object, its JSON text, or that in quotes.

    Raises:
        DroppedRow: it is none of these.
    """
    match = _QUOTED_CALL.fullmatch(text)
    if match is not None:
        return read_call({"name": match[1], "arguments": match[2].replace("\\'", "'")})
    return read_call(parse_json(text, "a call that is not JSON"))


def _split_system(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The system message without its functions, and the functions, which follow it as JSON objects in a row."""
    text = text.removeprefix("SYSTEM:").strip()
    start = text.find("{")
    if start < 0:
        return text, []
    tools, position, decoder = [], start, json.JSONDecoder()
    while position < len(text):
        try:
            function, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            raise DroppedRow("functions that are not JSON") from None
        tools.append(function_schema(function))
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
    said = _ACCESS.sub("", text[:start].strip())
    return (said + "." if said and said[-1].isalnum() else said), tools
