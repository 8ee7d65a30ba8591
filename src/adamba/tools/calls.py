"""From what a model wrote to a tool call and its result; whatever is wrong becomes a message the model can read."""

import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# Thoughts and calls as the tokenizer's response template has them, which training reads with: the one that opens first
# runs to its closing tag, or to the end of the text when the tag is missing.
PIECE = re.compile(rf"<think>.*?(?:</think>|\Z)|{OPEN}(?P<call>.*?)(?:{CLOSE}|\Z)", re.DOTALL)
FIRST_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)  # the only one that a message has a field for


@dataclass(frozen=True)
class ToolCall:
    """One call read from a text: `error` is empty when it could be read."""

    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """Split an assistant's text into its content and its tool calls, in order; what it thought is neither.

    A call that cannot be read is kept, with `error` saying why: it must be answered, not silently dropped.
    """
    found = [match for match in PIECE.finditer(text) if match["call"] is not None]
    calls = [_parse(match["call"], is_closed=match[0].endswith(CLOSE)) for match in found]
    return PIECE.sub("", text).strip(), calls


def _parse(body: str, is_closed: bool) -> ToolCall:
    try:
        call = _read(body.strip())
    except (ValueError, RecursionError):
        return ToolCall(error="error: the tool call is not valid JSON")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolCall(error="error: the tool call has no name")
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # some models write the arguments as JSON inside a string
        try:
            arguments = _read(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        return ToolCall(name=call["name"], error="error: the arguments are not a JSON object")
    if not is_closed:  # nor does the response template find a call where the turn ends first
        return ToolCall(error="error: the tool call is not closed")
    return ToolCall(name=call["name"], arguments=arguments)


def _read(text: str) -> Any:
    """
    Raises:
        ValueError: not JSON, a number of more than 4,300 digits, or half of a surrogate pair, which is no text.
    """
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def run_tool_call(call: ToolCall, tools: Sequence[Callable[..., str]]) -> tuple[str, bool]:
    """Call the tool of that name. Returns its answer, or a message saying what is wrong, and whether it was called.

    Tools answer bad values themselves; only a call that does not fit the tool's signature is refused here.
    """
    if call.error:
        return call.error, False
    by_name = {tool.__name__: tool for tool in tools}
    if call.name not in by_name:
        return f"error: no tool named {call.name[:40]!r}; there is {', '.join(by_name) or 'none'}", False
    try:
        inspect.signature(by_name[call.name]).bind(**call.arguments)
    except TypeError as error:
        return f"error: {call.name}: {error}", False
    return str(by_name[call.name](**call.arguments)), True
