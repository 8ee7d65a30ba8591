"""Tokens and tools counted, unreadable calls answered; AT-GRPO's rows are groups, advantages inside them."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adamba.errors import UserError
from adamba.model import AdambaForCausalLM
from adamba.rewards import correctness
from adamba.tasks import ENVIRONMENTS, TASKS
from adamba.tasks.roles import select_roles
from adamba.training.agent_config import team_settings, tool_call_limit
from adamba.training.agent_trainer import UNREADABLE, AgentGRPOTrainer, answer_unreadable_calls
from adamba.training.at_grpo import AtGrpoTrainer, TeamSettings
from adamba.training.lora import LoraArguments, peft_config
from adamba.training.optimizers import MuonWithAdamW
from adamba.training.role_adapters import activate, add_role_adapters, load_roles
from teams import TEAM, config, path_rows, path_tokenizer, team_trainer, tiny_model

CALL = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer():
    return path_tokenizer()


def scripted(trainer, texts: list[str]) -> None:
    """Let the trainer's model say these texts in turn, whatever it reads."""
    said = iter(texts)
    encode = trainer._tokenizer.encode

    def generate(prompts, *args, **kwargs):
        return [encode(next(said) + "<|im_end|>") for _ in prompts], None

    trainer._generate_single_turn = generate


def test_unreadable_unknown_and_refused_calls_are_answered_and_counted_by_name(tokenizer, tmp_path: Path) -> None:
    trainer = AgentGRPOTrainer(
        model=tiny_model(tokenizer),
        reward_funcs=[correctness],
        args=config(tmp_path, max_completion_length=600, num_generations=2, per_device_train_batch_size=4),
        train_dataset=path_rows(8),
        processing_class=tokenizer,
        environment_factory={"plan_path": ENVIRONMENTS["plan_path"]},
    )
    half = '<tool_call>\n{"name": "move", "argu'
    unknown, wrong = CALL.format("fly", '{"moves": "R"}'), CALL.format("move", '{"speed": 3}')
    refused, garbage = CALL.format("move", '{"moves": 7}'), "\x00 ~~"
    scripted(trainer, [half, unknown, wrong, refused, garbage, garbage, garbage, garbage])
    rows = [path_rows(2)[index // 2] for index in range(4)]
    trainer.model.train()
    heard = []
    suffix = trainer._get_tool_suffix_ids
    trainer._get_tool_suffix_ids = lambda messages: heard.extend(messages) or suffix(messages)
    output = trainer._generate_and_score_completions(rows)
    answers = [message["content"] for message in heard]
    assert answers[0] == "error: the tool call is not valid JSON"
    assert "fly" in answers[1] and "not found" in answers[1]
    assert "argument" in answers[2] and answers[3].startswith("Not moves.")
    metrics = {key: values[-1] for key, values in trainer._metrics["train"].items() if key.startswith("tools/")}
    assert metrics["tools/move/call_frequency"] == 0.5 and metrics["tools/move/failure_frequency"] == 1.0
    assert metrics[f"tools/{UNREADABLE}/call_frequency"] == 0.25
    assert metrics["tools/call_frequency"] == 1.0
    mask = output["completion_mask"] * output["tool_mask"]
    assert trainer.num_generated_tokens == mask.sum() < output["completion_mask"].sum(), "tool tokens are masked"


def test_a_readable_turn_is_parsed_as_before(tokenizer) -> None:
    texts = ["hello", CALL.format("move", '{"moves": "RD"}')]
    ids = [tokenizer.encode(text + "<|im_end|>") for text in texts]
    before = [tokenizer.parse_response(one, prefix="") for one in ids]
    answer_unreadable_calls(tokenizer)
    assert [tokenizer.parse_response(one, prefix="") for one in ids] == before


@pytest.mark.parametrize("end", ["<|im_end|>", ""])  # `max_completion_length` may cut the turn
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('<tool_call>\n{"name": 3}\n</tool_call>', "has no name"),
        (CALL.format("move", '{"moves": "RD"}').removesuffix("\n</tool_call>"), "is not closed"),
    ],
)
def test_a_call_that_cannot_be_read_has_its_reason_for_argument(tokenizer, text: str, reason: str, end: str) -> None:
    answer_unreadable_calls(tokenizer)
    [call] = tokenizer.parse_response(tokenizer.encode(text + end), prefix="")["tool_calls"]
    assert call["function"] == {"name": UNREADABLE, "arguments": {"error": f"error: the tool call {reason}"}}


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("<think>\nNot <tool_call>{ though.\n</think>\n\n" + CALL.format("move", '{"moves": "RD"}'), {"moves": "RD"}),
        (CALL.format("move", json.dumps('{"moves": "RD"}')), {"moves": "RD"}),
    ],
)
def test_a_call_after_a_thought_or_with_its_arguments_in_a_text_is_made(tokenizer, text: str, arguments: dict) -> None:
    answer_unreadable_calls(tokenizer)
    message = tokenizer.parse_response(tokenizer.encode(text + "<|im_end|>"), prefix="")
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "move", "arguments": arguments}]


