"""Talking to a checkpoint: one conversation, streamed, with tools, and what each answer cost.

The model's own tokens are kept as it wrote them (as in training); only what the user and the tools say is tokenised.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from adamba.data.render import chat_ids
from adamba.errors import UserError
from adamba.loading import role_folders
from adamba.model import AdambaForCausalLM
from adamba.model.decoding_adamba import EXIT_MODES
from adamba.plan_steps import PHASES, family_steps
from adamba.tasks import tool_methods, tool_schemas
from adamba.tools import ToolCall, parse_tool_calls, run_tool_call
from adamba.training.play import ToolResultIds

MAX_TURNS = 12  # of the model in one answer: enough for the longest game, and a stop for a loop of calls
UNCALIBRATED_THRESHOLD = 0.95  # of a checkpoint that says nothing of its own
STOPPED = "error: stopped by the user"  # result of a tool
MIN_ROOM = 8  # tokens; with less left of the context there is no answer


@dataclass
class ChatOptions:
    """How answers are generated. `/width` and its like change them while talking."""

    width: str | None = field(
        default=None,
        metadata={"help": "auto, a level name (ghost, whisper, normal, think) or channels. Default: full."},
    )
    exit_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Leave at the first layer whose gate is surer than this; 1 never leaves early. Default: what the "
            f"checkpoint was calibrated to (run_eval.py --calibrate), else {UNCALIBRATED_THRESHOLD}."
        },
    )
    exit_mode: str | None = field(
        default=None,
        metadata={
            "help": "propagate (faster) or verify (same tokens as full depth). Default: the checkpoint's, else "
            "propagate."
        },
    )
    temperature: float = field(default=0.0, metadata={"help": "0 takes the likeliest token."})
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of one turn."})

    def __post_init__(self) -> None:
        if self.exit_threshold is not None and not 0 <= self.exit_threshold <= 1:
            raise UserError(f"exit_threshold: {self.exit_threshold} must be a probability from 0 to 1")
        if self.exit_mode is not None and self.exit_mode not in EXIT_MODES:
            raise UserError(f"exit_mode: {self.exit_mode!r} is unknown; use {' or '.join(EXIT_MODES)}")
        if not 0 <= self.temperature < float("inf"):  # nan too, which would sample nothing and say so nowhere
            raise UserError(f"temperature: {self.temperature} must be a finite number from 0 on")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {self.max_new_tokens} must be at least 1")


class View(Protocol):
    """Where an answer is shown while it is made."""

    def text(self, piece: str) -> None:
        """The next piece of the model's turn, tool calls in their raw text included."""

    def call(self, call: ToolCall) -> None:
        """A tool call, once its turn is complete."""

    def result(self, call: ToolCall, answer: str) -> None:
        """What the tool answered."""


@dataclass
class Answer:
    """What an answer was and what it cost.

    Attributes:
        text: What the model said last without calling a tool.
        widths: Channels of every attention layer, of every turn.
        layers: Layers computed for each token; empty for a model that cannot leave early.
        num_layers: Layers of the model.
        num_drafted: Tokens that early layers proposed (`verify`), of which `num_accepted` held.
        interrupted: Whether the user stopped it.
    """

    num_layers: int
    text: str = ""
    widths: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    def summary(self, width_names: dict[int, str]) -> str:
        """`width think 128 · exit layers mean 5.2 of 8 · 38 tokens · 210 tok/s`."""
        parts = []
        if self.widths:
            narrow, wide = min(self.widths), max(self.widths)
            if narrow == wide:
                parts.append(f"width {width_names.get(wide, '')} {wide}".replace("  ", " "))
            else:
                parts.append(f"width {narrow} to {wide}, mean {sum(self.widths) / len(self.widths):.0f}")
        if self.layers:
            parts.append(f"exit layers mean {sum(self.layers) / len(self.layers):.1f} of {self.num_layers}")
        else:
            parts.append(f"all {self.num_layers} layers")
        if self.num_drafted:
            parts.append(f"drafts kept {self.num_accepted} of {self.num_drafted}")
        parts.append(f"{self.num_tokens} tokens")
        parts.append(f"{self.num_tokens / max(self.seconds, 1e-9):.0f} tok/s")
        return " · ".join([*parts, *(["stopped"] if self.interrupted else [])])


