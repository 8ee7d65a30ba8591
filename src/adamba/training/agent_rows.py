"""Rows for reinforcement learning: prompts to play from (GRPO) and pairs to prefer between (DPO)."""

import itertools
import json
import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, Value

from adamba.data.cards import find_cards_dir, parse_card
from adamba.data.files import OnBadFile
from adamba.data.formats.conversation import SPECIAL_TEXTS, DroppedRow, check_unicode
from adamba.data.formats.plain import check_message, check_tools
from adamba.data.formats.preference import check_answer
from adamba.data.mixture import load_mixture, storable
from adamba.data.sources import is_held_out
from adamba.errors import UserError
from adamba.tasks import TASKS, Split, Task

Row = dict[str, Any]
PAIR_COLUMNS = ("prompt", "chosen", "rejected")


def prompt_rows(
    mix: Mapping[str, float], num_rows: int, *, split: Split, seed: int, settings: Mapping[str, dict[str, Any]]
) -> Dataset:
    """Rows of `Task.prompt`, tasks drawn by weight; a column that a task lacks is None in its rows.

    Raises:
        UserError: a source that is no task, or settings that a task refuses.
    """
    _check_known("mix", mix, TASKS)
    _check_known("task_settings", settings, TASKS)

    def make(task: Task, row_seed: int) -> Row:
        return task.prompt(row_seed, split, **settings.get(task.name, {}))

    rows = [make(TASKS[name], row_seed) for name, row_seed in _draw(mix, num_rows, seed)]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})


def own_columns(row: Row) -> Row:
    """A row of `prompt_rows` without the columns that its task lacks."""
    return {column: value for column, value in row.items() if value is not None}


def preference_rows(
    mix: Mapping[str, float],
    num_rows: int,
    *,
    split: Split,
    seed: int,
    settings: Mapping[str, dict[str, Any]],
    data_files: Mapping[str, str],
    cards_dir: str = "data_cards",
    on_bad_file: OnBadFile = "stop",
    distinct: bool = False,
    imitated: Collection[str] = (),
) -> Dataset:
    """Rows `{"prompt", "chosen", "rejected", "tools", "source"}`: a task's own pairs, or those of a file or a card.

    A source in `data_files` is a JSON Lines file of such rows (`tools` may be absent), another one a data card of
    format `preference`. One prompt in fifty, by its hash, belongs to `test` with all its pairs, where a card names no
    such split. Each pair is drawn once before any is drawn again.
    With `distinct`, each of the drawn pairs is kept once: fewer rows, and rare turns weigh as much as common ones.
    A source in `imitated` gets its good turn as the rejected one too: the halves of DPO's loss cancel, and only a
    supervised term is left. (Of two long expressions that differ in a digit, DPO also makes what follows the wrong
    digit unlikely, although that is right, and so harms the copying of expressions.)

    Raises:
        UserError: a source that is neither a task nor in `data_files` nor a card of pairs, a row of a file that is no
            pair, a source without a pair of this split, or an imitated source that is not in the mix.
    """
    _check_known("task_settings", settings, [*TASKS, *data_files])
    for name in imitated:
        if name not in mix:
            rest = [source for source in imitated if source in mix]
            raise UserError(
                f"imitated: {name!r} is not in the mix ({', '.join(mix)}); give --imitated '[{', '.join(rest)}]' too"
            )
    pairs = {name: _shuffled_pairs(data_files[name], split, seed) for name in mix if name in data_files}
    for name in [name for name in mix if name not in TASKS and name not in pairs]:
        pairs[name] = _pairs_of_card(name, split, seed, cards_dir, on_bad_file)

    def make(name: str, row_seed: int) -> Row:
        if name in pairs:
            return next(pairs[name])
        return TASKS[name].preference(row_seed, split, **settings.get(name, {}))

    rows = [make(name, row_seed) | {"source": name} for name, row_seed in _draw(mix, num_rows, seed)]
    rows = [row | {"rejected": row["chosen"]} if row["source"] in imitated else row for row in rows]
    if distinct:
        rows = list({json.dumps(row): row for row in rows}.values())
    # Json keeps each call's arguments as they are; a struct column would give every call the keys of all tools.
    typed = {column: [Json()] for column in (*PAIR_COLUMNS, "tools")}
    table = {column: [row.get(column) or [] for row in rows] for column in typed}
    for column in PAIR_COLUMNS:
        table[column] = [[storable(message) for message in messages] for messages in table[column]]
    table["source"] = [row["source"] for row in rows]
    return Dataset.from_dict(table, features=Features(typed | {"source": Value("string")}))