def test_advantages_are_normalised_inside_a_group_and_discounted_by_turn(tokenizer, tmp_path: Path) -> None:
    roles = select_roles(TEAM, ENVIRONMENTS["plan_path"])
    team = TeamSettings(roles, alpha=2.0, turn_discount=0.5, num_parallel_games=1)
    trainer = team_trainer(tokenizer, tmp_path, team, per_device_train_batch_size=32)
    say = [
        "",
        "UUU",
        "DR",
        "R",
        CALL.format("move", '{"moves": "?"}'),
        CALL.format("move", '{"moves": "D"}'),
        "no",
        "",
    ]
    scripted(trainer, say * 4)
    trainer.model.train()
    rows = path_rows(8)
    inputs = [rows[index // 4] for index in range(32)]
    output = trainer._generate_and_score_completions(inputs)
    groups = trainer._groups
    assert [group.key[1] for group in groups[:2]] == ["planner", "actor"] and {g.turn for g in groups} >= {0, 1}
    for number, group in enumerate(groups):
        rewards = torch.tensor([2.0 * one.team + one.local for one in group.candidates])
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4) * 0.5**group.turn
        torch.testing.assert_close(output["advantages"][4 * number : 4 * number + 4], expected, atol=1e-5, rtol=1e-4)
        assert output["turn_discount"][4 * number : 4 * number + 4].tolist() == [0.5**group.turn] * 4
        assert output["role_index"][4 * number : 4 * number + 4].tolist() == [group.role_index] * 4
        prompts = output["prompt_ids"][4 * number : 4 * number + 4]
        assert (prompts == prompts[0]).all()
    late = {"advantages": torch.tensor([0.004, 0.8]) * 0.5**10, "turn_discount": torch.full((2,), 0.5**10)}
    assert trainer._teaches(late).tolist() == [False, True], "however late the turn"


def test_an_evaluation_leaves_out_what_is_not_scored(tokenizer, tmp_path: Path) -> None:
    """A reward of None: of one function it leaves the others; a row without any counts nowhere."""

    def first(completions, **columns) -> list[float | None]:
        return [None, 0.5, None, 1.0]

    def second(completions, **columns) -> list[float | None]:
        return [None, None, 0.25, 1.0]

    trainer = AgentGRPOTrainer(
        model=tiny_model(tokenizer),
        reward_funcs=[first, second],
        args=config(tmp_path, num_generations=2, per_device_eval_batch_size=4, max_completion_length=2),
        train_dataset=path_rows(8),
        eval_dataset=path_rows(2),
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] == pytest.approx((0.5 + 0.25 + 2.0) / 3)
    assert metrics["eval_rewards/first/mean"] == pytest.approx(0.75)
    assert metrics["eval_rewards/second/mean"] == pytest.approx(0.625)


@pytest.mark.parametrize(("beta", "use_muon"), [(0.0, False), (0.1, False), (0.0, True)])
def test_each_role_trains_its_own_adapter_and_is_published_with_the_base(
    tokenizer, tmp_path: Path, beta: float, use_muon: bool
) -> None:
    roles = select_roles(TEAM, ENVIRONMENTS["plan_path"])
    base = tiny_model(tokenizer)
    untouched = {name: value.clone() for name, value in base.state_dict().items()}
    model = add_role_adapters(base, peft_config(LoraArguments(use_peft=True, lora_r=4)), ["planner", "actor"])
    before = {name: value.clone() for name, value in model.named_parameters() if "lora_" in name}
    team = TeamSettings(roles, per_role=True, num_parallel_games=2)
    trainer = team_trainer(
        tokenizer, tmp_path, team, model, per_device_train_batch_size=16, beta=beta, use_muon=use_muon
    )
    say = ["DR", "?", "R", "UU", CALL.format("move", '{"moves": "D"}'), CALL.format("move", '{"moves": "R"}'), "", "?"]
    order = [say[:4] * 2, say[4:] * 2] * 20
    scripted(trainer, [text for part in order for text in part])
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, MuonWithAdamW) == use_muon
    moved = {name for name, value in model.named_parameters() if name in before and not value.equal(before[name])}
    for role in ("planner", "actor"):
        assert any(f".{role}." in name for name in moved), f"the adapter of {role} did not learn"
    ids = torch.randint(30, 200, (2, 9))
    logits = {}
    for role in ("planner", "actor"):
        activate(model, role)
        logits[role] = model.eval()(ids).logits
    assert not torch.allclose(logits["planner"], logits["actor"])

    trainer.save_model(str(tmp_path / "published"))
    again = AdambaForCausalLM.from_pretrained(tmp_path / "published")
    assert all(torch.equal(value, untouched[name]) for name, value in again.state_dict().items())
    loaded = load_roles(again, tmp_path / "published")
    assert isinstance(loaded, PeftModel)
    for role in ("planner", "actor"):
        activate(loaded, role)
        torch.testing.assert_close(loaded.eval()(ids).logits, logits[role])


