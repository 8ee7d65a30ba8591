"""
Talk to a checkpoint in the terminal: it streams, shows its tool calls, and says how wide and how deep each answer was.

    python src/run_chat.py                                   # the furthest finished phase in checkpoints/tiny
    python src/run_chat.py checkpoints/tiny/phase5 --width auto --exit-threshold 0.9
    python src/run_chat.py recipes/tiny --prompt "What is 12 plus 7 divided by 2?"
    python src/run_chat.py checkpoints/tiny --task tic_tac_toe

/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.
"""

from adamba.kept_help import print_kept_help

if __name__ == "__main__":
    print_kept_help()  # before the imports below, which take seconds

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from rich.console import Console

from adamba.chat import ChatOptions, ChatSession, furthest_checkpoint
from adamba.chat_terminal import Chat
from adamba.errors import UserError, user_errors
from adamba.loading import ModelArguments, load_model_and_tokenizer
from adamba.recipe import parse
from adamba.tasks import TASKS

GAME = "tic_tac_toe"


@dataclass
class ChatArguments:
    model: str = field(
        default="checkpoints/tiny",
        metadata={"help": "A checkpoint, or a folder of checkpoints or recipes: its furthest finished phase."},
    )
    task: str = field(
        default="calculator", metadata={"help": f"Whose tools the model has: {', '.join(TASKS)}. {GAME}: play it."}
    )
    prompt: str | None = field(
        default=None, metadata={"help": f"Ask this one question and leave; for {GAME} your cells, like '5 1 9'."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UserError(f"task: {self.task!r} is unknown; use {', '.join(TASKS)}")


def line_reader(prompt: str | None) -> Callable[[str], str]:
    """Where the user's lines come from: the words of `--prompt` (the moves of a game), else standard input."""
    if prompt is not None:
        words = iter(prompt.replace(",", " ").split())

        def next_word(_: str) -> str:
            try:
                return next(words)
            except StopIteration:
                raise EOFError from None

        return next_word
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # a byte that is no UTF-8 is no reason to leave
        return lambda _: input()
    import readline  # noqa: F401  (importing it gives `input` its history and line editing; absent on Windows)

    return input


@user_errors()
def main() -> None:
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-") and not argv[0].endswith((".yaml", ".yml")):
        argv = ["--model", *argv]
    args, options, _ = parse(ChatArguments, ChatOptions, argv=argv)
    transformers.logging.set_verbosity_error()
    transformers.set_seed(args.seed)

    checkpoint = furthest_checkpoint(args.model)
    model, tokenizer = load_model_and_tokenizer(ModelArguments(model_name_or_path=str(checkpoint), dtype=args.dtype))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    session = ChatSession(model.to(device), tokenizer, options, TASKS[args.task].environment)

    console = Console()
    chat = Chat(session, console, line_reader(args.prompt))
    size = f"{model.num_parameters() / 1e6:.2f} M parameters"
    levels = " · ".join(f"{name} {width}" for width, name in session.width_names.items())
    console.print(
        f"[bold]{checkpoint}[/] [dim]{size}{' · ' + levels if levels else ''}[/]", highlight=False, soft_wrap=True
    )
    if args.task == GAME:
        chat.play(num_games=None if args.prompt is None else 1)
    elif args.prompt is not None:
        chat.ask(args.prompt)
    else:
        console.print("[dim]/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves[/]", highlight=False)
        chat.talk()


if __name__ == "__main__":
    main()
