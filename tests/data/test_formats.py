import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.chat_template_utils import parse_response

from adamba.data.formats import FORMATS, DroppedRow
from adamba.data.formats.glaive import parse_call

ROWS = Path(__file__).parent / "rows"
RECORDS = [
    pytest.param(name, record, id=f"{name}-{index}")
    for name in FORMATS
    for index, record in enumerate(map(json.loads, (ROWS / f"{name}.jsonl").open(encoding="utf-8")))
]


def converted(name):
    for line in (ROWS / f"{name}.jsonl").open(encoding="utf-8"):
        record = json.loads(line)
        if record["_drops"] is None:
            yield FORMATS[name].convert(record)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_ten_rows_with_faults(name):
    drops = [json.loads(line)["_drops"] for line in (ROWS / f"{name}.jsonl").open(encoding="utf-8")]
    assert len(drops) >= 10 and None in drops and any(drops)


@pytest.mark.parametrize(("name", "record"), RECORDS)
def test_row_converts_or_drops_with_its_reason(name, record):
    before = json.dumps(record)
    if record["_drops"] is None:
        row = FORMATS[name].convert(record)
        assert row.keys() <= {"text", "messages", "tools", "prompt", "chosen", "rejected"}
    else:
        with pytest.raises(DroppedRow) as reason:
            FORMATS[name].convert(record)
        assert str(reason.value) == record["_drops"]
    assert json.dumps(record) == before  # conversion is pure


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("text", "preference")])
def test_conversations_survive_the_chat_template(name, tokenizer):
    for row in converted(name):
        messages, tools = row["messages"], row["tools"] or None
        rendered = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = tokenizer.apply_chat_template(
                messages[:index], tools=tools, add_generation_prompt=True, return_dict=False
            )
            upto = tokenizer.apply_chat_template(messages[: index + 1], tools=tools, return_dict=False)
            assert rendered[: len(upto)] == upto and upto[: len(prompt)] == prompt
            parsed = parse_response(tokenizer, upto[len(prompt) :], prefix=prompt, tools=tools)
            assert parsed.get("tool_calls", []) == message.get("tool_calls", [])
            assert parsed["content"] == message["content"]
            assert parsed.get("reasoning_content") == message.get("reasoning_content")


def test_glaive_keeps_calls_tools_and_results():
    rows = list(converted("glaive"))
    row = rows[3]
    assert [tool["function"]["name"] for tool in row["tools"]] == ["calculate_tip", "create_note"]
    assert [message["role"] for message in row["messages"]] == [
        *("system", "user", "assistant", "tool", "assistant", "tool", "assistant", "user", "assistant")
    ]
    assert row["messages"][0]["content"] == "You are a helpful assistant."
    assert row["messages"][2]["tool_calls"][0]["function"] == {
        "name": "calculate_tip",
        "arguments": {"bill": 50, "percentage": 15},
    }
    assert row["messages"][3] == {"role": "tool", "name": "calculate_tip", "content": '{"tip": 7.5}'}
    assert row["messages"][4]["tool_calls"][0]["function"]["arguments"]["content"] == "It's 7.5"
    assert "no access" in rows[2]["messages"][0]["content"] and rows[2]["tools"] == []


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "f", "arguments": \'{"a": "it\\\'s"}\'}', {"a": "it's"}),
        ('{"name": "f", "arguments": \'{"a": "it\'s"}\'}', {"a": "it's"}),
        ('{"name": "f", "arguments": {"a": {"b": [1]}}}', {"a": {"b": [1]}}),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', {"a": 1}),
        ('{"name": "f", "arguments": \'{}\'}', {}),
        ('{"name": "f"}', {}),
    ],
)
def test_glaive_call_spellings(text, arguments):
    assert parse_call(text)["function"] == {"name": "f", "arguments": arguments}


def test_toolbench_thoughts_actions_and_tools():
    row = next(converted("toolbench"))
    assert [tool["function"]["name"] for tool in row["tools"]] == ["current_for_simple_weather", "Finish"]
    system, question, action, result, finish = row["messages"]
    assert system["content"].endswith("Weather for 'everyone'") and "APIs" not in system["content"]
    assert question["content"] == "What is the weather in Berlin?"
    assert action["reasoning_content"] == "I need the weather."
    assert action["tool_calls"][0]["function"]["arguments"] == {"city": "Berlin", "days": 1}
    assert result["name"] == "current_for_simple_weather"
    assert finish["tool_calls"][0]["function"]["arguments"]["final_answer"] == 'It\'s 21 °C in "Berlin".'


def test_sharegpt_cuts_loose_ends():
    rows = list(converted("sharegpt"))
    assert [message["role"] for message in rows[2]["messages"]] == ["user", "assistant"]
    assert rows[3]["messages"][-1]["content"] == "1"
    assert rows[4]["messages"][0] == {"role": "system", "content": "You are a pirate."}


def test_sharegpt_takes_the_system_prompt_from_a_column():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Arr"}]
    pirate = {"role": "system", "content": "You are a pirate."}
    for system, expected in ((" You are a pirate.", [pirate]), (None, []), ("", [])):
        row = FORMATS["sharegpt"].convert({"conversations": turns, "system": system})
        assert row["messages"][:-2] == expected
    own = [{"from": "system", "value": "You are a pirate."}, *turns]
    assert FORMATS["sharegpt"].convert({"conversations": own, "system": "x"})["messages"][0] == pirate


