"""Reading tool calls: what can be understood is, what cannot is answered with its reason."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adamba.tools import ToolCall, calculator, parse_tool_calls, run_tool_call

GOOD = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "5 + 3"}}\n</tool_call>'
CALL = ToolCall("calculator", {"expression": "5 + 3"})


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (GOOD, "", [CALL]),
        ("Let me see." + GOOD, "Let me see.", [CALL]),
        (GOOD + GOOD, "", [CALL, CALL]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [ToolCall("f", {"a": 1})]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [ToolCall("f")]),
        (
            '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d\\ude00"}}</tool_call>',
            "",
            [ToolCall("f", {"a": "😀"})],
        ),
        ("5 + 3 # Answer", "5 + 3 # Answer", []),
        (f"<think>\nI could say {GOOD} or <tool_call>{{\n</think>\n\n{GOOD}", "", [CALL]),
        (f"<think>\n{GOOD}\n</think>\n\nAnswer: 8", "Answer: 8", []),
        (f"<think>\nIs it {GOOD}? Answer: 8", "", []),
        (f"Hm. <think>{GOOD}</think>{GOOD}<think>\n{GOOD}", "Hm.", [CALL]),
        ("", "", []),
    ],
)
def test_parse(text: str, content: str, calls: list[ToolCall]) -> None:
    assert parse_tool_calls(text) == (content, calls)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"name": "f", "arguments": {', "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "has no name"),
        ('{"arguments": {}}', "has no name"),
        ('{"name": 3, "arguments": {}}', "has no name"),
        ('{"name": "f", "arguments": [1]}', "not a JSON object"),
        ('{"name": "f", "arguments": "{"}', "not a JSON object"),
        ('{"name": "f", "arguments": {"cell": ' + "9" * 5000 + "}}", "not valid JSON"),
        ('{"name": "f", "arguments": {"code": "\\ud83d"}}', "not valid JSON"),
        ('{"name": "f", "arguments": "{\\"code\\": \\"\\\\ud83d\\"}"}', "not a JSON object"),
        ('{"name": "f", "arguments": "{\\"cell\\": ' + "9" * 5000 + '}"}', "not a JSON object"),
    ],
)
def test_a_broken_call_is_kept_with_its_reason(body: str, reason: str) -> None:
    _, [call] = parse_tool_calls(f"<tool_call>{body}</tool_call>")
    assert reason in call.error
    answer, called = run_tool_call(call, [calculator])
    assert (answer, called) == (call.error, False)


@pytest.mark.parametrize("before", ["", GOOD])
def test_a_call_without_its_closing_tag_is_not_made(before: str) -> None:
    *_, call = parse_tool_calls(before + GOOD.removesuffix("\n</tool_call>"))[1]
    assert call == ToolCall(error="error: the tool call is not closed")


def test_run() -> None:
    assert run_tool_call(CALL, [calculator]) == ("8.0", True)
    assert run_tool_call(ToolCall("abacus"), [calculator]) == (
        "error: no tool named 'abacus'; there is calculator",
        False,
    )
    answer, called = run_tool_call(ToolCall("calculator", {"x": 1}), [calculator])
    assert answer.startswith("error: calculator: ") and "expression" in answer and not called


@settings(deadline=None)
@given(st.text(alphabet='<tool_call>/{}":, na\n1', max_size=80))
def test_any_text_is_read(text: str) -> None:
    content, calls = parse_tool_calls(text)
    assert "<tool_call>" not in content or "<tool_call>" in text
    assert len(calls) <= text.count("<tool_call>")
