"""One question, one answer: OpenOrca, FLAN, MetaMathQA and question/answer lists."""

from adamba.data.formats.conversation import DroppedRow, Message, Row, column_text, conversation


def openorca(row: Row) -> Row:
    """`system_prompt` (often empty), `question`, `response`."""
    system = column_text({"system_prompt": None} | row, "system_prompt")
    return _exchange(column_text(row, "question"), column_text(row, "response"), system)


def flan(row: Row) -> Row:
    """`inputs`, `targets`."""
    return _exchange(column_text(row, "inputs"), column_text(row, "targets"))


def metamath(row: Row) -> Row:
    """`query`, `response`; the response ends in `The answer is: …`, which is kept."""
    return _exchange(column_text(row, "query"), column_text(row, "response"))


def question_answer(row: Row) -> Row:
    """`question`, `answer`, as in `[{"id", "question", "answer"}, …]`; a number as answer is written out."""
    answer = row.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        row = row | {"answer": str(answer)}
    return _exchange(column_text(row, "question"), column_text(row, "answer"))


def _exchange(question: str, answer: str, system: str = "") -> Row:
    if not question:
        raise DroppedRow("an empty question")
    if not answer:
        raise DroppedRow("an empty answer")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return conversation(messages)
