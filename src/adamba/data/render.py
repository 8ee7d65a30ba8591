"""Rows to token ids and loss masks, in batches, without Jinja.

`Renderer.render` gives the ids that `apply_chat_template` gives for Adamba's template: only contents are encoded, all
of a batch at once, and template text is inserted as ids. Contents are encoded as plain text: a control token written
by a user (`<|im_end|>`) stays text. The slow way is taken for any other template with `{% generation %}` markers, and
for a tokenizer that encodes the beginning of a text otherwise than what follows a token.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from adamba.data.tokenizer import (
    CALL_CLOSE,
    CALL_MIDDLE,
    CALL_OPEN,
    CHAT_TEMPLATE,
    END_OF_TEXT,
    END_OF_TURN,
    RESPONSE_CLOSE,
    RESPONSE_OPEN,
    ROLE_HEADERS,
    THINK_CLOSE,
    THINK_OPEN,
)
from adamba.errors import UserError

Part = tuple[int | str, bool]  # a template token's id or a text, and whether the assistant wrote it


class Renderer:
    """Renders rows with one tokenizer; make one and keep it, it caches tool texts.

    Raises:
        UserError: the tokenizer has no chat template, or one without `{% generation %}` markers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        template = tokenizer.chat_template
        if not template:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template; add_chat_tokens: true gives it one"
            )
        if "generation" not in template:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r}: its chat template has no {{% generation %}} markers, so the "
                "assistant's tokens cannot be told apart; add_chat_tokens: true replaces it"
            )
        self.tokenizer = tokenizer
        self.is_fast = template == CHAT_TEMPLATE and CALL_OPEN in tokenizer.get_added_vocab()
        self.ids = tokenizer.get_added_vocab()
        self.end_of_text_id: int = self.ids.get(END_OF_TEXT, tokenizer.eos_token_id)
        plain = json.loads(tokenizer.backend_tokenizer.to_str()) | {"added_tokens": [], "post_processor": None}
        self._plain = Tokenizer.from_str(json.dumps(plain))
        if self.is_fast:
            # A tokenizer that marks the beginning of a text (Llama's) takes a content by itself for one.
            alone = self._plain.encode("a", add_special_tokens=False).ids
            self.is_fast = tokenizer.encode(CALL_OPEN + "a", add_special_tokens=False)[1:] == alone

    def render(self, rows: Sequence[dict[str, Any]]) -> list[tuple[list[int], list[bool]]]:
        """Token ids of each row and, per token, whether the assistant wrote it (all True for text rows).

        Text rows end with the end-of-text token, each assistant turn with the end-of-turn token.
        """
        if not self.is_fast:
            return [self._render_slowly(row) for row in rows]
        parts_of_rows = [self._parts(row) for row in rows]
        texts = list({part: None for parts in parts_of_rows for part, _ in parts if isinstance(part, str)})
        encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        ids_of = {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
        rendered = []
        for parts in parts_of_rows:
            ids: list[int] = []
            mask: list[bool] = []
            for part, trained in parts:
                if isinstance(part, int):
                    ids.append(part)
                    mask.append(trained)
                else:
                    encoded = ids_of[part]
                    ids += encoded
                    mask += [trained] * len(encoded)
            rendered.append((ids, mask))
        return rendered

    def _parts(self, row: dict[str, Any]) -> list[Part]:
        ids = self.ids
        messages = row.get("messages")
        if messages is None:
            if row.get("text") is None:
                raise UserError(f"mix: a row of {row.get('source')!r} has neither 'text' nor 'messages' to train on")
            return [(row["text"], True), (self.end_of_text_id, True)]
        end: Part = (ids[END_OF_TURN], False)
        parts: list[Part] = []
        tools = row.get("tools")
        first = messages[0] if messages and messages[0]["role"] == "system" else None
        system = (first["content"] or "") if first else ""
        if tools:
            signatures = tool_lines(tools if isinstance(tools, str) else json.dumps(tools))
            system = f"{system}\n{signatures}" if system else signatures
        if system:
            parts += [(ids[ROLE_HEADERS["system"]], False), (system, False), end]
        for message in messages:
            role, content = message["role"], message.get("content") or ""
            if role == "assistant":
                parts.append((ids[ROLE_HEADERS[role]], False))
                if message.get("reasoning_content"):
                    thought = message["reasoning_content"]
                    parts += [(ids[THINK_OPEN], True), (thought, True), (ids[THINK_CLOSE], True)]
                if content:
                    parts.append((content, True))
                for tool_call in message.get("tool_calls") or []:
                    parts += self._call_parts(tool_call.get("function", tool_call))
                parts.append((ids[END_OF_TURN], True))
            elif role == "tool":
                parts += [(ids[RESPONSE_OPEN], False), (str(content), False), (ids[RESPONSE_CLOSE], False)]
            elif role == "user" or (role == "system" and message is not first):
                parts += [(ids[ROLE_HEADERS[role]], False), (content, False), end]
            elif role != "system":
                raise UserError(f"chat template: unknown role {role!r}, expected system, user, assistant or tool")
        return parts

    def _call_parts(self, call: dict[str, Any]) -> list[Part]:
        arguments = call.get("arguments") or {}
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        if "<" in text:  # the same escapes as in the template: an argument can never end the call
            text = text.replace("</tool_call>", "<\\/tool_call>").replace("<|", "<\\u007c")
        name = json.dumps(call["name"], ensure_ascii=False)[1:-1]
        ids = self.ids
        return [(ids[CALL_OPEN], True), (name, True), (ids[CALL_MIDDLE], True), (text, True), (ids[CALL_CLOSE], True)]

    def _render_slowly(self, row: dict[str, Any]) -> tuple[list[int], list[bool]]:
        if row.get("messages") is None:
            ids = self.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            return ids + [self.end_of_text_id], [True] * (len(ids) + 1)
        tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
        output = self.tokenizer.apply_chat_template(
            row["messages"], tools=tools or None, return_dict=True, return_assistant_tokens_mask=True
        )
        return output["input_ids"], [bool(trained) for trained in output["assistant_masks"]]


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict] | None = None,
    add_generation_prompt: bool = False,
) -> list[int]:
    """Ids of a conversation to be continued, as they are in training: what a user or a tool wrote stays text.

    `apply_chat_template` would make a control token of an `<|im_end|>` in it; that is done for other templates.
    """
    renderer = _renderer(tokenizer, tokenizer.chat_template, len(tokenizer))
    if renderer is None:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
        )
    [(ids, _)] = renderer.render([{"messages": messages, "tools": tools}])
    return [*ids, renderer.ids[ROLE_HEADERS["assistant"]]] if add_generation_prompt else ids


