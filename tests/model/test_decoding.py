"""Adaptive decoding: width by name and by router, exit options, what lives in the generation config, the trace."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, SynthIDTextWatermarkingConfig

from adamba.model import AdambaForCausalLM, decoding_adamba
from models import hybrid, tokens

GREEDY = {"do_sample": False, "max_new_tokens": 6}


def test_a_level_name_is_its_width() -> None:
    model, prompt = hybrid(0), tokens(0, length=7)
    for name, width in model.config.width_levels.items():
        by_name = model.generate(prompt, width=name, **GREEDY)
        assert model.last_generation.widths == [width] * model.config.num_attention_layers
        assert torch.equal(by_name, model.generate(prompt, width=width, **GREEDY))
    outputs = {tuple(model.generate(prompt, width=name, **GREEDY).flatten().tolist()) for name in ("ghost", "think")}
    assert len(outputs) == 2, "the test needs widths that answer differently"


def test_generation_at_a_width_is_greedy_on_the_logits_at_that_width() -> None:
    model, ids = hybrid(1), tokens(1, length=7)
    widths = [model.config.width_levels["ghost"], model.config.width_levels["normal"]] * 2
    widths = widths[: model.config.num_attention_layers]
    generated = model.generate(ids, width=widths, **GREEDY)
    for _ in range(GREEDY["max_new_tokens"]):
        with torch.no_grad():
            logits = model(ids, width=widths, use_cache=False).logits[:, -1]
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generated, ids)


def spread_router(model: AdambaForCausalLM) -> None:
    """A router whose decisions are near the border, so that different prompts get different widths."""
    with torch.no_grad():
        router = model.model.router
        router.up_proj.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(5))
        router.down_proj.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(6))
        router.down_proj.bias.zero_()


@pytest.mark.parametrize("eos_token_id", [None, 3])
@pytest.mark.parametrize("seed", range(3))
def test_auto_routes_each_row_as_if_it_were_alone(seed: int, eos_token_id: int | None) -> None:
    model, ids = hybrid(seed), tokens(seed, batch=4, length=9)
    spread_router(model)
    if eos_token_id is not None:  # a token that is really generated: rows of a group end at different lengths
        eos_token_id = int(model.generate(ids, width="auto", **GREEDY)[0, ids.shape[1] + 2])
    options = {"width": "auto", "eos_token_id": eos_token_id, **GREEDY}
    mask = torch.ones_like(ids)
    mask[1, :4], mask[3, :2] = 0, 0
    ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
    together = model.generate(ids, attention_mask=mask, **options)
    trace_widths = model.last_generation.widths
    assert len({tuple(widths) for widths in trace_widths}) > 1, "the test needs rows that are routed apart"
    for row in range(4):
        prompt = ids[row : row + 1, mask[row].bool()]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert model.last_generation.widths == trace_widths[row]
        expected, answer = alone[0, prompt.shape[1] :], together[row, ids.shape[1] :]
        assert torch.equal(answer[: len(expected)], expected)
        assert (answer[len(expected) :] == model.config.pad_token_id).all()


def test_auto_without_a_mask_sees_what_generation_sees() -> None:
    model, ids = hybrid(1), tokens(1, batch=8, length=9)
    spread_router(model)
    ids[::2, :7] = model.config.pad_token_id
    mask = (ids != model.config.pad_token_id).long()
    expected = model.generate(ids, attention_mask=mask, width="auto", **GREEDY)
    widths = model.last_generation.widths
    assert widths != model.route(ids).tolist(), "the test needs padding that would change a width"
    assert torch.equal(model.generate(ids, width="auto", **GREEDY), expected)
    assert model.last_generation.widths == widths


def test_auto_needs_a_prompt_and_one_width_for_a_cache() -> None:
    model, ids = hybrid(0), tokens(0, batch=4, length=9)
    spread_router(model)
    with pytest.raises(ValueError, match='width: "auto" is chosen from input_ids'):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), width="auto", **GREEDY)
    with pytest.raises(ValueError, match="past_key_values: goes with one width"):
        model.generate(ids, past_key_values=DynamicCache(config=model.config), width="auto", **GREEDY)


def test_a_cache_is_continued_at_its_width_only() -> None:
    model, ids = hybrid(0), tokens(0, batch=1, length=9)
    options = {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True, **GREEDY}
    output = model.generate(ids, width="ghost", **options)
    options |= {"past_key_values": output.past_key_values, "attention_mask": torch.ones_like(output.sequences)}
    with pytest.raises(ValueError, match="past_key_values: holds the keys of another width"):
        model.generate(output.sequences, width="think", **options)
    assert model.generate(output.sequences, width="ghost", **options).sequences.shape[1] == 9 + 12


def test_the_router_reads_the_prompt_only_and_its_confidence() -> None:
    model, ids = hybrid(2), tokens(2, batch=5)
    spread_router(model)
    widths = model.route(ids)
    assert widths.shape == (5, model.config.num_attention_layers)
    assert set(widths.flatten().tolist()) <= set(model.config.width_levels.values())
    model.generation_config.router_confidence = 1.0  # never sure: always the widest
    assert (model.route(ids) == model.config.hidden_size).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_mode": "guess"}, "exit_mode: 'guess' is unknown; use propagate or verify"),
        ({"exit_threshold": 1.5}, "exit_threshold: 1.5 must be a probability"),
        ({"exit_threshold": -0.1}, "exit_threshold: -0.1 must be a probability"),
        ({"exit_mode": "verify", "exit_layer": -1}, "exit_layer: -1 must be from 0 to"),
        ({"exit_mode": "verify", "exit_layer": 99}, "exit_layer: 99 must be from 0 to"),
        ({"width": "huge"}, "width: unknown level 'huge'"),
        ({"width": 3}, "width: 3 is not possible here; use a multiple of 8 .* the nearest is 8"),
        ({"width": 29}, "width: 29 is not possible here; .* the nearest is 32"),
        ({"expand_threshold": 1.5}, "expand_threshold: 1.5 must be a probability"),
        ({"exit_mode": "verify", "num_beams": 2}, "num_beams: 2 does not go with exit_mode verify"),
        ({"exit_mode": "verify", "expand_threshold": 0.5}, "expand_threshold: does not go with exit_mode verify"),
        ({"exit_mode": "verify", "prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens: is another way"),
        ({"exit_mode": "verify", "output_scores": True}, "output_scores: exit_mode verify has no such output"),
        ({"exit_mode": "verify", "guidance_scale": 1.5}, "guidance_scale: remembers what it saw"),
        (
            {"exit_mode": "verify", "watermarking_config": SynthIDTextWatermarkingConfig(5, [1, 2])},
            "watermarking_config: remembers what it saw",
        ),
        ({"past_key_values": DynamicCache()}, r"past_key_values: .* DynamicCache\(config=model.config\)"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hybrid(0).generate(tokens(0, batch=1), max_new_tokens=1, **options)


def test_verify_needs_a_gate() -> None:
    model = hybrid(0)
    without = hybrid(0, first_exit_layer=model.config.num_hidden_layers - 1)
    with pytest.raises(ValueError, match="exit_mode: verify needs a layer to exit from"):
        without.generate(tokens(0, batch=1), max_new_tokens=1, exit_mode="verify")


def test_expansion_needs_a_gate_before_the_last_attention_layer() -> None:
    kinds = ["full_attention", "linear_attention", "full_attention", "linear_attention"]
    model = hybrid(0, num_hidden_layers=4, layer_types=kinds, first_exit_layer=2)
    with pytest.raises(ValueError, match=r"expand_threshold: needs an exit gate after one of the layers \[1\]"):
        model.generate(tokens(0, batch=1), width="ghost", expand_threshold=0.5, max_new_tokens=1)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """What `generate` warns about, each once."""
    said: list[str] = []
    monkeypatch.setattr(
        decoding_adamba.logger, "warning_once", lambda text: said.append(text) if text not in said else None
    )
    return said


def test_a_width_that_was_never_trained_warns(warnings: list[str]) -> None:
    model, prompt = hybrid(0), tokens(0, batch=1, length=5)
    levels = model.config.width_levels.values()
    step = model.config.width_step
    untrained = next(width for width in range(step, model.config.hidden_size, step) if width not in levels)
    model.generate(prompt, width="ghost", **GREEDY)
    assert not warnings
    for _ in range(2):
        model.generate(prompt, width=untrained, **GREEDY)
    assert len(warnings) == 1 and f"width: {untrained} was never trained" in warnings[0]


def test_exits_without_a_cache_run_in_full_with_a_warning(warnings: list[str]) -> None:
    model, prompt = hybrid(0), tokens(0, batch=1, length=5)
    plain = model.generate(prompt, use_cache=False, **GREEDY)
    assert not warnings
    assert torch.equal(model.generate(prompt, use_cache=False, exit_threshold=0.1, **GREEDY), plain)
    assert len(warnings) == 1 and warnings[0].startswith("use_cache: without a cache no token leaves early")


def test_untrained_gates_and_router_fall_back_with_a_warning(warnings: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    new, prompt = AdambaForCausalLM(hybrid(0).config), tokens(0, batch=2, length=5)
    new.save_pretrained(tmp_path)
    new = AdambaForCausalLM.from_pretrained(tmp_path)  # survives a checkpoint
    plain = new.generate(prompt, **GREEDY)
    for options in (
        {"exit_threshold": 0.1},
        {"exit_mode": "verify"},
        {"width": "think", "expand_threshold": 0.9},
        {"width": "auto"},
    ):
        assert torch.equal(plain, new.generate(prompt, **options, **GREEDY))
        assert (new.last_generation.exit_layers == new.config.num_hidden_layers - 1).all()
    assert [text.split()[0] for text in warnings] == ["exit_threshold,", "width:"]
    assert "need trained exit gates" in warnings[0] and "needs a trained router" in warnings[1]


def test_verify_of_several_rows_decodes_plainly_with_a_warning(warnings: list[str]) -> None:
    model, prompt = hybrid(0), tokens(0, batch=2, length=5)
    plain = model.generate(prompt, **GREEDY)
    assert torch.equal(plain, model.generate(prompt, exit_mode="verify", exit_threshold=0.3, **GREEDY))
    assert model.last_generation.num_drafted == 0
    assert len(warnings) == 1 and "one row of input_ids at a time" in warnings[0]


@pytest.mark.parametrize("option", ["position_ids", "cache_implementation"])
def test_verify_of_what_its_loop_cannot_take_is_plain_too(option: str, warnings: list[str]) -> None:
    model, prompt = hybrid(0), tokens(0, batch=1, length=7)
    value = {"position_ids": torch.tensor([[0, 1, 2, 2, 2, 3, 4]]), "cache_implementation": "static"}[option]
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1]])
    options = {"attention_mask": mask, option: value, **GREEDY}
    plain = model.generate(prompt, **options)
    assert torch.equal(plain, model.generate(prompt, exit_mode="verify", exit_threshold=0.3, **options))
    assert model.last_generation.num_drafted == 0 and len(warnings) == 1


def test_a_static_cache_holds_what_a_growing_one_does() -> None:
    model, ids = hybrid(2), tokens(2, batch=2, length=7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    growing = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(growing, model.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY))


@pytest.mark.parametrize("options", [{"exit_threshold": 0.0}, {"width": "ghost", "expand_threshold": 0.9}], ids=str)
@pytest.mark.parametrize("seen", [0, 6])
def test_a_prompt_of_one_new_token_takes_all_layers(options: dict, seen: int) -> None:
    """Alone it does by our own loop; a batch goes through transformers', where it looks like a generated token."""
    model, ids = hybrid(0), tokens(1, batch=2, length=seen + 1)
    found = []
    for rows in (ids, ids[:1]):
        cache = DynamicCache(config=model.config)
        mask = torch.ones_like(rows)
        if seen:
            known = {key: value for key, value in options.items() if key != "exit_threshold"}
            with torch.no_grad():
                model(rows[:, :-1], past_key_values=cache, use_cache=True, **known)
        output = model.generate(rows, attention_mask=mask, past_key_values=cache, **options, **GREEDY)
        found.append((output[0], model.last_generation.exit_layers[0]))
        assert found[-1][1][0] == model.config.num_hidden_layers - 1
    for together, alone in zip(*found, strict=True):
        assert torch.equal(together, alone)


