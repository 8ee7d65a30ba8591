"""The chat: token-exact conversations, tools, what an answer cost, commands, games, the command itself."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import run_chat
from adamba.chat import Answer, ChatOptions, ChatSession
from adamba.chat_terminal import Chat
from adamba.data import train_tokenizer
from adamba.errors import UserError
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.tasks import TASKS
from adamba.tasks.tic_tac_toe_rules import best_moves
from adamba.tools import ToolCall

REPOSITORY = Path(__file__).parents[1]
CALCULATOR = TASKS["calculator"].environment
CALL = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [
        json.dumps(TASKS[name].example(seed, "train")) for name in ("calculator", "tic_tac_toe") for seed in range(50)
    ]
    return train_tokenizer(texts, vocab_size=512)


@pytest.fixture(scope="module")
def hybrid(tokenizer: PreTrainedTokenizerFast) -> AdambaForCausalLM:
    torch.manual_seed(0)
    model = AdambaForCausalLM(AdambaConfig.from_depth(4, vocab_size=512))
    for verdict in (model.model.router.down_proj, *(gate.down_proj for gate in model.model.exit_gates.values())):
        torch.nn.init.normal_(verdict.weight, std=0.02)  # as if trained: untrained ones are not asked
    return model


class Scripted:
    """A model that says what a function of the rendered conversation says, streamed; it may be interrupted."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, speak: Callable[[str], str], limit: int = 4096) -> None:
        self.tokenizer, self.speak, self.interrupt_after = tokenizer, speak, 10**9
        self.config = SimpleNamespace(max_position_embeddings=limit, num_hidden_layers=3)
        self.device = torch.device("cpu")

    def eval(self) -> "Scripted":
        return self

    def generate(self, input_ids: torch.Tensor, streamer: Any, max_new_tokens: int, **_: Any) -> torch.Tensor:
        context = self.tokenizer.decode(input_ids[0], skip_special_tokens=False)
        assert context.endswith("<|im_start|>assistant\n")
        streamer.put(input_ids)
        new = self.tokenizer.encode(self.speak(context) + "<|im_end|>")[:max_new_tokens]
        for position, token in enumerate(new):
            if position == self.interrupt_after:
                raise KeyboardInterrupt
            streamer.put(torch.tensor([token]))
        return torch.cat([input_ids, torch.tensor([new])], dim=1)


def calculate(context: str) -> str:
    """Call the calculator once, then quote it; plain talk about anything else."""
    question = context.rsplit("<|im_start|>user\n", 1)[1]
    if "Calculate" not in question:
        return "Grüße ☃ [bold]"
    if "<tool_response>" not in question:
        return CALL.format("calculator", '{"expression": "5 + 3"}')
    result = question.split("<tool_response>\n")[1].split("\n")[0]
    return f'5 + 3 # Answer: "{result}"'


class Record:
    """A view that remembers what it was shown."""

    def __init__(self) -> None:
        self.raw = ""
        self.events: list[tuple[str, str]] = []

    def text(self, piece: str) -> None:
        self.raw += piece

    def call(self, call: ToolCall) -> None:
        self.events.append((call.name, json.dumps(call.arguments)))

    def result(self, call: ToolCall, answer: str) -> None:
        self.events.append(("result", answer))


