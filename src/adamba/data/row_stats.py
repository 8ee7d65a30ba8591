"""What a source really gives: rows as the model sees them, lengths, drops and why, duplicates, the mix as it comes."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean, quantiles
from typing import Any

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from adamba.data.arguments import DataArguments
from adamba.data.cards import load_card
from adamba.data.mixture import load_mixture
from adamba.data.render import Renderer, row_texts
from adamba.data.sources import Conversion, open_source, rows_of
from adamba.data.tokenizer import train_tokenizer
from adamba.errors import printable

LOOK_VOCAB_SIZE = 4096
BAR_WIDTH = 40


@dataclass
class SourceStats:
    """Counts over the rows of one source.

    Attributes:
        lengths: tokens of each row.
        num_trained: tokens that the assistant wrote (all of a text row).
        num_duplicates: rows whose content occurred before.
    """

    source: str
    lengths: list[int] = field(default_factory=list)
    num_trained: int = 0
    num_duplicates: int = 0
    num_seen: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def source_rows(
    source: str, split: str, data_args: DataArguments, limit: int
) -> tuple[list[dict[str, Any]], Conversion | None]:
    """Up to `limit` rows of a source in their own order, and what the conversion dropped (None for a task)."""
    card = load_card(source, data_args.cards_dir)
    if card.loader == "task":
        options = data_args.mixture_options(split) | {"data_files": {}}
        return list(itertools.islice(load_mixture({source: 1.0}, **options), limit)), None
    conversion = Conversion(card)
    reader, shards = open_source(card, split, data_args.data_files.get(source), data_args.on_bad_file)
    rows = list(itertools.islice(rows_of(card, split, reader, shards, conversion), limit))
    return [row | {"source": source} for row in rows], conversion


def collect(
    source: str, rows: Iterable[dict[str, Any]], conversion: Conversion | None, renderer: Renderer
) -> SourceStats:
    """Statistics of converted rows."""
    stats = SourceStats(source)
    seen: set[bytes] = set()
    for batch in _batches(rows, 512):
        for row, (ids, mask) in zip(batch, renderer.render([as_conversation(row) for row in batch]), strict=True):
            stats.lengths.append(len(ids))
            stats.num_trained += sum(mask)
            digest = hashlib.blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=12).digest()
            stats.num_duplicates += digest in seen
            seen.add(digest)
    if conversion is not None:
        stats.num_seen, stats.dropped = conversion.seen, conversion.dropped
    else:
        stats.num_seen = len(stats.lengths)
    return stats


def as_conversation(row: dict[str, Any]) -> dict[str, Any]:
    """A preference row as the conversation that is to be chosen; any other row as it is."""
    if "chosen" not in row:
        return row
    return {"messages": row["prompt"] + row["chosen"], "tools": row.get("tools")}


def coloured(row: dict[str, Any], renderer: Renderer) -> Text:
    """The row's text as the model sees it: green where the loss is taken, dim elsewhere."""
    [(ids, mask)] = renderer.render([as_conversation(row)])
    text = Text()
    for trained, group in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        piece = renderer.tokenizer.decode([token for token, _ in group])
        text.append(printable(piece), style="bold green" if trained else "dim")
    return text


def histogram(lengths: Sequence[int], num_bars: int = 8) -> list[str]:
    """Lines of a text histogram over powers of two."""
    if not lengths:
        return []
    counts = Counter(max(0, (length - 1).bit_length()) for length in lengths)
    highest = max(counts)
    lowest = max(min(counts), highest - num_bars + 1)
    most = max(counts.values())
    lines = []
    for power in range(lowest, highest + 1):
        count = sum(number for bits, number in counts.items() if bits == power or (power == lowest and bits < lowest))
        bar = "█" * round(BAR_WIDTH * count / most)
        lines.append(f"up to {2**power:>7,} tokens {count:>8,} {bar}")
    return lines


def summary(stats: SourceStats) -> list[str]:
    """Lines for a person: counts, lengths, drops, duplicates."""
    total = sum(stats.lengths)
    if not stats.lengths:
        return [f"{stats.source}: no row"]
    cuts = quantiles(stats.lengths, n=100, method="inclusive") if len(stats.lengths) > 1 else [stats.lengths[0]] * 99
    kept = len(stats.lengths)
    num_dropped = stats.dropped.total()
    lines = [
        f"{stats.source}: {kept:,} rows, {total:,} tokens, {100 * stats.num_trained / total:.1f} % of them trained on",
        f"  tokens a row: mean {mean(stats.lengths):.0f}, median {cuts[49]:.0f}, 95 % below {cuts[94]:.0f}, "
        f"longest {max(stats.lengths):,}",
        f"  dropped: {num_dropped:,} of {stats.num_seen:,} ({100 * num_dropped / max(stats.num_seen, 1):.1f} %), "
        f"duplicates: {stats.num_duplicates:,} ({100 * stats.num_duplicates / kept:.1f} %)",
    ]
    lines += [f"    {reason}: {count:,}" for reason, count in stats.dropped.most_common()]
    return lines + [f"  {line}" for line in histogram(stats.lengths)]


def mix_as_it_comes(data_args: DataArguments, renderer: Renderer, num_rows: int) -> list[str]:
    """Asked weight, share of rows and share of tokens of each source, over the first rows of the mixture."""
    rows = list(itertools.islice(load_mixture(data_args.mix, **data_args.mixture_options("train")), num_rows))
    counts: Counter[str] = Counter(row["source"] for row in rows)
    tokens: Counter[str] = Counter()
    for row, (ids, _) in zip(rows, renderer.render(rows), strict=True):
        tokens[row["source"]] += len(ids)
    total = sum(data_args.mix.values())
    return [
        f"{source}: asked {100 * weight / total:.1f} %, comes as {100 * counts[source] / len(rows):.1f} % of rows, "
        f"{100 * tokens[source] / tokens.total():.1f} % of tokens"
        for source, weight in data_args.mix.items()
    ]


def look_tokenizer(rows: Sequence[dict[str, Any]]) -> PreTrainedTokenizerBase:
    """A tokenizer trained on the rows themselves, for a look without a checkpoint; its counts are rough."""
    texts = (text for row in rows for text in row_texts(as_conversation(row)))
    return train_tokenizer(texts, LOOK_VOCAB_SIZE)


def _batches(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