def test_beams_may_exit_early() -> None:
    model, prompt = hybrid(1), tokens(1, batch=2, length=5)
    plain = model.generate(prompt, num_beams=2, **GREEDY)
    assert torch.equal(plain, model.generate(prompt, num_beams=2, exit_threshold=1.0, **GREEDY))
    assert model.last_generation.exit_layers is None
    assert model.generate(prompt, num_beams=2, exit_threshold=0.5, **GREEDY).shape == plain.shape


@pytest.mark.parametrize("answers", [1, 2])
def test_a_mixed_batch_returns_what_was_asked_for(answers: int) -> None:
    """Sequences, scores and exits of rows that are routed apart come back in the batch's order."""
    model, ids = hybrid(0), tokens(0, batch=4, length=9)
    spread_router(model)
    options = {"width": "auto", "exit_threshold": 0.5, "return_dict_in_generate": True, "output_scores": True}
    options |= {"max_new_tokens": 6, "do_sample": answers > 1, "top_k": 1, "num_return_sequences": answers}
    together = model.generate(ids, **options)
    trace = model.last_generation
    assert len({tuple(widths) for widths in trace.widths}) > 1, "the test needs rows that are routed apart"
    assert trace.exit_layers.shape == (4 * answers, 6)
    assert len(together.scores) == 6 and together.scores[0].shape == (4 * answers, model.config.vocab_size)
    for row in range(4):
        alone = model.generate(ids[row : row + 1], **options)
        for answer in range(answers):
            place = row * answers + answer
            assert torch.equal(alone.sequences[answer], together.sequences[place])
            assert torch.equal(model.last_generation.exit_layers[answer], trace.exit_layers[place])
            scores = torch.stack([step[place] for step in together.scores])
            torch.testing.assert_close(scores, torch.stack([step[answer] for step in alone.scores]))


