import pytest

from adamba.errors import UserError
from adamba.tasks import TASKS
from adamba.training.agent_rows import read_pairs
from adamba.training.play import Episode
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
