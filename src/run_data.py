"""
Look at the data before training on it.

    python src/run_data.py list
    python src/run_data.py show glaive_fc -n 3 --data-files glaive_fc=my/glaive.json
    python src/run_data.py stats recipes/tiny/phase5.yaml
    python src/run_data.py download fineweb --max-files 100
    python src/run_data.py check recipes/phase5.yaml
"""

from adamba.kept_help import KeepingParser, print_kept_help

if __name__ == "__main__":
    print_kept_help()  # before the imports below, which take seconds

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from adamba.data import Renderer, load_cards, log_mix, parse_mix
from adamba.data.arguments import DataArguments
from adamba.data.download import download
from adamba.data.row_stats import (
    as_conversation,
    collect,
    coloured,
    look_tokenizer,
    mix_as_it_comes,
    source_rows,
    summary,
)
from adamba.data.sources import DOWNLOAD_DIR
from adamba.errors import UserError, user_errors
from adamba.loading import ModelArguments, load_tokenizer
from adamba.recipe_file import read_recipe

console = Console(highlight=False)
CHECKED_ROWS = 20


def parse_arguments() -> argparse.Namespace:
    parser = KeepingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the registered datasets and tasks")
    for name, what in (("show", "rows as the model sees them, green where the loss is taken"), ("stats", "counts")):
        command = commands.add_parser(name, help=what)
        command.add_argument("target", help="a source's id" + ("" if name == "show" else ", or a recipe"))
        command.add_argument("-n", "--num-rows", type=int, default=3 if name == "show" else 1000)
        command.add_argument("--split", choices=("train", "test"), default="train")
        command.add_argument("--tokenizer", help="checkpoint to take it from; default: one trained on the rows shown")
    command = commands.add_parser("download", help="fetch a dataset from the Hub into data/<id>")
    command.add_argument("target", help="a source's id")
    command.add_argument("--max-files", type=int, help="only the first so many files")
    command = commands.add_parser("check", help="can every source of a recipe be read?")
    command.add_argument("target", help="a recipe")
    for command in commands.choices.values():
        command.add_argument(
            "--data-files", "--data_files", default="", help="local stand-ins: source=file_or_folder,…"
        )
        command.add_argument("--on-bad-file", "--on_bad_file", choices=("stop", "skip"), default="stop")
        command.add_argument("--cards-dir", "--cards_dir", default="data_cards")
    options = parser.parse_args()
    counts = (getattr(options, key, None) for key in ("num_rows", "max_files"))
    if any(count is not None and count < 1 for count in counts):
        raise UserError("command line: -n and --max-files must be 1 or more")
    return options


def data_arguments(options: argparse.Namespace) -> DataArguments:
    """What to read, from a recipe or for a single source, with the command line's stand-ins on top."""
    values: dict[str, Any] = {"mix": {options.target: 1.0}, "cards_dir": options.cards_dir}
    if options.target.endswith((".yaml", ".yml")):
        known = {item.name for item in dataclasses.fields(DataArguments)}
        values |= {key: value for key, value in read_recipe(options.target).items() if key in known}
        if isinstance(values["mix"], str):
            values["mix"] = parse_mix(values["mix"])
    pairs = [item.partition("=") for item in options.data_files.split(",") if item]
    values["data_files"] = (values.get("data_files") or {}) | {name: path for name, _, path in pairs}
    if options.on_bad_file == "skip":
        values["on_bad_file"] = "skip"
    return DataArguments(**values)


def list_cards(options: argparse.Namespace) -> None:
    table = Table("id", "from", "format", "licence", "for", "size", box=None, pad_edge=False)
    for card in load_cards(options.cards_dir).values():
        place = str(DOWNLOAD_DIR / card.id) if (DOWNLOAD_DIR / card.id).is_dir() else card.path or card.loader
        table.add_row(card.id, place, card.format, card.license, ", ".join(card.use), card.size.split(",")[0])
    console.print(table)


def make_renderer(options: argparse.Namespace, rows: list[dict[str, Any]]) -> Renderer:
    path = options.tokenizer
    return Renderer(look_tokenizer(rows) if path is None else load_tokenizer(ModelArguments(model_name_or_path=path)))


def show(options: argparse.Namespace, data_args: DataArguments) -> None:
    rows, _ = source_rows(options.target, options.split, data_args, options.num_rows)
    if not rows:
        raise UserError(f"{options.target}: no row in the {options.split} split")
    renderer = make_renderer(options, rows)
    for number, row in enumerate(rows, start=1):
        [(ids, mask)] = renderer.render([as_conversation(row)])
        console.rule(f"{options.target} {options.split} row {number}: {len(ids)} tokens, {sum(mask)} trained on")
        console.print(coloured(row, renderer))


def stats(options: argparse.Namespace, data_args: DataArguments) -> None:
    sources = {source: source_rows(source, options.split, data_args, options.num_rows) for source in data_args.mix}
    rows = [row for source_rows_, _ in sources.values() for row in source_rows_]
    renderer = make_renderer(options, rows)
    for source, (its_rows, conversion) in sources.items():
        console.print("\n".join(summary(collect(source, its_rows, conversion, renderer))))
    if len(data_args.mix) > 1:
        console.print(f"mix: {log_mix(data_args.mix)}")
        console.print("\n".join(mix_as_it_comes(data_args, renderer, options.num_rows)))


def check(options: argparse.Namespace, data_args: DataArguments) -> None:
    problems = []
    for source in data_args.mix:
        try:
            rows, conversion = source_rows(source, "train", data_args, CHECKED_ROWS)
        except UserError as error:
            problems.append(source)
            console.print(f"[red]✗[/red] {source}:", str(error), style=None)
        else:
            dropped = f", {conversion.report()}" if conversion and conversion.dropped else ""
            console.print(f"[green]✓[/green] {source}: {len(rows)} rows read{dropped}")
    if problems:
        found = f"{len(problems)} of {len(data_args.mix)} sources cannot be read"
        raise UserError(f"{options.target}: {found}: {', '.join(problems)}")


@user_errors()
def main() -> None:
    options = parse_arguments()
    if options.command == "list":
        list_cards(options)
    elif options.command == "download":
        cards = load_cards(options.cards_dir)
        if options.target not in cards:
            raise UserError(f"no data card {options.target!r}; known: {', '.join(cards)}")
        for path in download(cards[options.target], options.max_files):
            console.print(f"{path}: {Path(path).stat().st_size:,} bytes, verified")
    else:
        {"show": show, "stats": stats, "check": check}[options.command](options, data_arguments(options))


if __name__ == "__main__":
    main()
