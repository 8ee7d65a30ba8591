import json

import pytest

from adamba.data import train_tokenizer
from adamba.data.formats import FORMATS
from adamba.errors import UserError
from adamba.tasks import TASKS
from adamba.training.agent_rows import read_pairs
from adamba.training.play import Episode, ToolResultIds, _start, _take_turn
from adamba.training.rollouts import preference_pairs, rollout_metrics, rollout_rows, trajectory


def rows(num_prompts=2, num_samples=3, mix=None):
    return rollout_rows(mix or {"calculator": 1.0}, num_prompts, num_samples, split="train", seed=0, settings={})


def played(row, score, text, **changes):
    answer = {"role": "assistant", "content": text}
    episode = Episode(row, [*row["prompt"], answer], text, {"score": score}, 1, 0, 9, 5, 1, True)
    for name, value in changes.items():
        setattr(episode, name, value)
    return trajectory(episode, success_score=1.0)


def test_each_prompt_is_played_several_times():
    made = rows()
    assert len(made) == 6 and made[0] == made[2] != made[3]
    assert {row["environment"] for row in rows(100, 1, dict.fromkeys(TASKS, 1.0))} == set(TASKS)
    with pytest.raises(UserError, match="'pydoc_topics' is no task"):
        rows(mix={"pydoc_topics": 1.0})


def test_success_needs_the_score_no_refused_call_and_an_end():
    row = rows()[0]
    assert played(row, 1.0, "8")["success"]
    assert not played(row, 0.5, "8")["success"]
    assert not played(row, 1.0, "8", invalid_calls=1)["success"]
    assert not played(row, 1.0, "8", finished=False)["success"]
    cut = played(row, 1.0, "8 and so on and so", cut=True)
    assert not cut["success"] and not cut["finished"]
    assert played(row, 1.0, "8")["tools"][0]["function"]["name"] == "calculator"


def test_pairs_are_the_turns_where_the_best_and_the_worst_part(tmp_path):
    first, second = rows()[0], rows()[3]
    best = played(first, 1.0, "right")
    best["messages"] = [
        *first["prompt"],
        {"role": "assistant", "content": "same"},
        {"role": "assistant", "content": "b"},
    ]
    worst = played(first, 0.0, "wrong")
    worst["messages"] = [
        *first["prompt"],
        {"role": "assistant", "content": "same"},
        {"role": "assistant", "content": "w"},
    ]
    always = [played(second, 1.0, "right"), played(second, 1.0, "also right")]
    [pair] = preference_pairs([best, worst, played(first, 0.5, "middling"), *always])
    assert pair["prompt"][-1]["content"] == "same"
    assert pair["chosen"] == [{"role": "assistant", "content": "b"}]
    assert pair["rejected"] == [{"role": "assistant", "content": "w"}]
    assert rollout_metrics([best, worst, *always], 1) == {
        "num_trajectories": 4,
        "num_pairs": 1,
        "success_rate_calculator": 0.75,
    }


def test_pairs_are_what_dpo_reads(tmp_path):
    import run_rollout

    first = rows()[0]
    pairs = preference_pairs([played(first, 1.0, "right"), played(first, 0.0, "wrong")])
    run_rollout.write_lines(tmp_path / "pairs.jsonl", pairs)
    [row] = read_pairs(str(tmp_path / "pairs.jsonl"))
    assert row["chosen"][0]["content"] == "right" and row["rejected"][0]["content"] == "wrong"


def spoken(turns):
    """A calculator's episode in which the model says `turns`; and the tokenizer."""
    row = rows()[0]
    tokenizer = train_tokenizer([json.dumps(TASKS["calculator"].example(seed, "train")) for seed in range(20)], 400)
    live, result_ids = _start(tokenizer, row), ToolResultIds(tokenizer)
    for turn in turns:
        _take_turn(
            live, [*tokenizer.encode(turn, add_special_tokens=False), tokenizer.eos_token_id], tokenizer, result_ids
        )
    live.episode.outcome = live.environment._outcome(live.episode.final_text)
    return trajectory(live.episode, success_score=1.0), tokenizer, live.ids


def good_turns():
    row = rows()[0]
    arguments = json.dumps({"expression": row["expression"]})
    call = f'<tool_call>\n{{"name": "calculator", "arguments": {arguments}}}\n</tool_call>'
    return call, f'{row["expression"]} # Answer: "{row["answer"]}"'


def test_a_call_that_cannot_be_read_is_rejected_as_it_was_written():
    call, answer = good_turns()
    broken = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12 + }\n</tool_call>'
    good, tokenizer, _ = spoken([call, answer])
    bad, _, ids = spoken([broken, "I do not know"])
    assert good["success"] and not bad["success"] and bad["invalid_calls"] == 1
    [pair] = preference_pairs([good, bad])
    assert pair["rejected"] == [{"role": "assistant", "content": broken}]
    whole = tokenizer.apply_chat_template(bad["messages"], tools=bad["tools"], tokenize=True, return_dict=False)
    assert whole == ids


def test_a_turn_with_a_thought_is_data_for_sft():
    call, answer = good_turns()
    thought = "<think>\nthe tool said it\n</think>\n\n"
    played_row, tokenizer, ids = spoken([thought + call, thought + answer])
    assert played_row["success"]
    row = FORMATS["messages"].convert({"messages": played_row["messages"], "tools": played_row["tools"]})
    assert row["messages"][-1] == {"role": "assistant", "content": answer, "reasoning_content": "the tool said it"}
    assert tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=True, return_dict=False) == ids
