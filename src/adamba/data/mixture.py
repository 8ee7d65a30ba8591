"""Weighted mixtures of data cards and procedural tasks, as one stream.

What is interleaved is not rows but small references of one shape (a task's reference is its seed); a row is made after
its source was drawn. So sources of different columns mix without casts, a skipped row costs nothing on resume, and
sharding and `state_dict` are those of `datasets.IterableDataset`.
"""

import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

from datasets import Dataset, Features, IterableDataset, Json, Value, interleave_datasets

from adamba.data.cards import Card, load_card
from adamba.data.files import OnBadFile
from adamba.data.formats import Row
from adamba.data.sources import NUM_SHARDS, Conversion, Reader, open_source, rows_of
from adamba.errors import UserError
from adamba.tasks import TASKS

Split = Literal["train", "test"]
SHUFFLE_ROWS = 1000
REFERENCE = Features({"source": Value("string"), "payload": Value("string")})


def parse_mix(mix: str | Mapping[str, Any]) -> dict[str, float]:
    """Reads `"calculator=1.0,tic_tac_toe=0.5"`, or checks a mapping; sources of weight 0 are left out.

    Raises:
        UserError: empty, a weight that is missing, negative or no number, or all weights zero.
    """
    if isinstance(mix, str):
        pairs = [item.partition("=")[::2] for item in mix.split(",") if item.strip()]
        for name, value in pairs:
            if not value.strip():
                raise UserError(f"mix: {name.strip()!r} has no weight, write {name.strip()}=1.0")
        mix = {name.strip(): value.strip() for name, value in pairs}
    weights: dict[str, float] = {}
    for name, value in mix.items():
        try:
            weight = float(value)
        except (TypeError, ValueError):
            raise UserError(f"mix: weight of {name!r} is {value!r}, expected a number") from None
        if not math.isfinite(weight) or weight < 0:
            raise UserError(f"mix: weight of {name!r} is {weight:g}, expected a finite number of at least 0")
        weights[str(name)] = weight
    if not weights:
        raise UserError("mix: it is empty, write for instance calculator=1.0,tic_tac_toe=0.5")
    if not any(weights.values()):
        raise UserError(f"mix: all weights are 0 ({', '.join(weights)}), at least one must be above 0")
    return {name: weight for name, weight in weights.items() if weight > 0}


def log_mix(mix: Mapping[str, float]) -> str:
    """One line for the log: `calculator 1.0 (66.7 %), tic_tac_toe 0.5 (33.3 %)`."""
    total = sum(mix.values())
    return ", ".join(f"{name} {weight} ({100 * weight / total:.1f} %)" for name, weight in mix.items())


def load_mixture(
    mix: str | Mapping[str, float],
    *,
    split: Split,
    seed: int,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    data_files: Mapping[str, str] | None = None,
    cards_dir: str = "data_cards",
    on_bad_file: OnBadFile = "stop",
    rank: int = 0,
    num_ranks: int = 1,
) -> IterableDataset:
    """A stream of rows drawn from `mix` by relative weights (per row, not per token).

    Rows are `{"text", "source"}` or `{"messages", "tools", "source"}`, where `tools` is a list of JSON schemas. Tasks
    are infinite; a dataset repeats for ever in `train` and passes once in `test`. Same arguments, same rows. The
    stream shards with `split_dataset_by_node` and DataLoader workers, and resumes with `state_dict`.

    Args:
        mix: source → weight, or its command-line form (`parse_mix`).
        settings: task → keyword arguments of its generator.
        data_files: source → local file, folder or archive that stands in for the Hub.
        on_bad_file: `stop` at a file that is cut off or broken, or `skip` to keep what is whole.
        rank, num_ranks: of the process that will read its part of the shards: each draws its sources in an order of
            its own, where there are shards for all. Otherwise all ranks have the same source at the same time.

    Raises:
        UserError: an unknown source, a bad weight, data that cannot be reached, settings for what is no task, or files
            for what is not in the mix.
    """
    mix = parse_mix(mix)
    if split not in ("train", "test"):
        raise UserError(f"split: {split!r} is unknown, expected 'train' or 'test'")
    settings = settings or {}
    for name in settings:
        if name not in TASKS:
            raise UserError(f"settings: {name!r} is no task, expected one of {', '.join(TASKS)}")
    for name in data_files or {}:
        if name not in mix:
            raise UserError(f"data_files: {name!r} is not in the mix ({', '.join(mix)})")
    streams = []
    for name in mix:
        card = load_card(name, cards_dir)
        streams.append(_references(card, split, seed, (data_files or {}).get(name), on_bad_file))
    if len(streams) == 1:
        stream = streams[0]
    else:
        total = sum(mix.values())
        order = seed
        # With fewer shards than ranks each rank reads everything and takes every n-th row: those must be the same.
        if rank and min(stream.num_shards for stream in streams) >= num_ranks:
            order = random.Random(f"{seed}/rank {rank}").getrandbits(63)
        stream = interleave_datasets(
            streams,
            probabilities=[weight / total for weight in mix.values()],
            seed=order,
            stopping_strategy="all_exhausted_without_replacement",  # in `test` none begins again until all have ended
        )
    dereference = partial(_dereference, split=split, settings={name: dict(settings.get(name, {})) for name in mix})
    return stream.map(dereference, remove_columns=["payload"])


