"""Byte-level BPE tokenizer with Adamba's chat template, and the same chat tokens for a tokenizer that exists already.

The text is ChatML with Qwen3's tool calls. What always comes together in that text (`<|im_start|>user` and its
newline, `<tool_call>` and the JSON that opens a call) is *one* token here: a turn costs 2 tokens instead of 4, a call
6 instead of 15, and no merge can ever cross the border between template and content, so the ids of a prompt are
always a prefix of the ids of the whole conversation.
"""

from collections.abc import Iterable
from importlib.resources import files

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from adamba.errors import UserError

END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
ROLE_HEADERS = {role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")}
CALL_OPEN, CALL_MIDDLE, CALL_CLOSE = '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<tool_response>\n", "\n</tool_response>"
THINK_OPEN, THINK_CLOSE = "<think>\n", "\n</think>\n\n"

# Special tokens disappear with `skip_special_tokens=True`; the others are part of what the assistant says.
SPECIAL_TOKENS = (END_OF_TEXT, PAD, "<|im_start|>", END_OF_TURN, *ROLE_HEADERS.values())
PLAIN_TOKENS = (
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    *(CALL_OPEN, CALL_MIDDLE, CALL_CLOSE, RESPONSE_OPEN, RESPONSE_CLOSE, THINK_OPEN, THINK_CLOSE),
)

CHAT_TEMPLATE = files("adamba.data").joinpath("chat_template.jinja").read_text(encoding="utf-8")
# What the template writes, read back (transformers >= 5.13); TRL parses completions with it.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ROLE_HEADERS["assistant"],
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}

# Qwen's pattern: words with their leading space or quote, each digit alone, runs of punctuation, newlines.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_ADDED_TOKENS = len(SPECIAL_TOKENS) + len(PLAIN_TOKENS)
MIN_VOCAB_SIZE = 256 + NUM_ADDED_TOKENS


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer of at most `vocab_size` tokens, chat tokens included.

    Any text encodes and decodes exactly (256 byte tokens); each digit is its own token. With little text fewer merges
    than asked are found: read the size off `len(tokenizer)`.

    Raises:
        UserError: `vocab_size` below `MIN_VOCAB_SIZE`, or no text at all.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size: {vocab_size} is too small, bytes and chat tokens alone are {MIN_VOCAB_SIZE}")
    num_texts = 0

    def counted() -> Iterable[str]:
        nonlocal num_texts
        for text in texts:
            num_texts += bool(text)
            yield text

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - NUM_ADDED_TOKENS,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(counted(), trainer)
    if not num_texts:
        raise UserError("texts: nothing to train the tokenizer on, every text is empty")
    return add_chat_tokens(
        PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, padding_side="left")
    )


def add_chat_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Gives any fast tokenizer Adamba's chat tokens, chat template and response template; returns the same object.

    `len(tokenizer)` grows by the tokens it lacks, so the model's embedding must be resized to it. End of turn becomes
    `eos_token`; the padding token is one of its own, never the end token.
    """
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_TOKENS])
    tokenizer.eos_token = END_OF_TURN
    tokenizer.pad_token = PAD
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer
