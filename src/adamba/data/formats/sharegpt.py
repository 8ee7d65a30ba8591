"""ShareGPT: `conversations`, a list of `{"from", "value"}` with many names for two roles, and perhaps `system`."""

from adamba.data.formats.conversation import DroppedRow, Message, Row, column_text, conversation

ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "system": "system",
}


def sharegpt(row: Row) -> Row:
    """`conversations` → messages.

    Long conversations were split upstream, so a piece may start with an answer or end with a question: those ends are
    cut off. What is broken inside (two turns of one role, an empty turn, an unknown role) drops the row. A column
    `system` is the system turn, where the turns have none.
    """
    messages = turns(row, ROLES)
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    rest = messages[len(system) :]
    if not system and "system" in row and (prompt := column_text(row, "system")):
        system = [{"role": "system", "content": prompt}]
    while rest and rest[0]["role"] == "assistant":
        rest = rest[1:]
    while rest and rest[-1]["role"] == "user":
        rest = rest[:-1]
    if not rest:
        raise DroppedRow("no question with an answer")
    return conversation(system + rest)


def turns(row: Row, roles: dict[str, str]) -> list[Message]:
    """The turns of `conversations` as messages, white space around them removed.

    Raises:
        DroppedRow: not a list of turns, or a role that is not in `roles`.
    """
    if "conversations" not in row:
        raise DroppedRow("no column conversations")
    if not isinstance(row["conversations"], list) or not row["conversations"]:
        raise DroppedRow("no turns")
    messages: list[Message] = []
    for turn in row["conversations"]:
        if not isinstance(turn, dict):
            raise DroppedRow("a turn that is no mapping")
        role = turn.get("from", turn.get("role"))
        value = turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role.strip().lower() not in roles:
            raise DroppedRow("an unknown role")
        if value is not None and not isinstance(value, str):
            raise DroppedRow("a turn that is not text")
        if turn.get("weight") == 0 and roles[role.strip().lower()] == "assistant":
            raise DroppedRow("an answer of weight 0")
        messages.append({"role": roles[role.strip().lower()], "content": (value or "").strip()})
    return messages
