"""Models of a run: what is trained is what its checkpoint loads as."""

from pathlib import Path

import pytest
import torch

from adamba.errors import UserError
from adamba.loading import ModelArguments, check_reference, load_checkpoint, load_model, load_model_and_tokenizer
from models import hybrid, shake, tokens
from tiny_runs import save_base

LLAMA = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.mark.parametrize(
    "sizes", [{"depth": 2}, {"model_config": LLAMA | {"hidden_size": 64}}], ids=["hybrid", "llama"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_new_model_computes_what_its_checkpoint_does(sizes: dict, dtype: str, tmp_path: Path) -> None:
    model = shake(load_model(ModelArguments(**sizes, dtype=dtype), vocab_size=97), seed=0)
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}
    model.save_pretrained(tmp_path)
    ids = tokens(0, batch=1, length=900)  # far places: angles are rounded relative to their size
    assert torch.equal(load_checkpoint(str(tmp_path), dtype).eval()(ids).logits, model(ids).logits)


def test_a_base_keeps_its_other_ends(tmp_path: Path) -> None:
    model = save_base(tmp_path)
    _, tokenizer = load_model_and_tokenizer(ModelArguments(str(tmp_path)))
    own = tokenizer.eos_token_id
    for ends, kept in (([own, 5], [own, 5]), ([5, 6], own), (5, own), (None, own)):
        model.generation_config.eos_token_id = ends
        model.save_pretrained(tmp_path)
        loaded, _ = load_model_and_tokenizer(ModelArguments(str(tmp_path)))
        assert loaded.generation_config.eos_token_id == kept and loaded.config.eos_token_id == own


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_broken_config_is_named(name: str, tmp_path: Path) -> None:
    """transformers replaces a generation config that it cannot read: ends and exits would be lost in silence."""
    hybrid(0).save_pretrained(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match=f"{name}: not valid JSON"):
        load_checkpoint(str(tmp_path))


def test_a_model_with_new_rows_is_no_longer_its_checkpoint(tmp_path: Path) -> None:
    """TRL would load a reference without these rows, which fails at the first chat token."""
    size = save_base(tmp_path).config.vocab_size
    args = ModelArguments(str(tmp_path), add_chat_tokens=True)
    check_reference(load_model(args, vocab_size=size))
    with pytest.raises(UserError, match="model_name_or_path: .* has no checkpoint to load the frozen reference from"):
        check_reference(load_model(args, vocab_size=size + 2))
