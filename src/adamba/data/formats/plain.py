"""Rows that have one of our shapes already: `text`, or `messages` with `tools`."""

from itertools import groupby
from typing import Any

from adamba.data.formats.conversation import (
    DroppedRow,
    Message,
    Row,
    check_unicode,
    conversation,
    function_schema,
    parse_json,
    read_call,
)


def text(row: Row) -> Row:
    """`text`, as it is: white space may mean something."""
    if "text" not in row:
        raise DroppedRow("no column text")
    if not isinstance(row["text"], str):
        raise DroppedRow("column text is not text")
    if not row["text"].strip():
        raise DroppedRow("an empty text")
    return check_unicode({"text": row["text"]})


def messages(row: Row) -> Row:
    """`messages` in OpenAI's style and, if there are any, `tools` (a list of schemas, or its JSON text)."""
    if "messages" not in row:
        raise DroppedRow("no column messages")
    if not isinstance(row["messages"], list) or not row["messages"]:
        raise DroppedRow("no turns")
    checked = [check_message(message) for message in row["messages"]]
    return conversation([checked[place] for place in _in_call_order(row["messages"])], check_tools(row.get("tools")))


def _in_call_order(turns: list[Message]) -> list[int]:
    """Places of the turns, results in the order of their calls by `tool_call_id`: what is learnt has no ids."""
    order: list[int] = []
    ids: list[Any] = []
    for is_result, group in groupby(range(len(turns)), key=lambda place: turns[place]["role"] == "tool"):
        places = list(group)
        if is_result and all(turns[place].get("tool_call_id") in ids for place in places):
            places.sort(key=lambda place: ids.index(turns[place].get("tool_call_id")))
        order += places
        last = turns[places[-1]]
        ids = [call.get("id") for call in last.get("tool_calls") or []] if last["role"] == "assistant" else []
    return order


def check_message(message: Any) -> Message:
    """The fields of an OpenAI-style message that the template reads, tool calls with parsed arguments.

    Raises:
        DroppedRow: it is not such a message.
    """
    if not isinstance(message, dict):
        raise DroppedRow("a turn that is no mapping")
    role, content, thought = message.get("role"), message.get("content"), message.get("reasoning_content")
    if role not in ("system", "user", "assistant", "tool"):
        raise DroppedRow("an unknown role")
    if not isinstance(content, (str, type(None))) or not isinstance(thought, (str, type(None))):
        raise DroppedRow("a turn that is not text")
    checked: Message = {"role": role, "content": content or ""}
    if message.get("function_call"):
        raise DroppedRow("function_call instead of tool_calls")
    if role == "assistant" and message.get("weight") == 0:
        raise DroppedRow("an answer of weight 0")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise DroppedRow("a call without a name")
    if role == "assistant" and thought:
        checked["reasoning_content"] = thought
    if role == "assistant" and calls:
        checked["tool_calls"] = [read_call(call) for call in calls]
    return checked


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools' schemas from a list, its JSON text or None.

    Raises:
        DroppedRow: it is not a list of functions.
    """
    if isinstance(tools, str):
        tools = parse_json(tools or "[]", "tools that are not JSON")
    if not isinstance(tools, (list, type(None))):
        raise DroppedRow("tools that are not a list")
    functions = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in tools or []]
    return [function_schema(function) for function in functions]
