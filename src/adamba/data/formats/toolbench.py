"""ToolBench (ToolLLaMA): turns with `Thought`, `Action` and `Action Input`, the tools listed in the system turn."""

import ast
import json
import re
from typing import Any

from adamba.data.formats.conversation import DroppedRow, Message, Row, conversation, function_schema, read_call
from adamba.data.formats.sharegpt import turns

_ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt"), "assistant"),
    **dict.fromkeys(("function", "tool", "observation"), "tool"),
}
_APIS = "you have access to the following APIs:"
_STEP = re.compile(
    r"(?:\s*Thought:(?P<thought>.*?))?\s*Action:(?P<action>[^\n]*)\n\s*Action Input:(?P<input>.*)", re.DOTALL
)


def toolbench(row: Row) -> Row:
    """`conversations` → messages: a thought becomes `reasoning_content`, an action a tool call.

    `Finish`, which gives the answer or gives up, stays a call like any other.
    """
    messages = turns(row, _ROLES)
    if messages[0]["role"] != "system":
        raise DroppedRow("no system turn with the APIs")
    prompt, found, listing = messages[0]["content"].partition(_APIS)
    if not found:
        raise DroppedRow("no system turn with the APIs")
    tools = [function_schema(function) for function in _parse_apis(listing.strip())]
    prompt = prompt.rstrip().removesuffix("Specifically,").rstrip()
    converted: list[Message] = [{"role": "system", "content": prompt}] if prompt else []
    for message in messages[1:]:
        if message["role"] == "user":
            message["content"] = message["content"].removesuffix("Begin!").rstrip()
        elif message["role"] == "assistant":
            message = _step(message["content"])
        converted.append(message)
    return conversation(converted, tools)


def _step(text: str) -> Message:
    match = _STEP.fullmatch(text)
    if match is None:
        if "Action:" in text or "Action Input:" in text:
            raise DroppedRow("a broken action")
        return {"role": "assistant", "content": text.removeprefix("Thought:").strip()}
    call = read_call({"name": match["action"].strip(), "arguments": match["input"].strip()})
    message: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    thought = (match["thought"] or "").strip()
    return message | {"reasoning_content": thought} if thought else message


def _parse_apis(listing: str) -> list[Any]:
    """The list of functions, which was printed by Python (single quotes, `None`), or is JSON."""
    try:
        functions = json.loads(listing)
    except (ValueError, RecursionError):
        try:
            functions = ast.literal_eval(listing)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise DroppedRow("functions that are not JSON") from None
    if not isinstance(functions, list) or not functions:
        raise DroppedRow("no functions")
    return functions
