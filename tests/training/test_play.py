"""The agent loop: batched play equals the environments' own rules, whatever the model writes."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.chat_template_utils import parse_response

from adamba.data import train_tokenizer
from adamba.errors import UserError
from adamba.tasks import ENVIRONMENTS, TASKS, tool_schemas
from adamba.tasks.sudoku_rules import solution, solver_cells
from adamba.tasks.tic_tac_toe_rules import best_moves, legal_moves
from adamba.tools.calls import parse_tool_calls
from adamba.training.evaluation import GameSettings, play_tasks
from adamba.training.play import Episode, generate_turns, play, score_episodes

CALL = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
Speaker = Callable[[str], str]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [
        json.dumps(TASKS[name].example(seed, "train")) for name in ("calculator", "tic_tac_toe") for seed in range(50)
    ]
    return train_tokenizer(texts, vocab_size=512)


class Scripted:
    """A model that says what a function of the whole rendered conversation says."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, speak: Speaker) -> None:
        self.tokenizer, self.speak = tokenizer, speak
        self.config = SimpleNamespace(max_position_embeddings=2048)
        self.device, self.training = torch.device("cpu"), False
        self.batch_sizes: list[int] = []
        self.options: dict = {}

    def eval(self) -> None: ...

    def train(self, mode: bool) -> None: ...

    def generate(self, input_ids, attention_mask, eos_token_id, pad_token_id, **options) -> torch.Tensor:
        self.batch_sizes.append(len(input_ids))
        self.options = options
        assert ((input_ids != pad_token_id).long() == attention_mask).all()
        said = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            context = self.tokenizer.decode(ids[mask.bool()], skip_special_tokens=False)
            assert context.endswith("<|im_start|>assistant\n")
            said.append(self.tokenizer.encode(self.speak(context) + "<|im_end|>"))
        longest = max(map(len, said))
        new = torch.tensor([ids + [pad_token_id] * (longest - len(ids)) for ids in said])
        return torch.cat([input_ids, new], dim=1)


def last_board(context: str) -> str:
    line = [line for line in context.replace("<", "\n").split("\n") if line.count(" / ") == 2][-1]
    return "".join("." if cell.isdigit() else cell for cell in line.replace(" / ", " ").split())


def solve_game(context: str) -> str:
    for told, said in (("You win.", "I win."), ("Draw.", "Draw."), ("You lose.", "I lose.")):
        if told in context:
            return said
    return CALL.format("play", json.dumps({"cell": best_moves(last_board(context))[0]}))


def solve_sum(context: str) -> str:
    question = context.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    expression = question.removeprefix("Calculate ").removesuffix("?")
    if "<tool_response>" not in context:
        return CALL.format("calculator", json.dumps({"expression": expression}))
    answer = context.split("<tool_response>\n")[1].split("\n</tool_response>")[0]
    return f'{expression} # Answer: "{answer}"'


def sums(count: int) -> list[dict]:
    rows = [TASKS["calculator"].prompt(seed, "test", word_fraction=0.0) for seed in range(count)]
    for row in rows:
        row["prompt"][0]["content"] = f"Calculate {row['expression']}?"
    return rows


def test_the_solver_gets_everything_right(tokenizer: PreTrainedTokenizerFast) -> None:
    model = Scripted(tokenizer, solve_sum)
    rows = sums(20)
    episodes = play(model, tokenizer, rows, batch_size=8, generate_kwargs={"width": 64})
    assert [episode.row for episode in episodes] == rows
    assert score_episodes("calculator", episodes) == {
        "accuracy_calculator": 1.0,
        "valid_tool_call_rate_calculator": 1.0,
        "tool_calls_calculator": 20.0,
        "episodes_calculator": 20.0,
    }
    assert model.batch_sizes == [8, 8, 4, 8, 8, 4]
    assert model.options == {"width": 64, "max_new_tokens": 128, "do_sample": False}
    for episode in episodes:
        assert episode.finished and episode.num_turns == 2 and episode.outcome["well_formed"] == 1
        assert [message["role"] for message in episode.messages] == ["user", "assistant", "tool", "assistant"]