def chat_with(session: ChatSession, lines: Iterable[str]) -> tuple[Chat, StringIO]:
    output, waiting = StringIO(), iter(lines)

    def read(_: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    return Chat(session, Console(file=output, width=100), read), output


def test_the_conversation_is_what_the_template_renders(tokenizer: PreTrainedTokenizerFast) -> None:
    session = ChatSession(Scripted(tokenizer, calculate), tokenizer, ChatOptions(), CALCULATOR)
    view = Record()
    assert session.answer("Calculate 5 + 3?", view).text == '5 + 3 # Answer: "8.0"'
    assert view.events == [("calculator", '{"expression": "5 + 3"}'), ("result", "8.0")]
    assert session.answer("Hello", view).text == "Grüße ☃ [bold]"
    assert view.raw.endswith('# Answer: "8.0"Grüße ☃ [bold]')
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "5 + 3"}}}
    messages = [
        {"role": "user", "content": "Calculate 5 + 3?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculator", "content": "8.0"},
        {"role": "assistant", "content": '5 + 3 # Answer: "8.0"'},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Grüße ☃ [bold]"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tools=session.schemas, tokenize=True, return_dict=False)
    assert session.ids == rendered


@pytest.mark.parametrize(
    "options",
    [
        ChatOptions(max_new_tokens=9),
        ChatOptions(max_new_tokens=9, width="auto", exit_threshold=0.3),
        ChatOptions(max_new_tokens=9, width="64", exit_threshold=1.0),
        ChatOptions(max_new_tokens=9, exit_mode="verify", exit_threshold=0.3, temperature=1.0),
    ],
)
def test_a_hybrid_says_how_wide_and_deep_it_was(
    tokenizer: PreTrainedTokenizerFast,
    hybrid: AdambaForCausalLM,
    options: ChatOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate, turns = hybrid.generate, []

    def remember(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        output = generate(input_ids=input_ids, **kwargs)
        turns.append(tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True))
        return output

    monkeypatch.setattr(hybrid, "generate", remember)
    session = ChatSession(hybrid, tokenizer, options, CALCULATOR)
    view = Record()
    answer = session.answer("What is 1 + 1?", view)
    levels = set(hybrid.config.width_levels.values())
    assert answer.num_tokens >= 9 and set(answer.widths) <= levels | {hybrid.config.hidden_size}
    if options.exit_threshold != 1:
        assert len(answer.layers) == answer.num_tokens and set(answer.layers) <= {1, 2, 3, 4}
    assert (answer.num_drafted > 0) == (options.exit_mode == "verify")
    assert turns and view.raw == "".join(turns)  # more than one turn if the random model happens to write a call


@pytest.mark.parametrize(
    ("calibrated", "given", "used"),
    [
        ({}, {}, 0.95),
        ({"exit_threshold": 0.2}, {}, 0.2),
        ({"exit_threshold": 1.0}, {}, 1.0),
        ({"exit_threshold": 0.2}, {"exit_threshold": 0.7}, 0.7),
        ({"exit_threshold": 0.2}, {"exit_threshold": 1.0}, 1.0),
        ({"exit_mode": "verify"}, {}, None),
    ],
)
def test_the_calibrated_threshold_stands_unless_the_user_gives_one(
    tokenizer: PreTrainedTokenizerFast, calibrated: dict, given: dict, used: float | None, monkeypatch
) -> None:
    model = AdambaForCausalLM(AdambaConfig.from_depth(4, vocab_size=512, hidden_size=32, intermediate_size=32))
    for gate in model.model.exit_gates.values():
        torch.nn.init.ones_(gate.down_proj.weight)  # as if trained
    for key, value in calibrated.items():
        setattr(model.generation_config, key, value)
    seen, generate_at = [], model._generate_at
    monkeypatch.setattr(
        model, "_generate_at", lambda *inputs, **options: seen.append(options) or generate_at(*inputs, **options)
    )
    ChatSession(model, tokenizer, ChatOptions(max_new_tokens=1, **given), CALCULATOR).answer("Hello", Record())
    assert seen[0]["exit_threshold"] == used
    assert seen[0]["exit_mode"] == calibrated.get("exit_mode", "propagate")


def test_a_dense_base_can_be_talked_to(tokenizer: PreTrainedTokenizerFast) -> None:
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=256)  # fmt: skip
    model = LlamaForCausalLM(config)
    answer = ChatSession(model, tokenizer, ChatOptions(max_new_tokens=5), CALCULATOR).answer("Hello", Record())
    assert answer.widths == [] and "all 1 layers" in answer.summary({})
    with pytest.raises(UserError, match="dense model"):
        ChatSession(model, tokenizer, ChatOptions(width="32"), CALCULATOR)


def test_summary() -> None:
    answer = Answer(num_layers=8, widths=[128, 128], layers=[8, 3, 5], num_tokens=38, seconds=0.19)
    assert answer.summary({128: "think"}) == "width think 128 · exit layers mean 5.3 of 8 · 38 tokens · 200 tok/s"
    mixed = Answer(num_layers=8, widths=[32, 128], num_tokens=1, seconds=1, interrupted=True)
    assert mixed.summary({}) == "width 32 to 128, mean 80 · all 8 layers · 1 tokens · 1 tok/s · stopped"


def test_an_interrupted_answer_is_kept_and_the_talk_goes_on(tokenizer: PreTrainedTokenizerFast) -> None:
    model = Scripted(tokenizer, calculate)
    session = ChatSession(model, tokenizer, ChatOptions(), CALCULATOR)
    model.interrupt_after = 2
    answer = session.answer("Hello", Record())
    assert answer.interrupted and answer.num_tokens == 2 and session.ids[-1] == tokenizer.eos_token_id
    model.interrupt_after = 10**9
    assert session.answer("Calculate 5 + 3?", Record()).text == '5 + 3 # Answer: "8.0"'


def test_a_tool_that_is_interrupted_ends_the_answer_and_not_the_chat(tokenizer: PreTrainedTokenizerFast) -> None:
    class Hanging(CALCULATOR):
        def calculator(self, expression: str) -> str:
            raise KeyboardInterrupt

    session = ChatSession(Scripted(tokenizer, calculate), tokenizer, ChatOptions(), CALCULATOR)
    view = Record()
    answer = session.answer("Calculate 5 + 3?", view, Hanging())
    assert answer.interrupted and view.events[-1] == ("result", "error: stopped by the user")
    assert session.answer("Calculate 5 + 3?", Record()).text == '5 + 3 # Answer: "8.0"'
    assert "stopped by the user" in tokenizer.decode(session.ids), "each call has its result"


def test_a_full_context_is_an_error_that_changes_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    session = ChatSession(Scripted(tokenizer, calculate, limit=130), tokenizer, ChatOptions(), CALCULATOR)
    session.answer("Hello", Record())
    before = list(session.ids)
    with pytest.raises(UserError, match="of 130 tokens are used; /reset"):
        session.answer("Calculate " * 20, Record())
    assert session.ids == before


def test_a_loop_of_calls_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    call = CALL.format("calculator", '{"expression": "1"}')
    session = ChatSession(Scripted(tokenizer, lambda _: call), tokenizer, ChatOptions(), CALCULATOR)
    view = Record()
    session.answer("Calculate", view)
    assert len(view.events) == 24 and view.events[-1][1].startswith("error")
    assert tokenizer.decode(session.ids).endswith("</tool_response><|im_start|>assistant\n<|im_end|>"), "left open"


@pytest.mark.parametrize(
    "changes",
    [
        {"exit_threshold": 1.5},
        {"exit_mode": "guess"},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"width": "huge"},
        {"width": "6²"},
    ],
)
def test_a_bad_option_is_one_line_and_changes_nothing(
    tokenizer: PreTrainedTokenizerFast, hybrid: AdambaForCausalLM, changes: dict[str, Any]
) -> None:
    session = ChatSession(hybrid, tokenizer, ChatOptions(), CALCULATOR)
    key, value = next(iter(changes.items()))
    with pytest.raises(UserError, match=key) as error:
        session.set_options(**changes)
    assert str(value) in str(error.value) and session.options == ChatOptions()


