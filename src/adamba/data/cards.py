"""Data cards: the front matter of `data_cards/<id>.md` is the registry of datasets.

Words the Hub's dataset cards have keep their meaning there (`pretty_name`, `license`, `language`, …); what they lack
stands under `adamba:` and is typed here.
"""

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from adamba.errors import UserError

LOADERS = ("hub", "task", "python_docs", "files")


@dataclass(frozen=True)
class Card:
    """One dataset.

    Attributes:
        id: name in a `mix`, and of the card's file.
        loader: `hub` (a dataset repository), `files` (only local files), `task` (made by `adamba.tasks`) or
            `python_docs`.
        format: name of the function in `adamba.data.formats` that converts its rows.
        path: Hub repository, for loader `hub`.
        revision: Hub revision; None is the newest.
        config: Hub configuration name.
        data_files: files in the repository to read instead of what the Hub would choose (glob patterns).
        fallback: Hub repository (`name` or `name:config`) with the same data, read where the Hub has no `path`.
        splits: our split → split there. Without `test`, and of local files, it is held out by a hash of the row.
        columns: name the format expects → column there, where they differ.
        use: what it is for.
        size: rows and bytes, for people.
        pretty_name, license, language: as on the Hub.
        body: the card's text below the front matter.
        file: where the card was read.
    """

    id: str
    loader: str
    format: str
    path: str | None = None
    revision: str | None = None
    config: str | None = None
    data_files: tuple[str, ...] = ()
    fallback: str | None = None
    splits: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    use: tuple[str, ...] = ()
    size: str = ""
    pretty_name: str = ""
    license: str = ""
    language: tuple[str, ...] = ()
    body: str = ""
    file: str = ""


def find_cards_dir(cards_dir: str | Path = "data_cards") -> Path:
    """The folder of cards: as given, or, when a relative one is not below the working directory, in the repository."""
    folder = Path(cards_dir)
    in_repository = Path(__file__).parents[3] / folder
    if not folder.is_dir() and not folder.is_absolute() and in_repository.is_dir():
        return in_repository
    if not folder.is_dir():
        raise UserError(f"cards_dir: {folder} is not a folder of data cards")
    return folder


def parse_card(file: Path) -> Card:
    """Reads one card.

    Raises:
        UserError: no front matter, a missing or unknown key, or a value of the wrong type.
    """
    _, opening, rest = file.read_text(encoding="utf-8").partition("---\n")
    front_matter, closing, body = rest.partition("\n---\n")
    if not opening or not closing:
        raise UserError(f"{file}: no front matter between two lines of '---'")
    try:
        metadata = yaml.safe_load(front_matter)
    except yaml.YAMLError as error:
        raise UserError(f"{file}: the front matter is not YAML: {' '.join(str(error).split())}") from error
    own = metadata.get("adamba") if isinstance(metadata, dict) else None
    if not isinstance(own, dict):
        raise UserError(f"{file}: key 'adamba' is missing or not a mapping")
    known = {item.name for item in fields(Card)} - {"pretty_name", "license", "language", "body", "file"}
    for key in own.keys() - known:
        raise UserError(f"{file}: unknown key 'adamba.{key}', expected one of {', '.join(sorted(known))}")
    for key in ("id", "loader", "format"):
        if not isinstance(own.get(key), str):
            raise UserError(f"{file}: key 'adamba.{key}' is missing or not a string")
    if own["id"] != file.stem:
        raise UserError(f"{file}: key 'adamba.id' is {own['id']!r}, the file's name asks for {file.stem!r}")
    if own["loader"] not in LOADERS:
        raise UserError(f"{file}: key 'adamba.loader' is {own['loader']!r}, expected one of {', '.join(LOADERS)}")
    if own["loader"] == "hub" and not own.get("path"):
        raise UserError(f"{file}: key 'adamba.path' is missing, loader 'hub' needs it")
    for key in ("splits", "columns"):
        if not isinstance(own.get(key, {}), dict):
            raise UserError(f"{file}: key 'adamba.{key}' is {own[key]!r}, expected a mapping")
    own = own | {key: _as_tuple(own[key]) for key in ("data_files", "use") if key in own}
    return Card(
        **own,
        pretty_name=str(metadata.get("pretty_name", own["id"])),
        license=str(metadata.get("license", "unknown")),
        language=_as_tuple(metadata.get("language", ())),
        body=body.strip(),
        file=str(file),
    )


def load_cards(cards_dir: str | Path = "data_cards") -> dict[str, Card]:
    """All cards by id, in the order of their names. `README.md` is no card."""
    folder = find_cards_dir(cards_dir)
    return {file.stem: parse_card(file) for file in sorted(folder.glob("*.md")) if file.stem != "README"}


def load_card(source: str, cards_dir: str | Path = "data_cards") -> Card:
    """The card of one id.

    Raises:
        UserError: no such card; the message names the nearest.
    """
    folder = find_cards_dir(cards_dir)
    file = folder / f"{source}.md"
    if file.is_file() and source != "README":
        return parse_card(file)
    known = sorted(path.stem for path in folder.glob("*.md") if path.stem != "README")
    nearest = difflib.get_close_matches(source, known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
    raise UserError(f"mix: no data card {source!r} in {folder}; {hint}")


def _as_tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