@lru_cache(maxsize=4)
def _renderer(tokenizer: PreTrainedTokenizerFast, template: str, size: int) -> Renderer | None:
    """The tokenizer's renderer, if it has a fast one; template and size tell what may change."""
    if template != CHAT_TEMPLATE:
        return None
    renderer = Renderer(tokenizer)
    return renderer if renderer.is_fast else None


@lru_cache(maxsize=256)
def tool_lines(tools_json: str) -> str:
    """The tools as the chat template writes them, one line each; `tools_json` is the list of their schemas."""
    empty_turn = [{"role": "user", "content": ""}]
    [text], _ = render_jinja_template([empty_turn], tools=json.loads(tools_json), chat_template=CHAT_TEMPLATE)
    end = END_OF_TURN + ROLE_HEADERS["user"] + END_OF_TURN
    return text.removeprefix(ROLE_HEADERS["system"]).removesuffix(end)


def row_texts(row: dict[str, Any]) -> list[str]:
    """The texts of a row that a tokenizer is trained on: tool lines, contents, thoughts, call names and arguments."""
    if row.get("messages") is None:
        return [row["text"]]
    tools = row.get("tools")
    texts = [tool_lines(tools if isinstance(tools, str) else json.dumps(tools))] if tools else []
    for message in row["messages"]:
        texts += [message.get("reasoning_content") or "", message.get("content") or ""]
        for tool_call in message.get("tool_calls") or []:
            call = tool_call.get("function", tool_call)
            arguments = call.get("arguments") or {}
            texts += [
                call["name"],
                arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
            ]
    return [text for text in texts if text]