def test_talk_streams_and_shows_calls_results_and_cost(tokenizer: PreTrainedTokenizerFast) -> None:
    session = ChatSession(Scripted(tokenizer, calculate), tokenizer, ChatOptions(), CALCULATOR)
    chat, output = chat_with(session, ["Calculate 5 + 3?", "", "hi", "/quit", "never read"])
    chat.talk()
    lines = output.getvalue().splitlines()
    assert lines[:3] == ["→ calculator(expression='5 + 3')", "← 8.0", '5 + 3 # Answer: "8.0"']
    assert lines[3].startswith("all 3 layers · ") and lines[4] == "Grüße ☃ [bold]" and len(lines) == 6


def test_control_characters_do_not_reach_the_terminal(tokenizer: PreTrainedTokenizerFast) -> None:
    session = ChatSession(Scripted(tokenizer, lambda _: "a\x1b[31mb"), tokenizer, ChatOptions(), CALCULATOR)
    chat, output = chat_with(session, ["hi"])
    chat.talk()
    assert "\x1b" not in output.getvalue() and "a\ufffd[31mb" in output.getvalue()


def test_commands(tokenizer: PreTrainedTokenizerFast, hybrid: AdambaForCausalLM) -> None:
    session = ChatSession(hybrid, tokenizer, ChatOptions(), CALCULATOR)
    session.ids = [1, 2, 3]
    lines = ["/help", "/tools", "/width 64", "/exit-threshold 0.5", "/exit-threshold no", "/exit-mode verify"]
    chat, output = chat_with(session, [*lines, "/temperature 0.5", "/width 63", "/bogus", "/reset"])
    chat.talk()
    text = output.getvalue()
    assert session.options == ChatOptions("64", 0.5, "verify", 0.5) and session.ids == []
    assert "calculator(expression) Evaluate an expression." in text and "/quit" in text
    assert "'no' is no number" in text and "/bogus: unknown command" in text and "width: 63 is not possible" in text


