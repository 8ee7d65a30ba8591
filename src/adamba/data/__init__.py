"""Data: cards, formats, mixtures, tokenizer, rendering and packing."""

from adamba.data.cards import Card, load_card, load_cards
from adamba.data.mixture import load_mixture, log_mix, materialise, parse_mix
from adamba.data.packing import pack_rows
from adamba.data.render import Renderer, row_texts
from adamba.data.tokenizer import add_chat_tokens, train_tokenizer

__all__ = [
    "Card",
    "Renderer",
    "add_chat_tokens",
    "load_card",
    "load_cards",
    "load_mixture",
    "log_mix",
    "materialise",
    "pack_rows",
    "parse_mix",
    "row_texts",
    "train_tokenizer",
]
