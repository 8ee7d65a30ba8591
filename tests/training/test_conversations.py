"""Turns on kept caches: the very tokens that `generate` writes from the whole context."""

import json
from types import MethodType

import pytest
import torch
from transformers import GenerationConfig

from adamba.data import train_tokenizer
from adamba.model import AdambaForCausalLM
from adamba.model.decoding_adamba import OPTIONS
from adamba.tasks import ENVIRONMENTS, TASKS
from adamba.training.agent_config import AgentConfig
from adamba.training.agent_rows import prompt_rows
from adamba.training.agent_trainer import AgentGRPOTrainer
from adamba.training.conversations import Conversations, sampler
from models import VOCAB, random_config, shake, smallest_config

ENDS = (3, 7, 11, 19, 40, 55, 70)  # several, so that random rows end at different lengths
NEW_TOKENS = 12


def whole(model, context: list[int]) -> list[int]:
    """A turn by `generate`, alone and from nothing."""
    output = model.generate(
        torch.tensor([context]),
        attention_mask=torch.ones(1, len(context), dtype=torch.long),
        eos_token_id=list(ENDS),
        pad_token_id=0,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return output[0, len(context) :].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_turns_are_those_of_generate_from_the_whole_context(seed: int) -> None:
    torch.manual_seed(seed)
    model = shake(
        AdambaForCausalLM(
            random_config(
                seed, layer_types=["full_attention", "linear_attention"] * 2, num_hidden_layers=4, sliding_window=None
            )
        ),
        seed,
    )
    read: list[int] = []
    forward = model.forward
    model.forward = lambda *args, **kwargs: (read.append(kwargs["input_ids"].numel()), forward(*args, **kwargs))[1]
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False)
    conversations = Conversations(config, ENDS, pad_token_id=0)
    generator = torch.Generator().manual_seed(seed)

    def noise(length: int) -> list[int]:
        return torch.randint(1, VOCAB, (length,), generator=generator).tolist()

    first = noise(9)
    contexts = [first, first, noise(5), noise(14), noise(9)]
    lengths = set()
    for turn in range(3):
        read.clear()
        answers = conversations.turn(model, contexts)
        if turn:  # nothing was read twice
            assert sum(read) < sum(map(len, contexts))
        assert answers == [whole(model, context) for context in contexts]
        lengths |= {len(answer) for answer in answers}
        contexts = [
            context + answer + noise(2 + row)
            for row, (context, answer) in enumerate(zip(contexts, answers, strict=True))
        ][turn:]
    assert len(lengths) > 2
    contexts[0] = [1, *contexts[0]]  # unknown from its first token
    assert conversations.turn(model, contexts) == [whole(model, context) for context in contexts]


def test_sampling_follows_the_settings() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]]).repeat(4000, 1)
    torch.manual_seed(0)
    plain = sampler(GenerationConfig(do_sample=True, temperature=1.0, top_k=0))(logits).bincount(minlength=4) / 4000
    torch.testing.assert_close(plain, logits[0].softmax(-1), atol=0.03, rtol=0)
    sharp = sampler(GenerationConfig(do_sample=True, temperature=0.5, top_k=2))(logits).bincount(minlength=4) / 4000
    expected = torch.tensor([0.0, 0.0, *torch.tensor([6.0, 4.0]).softmax(-1).tolist()])
    torch.testing.assert_close(sharp, expected, atol=0.03, rtol=0)
    assert set(sampler(GenerationConfig(do_sample=True, top_k=0, top_p=0.5))(logits).tolist()) == {2}
    assert set(sampler(GenerationConfig(do_sample=False))(logits).tolist()) == {2}


def calls_up() -> dict:
    call = {"type": "function", "function": {"name": "move", "arguments": {"moves": "U"}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def test_episodes_of_the_trainer_are_those_of_its_stock_loop(tmp_path) -> None:
    settings = {"plan_path": {"size": 4, "max_steps": 6, "moves_per_call": 2}}
    tokenizer = train_tokenizer([json.dumps(TASKS["plan_path"].example(seed, "train")) for seed in range(20)], 277)
    rows = prompt_rows({"plan_path": 1.0}, 8, split="train", seed=0, settings=settings)
    episodes = []
    for keeps in (False, True):
        torch.manual_seed(0)
        model = shake(AdambaForCausalLM(smallest_config(len(tokenizer), max_position_embeddings=1024)), 0)
        model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
        trainer = AgentGRPOTrainer(
            model=model,
            args=AgentConfig(
                output_dir=str(tmp_path),
                max_steps=1,
                per_device_train_batch_size=4,
                num_generations=2,
                max_completion_length=160,
                max_tool_calling_iterations=2,
                use_cpu=True,
                bf16=False,
                report_to="none",
            ),
            reward_funcs=lambda completions, **columns: [0.0] * len(completions),
            environment_factory={"plan_path": ENVIRONMENTS["plan_path"]},
            train_dataset=rows,
            processing_class=tokenizer,
        )
        trainer._tokenizer.parse_response = MethodType(lambda self, *args, **kwargs: calls_up(), trainer._tokenizer)
        trainer.generation_config.do_sample = False
        trainer.generation_config.max_new_tokens = 8
        assert trainer._can_keep_caches()
        for key in OPTIONS:  # nothing turns them off unsaid
            setattr(model.generation_config, key, 0)
            assert trainer._reads_anew() == f"the checkpoint's generation config has {key}"
            setattr(model.generation_config, key, None)
        if not keeps:
            trainer._can_keep_caches = lambda: False
        batch = [row for row in rows.select(range(2)) for _ in range(2)]
        with torch.no_grad():
            output = trainer._generate_and_score_completions(batch)
        episodes.append(output)
    stock, kept = episodes
    for key in ("prompt_ids", "completion_ids", "completion_mask", "tool_mask"):
        assert torch.equal(stock[key], kept[key]), key
    assert (kept["tool_mask"] == 0).any()  # tools did answer