def play_best(context: str) -> str:
    last = context.rsplit("<tool_response>", 1)[-1]
    if "You " in last.rsplit("\n", 4)[-3] or "Draw" in last:
        return "Draw."
    board = [line for line in context.split("\n") if line.count(" / ") == 2][-1].replace(" / ", "").replace(" ", "")
    return CALL.format("play", json.dumps({"cell": best_moves(board)[0]}))


def test_a_game_against_the_user(tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[str] = []

    def speak(context: str) -> str:
        seen.append(context)
        return play_best(context) if "win." not in context and "Draw." not in context else "Draw."

    session = ChatSession(Scripted(tokenizer, speak), tokenizer, ChatOptions(), TASKS["tic_tac_toe"].environment)
    cells = [str(cell) for cell in (5, 5, 1, 2, 3, 4, 6, 7, 8, 9)] * 3
    chat, output = chat_with(session, ["0", "five", *cells])
    chat.play(num_games=2)
    text = output.getvalue()
    assert "Game 1. You are O." in text and "Game 2. You are X." in text and "five is not free" in text
    assert text.count("The model wins.") + text.count("Draw.") >= 2 and "You win." not in text
    assert seen[0].rsplit("user\n", 1)[1].startswith("Tic-tac-toe. You are X.\n1 2 3 / 4 5 6 / 7 8 9")
    assert session.schemas[0]["function"]["name"] == "play" and "wait for the user" not in json.dumps(session.schemas)


def test_leaving_and_restarting_in_the_middle_of_a_game(tokenizer: PreTrainedTokenizerFast) -> None:
    session = ChatSession(Scripted(tokenizer, play_best), tokenizer, ChatOptions(), TASKS["tic_tac_toe"].environment)
    chat, output = chat_with(session, ["/reset", "/width 3", "/quit"])
    chat.play()
    assert "Game 2" in output.getvalue() and "dense model" in output.getvalue()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # Python's choice in a UTF-8 and in a C locale
def test_a_byte_that_is_no_text_is_replaced(tokenizer: PreTrainedTokenizerFast, monkeypatch, errors: str) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nsecond\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", stdin)
    read = run_chat.line_reader(None)
    assert (read(""), read("")) == ("caf\ufffd", "second")
    session = ChatSession(Scripted(tokenizer, calculate), tokenizer, ChatOptions(), CALCULATOR)
    session.answer("caf\udce9", SimpleNamespace(text=lambda _: None))
    assert "caf?" in tokenizer.decode(session.ids)


@pytest.mark.smoke
def test_the_command(
    tokenizer: PreTrainedTokenizerFast,
    hybrid: AdambaForCausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "phase2"
    hybrid.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "run.json").write_text('{"files": {}}')
    capsys.readouterr()

    monkeypatch.setattr(sys, "argv", ["run_chat.py", str(folder), "--max-new-tokens", "5"])
    monkeypatch.setattr(sys, "stdin", StringIO("/width 64\nhello\n"))
    run_chat.main()
    assert "width normal 64 · " in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["run_chat.py", "--task", "chess"])
    with pytest.raises(SystemExit) as stopped:
        run_chat.main()
    assert stopped.value.code == 2 and "task: 'chess' is unknown" in capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", ["run_chat.py", "nosuch"])
    with pytest.raises(SystemExit):
        run_chat.main()
    assert "nosuch: no such folder; give a checkpoint, a folder of" in capsys.readouterr().err

    command = [sys.executable, "src/run_chat.py", tmp_path, "--prompt", "What is 1 + 1?", "--max-new-tokens", "5"]
    done = subprocess.run([*map(str, command), "--width", "auto"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(folder) in done.stdout and " · exit layers mean " in done.stdout and "tok/s" in done.stdout
