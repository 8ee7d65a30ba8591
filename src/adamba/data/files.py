"""Records from local files in bounded memory: JSON, JSONL, Parquet, CSV, text, compressed, in folders and archives."""

import codecs
import csv
import gzip
import io
import json
import logging
import lzma
import tarfile
import zipfile
from bz2 import BZ2File
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from adamba.errors import UserError

OnBadFile = Literal["stop", "skip"]
Record = dict[str, Any]

CHUNK_BYTES = 1 << 20
MAX_RECORD_CHARACTERS = 1 << 26  # of a JSON record, or of a CSV field
TEXTS = (".txt", ".md")
SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", *TEXTS)
_OPENERS: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": BZ2File, ".xz": lzma.open}
_WHITE = " \t\r\n"

logger = logging.getLogger(__name__)


def find_files(location: str | Path) -> list[Path]:
    """The data files at a path: a file itself, or everything readable in a folder and below it, sorted.

    Raises:
        UserError: nothing there, or nothing readable.
    """
    location = Path(location).expanduser()
    if location.is_file():
        return [location]
    if not location.is_dir():
        raise UserError(f"data_files: {location} does not exist")
    found = [path for path in sorted(location.rglob("*")) if path.is_file() and _is_data(path.name)]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(location).parts)]
    if not found:
        raise UserError(f"data_files: {location} holds no data file ({', '.join(SUFFIXES)}, also compressed)")
    return found


def read_records(path: Path, on_bad_file: OnBadFile = "stop") -> Iterator[Record]:
    """The records of one file, one after another; memory does not grow with the file.

    Args:
        on_bad_file: what to do where a file is cut off or not what its name says: `stop`, or `skip` to go on with what
            is whole, and log how much that was.

    Raises:
        UserError: the file cannot be read; it names file and byte.
    """
    name = path.name.lower()
    try:
        if name.endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                for member in sorted(archive.namelist()):
                    if _is_data(member):
                        with archive.open(member) as stream:
                            yield from _read_stream(stream, f"{path}:{member}", member.lower(), on_bad_file)
        elif name.endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
            with tarfile.open(path) as tar:
                for item in tar:
                    inside = tar.extractfile(item) if item.isfile() and _is_data(item.name) else None
                    if inside is not None:
                        yield from _read_stream(inside, f"{path}:{item.name}", item.name.lower(), on_bad_file)
        elif Path(name).suffix in _OPENERS:
            with _OPENERS[Path(name).suffix](path) as stream:
                yield from _read_stream(stream, str(path), name.rpartition(".")[0], on_bad_file)
        else:
            with path.open("rb") as stream:
                yield from _read_stream(stream, str(path), name, on_bad_file)
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError) as error:
        _bad(on_bad_file, f"{path}: cannot be read ({error})")


def holds_one_record(path: Path) -> bool:
    """Whether a file is read whole, as one text."""
    return _uncompressed(path.name.lower()).endswith(TEXTS)


def _is_data(name: str) -> bool:
    name = name.lower()
    return name.endswith((".zip", ".tar", ".tgz")) or _uncompressed(name).endswith((*SUFFIXES, ".tar"))


def _uncompressed(name: str) -> str:
    return name.rpartition(".")[0] if Path(name).suffix in _OPENERS else name


def _bad(on_bad_file: OnBadFile, problem: str, kept: int | None = None) -> None:
    """Stops with the problem, or logs it."""
    if on_bad_file == "stop":
        raise UserError(f"{problem}; mend it, or set on_bad_file: skip to keep the whole records")
    logger.warning("%s; skipped%s", problem, "" if kept is None else f", {kept} whole records kept")


def _read_stream(stream: IO[bytes], label: str, name: str, on_bad_file: OnBadFile) -> Iterator[Record]:
    if name.endswith((".jsonl", ".ndjson")):
        yield from _read_lines(stream, label, on_bad_file)
    elif name.endswith(".json"):
        yield from _read_json(stream, label, on_bad_file)
    elif name.endswith(".parquet"):
        yield from _read_parquet(stream, label, on_bad_file)
    elif name.endswith((".csv", ".tsv")):
        yield from _read_csv(stream, label, "\t" if name.endswith(".tsv") else ",", on_bad_file)
    elif name.endswith(TEXTS):
        try:
            yield {"text": stream.read().decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            _bad(on_bad_file, f"{label}: not UTF-8 at byte {error.start}")
    else:
        raise UserError(f"{label}: files of this kind are not read, only {', '.join(SUFFIXES)}")


def _read_lines(stream: IO[bytes], label: str, on_bad_file: OnBadFile) -> Iterator[Record]:
    start = kept = 0
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                cut_off = not line.endswith(b"\n")
                what = "cut off" if cut_off else "not JSON"
                _bad(on_bad_file, f"{label}: line {number}, byte {start}, is {what}", kept if cut_off else None)
            else:
                yield _as_record(record, label, kept)
                kept += 1
        start += len(line)


def _read_csv(stream: IO[bytes], label: str, delimiter: str, on_bad_file: OnBadFile) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD_CHARACTERS)  # Python's own limit, 131,072 characters, is less than many documents
    # `-sig`: spreadsheets write a mark before the first column's name, which would be another name with it.
    reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=delimiter)
    kept = 0
    try:
        for record in reader:
            yield record
            kept += 1
    except csv.Error as error:
        _bad(on_bad_file, f"{label}: not CSV after line {reader.line_num} ({error})", kept)
    except UnicodeDecodeError:
        _bad(on_bad_file, f"{label}: not UTF-8 after line {reader.line_num}", kept)