@pytest.mark.parametrize("per_role", [False, True])
def test_rows_without_an_advantage_cost_nothing_and_change_no_gradient(
    tokenizer, tmp_path: Path, per_role: bool
) -> None:
    model = tiny_model(tokenizer)
    if per_role:
        model = add_role_adapters(model, peft_config(LoraArguments(use_peft=True, lora_r=4)), ["planner", "actor"])
    team = TeamSettings(select_roles(TEAM, ENVIRONMENTS["plan_path"]), per_role=per_role, num_parallel_games=2)
    trainer = team_trainer(tokenizer, tmp_path, team, model, num_generations=2)
    trainer.current_gradient_accumulation_steps = 1
    moves = ["DR", "?", *[CALL.format("move", f'{{"moves": "{way}"}}') for way in "DR"]]
    scripted(trainer, moves * 8)
    trainer.model.train()
    rows = path_rows(4)
    batch = trainer._generate_and_score_completions([rows[index // 2] for index in range(8)])
    batch["advantages"] = torch.tensor([0.9, -0.9, 0.0, 0.0, 0.7, -0.7, 0.004, 0.0])
    gradients = []
    for rounding in (0.0, 0.004):  # what rounding leaves of equal rewards does not teach either
        batch["advantages"][6] = rounding
        trainer._buffered_inputs, trainer._step, trainer.args.steps_per_generation = [{}, batch], 1, 2
        assert trainer._only_advantages_teach()
        taught = trainer._prepare_inputs([])
        assert taught["advantages"].tolist() == pytest.approx([0.9, -0.9, 0.7, -0.7])
        assert taught["role_index"].tolist() == [0, 0, 1, 1]
        for inputs in (taught, batch) if rounding == 0.0 else (taught,):
            trainer.model.zero_grad()
            trainer._compute_loss(trainer.model, inputs).backward()
            gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)
        assert torch.equal(gradient, gradients[2][name])
    nothing = batch | {"advantages": torch.zeros(8)}
    kept = trainer._rows_that_teach(nothing)["role_index"].tolist()
    assert kept == ([0, 1] if per_role else [0]), "every process, and every adapter, takes part in a step"


def test_all_rows_are_trained_on_where_the_loss_is_more_than_advantages(tokenizer, tmp_path: Path) -> None:
    trainer = team_trainer(tokenizer, tmp_path, TeamSettings(select_roles(TEAM, ENVIRONMENTS["plan_path"])))
    assert trainer._only_advantages_teach()
    for name, value in {
        "beta": 0.1,
        "_entropy_bonus_enabled": True,
        "loss_type": "grpo",
        "scale_rewards": "none",
    }.items():
        before = getattr(trainer, name)
        setattr(trainer, name, value)
        assert not trainer._only_advantages_teach(), name
        setattr(trainer, name, before)


def test_rows_of_two_roles_get_the_log_probabilities_of_their_own_adapter(tokenizer, tmp_path: Path) -> None:
    roles = select_roles(TEAM, ENVIRONMENTS["plan_path"])
    model = add_role_adapters(
        tiny_model(tokenizer), peft_config(LoraArguments(use_peft=True, lora_r=4)), ["planner", "actor"]
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    trainer = team_trainer(tokenizer, tmp_path, TeamSettings(roles, per_role=True), model)
    model.eval()
    ids, mask = torch.randint(30, 200, (6, 12)), torch.ones(6, 12, dtype=torch.long)
    trainer._row_roles = torch.tensor([0, 1, 1, 0, 0, 1])
    with torch.no_grad():
        mixed, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, 5)
        for row, role in enumerate([0, 1, 1, 0, 0, 1]):
            trainer_rows, trainer._row_roles = trainer._row_roles, torch.tensor([role])
            alone, _, _ = trainer._get_per_token_logps_and_entropies(model, ids[row : row + 1], mask[:1], 5)
            trainer._row_roles = trainer_rows
            torch.testing.assert_close(mixed[row : row + 1], alone)


@pytest.mark.parametrize("window", [{"steps_per_generation": 2}, {"num_iterations": 2}])
@pytest.mark.parametrize("is_team", [False, True], ids=["one agent", "team"])
def test_a_run_stopped_between_two_generations_resumes_to_the_same_bits(
    tokenizer, tmp_path: Path, is_team: bool, window: dict
) -> None:
    def train(name: str, resume: Path | None = None, **changes):
        args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 1} | window
        if is_team:
            team = TeamSettings(select_roles(TEAM, ENVIRONMENTS["plan_path"]), num_parallel_games=2)
            trainer = team_trainer(tokenizer, tmp_path / name, team, **(args | changes))
        else:
            trainer = AgentGRPOTrainer(
                model=tiny_model(tokenizer),
                reward_funcs=[lambda completions, **_: [float(len(str(said)) % 7) for said in completions]],
                args=config(tmp_path / name, **(args | changes)),
                train_dataset=path_rows(40),
                processing_class=tokenizer,
            )
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return trainer.model.state_dict()

    whole = train("whole")
    within, between = (tmp_path / f"whole/checkpoint-{step}" for step in (3, 2))
    assert (within / "generation_0.pt").is_file() and not (between / "generation_0.pt").exists()
    resumed = train("resumed", within)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    with pytest.raises(UserError, match="checkpoint-3 lies between two generations"):
        train("other", within, per_device_train_batch_size=4, gradient_accumulation_steps=2)


def test_a_resumed_team_goes_on_with_its_games_to_the_same_bits(tokenizer, tmp_path: Path) -> None:
    team = TeamSettings(select_roles(TEAM, ENVIRONMENTS["plan_path"]), num_parallel_games=2, stray_fraction=1.0)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = team_trainer(tokenizer, tmp_path / "whole", team, **saving)
    whole.train()
    assert len(json.loads((tmp_path / "whole/checkpoint-2/games_0.json").read_text())) == 2
    resumed = team_trainer(tokenizer, tmp_path / "resumed", team, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert [game.record() for game in resumed._games] == [game.record() for game in whole._games]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_training_stops_at_the_tokens_that_were_allowed(tokenizer, tmp_path: Path) -> None:
    team = TeamSettings(select_roles(TEAM, ENVIRONMENTS["plan_path"]), max_turns=3)
    trainer = AtGrpoTrainer(
        team_settings=team,
        model=tiny_model(tokenizer),
        args=config(tmp_path, max_steps=50),
        train_dataset=path_rows(40),
        processing_class=tokenizer,
        max_generated_tokens=250,
    )
    trainer.train()
    assert 250 <= trainer.num_generated_tokens < 250 + 8 * 24 and trainer.state.global_step < 50
    assert trainer.state.log_history[-2]["num_generated_tokens"] == trainer.num_generated_tokens


def test_tokens_of_turns_that_were_cut_are_counted_where_they_teach_nothing(tokenizer, tmp_path: Path) -> None:
    team = TeamSettings(select_roles(TEAM, ENVIRONMENTS["plan_path"]), max_turns=3)
    trainer = AtGrpoTrainer(
        team_settings=team,
        model=tiny_model(tokenizer),
        args=config(tmp_path, mask_truncated_completions=True, max_completion_length=2),
        train_dataset=path_rows(40),
        processing_class=tokenizer,
    )
    trainer.model.train()
    trainer._speak = lambda prompts, role: [[5, 6] for _ in prompts]
    output = trainer._generate_and_score_completions([path_rows(2)[index // 4] for index in range(8)])
    assert not output["completion_mask"].any() and trainer.num_generated_tokens == 2 * 8


def test_longest_episode_of_a_task_sets_the_limit_of_calls() -> None:
    rows = [TASKS["plan_path"].prompt(seed, "train", min_steps=6, moves_per_call=1) for seed in range(20)]
    assert tool_call_limit(rows) == max(2 * row_steps(row) + 2 for row in rows) > 8
    assert tool_call_limit([TASKS["tic_tac_toe"].prompt(0, "train")]) == 8


def row_steps(row: dict) -> int:
    environment = ENVIRONMENTS["plan_path"]()
    environment.reset(**row)
    return environment._best_calls


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roles": {"boss": {}}}, "unknown role 'boss'"),
        ({"roles": {"coder": {}}}, "no tool named 'submit'"),
        ({"policy": "per_role"}, "policy: per_role needs roles"),
        ({"turn_discount": 0.0}, "turn_discount: 0.0"),
        ({"max_turns": 0}, "max_turns: 0"),
        ({"alpha": -1.0}, "alpha: -1.0"),
        ({"roles": TEAM, "metric_for_best_model": "loss"}, "metric_for_best_model: loss .* use eval_reward"),
        ({"stray_fraction": 1.5}, "stray_fraction: 1.5 must be between 0 and 1"),
    ],
)
def test_bad_team_keys_get_one_line(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        team_settings(config(tmp_path, **changes), ["plan_path"])


def test_candidates_must_fill_the_rows_of_a_process(tokenizer, tmp_path: Path) -> None:
    args = config(tmp_path)
    args.per_device_train_batch_size = 2  # as on each of several processes
    with pytest.raises(UserError, match="num_generations: 4 candidates do not divide the 2 rows"):
        AtGrpoTrainer(
            team_settings=TeamSettings(select_roles(TEAM, ENVIRONMENTS["plan_path"])),
            model=tiny_model(tokenizer),
            args=args,
            train_dataset=path_rows(4),
            processing_class=tokenizer,
        )
