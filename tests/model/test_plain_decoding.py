"""One row at full depth is decoded by our own loop: what transformers' loop says, and that one where it is needed."""

import pytest
import torch
from transformers import DynamicCache

from adamba.model import AdambaForCausalLM, decoding_adamba
from models import hybrid, tokens

NEW_TOKENS = 24


def count_plain(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every text that our loop decodes."""
    calls: list[int] = []
    ours = decoding_adamba.plain_decode
    monkeypatch.setattr(decoding_adamba, "plain_decode", lambda *a, **k: (calls.append(1), ours(*a, **k))[1])
    return calls


def stock(model: AdambaForCausalLM, monkeypatch: pytest.MonkeyPatch, *args, **options) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_is_plain", lambda *_: False)
        return model.generate(*args, **options)


@pytest.mark.parametrize("width", ["think", "ghost"])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("sampling", [False, True])
def test_one_row_is_what_transformers_loop_says(
    monkeypatch: pytest.MonkeyPatch, width: str, padding: int, sampling: bool
) -> None:
    calls = count_plain(monkeypatch)
    model, prompt = hybrid(3), tokens(3, batch=1, length=9)
    mask = torch.ones_like(prompt)
    mask[:, :padding] = 0
    options = {"attention_mask": mask, "width": width, "max_new_tokens": NEW_TOKENS, "repetition_penalty": 1.2}
    options |= {"do_sample": True, "temperature": 1.4, "top_p": 0.9} if sampling else {"do_sample": False}
    torch.manual_seed(0)
    expected = stock(model, monkeypatch, prompt, **options)
    layers = model.last_generation.exit_layers
    assert not calls
    torch.manual_seed(0)
    assert torch.equal(model.generate(prompt, **options), expected) and calls
    assert torch.equal(model.last_generation.exit_layers, layers)


def test_a_hole_in_the_mask_takes_no_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a tokenizer that pads inside, or a text that has the padding token itself."""
    differ = 0
    for seed in range(8):
        model, prompt = hybrid(seed), tokens(seed, batch=1, length=9)
        mask = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 1]])
        options = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False}
        expected = stock(model, monkeypatch, prompt, **options)
        assert torch.equal(model.generate(prompt, **options), expected)
        differ += not torch.equal(
            stock(model, monkeypatch, prompt, max_new_tokens=NEW_TOKENS, do_sample=False), expected
        )
    assert differ, "the test needs holes that matter"


def test_a_cache_goes_on_where_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = hybrid(1), tokens(1, batch=1, length=6)
    greedy = {"do_sample": False, "return_dict_in_generate": True}
    whole = stock(model, monkeypatch, prompt, max_new_tokens=2 * NEW_TOKENS, **greedy).sequences
    sequence, cache = prompt, DynamicCache(config=model.config)
    for _ in range(2):
        mask = torch.ones_like(sequence)  # else tokens that look like padding would be left out
        output = model.generate(
            sequence, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW_TOKENS, **greedy
        )
        sequence, cache = output.sequences, output.past_key_values
    assert torch.equal(sequence, whole)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"output_scores": True, "return_dict_in_generate": True},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_only_transformers_loop_can_do_is_its(monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    calls = count_plain(monkeypatch)
    model, prompt = hybrid(1), tokens(1, batch=1, length=6)
    output = model.generate(prompt, do_sample=False, max_new_tokens=4, **options)
    assert not calls
    if "output_scores" in options:
        assert len(output.scores) == 4


@pytest.mark.parametrize("options", [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}], ids=str)
@pytest.mark.parametrize("mode", [{}, {"exit_threshold": 0.5}, {"exit_mode": "verify"}], ids=str)
def test_another_way_of_decoding_is_never_dropped(options: dict, mode: dict) -> None:
    model, prompt = hybrid(1), tokens(1, batch=1, length=6)
    with pytest.raises(ValueError, match="trust_remote_code|is another way of decoding"):
        model.generate(prompt, do_sample=False, max_new_tokens=4, **options, **mode)


def test_embeddings_and_several_rows_are_its_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_plain(monkeypatch)
    model, prompt = hybrid(1), tokens(1, batch=1, length=6)
    greedy = {"do_sample": False, "max_new_tokens": 4}
    by_embeddings = model.generate(inputs_embeds=model.get_input_embeddings()(prompt), **greedy)
    two = model.generate(prompt.repeat(2, 1), **greedy)
    assert not calls
    assert torch.equal(by_embeddings[0], two[0, 6:]) and torch.equal(two[0], two[1])
    assert torch.equal(model.generate(prompt, **greedy)[0], two[0]) and calls
