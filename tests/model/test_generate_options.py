"""What `generate` of transformers may be given beside our options: a row alone says what rows of a batch say."""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import DynamicCache

from adamba.data import train_tokenizer
from adamba.data.tokenizer import MIN_VOCAB_SIZE, NUM_ADDED_TOKENS
from adamba.model import AdambaForCausalLM
from adamba.surgery import slice_width
from models import hybrid, tokens

GREEDY = {"do_sample": False, "max_new_tokens": 8}
MODES = [{}, {"exit_threshold": 0.5}, {"exit_mode": "verify"}]


def cache_of(model: AdambaForCausalLM, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("num_new", [3, 12])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_only_what_is_new_may_be_given_after_a_cache(mode: dict, num_new: int) -> None:
    """As transformers has it: the mask is of the whole text, and so is longer than the tokens."""
    for seed in range(3):
        model, ids = hybrid(seed), tokens(seed, batch=1, length=9 + num_new)
        said = []
        for given in (ids, ids[:, 9:]):
            cache = cache_of(model, ids[:, :9])
            options = {"attention_mask": torch.ones_like(ids), "past_key_values": cache, **mode, **GREEDY}
            said.append(model.generate(given, **options)[:, given.shape[1] :])
        assert torch.equal(*said)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("seen", "length"), [(0, 0), (9, 9), (9, 4)])
def test_a_prompt_without_a_new_token_is_refused(batch: int, seen: int, length: int) -> None:
    model, ids = hybrid(0), tokens(0, batch=batch, length=9)
    cache = cache_of(model, ids) if seen else None
    with pytest.raises(ValueError, match=f"input_ids: no token is new, {length} are given .* holds {seen}"):
        model.generate(ids[:, :length], past_key_values=cache, **GREEDY)


def test_a_cache_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="past_key_values: has no place for Mamba states"):
        hybrid(0).generate(tokens(0), past_key_values=((torch.zeros(1), torch.zeros(1)),), **GREEDY)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_stop_string_ends_the_text(mode: dict) -> None:
    tokenizer = train_tokenizer(["a text"], MIN_VOCAB_SIZE)
    model, prompt = hybrid(2, vocab_size=MIN_VOCAB_SIZE), tokens(2, batch=1, length=6)
    options = {"attention_mask": torch.ones_like(prompt), "suppress_tokens": list(range(NUM_ADDED_TOKENS)), **mode}
    whole = model.generate(prompt, **options, **GREEDY)[0, 6:]
    stop = tokenizer.decode(whole[3:5])
    stopped = model.generate(prompt, stop_strings=stop, tokenizer=tokenizer, **options, **GREEDY)[0, 6:]
    assert len(stopped) < len(whole) and torch.equal(stopped, whole[: len(stopped)])
    assert stop in tokenizer.decode(stopped) and stop not in tokenizer.decode(stopped[:-1])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_tuned_prompt_is_read_by_a_row_alone(mode: dict) -> None:
    """PEFT puts its virtual tokens in front where transformers prepares the inputs."""
    model, ids = hybrid(0), tokens(0, batch=1, length=9)
    plain = model.generate(ids, **GREEDY)
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    torch.nn.init.normal_(tuned.prompt_encoder["default"].embedding.weight, std=3.0)
    alone, twice = (
        tuned.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **mode, **GREEDY)
        for rows in (ids, ids.repeat(2, 1))
    )
    assert torch.equal(alone[0], twice[0]) and not torch.equal(alone, plain)


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}], ids=str)
def test_allowed_tokens_are_asked_for_the_row_of_the_whole_batch(options: dict) -> None:
    """Rows that are routed apart are numbered anew in each group."""
    model, ids = hybrid(0), tokens(0, batch=4, length=9)
    torch.manual_seed(0)
    model.model.router.down_proj.weight.data.normal_(std=3)
    options = {**GREEDY, **options, "prefix_allowed_tokens_fn": lambda row, _: [10 + row]}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, width="auto", **options), expected)
    assert len({tuple(widths) for widths in model.last_generation.widths}) > 1, "the test needs several groups"


@pytest.mark.parametrize("batch", [1, 2])
def test_guidance_is_by_the_same_width(batch: int) -> None:
    """transformers' processor calls the model a second time; a slice has no other width to do it at."""
    for seed in range(3):
        model, ids = hybrid(seed), tokens(seed, batch=batch, length=9)
        options = {"guidance_scale": 2.0, **GREEDY}
        expected = slice_width(model, "ghost").generate(ids, **options)
        assert torch.equal(model.generate(ids, width="ghost", **options), expected)


def test_the_router_reads_what_is_new_after_a_cache() -> None:
    model, ids = hybrid(0), tokens(0, batch=1, length=13)
    torch.manual_seed(0)
    model.model.router.down_proj.weight.data.normal_(std=3)
    widths = model.route(ids[:, 9:])[0].tolist()
    said = []
    for width in (widths, "auto"):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :9], past_key_values=cache, use_cache=True, width=widths)
        options = {"attention_mask": torch.ones_like(ids), "past_key_values": cache, **GREEDY}
        said.append(model.generate(ids[:, 9:], width=width, **options))
    assert torch.equal(*said)
