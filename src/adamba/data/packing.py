"""Best-fit packing: several documents in one row of fixed length, with their borders in `position_ids`."""

import random
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedTokenizerFast

from adamba.data.cuts import IGNORED_LABEL, Cuts, Document
from adamba.data.render import Renderer
from adamba.errors import UserError

MIN_PIECE = 16  # tokens; a room smaller than this is left to padding rather than filled with a scrap
ROW_COLUMNS = ["text", "messages", "tools", "source"]


def pack_rows(
    stream: IterableDataset,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    *,
    assistant_only_loss: bool = False,
    one_source_per_row: bool = False,
    cut_conversations: bool = False,
    documents_per_batch: int = 1024,
    seed: int = 0,
) -> IterableDataset:
    """Renders, tokenizes and packs a mixture's rows.

    Each output row is `{"input_ids", "labels", "position_ids"}` of exactly `max_length`, and `"source"`.
    `position_ids` restart at 0 at each document, and no label asks for the first token of a document. Padding is its
    own document with labels -100. A document longer than `max_length` is split, or cut with `cut_conversations`; a
    shorter one never. `source` names the source of the row's tokens, or is `"mixed"`.

    Documents are packed in batches of `documents_per_batch`, each on its own, so sharding is the stream's and resume
    by `state_dict` is exact. The order of the rows of a batch is shuffled, seeded.

    Args:
        assistant_only_loss: labels only on what the assistant wrote (text rows keep all labels).
        one_source_per_row: never mix sources in a row, so that the loss can be logged by source.
        cut_conversations: a conversation longer than `max_length` is cut there, as TRL's `bfd` does, and counted: its
            second part would be learnt without the question. Text is split all the same.

    Raises:
        UserError: `max_length` below 2 or a tokenizer without a chat template; and when rows are read, `max_length` so
            short that cutting leaves nothing to learn in a batch.
    """
    if max_length < 2:
        raise UserError(f"max_length: {max_length} is too small, expected at least 2")
    pack = partial(
        _pack_batch,
        renderer=Renderer(tokenizer),
        max_length=max_length,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        assistant_only_loss=assistant_only_loss,
        one_source_per_row=one_source_per_row,
        cuts=Cuts(max_length) if cut_conversations else None,
        seed=seed,
    )
    return stream.map(
        pack, batched=True, batch_size=documents_per_batch, with_indices=True, remove_columns=ROW_COLUMNS
    )


def tokenize_rows(
    stream: IterableDataset,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    *,
    assistant_only_loss: bool = False,
    documents_per_batch: int = 64,
) -> IterableDataset:
    """One document a row, `{"input_ids", "labels", "source"}`: `pack_rows` without the packing.

    A longer document is cut at `max_length`; one that has no label left is dropped. The log counts both.

    Raises:
        UserError: `max_length` below 2 or a tokenizer without a chat template; and when rows are read, `max_length` so
            short that no row of a batch keeps a label.
    """
    if max_length < 2:
        raise UserError(f"max_length: {max_length} is too small, expected at least 2")
    tokenize = partial(
        _tokenize_batch,
        renderer=Renderer(tokenizer),
        cuts=Cuts(max_length),
        assistant_only_loss=assistant_only_loss,
    )
    return stream.map(tokenize, batched=True, batch_size=documents_per_batch, remove_columns=ROW_COLUMNS)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[tuple[int, int, int]]]:
    """Fills rows of `capacity` tokens with documents of these lengths.

    Returns rows of pieces `(document, start, end)`. A document that fits a row is never cut. A longer one gives whole
    rows, and its rest is cut to fill the rooms left over.
    """
    rows = _fill_rows([(length, document) for document, length in enumerate(lengths) if length <= capacity], capacity)
    rooms = sorted((capacity - sum(end for _, _, end in row), index) for index, row in enumerate(rows))
    rooms = [room for room in rooms if room[0] >= MIN_PIECE]

    def place(document: int, start: int, end: int, position: int) -> None:
        if position == len(rooms):
            rows.append([])
            room, row = capacity, len(rows) - 1
        else:
            room, row = rooms.pop(position)
        rows[row].append((document, start, end))
        if room - (end - start) >= MIN_PIECE:
            insort(rooms, (room - (end - start), row))

    for document in sorted(range(len(lengths)), key=lambda document: -lengths[document]):
        start, end = 0, lengths[document]
        if end <= capacity:
            break
        while end - start > capacity:
            place(document, start, start + capacity, len(rooms))
            start += capacity
        while start < end:
            position = bisect_left(rooms, (end - start, -1))
            cut = end if position < len(rooms) or not rooms else start + rooms[-1][0]
            place(document, start, cut, position if cut == end else len(rooms) - 1)
            start = cut
    return rows


