"""
Put every phase's metrics in one place and draw them: reports/<family>/report.html, report.json and the pictures.

    python src/run_report.py recipes/tiny                       # a family, by its recipes
    python src/run_report.py checkpoints/tiny                   # or by what it wrote
    accelerate launch src/run_report.py recipes/tiny/report.yaml

Nothing is trained or measured here: what a phase has not measured is shown as missing.
"""

from adamba.kept_help import print_kept_help

if __name__ == "__main__":
    print_kept_help()  # before the imports below, which take a second

import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from adamba.errors import UserError, user_errors
from adamba.recipe import parse
from adamba.report import print_report, read_family, write_report


@dataclass
class ReportArguments:
    family: str | None = field(
        default=None, metadata={"help": "Folder of recipes or of checkpoints. Default: the folder of this recipe."}
    )
    checkpoints_dir: str | None = field(
        default=None, metadata={"help": "Where the family's runs are, if not where its recipes write."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Default: reports/<name of the family>."})


def parse_arguments(argv: list[str]) -> ReportArguments:
    """The arguments; a folder may stand where the recipe does."""
    if argv and (Path(argv[0]).is_dir() or not argv[0].startswith("-") and Path(argv[0]).suffix != ".yaml"):
        argv = ["--family", *argv]
    args, recipe = parse(ReportArguments, argv=argv)
    if args.family is None:
        if recipe.path is None:
            raise UserError("family: missing; give a folder of recipes (recipes/tiny) or of checkpoints")
        args.family = str(Path(recipe.path).parent)
    return args


@user_errors()
def main() -> None:
    args = parse_arguments(sys.argv[1:])
    family = read_family(args.family, args.checkpoints_dir)
    output_dir = Path(args.output_dir or Path("reports") / family.name)
    if output_dir.is_file():
        raise UserError(f"{output_dir}: output_dir is a file; name a folder")
    page = write_report(family, output_dir)
    console = Console()
    print_report(family, console)
    console.print(f"\nwrote {page} and {page.with_suffix('.json')}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