def _shuffled_pairs(path: str, split: Split, seed: int) -> Iterator[Row]:
    """The file's pairs of this split for ever, each pass in another order."""
    pairs = read_pairs(path)
    ours = [pair for pair in pairs if is_held_out(pair) == (split == "test")]
    if not ours:
        kind = "held out (one prompt in fifty is)" if split == "test" else "left to train on"
        how = "give more, or num_eval_pairs: 0" if split == "test" else "give more"
        raise UserError(f"{path}: of its {len(pairs)} pairs none is {kind}; {how}")
    passes = (random.Random(f"pairs/{seed}/{number}").sample(ours, len(ours)) for number in itertools.count())
    return itertools.chain.from_iterable(passes)


def _pairs_of_card(name: str, split: Split, seed: int, cards_dir: str, on_bad_file: OnBadFile) -> Iterator[Row]:
    """The pairs of a data card for ever, each pass of the held-out ones in the same order."""
    file = find_cards_dir(cards_dir) / f"{name}.md"
    if not file.is_file() or parse_card(file).format != "preference":
        known = ", ".join(TASKS)
        raise UserError(
            f"mix: {name!r} is no task ({known}) and no data card of format 'preference'; "
            f"give its pairs: --data_files {name}=PAIRS.jsonl"
        )
    stream = load_mixture({name: 1.0}, split=split, seed=seed, cards_dir=cards_dir, on_bad_file=on_bad_file)
    if next(iter(stream), None) is None:
        raise UserError(f"{name}: holds no pair for the {split} split; give more, or num_eval_pairs: 0")
    return itertools.chain.from_iterable(itertools.repeat(stream))


def read_pairs(path: str) -> list[Row]:
    """Preference rows of a JSON Lines file.

    Raises:
        UserError: naming the file and the line that is not a pair of two different answers of the assistant
            to one prompt.
    """
    try:
        # Not `splitlines`: inside a JSON text a line may hold other separators, as U+2028. `-sig`: some editors' mark.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read these trajectories: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot read these trajectories: not UTF-8 at byte {error.start}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{path}: line {number}: not valid JSON") from None
        for column in PAIR_COLUMNS:
            messages = row.get(column) if isinstance(row, dict) else None
            if not isinstance(messages, list) or not messages:
                raise UserError(f"{path}: line {number}: key '{column}': needs a list of messages")
            for message in messages:
                if problem := _problem(message):
                    raise UserError(f"{path}: line {number}: key '{column}': {problem}")
        if row["chosen"] == row["rejected"]:
            raise UserError(f"{path}: line {number}: chosen and rejected are the same")
        try:
            check_answer(row["chosen"] + row["rejected"])
            pair = {column: row[column] for column in PAIR_COLUMNS} | {"tools": _tools(row.get("tools"))}
            rows.append(check_unicode(pair))
        except DroppedRow as reason:
            raise UserError(f"{path}: line {number}: {reason}") from None
    if not rows:
        raise UserError(f"{path}: holds no trajectories")
    return rows


def _tools(tools: Any) -> list[Any]:
    """The tools from a list, its JSON text or None. Whole schemas stay as they are: a template may write all of one.

    Raises:
        DroppedRow: it is not a list of functions.
    """
    checked = check_tools(tools)
    given = json.loads(tools or "[]") if isinstance(tools, str) else tools or []
    return [tool if "function" in tool else schema for tool, schema in zip(given, checked, strict=True)]


def _problem(message: Any) -> str | None:
    """Why the chat template cannot write a message as it is meant, or would read a turn's end inside it."""
    if isinstance(message, dict):
        message = message | {"tool_calls": None}  # a call to be rejected may be of any shape
    try:
        checked = check_message(message)
    except DroppedRow as reason:
        return str(reason)
    texts = (checked["content"], checked.get("reasoning_content", ""))
    return "a control token in the text" if any(token in text for token in SPECIAL_TEXTS for text in texts) else None


def _draw(mix: Mapping[str, float], num_rows: int, seed: int) -> list[tuple[str, int]]:
    """Source and seed of each row."""
    rng = random.Random(f"agent rows/{seed}")
    names = rng.choices(list(mix), weights=list(mix.values()), k=num_rows)
    return [(name, rng.getrandbits(48)) for name in names]


def _check_known(key: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{key}: {name!r} is unknown; use {', '.join(known)}")