class TurnStreamer(BaseStreamer):
    """Hands the text of one turn on, token by token, and remembers the ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.num_shown = 0

    def put(self, value: torch.Tensor) -> None:
        if value.dim() == 1:  # `generate` also hands over the prompt, as (batch, tokens)
            self.extend(value.tolist())

    def extend(self, ids: Sequence[int]) -> None:
        self.ids += ids
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # the first bytes of a character: wait for the rest
            self._show(text)

    def end(self) -> None:
        self._show(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        if len(text) > self.num_shown:
            self.on_text(text[self.num_shown :])
            self.num_shown = len(text)


class ChatSession:
    """One conversation.

    Raises:
        UserError: the tokenizer has no chat template, or the model refuses an option.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: ChatOptions,
        environment_class: type,
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError("tokenizer: it has no chat template; talk to a checkpoint of this project")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.environment_class = environment_class
        self.schemas = tool_schemas(environment_class)
        self.result_ids = ToolResultIds(tokenizer)
        self.options = options
        self.generate_options(options)
        self.ids: list[int] = []

    @property
    def is_adaptive(self) -> bool:
        """Whether the model has widths and exits at all; a dense base has not."""
        return isinstance(self.model, AdambaForCausalLM)

    @property
    def width_names(self) -> dict[int, str]:
        levels = getattr(self.model.config, "width_levels", None) or {}
        return {width: name for name, width in levels.items()}

    def generate_options(self, options: ChatOptions) -> dict[str, Any]:
        """Arguments of `generate`.

        Raises:
            UserError: a width that this model does not have.
        """
        sampling = {"temperature": options.temperature} if options.temperature > 0 else {}
        chosen: dict[str, Any] = {"do_sample": options.temperature > 0, **sampling}
        if not self.is_adaptive:
            if options.width is not None:
                raise UserError(f"width: {options.width} is not possible; this checkpoint is a dense model")
            return chosen
        width = int(options.width) if options.width and options.width.isdecimal() else options.width
        if width != "auto":
            try:
                self.model.config.resolve_width(width)
            except ValueError as error:
                raise UserError(str(error)) from error
        chosen["width"] = width
        if self.model.config.gate_layers:
            chosen |= {"exit_threshold": options.exit_threshold, "exit_mode": options.exit_mode}
            own_threshold, own_mode = (
                getattr(self.model.generation_config, key, None) for key in ("exit_threshold", "exit_mode")
            )
            verify = (options.exit_mode or own_mode) == "verify"  # it loses nothing and finds its own limits
            if options.exit_threshold is None and own_threshold is None and not verify:
                chosen["exit_threshold"] = UNCALIBRATED_THRESHOLD
        return chosen

    def set_options(self, **changes: Any) -> None:
        """Change options for the next answer; a bad value changes nothing.

        Raises:
            UserError: a value that is not possible.
        """
        options = ChatOptions(**(vars(self.options) | changes))
        self.generate_options(options)
        self.options = options

    def reset(self) -> None:
        """Forget the conversation."""
        self.ids = []

    def answer(self, text: str, view: View, environment: Any = None) -> Answer:
        """Say `text`, run the tools that the model calls, and return its answer.

        Args:
            environment: Whose tools are called; by default a fresh one, without an instance to solve.

        Raises:
            UserError: the context is full.
        """
        environment = self.environment_class() if environment is None else environment
        text = text.encode(errors="replace").decode()  # tokenizers refuse what a terminal's odd bytes become
        start = len(self.ids)
        self.ids = self.ids + self._user_ids(text)
        answer = Answer(num_layers=self.model.config.num_hidden_layers)
        try:
            for _ in range(MAX_TURNS):
                calls = self._turn(answer, view)
                if not calls or answer.interrupted:
                    return answer
                self._run_tools(calls, environment, view, answer)
                if answer.interrupted:
                    break
            # The results have opened a turn in which nothing will be said; the user's must not begin inside it.
            self.ids = self.ids + [self.tokenizer.eos_token_id]
        except UserError:
            self.ids = self.ids[:start]
            raise
        return answer

    def _user_ids(self, text: str) -> list[int]:
        """Ids of a user's turn up to where the assistant speaks; the first one brings the tools along."""
        turn = [{"role": "user", "content": text}]
        if not self.ids:
            return chat_ids(self.tokenizer, turn, self.schemas or None, add_generation_prompt=True)
        before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]
        prefix = chat_ids(self.tokenizer, before)
        whole = chat_ids(self.tokenizer, before + turn, add_generation_prompt=True)
        end_of_turn = len(prefix) - prefix[::-1].index(self.tokenizer.eos_token_id)
        return whole[end_of_turn:]

    def _turn(self, answer: Answer, view: View) -> list[ToolCall]:
        """One turn of the model, appended to the conversation; returns the tools it calls."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        room = (
            self.options.max_new_tokens if limit is None else min(self.options.max_new_tokens, limit - len(self.ids))
        )
        if room < MIN_ROOM and room < self.options.max_new_tokens:
            raise UserError(f"context: {len(self.ids)} of {limit} tokens are used; /reset starts a new conversation")
        streamer = TurnStreamer(self.tokenizer, view.text)
        eos = self.tokenizer.eos_token_id
        started = time.monotonic()
        try:
            input_ids = torch.tensor([self.ids], device=self.model.device)
            output = self.model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=room,
                eos_token_id=eos,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=streamer,
                **self.generate_options(self.options),
            )
            new_ids = output[0, len(self.ids) :].tolist()
            streamer.extend(new_ids[len(streamer.ids) :])
            streamer.end()
        except KeyboardInterrupt:
            new_ids, answer.interrupted = streamer.ids, True
        answer.seconds += time.monotonic() - started
        answer.num_tokens += len(new_ids)
        self._add_trace(answer, len(new_ids))
        self.ids = self.ids + new_ids + ([] if new_ids[-1:] == [eos] else [eos])
        answer.text, calls = parse_tool_calls(self.tokenizer.decode(new_ids, skip_special_tokens=True))
        return calls

    def _add_trace(self, answer: Answer, num_tokens: int) -> None:
        trace = self.model.last_generation if self.is_adaptive else None
        if trace is None:
            return
        answer.widths += trace.widths
        exits = trace.exit_layers
        if exits is None and trace.steps:  # stopped by the user before `generate` could join them
            exits = torch.cat(trace.steps, dim=1)
        if exits is not None:
            answer.layers += [layer + 1 for layer in exits[0, :num_tokens].tolist()]
        answer.num_drafted += trace.num_drafted
        answer.num_accepted += trace.num_accepted

    def _run_tools(self, calls: list[ToolCall], environment: Any, view: View, answer: Answer) -> None:
        """Each call gets a result; when the user stops one, it and those after it say so."""
        results = []
        for call in calls:
            view.call(call)
            result = STOPPED
            try:
                if not answer.interrupted:
                    result, _ = run_tool_call(call, tool_methods(environment))
            except KeyboardInterrupt:
                answer.interrupted = True
            view.result(call, result)
            results.append({"role": "tool", "name": call.name, "content": result})
        self.ids = self.ids + self.result_ids(results)


def furthest_checkpoint(source: str | Path) -> Path:
    """The checkpoint to talk to: `source`, or of a folder of recipes or runs the furthest phase that is no team.

    Raises:
        UserError: there is none.
    """
    source = Path(source)
    if (source / "config.json").is_file():
        return source
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give a checkpoint, a folder of checkpoints or of recipes")
    if any(source.glob("*.yaml")):
        folders = [step.checkpoint for step in family_steps(source) if not step.evaluation]
    else:
        folders = [source / phase for phase in PHASES]
    finished = [folder for folder in folders if (folder / "run.json").is_file() and not role_folders(folder)]
    if not finished:
        raise UserError(f"{source}: no finished phase to talk to in {folders[0].parent}; run `make demo` first")
    return finished[-1]
