"""What surgery refuses: shapes that cannot be, sliced checkpoints, foreign bases, a result that is not the same."""

import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from adamba.bases import BASES
from adamba.surgery import (
    SurgeryError,
    check,
    compare,
    expand_width,
    insert_mamba,
    slice_width,
    sort_by_importance,
)
from models import dense_base, hybrid, tokens


@pytest.mark.parametrize("seed", range(6))
def test_an_impossible_expansion_names_what_would_work(seed: int) -> None:
    model = hybrid(seed)
    config = model.config
    size = config.hidden_size + config.head_dim // 2
    with pytest.raises(ValueError, match=rf"hidden_size: {size} would need .*; use a multiple of \d+$") as error:
        expand_width(model, size)
    step = int(re.search(r"\d+$", str(error.value))[0])
    good = (config.hidden_size // step + 1) * step
    assert expand_width(model, good).config.hidden_size == good
    for width in (config.hidden_size, config.hidden_size - step, 0):
        with pytest.raises(ValueError, match=f"hidden_size: {width} must be above the present {config.hidden_size}"):
            expand_width(model, width)


def test_impossible_levels_of_the_wider_model() -> None:
    model = hybrid(1)
    wide = model.config.hidden_size * 2
    with pytest.raises(ValueError, match=f"width_levels: .* must differ and end at hidden_size = {wide}"):
        expand_width(model, wide, {"ghost": model.config.width_step})
    with pytest.raises(ValueError, match="width_levels: 3 must be a multiple of"):
        expand_width(model, wide, {"ghost": 3, "think": wide})


def test_more_levels_than_before_leave_a_router_that_fits() -> None:
    model = hybrid(1)
    wide = model.config.hidden_size * 2
    levels = {**model.config.width_levels, "wide": wide}
    expanded = expand_width(model, wide, levels)
    assert expanded.model.router.num_levels == 4
    assert expanded.route(tokens(0)).shape == (2, model.config.num_attention_layers)


def test_a_sliced_checkpoint_is_neither_expanded_nor_sorted() -> None:
    sliced = slice_width(hybrid(0), "normal")
    with pytest.raises(ValueError, match="expand: this checkpoint was sliced; expand the elastic one"):
        expand_width(sliced, sliced.config.hidden_size * 2)
    with pytest.raises(ValueError, match="sort_by_importance: this checkpoint was sliced; sort the elastic one"):
        sort_by_importance(sliced, [tokens(0)])
    again = slice_width(sliced, "ghost")
    torch.testing.assert_close(again(tokens(0)).logits, hybrid(0)(tokens(0), width="ghost").logits, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="width: .* is not possible here"):
        slice_width(sliced, sliced.config.hidden_size)


def test_a_slice_forgets_a_width_that_was_chosen_for_the_whole() -> None:
    model = hybrid(0)
    for chosen, kept in ((model.config.hidden_size, None), ("think", None), ("auto", "auto"), (None, None)):
        model.generation_config.width = chosen
        sliced = slice_width(model, "ghost")
        assert sliced.generation_config.width == kept and model.generation_config.width == chosen
        expected = model.generate(tokens(0, length=5), width="ghost", max_new_tokens=3, do_sample=False)
        if chosen != "auto":
            assert torch.equal(sliced.generate(tokens(0, length=5), max_new_tokens=3, do_sample=False), expected)


def test_sorting_needs_a_batch() -> None:
    with pytest.raises(ValueError, match="sort_by_importance: no calibration batch was given"):
        sort_by_importance(hybrid(0), [])


def test_an_unsupported_base_gets_one_clear_line() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError) as error:
        insert_mamba(model)
    bases = ", ".join(f"{base.name} ({kind!r})" for kind, base in BASES.items())
    assert str(error.value) == f"model_type: 'gpt2' is not a supported base; use {bases}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"every": 0}, "mamba_every: 0 must be at least 1"),
        ({"hidden_size": 128}, "hidden_size: 128 does not fit the base, whose weights need 64"),
        ({"num_key_value_heads": 8}, "num_key_value_heads: 8 does not fit the base"),
        ({"qk_norm": "after_rope"}, "qk_norm: 'after_rope' does not fit the base, whose weights need 'before_rope'"),
        ({"mamba_head_dim": 7}, "mamba_head_dim: 7 must divide"),
        ({"width_levels": {"a": 8, "b": 64}}, "width_levels: 8 must be a multiple of 16"),
    ],
)
def test_settings_that_do_not_fit_the_base(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        insert_mamba(dense_base("qwen3"), **overrides)


def test_every_other_layer() -> None:
    dense = dense_base("smollm3", num_hidden_layers=5)
    model = insert_mamba(dense, every=2)
    kinds = [
        "A" if kind.endswith(("full_attention", "sliding_attention")) else "M" for kind in model.config.layer_types
    ]
    assert "".join(kinds) == "AAMAAMA"
    assert [model.config.rope_layers[index] for index, kind in enumerate(kinds) if kind == "A"] == list(
        dense.config.no_rope_layers
    )
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(0)).logits, dense(tokens(0)).logits, rtol=0, atol=1e-4)


def test_the_generation_config_is_a_copy() -> None:
    model = hybrid(0)
    wide = expand_width(model, model.config.hidden_size * 2)
    wide.generation_config.max_new_tokens = 7
    assert model.generation_config.max_new_tokens != 7


# Verification


def test_an_exact_surgery_passes() -> None:
    model = hybrid(1)
    wide = expand_width(model, model.config.hidden_size * 2)
    widths = list(model.config.width_levels.values())
    metrics = check(compare(model, wide, tokens(0), widths))
    assert {f"max_abs_logit_diff_width_{width}" for width in widths} <= metrics.keys()
    assert metrics["max_abs_logit_diff"] == max(metrics[f"max_abs_logit_diff_width_{width}"] for width in widths)
    assert metrics["loss_after"] == pytest.approx(metrics["loss_before"], abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_one_wrong_weight_is_seen(seed: int) -> None:
    model = hybrid(seed)
    wide = expand_width(model, model.config.hidden_size * 2)
    widths = list(model.config.width_levels.values())
    with torch.no_grad():
        wide.model.layers[0].mlp.down_proj.weight[0, 0] += 0.5
    with pytest.raises(SurgeryError, match=rf"surgery: width {widths[0]}: logits differ by .* > 0.0001"):
        check(compare(model, wide, tokens(seed), widths))


def test_a_fault_at_one_width_only_is_seen() -> None:
    model, broken = hybrid(1), hybrid(1)
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, -1] += 0.5  # the last unit works at full width only
    *smaller, full = model.config.width_levels.values()
    assert check(compare(model, broken, tokens(1), smaller))["max_abs_logit_diff"] == 0
    with pytest.raises(SurgeryError, match=f"surgery: width {full}: logits differ"):
        check(compare(model, broken, tokens(1), [*smaller, full]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_never_the_same(value: float) -> None:
    model, broken = hybrid(1), hybrid(1)
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = value
    for before, after in ((model, broken), (broken, model), (broken, broken)):
        with pytest.raises(SurgeryError, match="full width: logits differ by nan"):
            check(compare(before, after, tokens(0), [None]))


def test_another_argmax_is_refused_within_the_tolerance() -> None:
    class Constant:
        def __init__(self, *logits: float):
            self.logits = torch.tensor(logits).expand(2, 19, 2)

        def __call__(self, **_):
            return self

    comparisons = compare(Constant(0.0, 1e-5), Constant(1e-5, 0.0), tokens(0).clamp(max=1), [None])
    with pytest.raises(SurgeryError, match="full width: another token became the most likely one"):
        check(comparisons)
