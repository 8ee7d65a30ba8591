"""From a card to rows: where the records are, which split they belong to, how they convert, and what drops."""

import itertools
import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

from adamba.data.cards import Card
from adamba.data.files import OnBadFile, Record, find_files, holds_one_record, read_records, without_nulls
from adamba.data.formats import FORMATS, DroppedRow, Row
from adamba.data.python_docs import python_docs_rows
from adamba.errors import UserError, one_line

NUM_SHARDS = 48  # of what has no files: divides over 2, 3, 4, 6, 8, 12, 16 or 24 ranks × workers
TEST_FRACTION_INVERSE = 50  # rows held out of a dataset that has no test split
DOWNLOAD_DIR = Path("data")  # `run_data.py download` puts a dataset in a folder of its name here
MIN_SHARD_BYTES = 1 << 20  # smaller local files are read together
MIN_ROWS_TO_JUDGE = 100
MAX_DROPPED_FRACTION = 0.5

logger = logging.getLogger(__name__)
Reader = Callable[[Any], Iterator[Record]]


@dataclass
class Conversion:
    """Converts the records of one source, of both splits, and counts what it drops, by reason.

    `convert` returns None for a dropped record.
    """

    card: Card
    seen: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.card.format not in FORMATS:
            known = ", ".join(FORMATS)
            raise UserError(f"{self.card.file}: key 'adamba.format' is {self.card.format!r}, expected one of {known}")
        self.format = FORMATS[self.card.format]

    def convert(self, record: Record) -> Row | None:
        """
        Raises:
            UserError: the first record lacks the format's columns, or more than half of a hundred records drop.
        """
        for ours, theirs in self.card.columns.items():
            if theirs in record:
                record = record | {ours: record[theirs]}
        missing = [column for column in self.format.columns if column not in record]
        if missing and self.seen == 0:
            raise UserError(
                f"{self.card.id}: column {missing[0]!r} not found, the data has {', '.join(map(str, record))}; "
                f"format {self.card.format!r} needs {', '.join(self.format.columns)} (rename with 'adamba.columns' in "
                f"{self.card.file})"
            )
        self.seen += 1
        try:
            return self.format.convert(record)
        except DroppedRow as reason:
            self.dropped[str(reason)] += 1
        if self.seen >= MIN_ROWS_TO_JUDGE and self.dropped.total() > MAX_DROPPED_FRACTION * self.seen:
            raise UserError(f"{self.card.id}: {self.report()}; is {self.card.format!r} the right format?")
        return None

    def report(self) -> str:
        """`12 of 100 rows dropped (an empty turn 8, no answer at the end 4)`."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common())
        return f"{self.dropped.total()} of {self.seen} rows dropped" + (f" ({reasons})" if reasons else "")


def open_source(card: Card, split: str, data_file: str | None, on_bad_file: OnBadFile) -> tuple[Reader, list[Any]]:
    """A function that reads one shard's records, and the shards: tuples of files, or numbers.

    A local file or folder (`data_file`, or the folder that `run_data.py download` fills) stands in for the Hub.

    Raises:
        UserError: the files do not exist, or the Hub cannot be reached.
    """
    if data_file is None and card.loader in ("hub", "files") and (DOWNLOAD_DIR / card.id).is_dir():
        data_file = str(DOWNLOAD_DIR / card.id)
    if data_file is not None:
        return partial(_read_files, on_bad_file=on_bad_file), join_files(find_files(data_file))
    if card.loader == "python_docs":
        return partial(_read_python_docs, split=split), list(range(NUM_SHARDS))
    if card.loader == "files":
        raise UserError(f"{card.id}: it lives in no repository ({card.file} says where); {_how_to_pass_files(card)}")
    num_shards = load_hub(card, split).num_shards
    return partial(_read_hub, card=card, split=split, num_shards=num_shards), list(range(num_shards))


def join_files(paths: Sequence[Path]) -> list[tuple[str, ...]]:
    """Small neighbours together: of files of one record each, one in fifty would leave a shard nothing to train on."""
    shards: list[tuple[str, ...]] = []
    joined: tuple[str, ...] = ()
    size = 0
    for path in paths:
        joined += (str(path),)
        size += path.stat().st_size
        if size >= MIN_SHARD_BYTES and (not holds_one_record(path) or len(joined) >= TEST_FRACTION_INVERSE):
            shards.append(joined)
            joined, size = (), 0
    if joined and shards:
        shards[-1] += joined
    return shards or [joined]


def rows_of(card: Card, split: str, reader: Reader, shards: list[Any], conversion: Conversion) -> Iterator[Row]:
    """The converted rows of the shards that belong to `split`.

    Raises:
        UserError: a shard of the training split has no record, or none that converts, or only held-out ones.
    """
    for shard in shards:
        # A local file stands in for the whole dataset: which of the Hub's splits its rows are is not known.
        held_out_here = "test" not in card.splits or isinstance(shard, tuple)
        before, num_converted, num_kept = conversion.seen, 0, 0
        for record in reader(shard):
            row = conversion.convert(record)
            if row is None:
                continue
            num_converted += 1
            if held_out_here and (split == "test") != is_held_out(row):
                continue
            num_kept += 1
            yield row
        if split == "train" and not num_kept:
            what = conversion.report() if conversion.seen > before else "it holds no record"
            if num_converted:
                what = f"what it holds ({num_converted}) is held out for the test split; join it with other files"
            where = " to ".join(dict.fromkeys((shard[0], shard[-1]))) if isinstance(shard, tuple) else shard
            raise UserError(f"{card.id}: nothing to train on in {where}: {what}")
    if conversion.dropped:
        logger.warning("%s: %s", card.id, conversion.report())


def is_held_out(row: Row) -> bool:
    """Whether a converted row belongs to `test`: by a hash of what is learnt from it, so copies stay on one side.

    The record it came from would not do: copies there may differ in an id or another column that nobody learns. Of a
    pair its prompt counts, which others may have too.
    """
    text = json.dumps({"prompt": row["prompt"]} if "prompt" in row else row, sort_keys=True, default=str)
    return zlib.crc32(text.encode(errors="replace")) % TEST_FRACTION_INVERSE == 0


def load_hub(card: Card, split: str) -> IterableDataset:
    """The dataset, streamed; where the Hub says that there is no such dataset, its fallback.

    Raises:
        UserError: it cannot be reached; the message says how to pass local files.
    """
    problem: Exception
    for place in (card.path, card.fallback):
        if place is None:
            continue
        path, _, config = place.partition(":")
        try:
            stream = load_dataset(
                path,
                config or card.config,
                revision=card.revision if place == card.path else None,
                split=card.splits.get(split, card.splits.get("train", "train")),
                data_files=list(card.data_files) or None,
                streaming=True,
            )
        except DatasetNotFoundError as error:  # reached, but there is no such dataset
            problem = error
        except (OSError, ValueError, RuntimeError) as error:
            problem = error
            break
        else:
            if place != card.path:
                logger.warning("%s: there is no dataset %s on the Hub, reading %s", card.id, card.path, place)
            return stream
    raise UserError(
        f"{card.id}: the Hub dataset {card.path} cannot be read: {one_line(problem)[:200]}; {_how_to_pass_files(card)}"
    ) from problem


def _how_to_pass_files(card: Card) -> str:
    return f"pass local files with --data_files {card.id}=FILE_OR_FOLDER, or put them into {DOWNLOAD_DIR / card.id}/"


def _read_files(paths: Sequence[str], on_bad_file: OnBadFile) -> Iterator[Record]:
    return itertools.chain.from_iterable(read_records(Path(path), on_bad_file) for path in paths)


def _read_python_docs(shard: int, split: str) -> Iterator[Record]:
    return iter(python_docs_rows(split)[shard::NUM_SHARDS])


def _read_hub(shard: int, card: Card, split: str, num_shards: int) -> Iterator[Record]:
    return map(without_nulls, load_hub(card, split).shard(num_shards, shard))