def test_the_perfect_player_never_loses(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        TASKS["tic_tac_toe"].prompt(seed, "test", opponent=opponent)
        for seed in range(15)
        for opponent in ("perfect", "random")
    ]
    episodes = play(Scripted(tokenizer, solve_game), tokenizer, rows)
    metrics = score_episodes("tic_tac_toe", episodes)
    assert metrics["legal_move_rate_tic_tac_toe"] == metrics["score_tic_tac_toe"] == 1.0
    assert metrics["loss_rate_tic_tac_toe_perfect"] == metrics["loss_rate_tic_tac_toe_random"] == 0.0
    assert metrics["episodes_tic_tac_toe_perfect"] == 15.0
    for opponent in ("perfect", "random"):
        rates = [metrics[f"{result}_rate_tic_tac_toe_{opponent}"] for result in ("win", "draw", "loss")]
        assert sum(rates) == pytest.approx(1.0)
    assert all(episode.finished and episode.outcome["well_formed"] for episode in episodes)


def test_ids_are_those_of_the_rendered_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    seen: dict[str, list[int]] = {}

    class Recorder(Scripted):
        def generate(self, input_ids, attention_mask, **options) -> torch.Tensor:
            for ids, mask in zip(input_ids, attention_mask, strict=True):
                kept = ids[mask.bool()].tolist()
                seen[self.tokenizer.decode(kept)] = kept
            return super().generate(input_ids, attention_mask, **options)

    row = TASKS["tic_tac_toe"].prompt(1, "test", opponent="perfect")
    [episode] = play(Recorder(tokenizer, solve_game), tokenizer, [row])
    whole = tokenizer.apply_chat_template(
        episode.messages[:-1],
        tools=tool_schemas(ENVIRONMENTS["tic_tac_toe"]),
        add_generation_prompt=True,
        return_dict=False,
    )
    assert max(seen.values(), key=len) == whole


def test_what_the_parser_reads_is_what_trl_reads(tokenizer: PreTrainedTokenizerFast) -> None:
    for task in TASKS.values():
        for turn in task.example(0, "train")["messages"]:
            if turn["role"] != "assistant":
                continue
            user = {"role": "user", "content": "-"}
            prefix = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
            ids = tokenizer.apply_chat_template([user, turn], return_dict=False)[len(prefix) :]
            content, calls = parse_tool_calls(tokenizer.decode(ids, skip_special_tokens=True))
            trl = parse_response(tokenizer, ids, prefix=prefix)
            assert trl["content"] == content
            assert [call["function"] for call in trl.get("tool_calls", [])] == [
                {"name": call.name, "arguments": call.arguments} for call in calls
            ]


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<tool_call>{</tool_call>", "error: the tool call is not valid JSON"),
        (
            CALL.format("calculator", '{"expression": "1"}').removesuffix("</tool_call>"),
            "error: the tool call is not closed",
        ),
        (CALL.format("abacus", "{}"), "error: no tool named 'abacus'; there is calculator"),
        (CALL.format("calculator", '{"x": 1}'), "error: calculator: missing a required argument: 'expression'"),
        (CALL.format("calculator", '{"expression": "1 / 0"}'), "error: division by zero"),
    ],
)
def test_a_bad_call_is_answered_and_counted_and_the_model_may_go_on(
    tokenizer: PreTrainedTokenizerFast, said: str, answer: str
) -> None:
    def speak(context: str) -> str:
        return said if "<tool_response>" not in context else "sorry"

    [episode] = play(Scripted(tokenizer, speak), tokenizer, sums(1))
    assert [message["content"] for message in episode.messages[2:]] == [answer, "sorry"]
    assert (episode.valid_calls, episode.invalid_calls, episode.final_text) == (0, 1, "sorry")
    metrics = score_episodes("calculator", [episode])
    assert metrics["accuracy_calculator"] == metrics["valid_tool_call_rate_calculator"] == 0.0