def called(ids, results):
    """What is learnt of a turn of calls, and of results `(id, content)`."""
    calls = [{"id": name, "function": {"name": "f", "arguments": {}}} for name in ids]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": calls}]
    turns += [{"role": "tool", "tool_call_id": name, "content": content} for name, content in results]
    row = {"messages": [*turns, {"role": "assistant", "content": "a"}], "tools": [{"name": "f"}]}
    return [message["content"] for message in FORMATS["messages"].convert(row)["messages"]][2:-1]


def test_results_stand_in_the_order_of_their_calls():
    assert called(["x", "y", "z"], [("z", "3"), ("x", "1"), ("y", "2")]) == ["1", "2", "3"]
    assert called(["x", "y"], [("y", "2")]) == ["2"]
    assert called([None, None], [(None, "1"), (None, "2")]) == ["1", "2"]
    assert called(["x", "y"], [("y", "2"), ("other", "1")]) == ["2", "1"]
    odd = [{"role": "user", "content": "q", "tool_calls": ["x"]}, {"role": "assistant", "content": "a"}]
    assert len(FORMATS["messages"].convert({"messages": odd})["messages"]) == 2


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"weight": 0}, "an answer of weight 0"),
        ({"function_call": {"name": "f", "arguments": "{}"}}, "function_call instead of tool_calls"),
    ],
)
def test_what_would_be_learnt_otherwise_than_it_says_is_dropped(extra, reason):
    answer = {"role": "assistant", "content": "a"}
    question = {"role": "user", "content": "q", "weight": 0}
    assert FORMATS["messages"].convert({"messages": [question, answer | {"weight": 1}]})
    with pytest.raises(DroppedRow, match=reason):
        FORMATS["messages"].convert({"messages": [question, answer | extra, question, answer]})
    if "weight" in extra:
        turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]
        with pytest.raises(DroppedRow, match=reason):
            FORMATS["sharegpt"].convert({"conversations": turns})


def test_an_enum_that_is_none_does_not_reach_the_template(tokenizer):
    def row(enum):
        schema = {"type": "object", "properties": {"unit": {"type": "string", "enum": enum}}}
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        return {"messages": turns, "tools": json.dumps([{"name": "f", "parameters": schema}])}

    for enum, signature in ((None, "f(unit?: string)"), (["C", "F"], 'f(unit?: "C"|"F")')):
        converted = FORMATS["messages"].convert(row(enum))
        text = tokenizer.apply_chat_template(converted["messages"], tools=converted["tools"], tokenize=False)
        assert signature in text
    with pytest.raises(DroppedRow, match="function parameters are not a schema"):
        FORMATS["messages"].convert(row(5))


def test_preference_without_prompt_takes_what_both_share():
    row = list(converted("preference"))[2]
    assert row["prompt"] == [{"role": "user", "content": "Say hi"}]
    assert row["chosen"] == [{"role": "assistant", "content": "Hi!"}]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=12,
)
turn = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system", "function", "user", "assistant", "x"]), "value": st.text()}
)
pieces = [
    "USER:",
    "ASSISTANT:",
    "FUNCTION RESPONSE:",
    "<functioncall>",
    "<|endoftext|>",
    "\n\n\n",
    '{"name": "f"',
    "'",
    "}",
]
pieces += ["Thought:", "Action: f\n", "Action Input: ", "{}", "you have access to the following APIs:", "[", "]", ","]
tagged = st.lists(st.sampled_from(pieces) | st.text(max_size=5), max_size=12).map("".join)
values = (
    json_values | st.lists(turn, max_size=5) | tagged | st.lists(turn.map(lambda t: t | {"value": "x"}), max_size=5)
)
columns = sorted(
    {column for format in FORMATS.values() for column in format.columns} | {"tools", "prompt", "system_prompt"}
)


@settings(max_examples=150, deadline=None)
@given(record=st.dictionaries(st.sampled_from(columns), values), name=st.sampled_from(sorted(FORMATS)))
def test_no_record_crashes_a_format(tokenizer, record, name):
    record = dict.fromkeys(FORMATS[name].columns, "") | record
    try:
        row = FORMATS[name].convert(record)
    except DroppedRow as reason:
        assert 3 < len(str(reason)) < 60
    else:
        json.dumps(row, ensure_ascii=False).encode()
        if row.get("messages"):
            tokenizer.apply_chat_template(row["messages"], tools=row["tools"] or None)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.text(min_size=1), st.dictionaries(st.text(), st.text(), max_size=3), st.text()),
        min_size=1,
        max_size=4,
    )
)
def test_toolbench_conversations_of_any_content_convert(steps):
    apis = [{"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}]
    turns = [
        {"from": "system", "value": f"x you have access to the following APIs: {apis}"},
        {"from": "user", "value": "q"},
    ]
    for _, arguments, result in steps:
        value = f"\nThought: hm\nAction: f\nAction Input: {json.dumps(arguments)}"
        turns += [{"from": "assistant", "value": value}, {"from": "function", "value": result}]
    turns.append({"from": "assistant", "value": "done"})
    try:
        row = FORMATS["toolbench"].convert({"conversations": turns})
    except DroppedRow as reason:
        assert str(reason) in ("a control token in the text", "text that is not Unicode")
    else:
        calls = [
            message["tool_calls"][0]["function"]["arguments"] for message in row["messages"] if "tool_calls" in message
        ]
        assert calls == [arguments for _, arguments, _ in steps]
