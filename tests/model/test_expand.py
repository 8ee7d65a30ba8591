"""`expand_threshold`: unsure tokens run the last layers at full width, and every token finds the others' keys."""

import pytest
import torch

from adamba.model.configuration_adamba import ATTENTION_LAYERS
from adamba.model.layers_adamba import rotations
from models import hybrid, tokens

KINDS = ["full_attention", "linear_attention", "full_attention", "linear_attention", "full_attention"]
PROMPT = 7


def model_of(seed: int):
    """Layer 4, attention, may go wider; the gate after layer 3, Mamba, decides."""
    kinds = [*KINDS[:4], "sliding_attention"] if seed % 2 else KINDS
    return hybrid(seed, num_hidden_layers=5, layer_types=kinds, sliding_window=6)


def reference(model, ids: torch.Tensor, width: int, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, L, vocab) of a full forward in which each token's width in layer 4 is chosen by the gate after
    layer 3, and which tokens went wider."""
    config, full = model.config, model.config.hidden_size
    assert config.expand_start == 4
    output = model.model(ids, width=width, use_cache=False, exit_hidden_layers=[3])
    hidden = output.exit_hidden_states[0]
    wide = model.model.exit_gates["3"](hidden).sigmoid() < threshold
    wide[:, :PROMPT] = False  # only single tokens are judged
    positions = torch.arange(ids.shape[1])[None]
    cos, sin = model.model.rotary_emb(hidden, positions)
    rope = rotations(cos, sin, config.rope_sign)
    masks = model.model._masks(hidden, None, positions, None, set(config.layer_types))
    layer = model.model.layers[4]
    results = [layer(hidden, w, rope, masks[config.layer_types[4]], position_ids=positions) for w in (width, full)]
    hidden = torch.where(wide[..., None], results[1], results[0])
    return model.head(model.model.norm(hidden)), wide


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_cached_expansion_equals_the_full_forward(seed: int) -> None:
    model, ids = model_of(seed), tokens(seed, batch=4, length=20)
    assert model.config.layer_types[4] in ATTENTION_LAYERS
    width = model.config.width_levels["ghost"]
    probabilities = model.model.exit_gates["3"](
        model.model(ids, width=width, use_cache=False, exit_hidden_layers=[3]).exit_hidden_states[0]
    ).sigmoid()
    middle = probabilities.flatten().sort().values[probabilities.numel() // 2 - 1 :][:2]
    threshold = middle.mean().item()  # on no token's own probability
    expected, wide = reference(model, ids, width, threshold)
    output = model(ids[:, :PROMPT], use_cache=True, width=width, expand_threshold=threshold)
    cache, parts, expanded = output.past_key_values, [output.logits], []
    for place in range(PROMPT, ids.shape[1]):
        step = ids[:, place : place + 1]
        output = model(step, past_key_values=cache, use_cache=True, width=width, expand_threshold=threshold)
        parts.append(output.logits)
        expanded.append(output.expanded)
    assert torch.equal(torch.stack(expanded, dim=1), wide[:, PROMPT:])
    assert 0 < int(wide.sum()) < wide[:, PROMPT:].numel(), "the test needs both kinds of tokens"
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-4)


def test_generate_expands_between_never_and_always() -> None:
    model, prompt = model_of(0), tokens(0, batch=3, length=PROMPT)
    options = {"width": "ghost", "do_sample": False, "max_new_tokens": 8}
    plain = model.generate(prompt, **options)
    assert torch.equal(plain, model.generate(prompt, expand_threshold=0.0, **options))
    for seed in range(6):
        model = model_of(seed)
        plain = model.generate(prompt, **options)
        wider = model.generate(prompt, expand_threshold=1.0, **options)
        assert model.last_generation.num_expanded == 3 * 7, "every token but the first, which the prompt's pass gives"
        if not torch.equal(plain, wider):
            break
    else:
        pytest.fail("going wider never changed a token")
    full = {**options, "width": "think"}
    assert torch.equal(model.generate(prompt, **full), model.generate(prompt, expand_threshold=1.0, **full))


def test_expansion_and_exits_go_together() -> None:
    """A row alone equals the same row in a batch, whatever the others do."""
    model, prompt = model_of(2), tokens(2, batch=3, length=PROMPT)
    options = {"width": "ghost", "exit_threshold": 0.5, "expand_threshold": 0.6, "do_sample": False}
    together = model.generate(prompt, max_new_tokens=10, **options)
    assert model.last_generation.num_expanded > 0
    assert (model.last_generation.exit_layers < 4).any()
    for row in range(3):
        assert torch.equal(model.generate(prompt[row : row + 1], max_new_tokens=10, **options)[0], together[row])
