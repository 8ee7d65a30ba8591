"""Invariants 5, 6 and 8 of DESIGN section 5 for all modes together: width, exit, padding, sliding window, batch."""

import pytest
import torch

from adamba.model import AdambaForCausalLM
from models import hybrid, tokens

PROMPT, NEW = 9, 8  # longer than the sliding window, across Mamba's chunks
GREEDY = {"do_sample": False, "max_new_tokens": NEW}
WIDTHS = ["ghost", "think", "mixed"]


def make(seed: int, sliding: bool) -> AdambaForCausalLM:
    attention = ["sliding_attention" if sliding else "full_attention", "full_attention"]
    kinds = [attention[0], "linear_attention", attention[1], "linear_attention"] * 2
    return hybrid(seed, num_hidden_layers=6, layer_types=kinds[:6], sliding_window=5 if sliding else None)


def width_of(model: AdambaForCausalLM, name: str):
    levels = [model.config.width_levels[level] for level in ("normal", "think", "ghost")]
    return levels if name == "mixed" else name


def padded_batch(seed: int, num_rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `PROMPT` tokens with 0, 3 and 6 of padding on the left."""
    ids, mask = tokens(seed, batch=num_rows, length=PROMPT), torch.ones(num_rows, PROMPT, dtype=torch.long)
    for row in range(num_rows):
        mask[row, : 3 * row] = 0
    return ids.masked_fill(mask == 0, 0), mask


def follows_its_own_exits(model, ids, mask, output, exits, width) -> None:
    """Each new token is the greedy choice of one full forward whose tokens stop at the layers that `generate` took."""
    last = model.config.num_hidden_layers - 1
    forced = torch.full_like(output, last)
    forced[:, PROMPT - 1 : -1] = exits
    mask = torch.nn.functional.pad(mask, (0, output.shape[1] - PROMPT), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(
            output, attention_mask=mask, position_ids=positions, use_cache=False, width=width, exit_layers=forced
        ).logits
    assert torch.equal(logits[:, PROMPT - 1 : -1].argmax(-1), output[:, PROMPT:])


@pytest.mark.parametrize("width_name", WIDTHS)
@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_every_mode_agrees_with_the_full_forward_and_with_each_row_alone(
    seed: int, sliding: bool, width_name: str
) -> None:
    model, (ids, mask) = make(seed, sliding), padded_batch(seed)
    width = width_of(model, width_name)
    plain = model.generate(ids, attention_mask=mask, width=width, **GREEDY)
    follows_its_own_exits(model, ids, mask, plain, model.last_generation.exit_layers, width)
    never = model.generate(ids, attention_mask=mask, width=width, exit_threshold=1.0, **GREEDY)
    assert torch.equal(plain, never)

    early = model.generate(ids, attention_mask=mask, width=width, exit_threshold=0.5, **GREEDY)
    exits = model.last_generation.exit_layers
    assert (exits < model.config.num_hidden_layers - 1).any(), "the test needs tokens that leave early"
    follows_its_own_exits(model, ids, mask, early, exits, width)

    for row in range(len(ids)):
        for keep in (mask[row].bool(), torch.ones(PROMPT, dtype=torch.bool)):  # without its padding, and with
            alone = {"input_ids": ids[row : row + 1, keep], "attention_mask": mask[row : row + 1, keep]}
            length = int(keep.sum())
            left = model.generate(**alone, width=width, exit_threshold=0.5, **GREEDY)
            assert torch.equal(left[0, length:], early[row, PROMPT:])
            assert torch.equal(model.last_generation.exit_layers[0], exits[row])
            for threshold in (None, 0.3):
                options = {"width": width, "exit_mode": "verify", "exit_threshold": threshold, **GREEDY}
                verified = model.generate(**alone, **options)
                assert torch.equal(verified[0, length:], plain[row, PROMPT:])


@pytest.mark.parametrize("sliding", [False, True])
def test_widths_and_exits_change_what_is_said(sliding: bool) -> None:
    """The agreement above means something: the modes really differ in those models."""
    told = set()
    for seed in range(2):
        model, (ids, mask) = make(seed, sliding), padded_batch(seed)
        for name in WIDTHS:
            for threshold in (1.0, 0.5):
                options = {"width": width_of(model, name), "exit_threshold": threshold, **GREEDY}
                told.add((seed, tuple(model.generate(ids, attention_mask=mask, **options).flatten().tolist())))
    assert len(told) >= 8


def test_a_tuple_is_given_where_one_is_asked_for() -> None:
    model, ids = hybrid(0), tokens(0)
    expected = model(ids, labels=ids, use_cache=False)
    loss, logits, *_ = model(ids, labels=ids, use_cache=False, return_dict=False)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)
    assert model.generate(ids, max_new_tokens=2).shape[1] == ids.shape[1] + 2


def test_hidden_states_end_with_what_the_head_reads() -> None:
    """As in every model of transformers, and on request by the config too."""
    model, ids = hybrid(0), tokens(0)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.head(output.hidden_states[-1]), output.logits)
    model.config.output_hidden_states = True
    assert torch.equal(model(ids).hidden_states[-1], output.hidden_states[-1])
    assert model(ids, output_hidden_states=False).hidden_states is None