def _read_parquet(stream: IO[bytes], label: str, on_bad_file: OnBadFile) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    if not stream.seekable():
        stream = io.BytesIO(stream.read())
    kept = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=256):
            for record in batch.to_pylist():
                yield without_nulls(record)
                kept += 1
    except (pyarrow.ArrowException, OSError) as error:
        _bad(on_bad_file, f"{label}: not whole Parquet ({' '.join(str(error).split())})", kept)


def without_nulls(record: Record) -> Record:
    """The record; what its columns hold inside loses keys of value None.

    Arrow gives all objects of a column the keys of all: a call of one tool would have the arguments of every other.
    """

    def keep(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: keep(item) for key, item in value.items() if item is not None}
        return [keep(item) for item in value] if isinstance(value, list) else value

    return {column: keep(value) for column, value in record.items()}


def _read_json(stream: IO[bytes], label: str, on_bad_file: OnBadFile) -> Iterator[Record]:
    """A JSON array of records, or records one after another."""
    text = _JsonText(stream)
    kept = 0
    text.skip(_WHITE)
    in_array = text.peek() == "["
    if in_array:
        text.position += 1
    while True:
        text.skip(_WHITE + ",")
        following = text.peek()
        if following == "" and in_array:
            _bad(on_bad_file, f"{label}: cut off at byte {text.byte}, after {kept} records", kept)
        if following == "" or (in_array and following == "]"):
            return
        byte = text.byte
        try:
            record = text.value()
        except ValueError as error:
            what = "cut off in" if isinstance(error, _CutOff) else "not JSON in"
            place = f"the record that starts at byte {byte} (record {kept + 1})"
            _bad(on_bad_file, f"{label}: {what} {place}: {error}", kept)
            return
        yield _as_record(record, label, kept)
        kept += 1


def _as_record(record: Any, label: str, index: int) -> Record:
    if not isinstance(record, dict):
        raise UserError(f"{label}: record {index + 1} is a {type(record).__name__}, expected an object with columns")
    return record


class _CutOff(ValueError):
    """The text ends inside a value."""


class _JsonText:
    """The text of a stream, read in chunks: only the part from `position` on that is needed is kept."""

    def __init__(self, stream: IO[bytes]):
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self.buffer = ""
        self.position = 0
        self._counted_position = self._counted_bytes = 0
        self.scan = json.JSONDecoder().raw_decode

    @property
    def byte(self) -> int:
        """Where `position` is in the file."""
        self._count()
        return self._counted_bytes

    def _count(self) -> None:
        passed = self.buffer[self._counted_position : self.position]
        self._counted_bytes += len(passed) if passed.isascii() else len(passed.encode(errors="replace"))
        self._counted_position = self.position

    def more(self, at_least: int = 0) -> bool:
        """Reads on, forgetting what lies before `position`; False at the end of the file."""
        data = self.stream.read(max(CHUNK_BYTES, at_least))
        self._count()  # what is about to be forgotten
        self.buffer = self.buffer[self.position :] + self.decoder.decode(data, final=not data)
        self.position = self._counted_position = 0
        return bool(data)

    def peek(self) -> str:
        """The next character; empty at the end."""
        while self.position >= len(self.buffer):
            if not self.more():
                return ""
        return self.buffer[self.position]

    def skip(self, characters: str) -> None:
        while (following := self.peek()) and following in characters:
            self.position += 1

    def value(self) -> Any:
        """The next JSON object or array.

        Raises:
            _CutOff: the text ends inside it, or it is longer than `MAX_RECORD_CHARACTERS`.
            ValueError: what follows is no JSON.
        """
        while True:
            try:
                value, self.position = self.scan(self.buffer, self.position)
                return value
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except json.JSONDecodeError as error:
                if error.pos < len(self.buffer) - 8 and not error.msg.startswith("Unterminated string"):
                    raise ValueError(error.msg) from None
                room = len(self.buffer) - self.position
                if room > MAX_RECORD_CHARACTERS or not self.more(room):
                    raise _CutOff(error.msg) from None
