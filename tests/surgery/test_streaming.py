"""From disk to disk, a surgery writes the very files that it writes from memory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from adamba.model import AdambaForCausalLM
from adamba.surgery import SurgeryError, check, compare, expansion, insertion, slicing, streaming
from adamba.surgery.fetching import Together, attach
from adamba.surgery.rules import Surgery, apply, empty_model
from adamba.surgery.streaming import Weights, empty_from_folder, num_weight_bytes, stream
from models import BASES, dense_base, hybrid, tokens


def operate(surgery: Surgery, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Both ways, from the checkpoint in `folder / "old"`; every file must be the same. Returns the one in memory."""
    model.save_pretrained(folder / "old")
    old = Weights(folder / "old", model.dtype)
    before = empty_from_folder(folder / "old")
    old.check(before)
    written = stream(surgery, before, old, folder / "streamed")
    new = apply(surgery, model)
    new.save_pretrained(folder / "memory")
    assert num_weight_bytes(written, model.dtype) == sum(
        tensor.nbytes for tensor in load_file(folder / "memory/model.safetensors").values()
    )
    names = sorted(path.relative_to(folder / "memory") for path in (folder / "memory").rglob("*") if path.is_file())
    assert names == sorted(p.relative_to(folder / "streamed") for p in (folder / "streamed").rglob("*") if p.is_file())
    for name in names:
        assert (folder / "streamed" / name).read_bytes() == (folder / "memory" / name).read_bytes(), name
    return new


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BASES)
def test_every_base_gives_the_same_files_as_in_memory(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dense = dense_base(kind, dtype=dtype)
    levels = {"ghost": 16, "think": 64}
    inserted = operate(insertion(dense.config, dense.state_dict(), width_levels=levels), dense, tmp_path / "insert")
    wide = operate(expansion(inserted.config, 80), inserted, tmp_path / "expand")
    operate(slicing(wide.config, "ghost"), wide, tmp_path / "slice")


def test_shards_hold_what_one_file_holds_and_are_verified_layer_by_layer(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(streaming, "SHARD_SIZE", "50KB")
    model = hybrid(3, tie_word_embeddings=True)
    model.generation_config.exit_threshold = 0.9
    model.save_pretrained(tmp_path / "old", max_shard_size="50KB")
    old, before = Weights(tmp_path / "old", torch.float32), empty_from_folder(tmp_path / "old")
    surgery = expansion(model.config, 2 * model.config.hidden_size)
    written = stream(surgery, before, old, tmp_path / "new")
    shards = sorted((tmp_path / "new").glob("model-*.safetensors"))
    assert len(shards) > 3 and not (tmp_path / "new/model.safetensors").exists()
    apply(surgery, model).save_pretrained(tmp_path / "memory", max_shard_size="50KB")
    expected = sorted(path for path in (tmp_path / "memory").iterdir() if path.is_file())
    assert [path.name for path in expected] == sorted(path.name for path in (tmp_path / "new").iterdir())
    for path in expected:
        assert (tmp_path / "new" / path.name).read_bytes() == path.read_bytes(), path.name
    index = json.loads((tmp_path / "new/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == written.num_parameters()
    loaded, info = AdambaForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not info["missing_keys"] and loaded.generation_config.exit_threshold == 0.9

    widths = list(model.config.width_levels.values())
    together = Together(len(widths))
    attach(before, old, together)
    after = attach(empty_model(surgery.config), Weights(tmp_path / "new", torch.float32), together)
    layers = [(before.model.layers[i], after.model.layers[j]) for i, j in surgery.layers]
    metrics = check(compare(before, after, tokens(1), widths, layers, together))
    assert metrics["max_abs_logit_diff"] <= 1e-4
    assert sum(key.startswith("max_state_diff_layer_") for key in metrics) == model.config.num_hidden_layers
    expected_logits = model(tokens(1), width=widths[0]).logits
    torch.testing.assert_close(after(tokens(1), width=widths[0]).logits, expected_logits, rtol=0, atol=1e-4)
    assert all(parameter.device.type == "meta" for parameter in after.parameters()), "no weight stays in memory"


def test_the_first_wrong_layer_is_named(tmp_path: Path) -> None:
    model = hybrid(1)
    surgery = expansion(model.config, 2 * model.config.hidden_size)
    wide = apply(surgery, model)
    with torch.no_grad():
        wide.model.layers[2].mlp.down_proj.weight[-1, 0] = 0.5  # writes into a channel that only the new model has
    layers = [(model.model.layers[i], wide.model.layers[j]) for i, j in surgery.layers]
    with pytest.raises(SurgeryError, match="surgery: full width: states differ from layer 2 on, by"):
        check(compare(model, wide, tokens(1), [None], layers))


def test_rotary_tables_of_an_old_checkpoint_are_passed_over(tmp_path: Path) -> None:
    model = dense_base("llama")
    model.save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(load_file(path) | {name: torch.ones(4)}, path, metadata={"format": "pt"})
    weights = Weights(tmp_path, torch.float32)
    weights.check(empty_from_folder(tmp_path))
    assert set(weights) == set(model.state_dict())


def test_a_head_is_the_embedding_only_where_they_are_tied(tmp_path: Path) -> None:
    model = dense_base("llama", tie_word_embeddings=True)
    assert empty_model(model.config).num_parameters() == model.num_parameters()
    model.save_pretrained(tmp_path)
    Weights(tmp_path, torch.float32).check(empty_from_folder(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"1 missing weights, first lm_head\.weight"):
        Weights(tmp_path, torch.float32).check(empty_from_folder(tmp_path))


def test_what_cannot_be_read_is_named_before_anything_is_written(tmp_path: Path) -> None:
    model = hybrid(0)
    with pytest.raises(ValueError, match="no safetensors in it"):
        Weights(tmp_path, torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    before = empty_from_folder(tmp_path)
    Weights(tmp_path, torch.float32).check(before)
    with pytest.raises(ValueError, match=r"weights, first .*"):
        Weights(tmp_path, torch.float32).check(empty_model(hybrid(0, num_hidden_layers=3, layer_types=None).config))
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=rf"{shard.name}: .*; truncated or overwritten"):
        Weights(tmp_path, torch.float32).check(before)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: missing; the checkpoint is incomplete"):
        Weights(tmp_path, torch.float32)
