import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from trl.chat_template_utils import (
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
    parse_response,
    supports_tool_calling,
)

from adamba.data import add_chat_tokens, train_tokenizer
from adamba.data.tokenizer import MIN_VOCAB_SIZE, NUM_ADDED_TOKENS

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an expression.\nSecond line.",
        "parameters": {
            "type": "object",
            "properties": {
                "expression": {"type": "string"},
                "digits": {"type": ["integer", "null"]},
                "mode": {"type": "string", "enum": ["deg", "rad"]},
                "names": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["expression"],
        },
    },
}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def parse_back(tokenizer, message, tools=None):
    """Renders `message` as an answer, parses it as TRL does, and checks that the prompt is a prefix."""
    conversation = [{"role": "user", "content": "x"}]
    prompt = tokenizer.apply_chat_template(conversation, tools=tools, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*conversation, message], tools=tools, return_dict=False)
    assert whole[: len(prompt)] == prompt
    return parse_response(tokenizer, whole[len(prompt) :], prefix=prompt, tools=tools)


def test_any_text_encodes_and_decodes_exactly(tokenizer):
    for text in ["a\tb\n\n  c  ", "é漢字🙂\x00", "x" * 300, "3.14 + 15", '{"a": "}\\n"}', ""]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_each_digit_is_a_token(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("2026")["input_ids"]) == ["2", "0", "2", "6"]
    assert not [token for token in tokenizer.get_vocab() if sum(character.isdigit() for character in token) > 1]


def test_end_of_turn_is_eos_and_padding_is_another_token(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>"
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")}) == 3


def test_vocabulary_size_is_a_limit():
    assert len(train_tokenizer(["the cat and the hat " * 50], MIN_VOCAB_SIZE + 5)) == MIN_VOCAB_SIZE + 5
    assert MIN_VOCAB_SIZE <= len(train_tokenizer(["ab" * 50], 5000)) < 300
    with pytest.raises(ValueError, match=f"vocab_size: 100 is too small.*{MIN_VOCAB_SIZE}"):
        train_tokenizer(["x"], 100)
    with pytest.raises(ValueError, match="nothing to train"):
        train_tokenizer(["", ""], 1000)


def test_trl_accepts_the_template(tokenizer):
    assert supports_tool_calling(tokenizer)
    assert is_chat_template_prefix_preserving(tokenizer)
    assert is_chat_template_stop_token_trained(tokenizer)
    assert get_training_chat_template(tokenizer) is None


def test_text_is_qwen_tool_calls_and_one_line_a_tool(tokenizer):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "5 + 3?"},
        {"role": "assistant", "content": "", "tool_calls": [call("calculator", expression="5 + 3")]},
        {"role": "tool", "name": "calculator", "content": "8.0"},
        {"role": "assistant", "content": "8", "reasoning_content": "Easy."},
    ]
    assert tokenizer.apply_chat_template(messages, tools=[CALCULATOR], tokenize=False) == (
        "<|im_start|>system\nBe short.\n"
        'calculator(expression: string, digits?: integer|null, mode?: "deg"|"rad", names?: array[string])'
        ": Evaluate an expression.<|im_end|>"
        "<|im_start|>user\n5 + 3?<|im_end|>"
        "<|im_start|>assistant\n<tool_call>\n"
        '{"name": "calculator", "arguments": {"expression": "5 + 3"}}\n</tool_call>'
        "<|im_end|><tool_response>\n8.0\n</tool_response>"
        "<|im_start|>assistant\n<think>\nEasy.\n</think>\n\n8<|im_end|>"
    )


def test_template_text_costs_one_token_each(tokenizer):
    user = tokenizer.apply_chat_template([{"role": "user", "content": "7"}], return_dict=False)
    assert tokenizer.convert_ids_to_tokens(user) == ["<|im_start|>user\n", "7", "<|im_end|>"]
    called = tokenizer.apply_chat_template(
        [{"role": "assistant", "tool_calls": [call("f")]}, {"role": "tool", "name": "f", "content": "7"}],
        return_dict=False,
    )
    assert len(called) == 1 + 6 + 1 + 3  # header; open, f, middle, {, }, close; end; open, 7, close


def test_loss_mask_covers_assistant_tokens_and_their_end(tokenizer):
    messages = [
        {"role": "user", "content": "5 + 3?"},
        {"role": "assistant", "content": "", "tool_calls": [call("calculator", expression="5 + 3")]},
        {"role": "tool", "name": "calculator", "content": "8.0"},
        {"role": "assistant", "content": "It is 8."},
        {"role": "user", "content": "Thanks"},
    ]
    output = tokenizer.apply_chat_template(
        messages, tools=[CALCULATOR], return_dict=True, return_assistant_tokens_mask=True
    )
    trained = [token for token, mask in zip(output["input_ids"], output["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(trained) == (
        '<tool_call>\n{"name": "calculator", "arguments": {"expression": "5 + 3"}}\n</tool_call><|im_end|>'
        "It is 8.<|im_end|>"
    )


def test_saved_tokenizer_parses_the_same_calls(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    message = {
        "role": "assistant",
        "content": "Two calls.",
        "reasoning_content": "First this, then that.",
        "tool_calls": [
            call("calculator", expression='"quoted" \\ and\nnewline', nested={"a": [1, 2.5, None, {"é": "漢🙂"}]}),
            call("weird-name.x", text="</tool_call> <|im_end|> <tool_call> }}", empty={}, flag=True),
            call("none"),
        ],
    }
    parsed = parse_back(loaded, message, tools=[CALCULATOR])
    assert parsed == message
    assert loaded.eos_token_id == tokenizer.eos_token_id and loaded.pad_token_id == tokenizer.pad_token_id
    assert len(loaded) == len(tokenizer)
    again = {"role": "assistant", "tool_calls": parsed["tool_calls"]}
    assert parse_back(loaded, again)["tool_calls"] == message["tool_calls"]


def test_arguments_given_as_json_text_parse_too(tokenizer):
    message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": json.dumps({"a": 1})}}],
    }
    assert parse_back(tokenizer, message)["tool_calls"] == [call("f", a=1)]


def test_broken_call_is_plain_text_for_trl(tokenizer):
    ids = tokenizer('<tool_call>\n{"name": "f", "arguments": {</tool_call><|im_end|>')["input_ids"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True, return_dict=False
    )
    assert "tool_calls" not in parse_response(tokenizer, ids, prefix=prompt)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    arguments=st.dictionaries(st.text(), json_values, max_size=4),
    name=st.from_regex(r"[a-z_.-]{1,20}", fullmatch=True),
)
def test_any_arguments_survive(tokenizer, arguments, name):
    calls = [call(name, **{}), {"type": "function", "function": {"name": name, "arguments": arguments}}]
    parsed = parse_back(tokenizer, {"role": "assistant", "content": "", "tool_calls": calls})
    assert parsed["tool_calls"] == calls


def test_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match='unknown role "robot"'):
        tokenizer.apply_chat_template([{"role": "robot", "content": "x"}], tokenize=False)


def test_chat_tokens_are_added_once(tokenizer):
    size = len(tokenizer)
    assert len(add_chat_tokens(tokenizer)) == size
    assert len({*tokenizer.get_added_vocab()}) == NUM_ADDED_TOKENS