def test_every_option_survives_a_checkpoint(tmp_path: Path) -> None:
    model, chosen = hybrid(1), {"width": "ghost", "exit_threshold": 0.5, "exit_mode": "verify", "exit_layer": 1}
    chosen |= {"expand_threshold": 0.25, "router_confidence": 0.75}
    for key, value in chosen.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(tmp_path)
    loaded = AdambaForCausalLM.from_pretrained(tmp_path).generation_config
    assert {key: getattr(loaded, key) for key in chosen} == chosen


def test_options_live_in_the_generation_config(tmp_path: Path) -> None:
    model, prompt = hybrid(1), tokens(1, length=6)
    model.generation_config.width = "ghost"
    model.generation_config.exit_threshold = 0.5
    model.save_pretrained(tmp_path)
    loaded = AdambaForCausalLM.from_pretrained(tmp_path)
    assert (loaded.generation_config.width, loaded.generation_config.exit_threshold) == ("ghost", 0.5)
    by_config = loaded.generate(prompt, **GREEDY)
    trace = loaded.last_generation
    assert trace.widths == [loaded.config.width_levels["ghost"]] * loaded.config.num_attention_layers
    assert (trace.exit_layers < loaded.config.num_hidden_layers - 1).any(), "no token left early"
    plain = hybrid(1)
    assert torch.equal(by_config, plain.generate(prompt, width="ghost", exit_threshold=0.5, **GREEDY))
    full = loaded.generate(prompt, width="think", exit_threshold=1.0, **GREEDY)
    assert torch.equal(full, plain.generate(prompt, **GREEDY)), "what the call says wins"
    shorter = GenerationConfig(max_new_tokens=3, do_sample=False, width="think")
    loaded.generate(prompt, generation_config=shorter)
    assert loaded.last_generation.widths == [loaded.config.hidden_size] * loaded.config.num_attention_layers
    assert (loaded.last_generation.exit_layers < loaded.config.num_hidden_layers - 1).any(), "its threshold was lost"