POLICIES: dict[str, Speaker] = {
    "empty": lambda context: "",
    "copies the prompt": lambda context: context.split("<|im_start|>user\n")[1].split("<|im_end|>")[0],
    "loops on a legal call": lambda context: CALL.format("calculator", '{"expression": "1 + 1"}'),
    "loops on one cell": lambda context: CALL.format("play", '{"cell": 5}'),
    "loops on rubbish": lambda context: "<tool_call>",
    "says it won": lambda context: "I win.",
    "plays the first free cell": lambda context: (
        "Draw."
        if not legal_moves(last_board(context))
        else CALL.format("play", f'{{"cell": {legal_moves(last_board(context))[0]}}}')
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_poor_policies_end_and_score_below_the_solver(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    task_ids = ["tic_tac_toe"] if "free cell" in name else list(TASKS)
    for task_id in task_ids:
        rows = [TASKS[task_id].prompt(seed, "test") for seed in range(12)]
        episodes = play(Scripted(tokenizer, POLICIES[name]), tokenizer, rows, max_turns=9)
        assert all(episode.num_turns <= 9 for episode in episodes)
        assert sum(episode.outcome["score"] for episode in episodes) < len(rows)
        metrics = score_episodes(task_id, episodes)
        counts = ("episodes", "moves", "tool_calls")
        assert all(0 <= value <= 1 for key, value in metrics.items() if not key.startswith(counts))
        if task_id == "calculator":
            assert metrics["accuracy_calculator"] == 0.0


def test_prompts_are_padded_without_a_padding_token(tokenizer: PreTrainedTokenizerFast) -> None:
    class Silent:
        device = "cpu"

        def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: int) -> torch.Tensor:
            assert attention_mask.tolist() == [[1, 1], [0, 1]]
            return torch.cat((input_ids, torch.full((2, 1), options["eos_token_id"])), dim=1)

    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    eos = bare.eos_token_id
    assert generate_turns(Silent(), bare, [[5, 6], [7]], {}) == [[eos], [eos]]


def test_an_episode_ends_soon_after_its_game(tokenizer: PreTrainedTokenizerFast) -> None:
    def speak(context: str) -> str:
        move = best_moves(last_board(context)) or [1]
        return CALL.format("play", json.dumps({"cell": move[0]}))

    rows = [TASKS["tic_tac_toe"].prompt(seed, "test") for seed in range(5)]
    for episode in play(Scripted(tokenizer, speak), tokenizer, rows, max_turns=30):
        assert episode.num_turns == episode.valid_calls + 1 <= 6
        assert episode.invalid_calls == 1 and not episode.finished and episode.final_text == ""


def test_a_turn_without_end_is_closed_and_a_full_context_ends_the_episode(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    rows = [TASKS[name].prompt(seed, "test") for name in ("calculator", "tic_tac_toe") for seed in range(6)]
    episodes = play(model, tokenizer, rows, max_new_tokens=8, max_turns=3, batch_size=5)
    assert model.training
    for episode in episodes:
        assert 1 <= episode.num_generated_tokens <= 24 and episode.num_prompt_tokens > 10
    full = rows[0] | {"prompt": [{"role": "user", "content": rows[0]["prompt"][0]["content"] * 20}]}
    assert [one.num_turns > 0 for one in play(model, tokenizer, [full, rows[1]], max_new_tokens=8)] == [False, True]
    with pytest.raises(UserError, match="max_new_tokens: 250 after a prompt are more than the model's context of 256"):
        play(model, tokenizer, rows[:1], max_new_tokens=250)
    together = [episode.messages for episode in episodes]
    alone = [play(model, tokenizer, [row], max_new_tokens=8, max_turns=3)[0].messages for row in rows]
    assert together == alone  # padding and the neighbours change nothing
    sampled = [play(model, tokenizer, rows[:2], max_new_tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    texts = [[episode.messages for episode in run] for run in sampled]
    assert texts[0] == texts[1] != texts[2]


def test_a_turn_that_is_cut_is_known_from_one_that_ended(tokenizer: PreTrainedTokenizerFast) -> None:
    class Cut(Scripted):
        def generate(self, *args, max_new_tokens: int, **options) -> torch.Tensor:
            output = super().generate(*args, max_new_tokens=max_new_tokens, **options)
            return output[:, : options["attention_mask"].shape[1] + max_new_tokens]

    model = Cut(tokenizer, lambda context: "one two three")
    for most, cut in ((2, True), (20, False)):
        [episode] = play(model, tokenizer, sums(1), max_new_tokens=most)
        assert episode.cut is cut and episode.finished


def test_what_is_only_thought_is_neither_called_nor_an_answer_as_in_training(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    [row] = sums(1)
    call = CALL.format("calculator", '{"expression": "1 + 1"}')
    prefix = tokenizer.encode("<|im_start|>assistant\n")
    for said in (f"<think>\n{call}", f'<think>\nso # Answer: "{row["answer"]}"', f"Hm. <think>\n{call}"):
        [episode] = play(Scripted(tokenizer, lambda context, said=said: said), tokenizer, [row])
        assert episode.outcome["score"] == episode.valid_calls == episode.invalid_calls == 0
        trained_on = parse_response(tokenizer, tokenizer.encode(said + "<|im_end|>"), prefix=prefix)
        assert episode.final_text == trained_on["content"] and "tool_calls" not in trained_on
        assert episode.messages[-1] == {"role": "assistant", "content": said}, "as it was written"


def test_the_longest_puzzle_can_be_played_to_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    """A sudoku of 50 empty cells takes its solver 13 calls, and may take 28."""

    def speak(context: str) -> str:
        if context.endswith("Solved.\n</tool_response><|im_start|>assistant\n"):
            return "Solved."
        grid = "".join(re.findall(r"(?:\d{9}\n?){9}", context)[-1].split())
        answer = solution(grid)
        cells = [f"{cell // 9 + 1}{cell % 9 + 1}{answer[cell]}" for cell in solver_cells(grid, answer, 4)]
        return CALL.format("fill", json.dumps({"cells": " ".join(cells)}))

    model = Scripted(tokenizer, speak)
    model.config.max_position_embeddings = 2**14
    settings = {"sudoku": {"size": 9, "min_blanks": 50, "max_blanks": 50}}
    scores = play_tasks(model, tokenizer, GameSettings({"sudoku": 2}, settings=settings))
    assert scores["score_sudoku"] == 1.0 and scores["tool_calls_sudoku"] == 26.0


def test_a_tool_free_row_shows_no_tool(tokenizer: PreTrainedTokenizerFast) -> None:
    contexts: list[str] = []

    def speak(context: str) -> str:
        contexts.append(context)
        return "no idea"

    play(Scripted(tokenizer, speak), tokenizer, [TASKS["calculator"].prompt(0, "test", tool_free=True)])
    assert "calculator(" not in contexts[0]
    play(Scripted(tokenizer, speak), tokenizer, [TASKS["calculator"].prompt(0, "test")])
    assert "calculator(" in contexts[1]


def test_errors_name_the_problem(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="'chess'"):
        play(Scripted(tokenizer, str), tokenizer, [{"environment": "chess", "prompt": []}])
    with pytest.raises(ValueError, match="no episodes of task calculator"):
        score_episodes("calculator", [])


def test_a_silent_model_has_no_valid_call_rate_to_be_proud_of() -> None:
    def silent() -> Iterator[Episode]:
        for seed in range(4):
            outcome = {"score": 0.0, "best_calls": 1.0}
            yield Episode(TASKS["calculator"].prompt(seed, "test"), [], outcome=outcome)

    assert score_episodes("calculator", list(silent()))["valid_tool_call_rate_calculator"] == 0.0