def _fill_rows(documents: Sequence[tuple[int, int]], capacity: int) -> list[list[tuple[int, int, int]]]:
    """Whole documents `(length, document)` into rows: longest first, and last the one or two that fill a row best."""
    by_length: dict[int, list[int]] = {}
    for length, document in documents:
        by_length.setdefault(length, []).append(document)
    sizes = sorted(by_length)
    rows: list[list[tuple[int, int, int]]] = []
    while sizes:
        row: list[tuple[int, int, int]] = []
        room = capacity
        while sizes and sizes[0] <= room:
            for length in (sizes[-1],) if room > 2 * sizes[-1] else _best_one_or_two(sizes, by_length, room):
                row.append((by_length[length].pop(), 0, length))
                room -= length
                if not by_length[length]:
                    sizes.remove(length)
        rows.append(row)
    return rows


def _best_one_or_two(sizes: list[int], by_length: dict[int, list[int]], room: int) -> tuple[int, ...]:
    """The one or two lengths with the largest sum within `room`; `sizes` is sorted and its first fits."""
    high = bisect_right(sizes, room) - 1
    best: tuple[int, ...] = (sizes[high],)
    low = 0
    while low <= high:
        total = sizes[low] + sizes[high]
        if total > room:
            high -= 1
        else:
            if total > sum(best) and (low < high or len(by_length[sizes[low]]) > 1):
                best = (sizes[low], sizes[high])
            low += 1
    return best


def _documents(batch: dict[str, list], renderer: Renderer, assistant_only_loss: bool) -> list[Document]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    documents = []
    for row, (ids, mask) in zip(rows, renderer.render(rows), strict=True):
        labels = ids
        if assistant_only_loss:
            labels = [token if trained else IGNORED_LABEL for token, trained in zip(ids, mask, strict=True)]
        documents.append((ids, labels, row.get("source") or ""))
    return documents


def _tokenize_batch(
    batch: dict[str, list], *, renderer: Renderer, cuts: Cuts, assistant_only_loss: bool
) -> dict[str, list]:
    documents = cuts.apply(_documents(batch, renderer, assistant_only_loss))
    labelled = [(ids, [IGNORED_LABEL, *labels[1:]], source) for ids, labels, source in documents]
    columns = zip(*labelled, strict=True)
    return {name: list(values) for name, values in zip(("input_ids", "labels", "source"), columns, strict=True)}


def _pack_batch(
    batch: dict[str, list],
    indices: list[int],
    *,
    renderer: Renderer,
    max_length: int,
    pad_id: int,
    assistant_only_loss: bool,
    one_source_per_row: bool,
    cuts: Cuts | None,
    seed: int,
) -> dict[str, list]:
    documents = _documents(batch, renderer, assistant_only_loss)
    if cuts is not None and "messages" in batch:
        documents = cuts.apply(documents, [messages is not None for messages in batch["messages"]])
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document[2] if one_source_per_row else "", []).append(document)
    packed = []
    for group in groups.values():
        for pieces in best_fit([len(ids) for ids, _, _ in group], max_length):
            packed.append(_join(group, pieces, max_length, pad_id))
    random.Random(f"{seed}/{indices[0]}").shuffle(packed)
    return {column: [row[column] for row in packed] for column in ("input_ids", "labels", "position_ids", "source")}


def _join(
    documents: list[Document], pieces: list[tuple[int, int, int]], max_length: int, pad_id: int
) -> dict[str, Any]:
    input_ids: list[int] = []
    labels: list[int] = []
    position_ids: list[int] = []
    for document, start, end in pieces:
        ids, document_labels, _ = documents[document]
        input_ids += ids[start:end]
        labels.append(IGNORED_LABEL)
        labels += document_labels[start + 1 : end]
        position_ids += range(end - start)
    padding = max_length - len(input_ids)
    sources = {documents[document][2] for document, _, _ in pieces}
    return {
        "input_ids": input_ids + [pad_id] * padding,
        "labels": labels + [IGNORED_LABEL] * padding,
        "position_ids": position_ids + list(range(padding)),
        "source": sources.pop() if len(sources) == 1 else "mixed",
    }