def test_the_trace_of_early_exits() -> None:
    model, prompt = hybrid(2), tokens(2, batch=3, length=6)
    model.generate(prompt, exit_threshold=0.5, **GREEDY)
    trace, last = model.last_generation, model.config.num_hidden_layers - 1
    assert trace.num_layers == model.config.num_hidden_layers
    assert trace.exit_layers.shape == (3, GREEDY["max_new_tokens"])
    assert (trace.exit_layers[:, 0] == last).all(), "the first token comes from the prompt's full pass"
    assert set(trace.exit_layers.unique().tolist()) <= {*model.config.gate_layers, last}
    assert trace.num_drafted == trace.num_accepted == 0


def test_the_trace_of_verified_drafts() -> None:
    model, prompt = hybrid(2), tokens(2, batch=1, length=6)
    layer = model.config.gate_layers[0]
    options = {"exit_mode": "verify", "exit_layer": layer, "exit_threshold": 0.0}  # a draft goes on whatever gates say
    sequence = model.generate(prompt, do_sample=False, max_new_tokens=12, **options)
    trace = model.last_generation
    assert trace.exit_layers.shape == (1, sequence.shape[1] - prompt.shape[1])
    assert int((trace.exit_layers == layer).sum()) == trace.num_accepted <= trace.num_drafted
    assert trace.num_drafted > 0