def materialise(stream: IterableDataset, num_rows: int) -> Dataset:
    """The first `num_rows` rows (fewer if the stream ends) as a `Dataset` in memory.

    `messages` and `tools` get the type `Json`, so that tool arguments of different tools keep their own keys.

    Raises:
        UserError: the stream is empty.
    """
    rows = list(itertools.islice(stream, num_rows))
    if not rows:
        raise UserError("mix: the stream is empty, no row to train on")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = {column: [row.get(column) for row in rows] for column in columns}
    if "messages" not in table:
        return Dataset.from_dict(table)
    table["messages"] = [messages and [storable(message) for message in messages] for messages in table["messages"]]
    inferred = Dataset.from_dict({name: values for name, values in table.items() if name not in ("messages", "tools")})
    return Dataset.from_dict(table, features=Features(inferred.features | {"messages": [Json()], "tools": [Json()]}))


def storable(message: Row) -> Row:
    """The message for a column of type `Json`, which makes a text of a whole message with a number beyond 64 bits, and
    null of NaN: of a call with such a number the arguments become JSON text, which the chat template writes as it is.
    """
    calls = message.get("tool_calls")
    if _is_kept(calls) or not isinstance(calls, list):
        return message
    return message | {"tool_calls": [_with_text(call) for call in calls]}


def _with_text(call: Any) -> Any:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):  # in an answer to be rejected a call may be of any shape
        return call
    function = function | {"arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
    return call | {"function": function} if "function" in call else function


def _is_kept(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return all(map(_is_kept, value.values() if isinstance(value, dict) else value))
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or -(2**63) <= value < 2**64


def _references(card: Card, split: Split, seed: int, data_file: str | None, on_bad_file: OnBadFile) -> IterableDataset:
    """Rows `{"source", "payload"}`; payload is a task's seed, or the row as JSON."""
    fixed: dict[str, Any] = {"split": split}
    if card.loader == "task":
        if card.id not in TASKS:
            raise UserError(f"{card.file}: {card.id!r} is not in adamba.tasks.TASKS ({', '.join(TASKS)})")
        if data_file is not None:
            raise UserError(
                f"data_files: {card.id!r} is a task and makes its own rows, so {data_file} would go unread"
            )
        fixed |= {"source": card.id, "seed": seed, "shard": list(range(NUM_SHARDS))}
        return IterableDataset.from_generator(_task_references, features=REFERENCE, gen_kwargs=fixed)
    reader, shards = open_source(card, split, data_file, on_bad_file)
    fixed |= {"card": card, "reader": reader, "shard": shards}
    stream = IterableDataset.from_generator(_row_references, features=REFERENCE, gen_kwargs=fixed)
    if split == "test":
        return stream
    shuffle = partial(_shuffle_block, seed=seed)
    stream = stream.map(shuffle, batched=True, batch_size=SHUFFLE_ROWS, with_indices=True, features=REFERENCE)
    return stream.repeat(None)


def _task_references(source: str, split: str, seed: int, shard: list[int]) -> Iterator[dict[str, str]]:
    for index in itertools.count():
        for number in shard:
            digest = hashlib.blake2b(f"{source}/{split}/{seed}/{number}/{index}".encode(), digest_size=7).digest()
            yield {"source": source, "payload": str(int.from_bytes(digest, "big"))}


def _row_references(card: Card, split: str, reader: Reader, shard: list[Any]) -> Iterator[dict[str, str]]:
    for row in rows_of(card, split, reader, shard, Conversion(card)):
        yield {"source": card.id, "payload": json.dumps(row)}


def _shuffle_block(batch: dict[str, list], indices: list[int], *, seed: int) -> dict[str, list]:
    """A seeded permutation inside each block: no buffer, so a resumed stream goes on exactly where it was."""
    order = random.Random(f"{seed}/{indices[0]}").sample(range(len(indices)), len(indices))
    return {column: [values[index] for index in order] for column, values in batch.items()}


def _dereference(reference: dict[str, str], *, split: str, settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    source = reference["source"]
    if source in TASKS:
        return TASKS[source].example(int(reference["payload"]), split, **settings[source])
    return json.loads(reference["payload"])
