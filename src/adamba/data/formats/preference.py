"""Preference pairs for DPO: `prompt`, `chosen`, `rejected`, as texts or as messages."""

from typing import Any

from adamba.data.formats.conversation import DroppedRow, Message, Row, conversation
from adamba.data.formats.plain import check_message, check_tools


def preference(row: Row) -> Row:
    """→ `{"prompt", "chosen", "rejected"}`, each a list of messages, and `tools` if the row has any.

    Without a `prompt` column the two answers are whole conversations and what they share is the prompt.

    Raises:
        DroppedRow: the two answers are the same, one holds turns of others, or a conversation is not sound.
    """
    for column in ("chosen", "rejected"):
        if column not in row:
            raise DroppedRow(f"no column {column}")
    chosen, rejected = _messages(row["chosen"], "assistant"), _messages(row["rejected"], "assistant")
    if row.get("prompt") is None:
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        prompt = _messages(row["prompt"], "user")
    if chosen == rejected:
        raise DroppedRow("chosen and rejected are the same")
    tools = check_tools(row.get("tools"))
    for answer in (chosen, rejected):
        if not prompt or not answer:
            raise DroppedRow("an empty prompt or answer")
        whole = [dict(message) for message in prompt + answer]
        conversation(whole, tools, allow_broken_calls=answer is rejected)
        check_answer(answer)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | ({"tools": tools} if tools else {})


def check_answer(answer: list[Message]) -> None:
    """
    Raises:
        DroppedRow: not only the assistant speaks. DPO trains on all tokens after the prompt, a tool's result too.
    """
    if any(message["role"] != "assistant" for message in answer):
        raise DroppedRow("an answer with turns of others than the assistant")


def _messages(value: Any, role: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value.strip()}]
    if not isinstance(value, list) or not value:
        raise DroppedRow("neither text nor messages")
    return [check_message(message) for message in value]
