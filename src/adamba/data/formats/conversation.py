"""What every conversation must be, whatever format it came from."""

import json
from collections.abc import Sequence
from typing import Any

from adamba.data.tokenizer import PLAIN_TOKENS, SPECIAL_TOKENS

Message = dict[str, Any]
Row = dict[str, Any]

SPECIAL_TEXTS = tuple(text for text in SPECIAL_TOKENS if "\n" not in text)
CONTROL_TEXTS = SPECIAL_TEXTS + tuple(text for text in PLAIN_TOKENS if text.startswith("<") and "\n" not in text)


class DroppedRow(Exception):
    """This row cannot be converted; its message is the reason, one of a small fixed set, so that it can be counted."""


def column_text(row: Row, column: str) -> str:
    """The text of a column, without white space around it; None counts as empty.

    Raises:
        DroppedRow: the column is missing or holds something else.
    """
    if column not in row:
        raise DroppedRow(f"no column {column}")
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DroppedRow(f"column {column} is not text")
    return value.strip()


def tool_call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def read_call(call: Any) -> dict[str, Any]:
    """`{"name", "arguments"}`, bare or under `"function"`, as a tool call; arguments: an object or its JSON text.

    Raises:
        DroppedRow: it is not a call.
    """
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        raise DroppedRow("a call without a name")
    arguments = call.get("arguments")
    if arguments is None:
        arguments = {}
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", "arguments that are not JSON")
    if not isinstance(arguments, dict):
        raise DroppedRow("arguments that are not an object")
    return tool_call(call["name"], arguments)


def parse_json(text: str, reason: str) -> Any:
    """The value of a JSON text.

    Raises:
        DroppedRow: with `reason`, when it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DroppedRow(reason) from None


def function_schema(function: Any) -> dict[str, Any]:
    """A function's JSON description as an OpenAI tool.

    Raises:
        DroppedRow: it has no name, or parameters that are no JSON schema.
    """
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DroppedRow("a function without a name")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, dict) or not isinstance(parameters.get("properties", {}), dict):
        raise DroppedRow("function parameters are not a schema")
    parameters = {"type": "object", "properties": {}, **parameters}
    parameters["properties"] = {name: _property(schema) for name, schema in parameters["properties"].items()}
    description = function.get("description")
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": description if isinstance(description, str) else "",
            "parameters": parameters,
        },
    }


def _property(schema: Any) -> Any:
    """A parameter's schema; the chat template lists its `enum`, and some write null where there is none."""
    if not isinstance(schema, dict) or "enum" not in schema or isinstance(schema["enum"], list):
        return schema
    if schema["enum"] is not None:
        raise DroppedRow("function parameters are not a schema")
    return {key: value for key, value in schema.items() if key != "enum"}


def conversation(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), allow_broken_calls: bool = False
) -> Row:
    """The row `{"messages", "tools"}`, once the conversation is sound.

    A sound one has an optional system message, then user and assistant in turn; after an assistant's calls come their
    results, at most one a call, and the assistant again; the assistant has the last word; no turn is empty, no called
    tool unknown, and no text holds a control token of the template. With `allow_broken_calls`, as in an answer to be
    rejected, a text may hold what looks like a call, and calls need not fit the tools.

    Raises:
        DroppedRow: it is not sound.
    """
    names = {tool["function"]["name"] for tool in tools}
    open_calls: list[str] = []
    previous = "start"
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        calls = message.get("tool_calls") or []
        if not content.strip() and not calls and role != "tool":
            raise DroppedRow("an empty turn")
        control_texts = SPECIAL_TEXTS if allow_broken_calls else CONTROL_TEXTS
        if any(text in content or text in message.get("reasoning_content", "") for text in control_texts):
            raise DroppedRow("a control token in the text")
        if role == "tool":
            if not open_calls:
                raise DroppedRow("a tool result without a call")
            message["name"] = open_calls.pop(0)
        elif role == "assistant":
            if previous not in ("user", "tool"):
                raise DroppedRow("roles do not alternate")
            open_calls = [call["function"]["name"] for call in calls]
            if names and not names.issuperset(open_calls) and not allow_broken_calls:
                raise DroppedRow("a call of an unknown tool")
            if calls and not names and not allow_broken_calls:
                raise DroppedRow("a call without tools")
        elif role == "user":
            if previous not in ("start", "system", "assistant") or (previous == "assistant" and open_calls):
                raise DroppedRow("roles do not alternate")
        elif role != "system" or previous != "start":
            raise DroppedRow("roles do not alternate")
        previous = role
    if previous != "assistant":
        raise DroppedRow("no answer at the end")
    return check_unicode({"messages": list(messages), "tools": list(tools)})


def check_unicode(row: Row) -> Row:
    """The row itself.

    Raises:
        DroppedRow: some text cannot be written as UTF-8 (half a surrogate pair), or it is nested too deeply.
    """
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DroppedRow("text that is not Unicode") from None
    except RecursionError:
        raise DroppedRow("nested too deeply") from None
    return row
