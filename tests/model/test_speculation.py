"""Drafts that are verified, and exits that are filled later: the same text and the same cache as plain decoding."""

import itertools

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

from adamba.model.drafting_adamba import DraftLayer, DraftPolicy, draft_policy
from models import hybrid, random_config, tokens

NEW_TOKENS = 16


def any_hybrid(seed: int):
    """Random shapes; every other one with a sliding window that the prompt is longer than."""
    if seed % 2:
        kinds = ["sliding_attention", "linear_attention", "full_attention", "linear_attention"]
        return hybrid(seed, num_hidden_layers=6, layer_types=[*kinds, *kinds[:2]], sliding_window=5)
    return hybrid(seed)


def padded(seed: int) -> dict:
    """A prompt of one row, with padding on its left for two of three seeds."""
    ids, mask = tokens(seed, batch=1, length=9), torch.ones(1, 9, dtype=torch.long)
    mask[:, : seed % 3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def caches_agree(first, second) -> None:
    for one, other in zip(first.layers, second.layers, strict=True):
        if hasattr(one, "recurrent_states"):
            torch.testing.assert_close(one.recurrent_states[0], other.recurrent_states[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(one.conv_states[0], other.conv_states[0], rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(one.keys, other.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(one.values, other.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", ["normal", "think"])
@pytest.mark.parametrize("seed", range(6))
def test_verify_leaves_the_text_and_the_cache_of_plain_decoding(seed: int, width: str, monkeypatch) -> None:
    """Whatever layers draft, in any order, however badly: here every layer in turn, and plain rounds in between."""
    model, prompt = any_hybrid(seed), padded(seed)
    options = {"width": width, "do_sample": False, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True}
    plain = model.generate(**prompt, **options)
    turns = itertools.cycle(
        [*(DraftLayer(layer, 0, 1, 0) for layer in range(model.config.num_hidden_layers - 1)), None]
    )
    monkeypatch.setattr(DraftPolicy, "choose", lambda self: next(turns))
    verified = model.generate(**prompt, **options, exit_mode="verify", exit_threshold=0.2)
    assert torch.equal(plain.sequences, verified.sequences)
    assert model.last_generation.num_drafted > 0
    caches_agree(plain.past_key_values, verified.past_key_values)
    again = [
        model.generate(output.sequences, past_key_values=output.past_key_values, **options).sequences
        for output in (plain, verified)
    ]
    assert torch.equal(*again)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
@pytest.mark.parametrize("mode", [{"exit_mode": "verify", "exit_threshold": 0.2}, {"exit_threshold": 0.5}], ids=str)
def test_rotations_that_depend_on_the_length_are_those_of_each_step(mode: dict, rope_type: str) -> None:
    """A layer that gets to several tokens at once rotates each as it would have been alone."""
    for seed in range(4):
        prompt, half = tokens(seed, batch=1, length=9), random_config(seed).head_dim // 2
        factors = {"short_factor": [1.0] * half, "long_factor": [4.0] * half}
        rope = {"rope_type": rope_type, "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 12}
        model = hybrid(seed, max_position_embeddings=12, rope_parameters=rope | factors)
        options = {"do_sample": False, "max_new_tokens": 2 * NEW_TOKENS}
        alone = model.generate(prompt, **options, **mode, return_dict_in_generate=True)
        plain = model.generate(prompt, **options, return_dict_in_generate=True)
        if "exit_mode" in mode:
            caches_agree(alone.past_key_values, plain.past_key_values)
            assert torch.equal(alone.sequences, plain.sequences)
        else:
            assert torch.equal(alone.sequences, model.generate(prompt.repeat(2, 1), **options, **mode)[:1])


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.num_puts, self.ended = 0, False

    def put(self, value: torch.Tensor) -> None:
        self.num_puts += 1
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("mode", ["verify", "propagate", None])
def test_own_loops_stream_and_stop_at_the_end_token(mode: str | None) -> None:
    model, prompt = hybrid(2), tokens(2, batch=1, length=6)
    options = {
        "do_sample": False,
        "max_new_tokens": NEW_TOKENS,
        "exit_mode": mode,
        "exit_threshold": 0.4 if mode else None,
    }
    whole = model.generate(prompt, **options)[0, 6:].tolist()
    end = whole[9]
    recorder = Recorder()
    stopped = model.generate(prompt, eos_token_id=end, streamer=recorder, **options)
    assert stopped[0, 6:].tolist() == whole[: whole.index(end) + 1]
    assert recorder.ids == stopped[0].tolist() and recorder.ended
    assert recorder.num_puts == 1 + len(stopped[0, 6:]), "the prompt at once, then each token"


class Full(Recorder):
    """Takes so many values and refuses the next."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def put(self, value: torch.Tensor) -> None:
        if self.num_puts == self.room:
            raise OSError("full")
        super().put(value)


@pytest.mark.parametrize("mode", [{"exit_mode": "verify", "exit_threshold": 0.2}, {"exit_threshold": 0.5}], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_a_streamer_that_raises_leaves_the_cache_whole(seed: int, mode: dict, monkeypatch) -> None:
    """The prompt and all that was chosen but the newest token, as in plain decoding: from there one can go on."""
    model, prompt = any_hybrid(seed), tokens(seed, batch=1, length=9)
    options = {"do_sample": False, **mode}
    monkeypatch.setattr(DraftPolicy, "choose", lambda self: DraftLayer(1, 0, 1, 0, length=4))
    whole = model.generate(prompt, max_new_tokens=NEW_TOKENS, **options)
    for num_new in range(1, 10):
        stopped, ended = (DynamicCache(config=model.config) for _ in range(2))
        with pytest.raises(OSError, match="full"):
            model.generate(
                prompt, past_key_values=stopped, streamer=Full(num_new), max_new_tokens=NEW_TOKENS, **options
            )
        model.generate(prompt, past_key_values=ended, max_new_tokens=num_new, **options)
        assert stopped.get_seq_length() == 9 + num_new - 1
        caches_agree(stopped, ended)
        texts = [
            model.generate(whole[:, : 9 + num_new], past_key_values=cache, max_new_tokens=3, **options)
            for cache in (stopped, ended)
        ]
        assert torch.equal(*texts)


def test_verify_takes_what_the_layers_below_agree_on(monkeypatch) -> None:
    """Layers that write nothing: every draft is right, so none is taken back and rounds are as long as allowed."""
    model = hybrid(0)
    for layer in model.model.layers[2:]:
        for name, parameter in layer.named_parameters():
            if name.endswith(("o_proj.weight", "o_proj.bias", "down_proj.weight", "out_proj.weight")):
                parameter.data.zero_()
    prompt = tokens(0, batch=1, length=5)
    options = {"exit_mode": "verify", "exit_layer": 1, "exit_threshold": 0.0}
    model.generate(prompt, do_sample=False, max_new_tokens=41, **options)
    trace = model.last_generation
    assert trace.num_accepted == trace.num_drafted >= 32  # 8 of 9 tokens a round, after the first


def test_bad_drafts_are_given_up() -> None:
    """Drafting is paid from what it saved: with none accepted, hardly any is tried."""
    model, prompt = hybrid(4), tokens(4, batch=1, length=5)
    options = {"exit_mode": "verify", "exit_layer": 1, "exit_threshold": 0.0, "do_sample": False}
    text = model.generate(prompt, max_new_tokens=80, **options)
    trace = model.last_generation
    assert trace.num_drafted < 40
    assert torch.equal(text, model.generate(prompt, max_new_tokens=80, do_sample=False))


def test_a_policy_learns_which_layer_drafts_well() -> None:
    """Layer 1 is always wrong, layer 3 always right: after some rounds layer 3 drafts, and costs stay bounded."""
    layers = [DraftLayer(layer, 100.0 * (layer + 1), 100.0 * (7 - layer), 10.0) for layer in (1, 3)]
    policy = DraftPolicy(layers, plain_cost=810.0)
    chosen, emitted = [], 0
    for _ in range(60):
        layer = policy.choose()
        chosen.append(None if layer is None else layer.layer)
        if layer is None:
            policy.learn(None, 1, [], 0, 0, 1)
            emitted += 1
        else:
            right = layer.layer == 3
            policy.learn(layer, 5, [0.9] * (4 if right else 1), 4, 4 if right else 0, 5 if right else 1)
            emitted += 5 if right else 1
    assert chosen[-20:].count(3) >= 15
    assert policy.layers[0].chance(0.9) < 0.9 < policy.layers[1].chance(0.9)


def test_the_policy_costs_no_more_than_it_may() -> None:
    policy = DraftPolicy([DraftLayer(1, 200.0, 600.0, 10.0)], plain_cost=800.0)
    spent = 0.0
    for _ in range(400):  # every draft of 8 is wrong: one token a round
        layer = policy.choose()
        spent += 800.0 if layer is None else 9 * 200.0 + 8 * 10.0 + 600.0
        policy.learn(layer, 9, [1.0], 8, 0, 1) if layer else policy.learn(None, 1, [], 0, 0, 1)
    assert spent < 400 * 800.0 * 1.05


def test_candidates_are_gates_or_the_one_asked_for() -> None:
    model = hybrid(1)
    assert {layer.layer for layer in draft_policy(model, model.config.attention_widths, None).layers} <= set(
        model.config.gate_layers
    )
    assert [layer.layer for layer in draft_policy(model, model.config.attention_widths, 0).layers] == [0]


@pytest.mark.parametrize("width", ["ghost", "think"])
@pytest.mark.parametrize("seed", range(6))
def test_exits_filled_later_equal_exits_filled_at_once(seed: int, width: str) -> None:
    """A row alone fills skipped layers when it needs them; twice in a batch, it fills them at once."""
    model, prompt = any_hybrid(seed), padded(seed)
    options = {"width": width, "do_sample": False, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True}
    alone = model.generate(**prompt, **options, exit_threshold=0.5)
    exits = model.last_generation.exit_layers
    twice = model.generate(**{key: value.repeat(2, 1) for key, value in prompt.items()}, **options, exit_threshold=0.5)
    assert torch.equal(alone.sequences[0], twice.sequences[0])
    assert torch.equal(exits[0], model.last_generation.exit_layers[0])
    for layer in twice.past_key_values.layers:
        if hasattr(layer, "recurrent_states"):
            layer.recurrent_states[0], layer.conv_states[0] = layer.recurrent_states[0][:1], layer.conv_states[0][:1]
        else:
            layer.keys, layer.values = layer.keys[:1], layer.values[:1]
    caches_agree(alone.past_key_values, twice.past_key_values)


def test_rows_that_exit_early_are_many() -> None:
    """The comparison above means something: in those models tokens leave at several layers."""
    seen = set()
    for seed in range(6):
        model, prompt = any_hybrid(seed), padded(seed)
        model.generate(**prompt, do_sample=False, max_new_tokens=NEW_TOKENS, exit_threshold=0.5)
        seen |= set(model.last_generation.exit_layers.unique().tolist())
    assert len(seen) >= 4
