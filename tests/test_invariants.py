"""The heart: what must always hold (DESIGN section 5), over many small random models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adamba.model import AdambaForCausalLM
from adamba.surgery import expand_width, insert_mamba, slice_width, sort_by_importance
from models import BASES, dense_base, hybrid, tokens

TOLERANCE = 1e-4
SEEDS = range(8)
DTYPES = [torch.float32, torch.float64]


def logits(model, input_ids, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False, **options).logits


def assert_same(first: torch.Tensor, second: torch.Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=TOLERANCE)


def levels(model: AdambaForCausalLM) -> list[int]:
    return list(model.config.width_levels.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BASES)
def test_1_inserting_mamba_keeps_the_base(kind: str, dtype: torch.dtype) -> None:
    dense = dense_base(kind, dtype=dtype)
    model = insert_mamba(dense)
    assert "linear_attention" in model.config.layer_types
    assert_same(logits(dense, tokens(0)), logits(model, tokens(0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_2_expansion_keeps_every_width(seed: int, dtype: torch.dtype) -> None:
    narrow = hybrid(seed, dtype)
    size = narrow.config.hidden_size
    once = expand_width(narrow, size * 5 // 4, seed=seed)
    twice = expand_width(once, size * 2, seed=seed + 1)
    assert twice.config.norm_base_width == size
    for width in levels(narrow):
        before = logits(narrow, tokens(seed), width=width)
        assert before.std() > 0.1
        assert_same(before, logits(once, tokens(seed), width=width))
        assert_same(before, logits(twice, tokens(seed), width=width))
    assert_same(logits(narrow, tokens(seed)), logits(twice, tokens(seed)))


@pytest.mark.parametrize("kind", BASES)
def test_2_expansion_keeps_every_base(kind: str) -> None:
    dense = dense_base(kind)
    wide = expand_width(expand_width(insert_mamba(dense), 80), 128)
    assert_same(logits(dense, tokens(1)), logits(wide, tokens(1)))


@pytest.mark.parametrize("seed", SEEDS)
def test_2_gradient_reaches_every_new_weight_within_two_steps(seed: int) -> None:
    narrow = hybrid(seed)
    wide = expand_width(narrow, narrow.config.hidden_size * 2).train()
    reached: dict[str, torch.Tensor] = {}
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.05)
    for step in range(2):
        ids = tokens(step, batch=6, length=24)
        wide(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in wide.named_parameters():
            if parameter.grad is not None:
                reached[name] = reached.get(name, 0) + parameter.grad.abs()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in wide.named_parameters():
        if any(part in name for part in ("exit_gates", "router", "embed_tokens", "k_proj.bias")):
            continue  # gates and router have their own losses; unseen tokens and key biases have no gradient
        dead = (reached[name] == 0).float().mean().item()
        assert dead < 0.05, f"{name}: {dead:.0%} of {tuple(parameter.shape)} got no gradient"


@pytest.mark.parametrize("seed", SEEDS)
def test_3_sorting_keeps_full_width_and_moves_channels(seed: int) -> None:
    model = hybrid(seed)
    before = logits(model, tokens(seed))
    weights = model.model.layers[0].mlp.up_proj.weight.clone()
    sort_by_importance(model, [tokens(seed + 1)])
    assert not torch.equal(weights, model.model.layers[0].mlp.up_proj.weight)
    assert_same(before, logits(model, tokens(seed)))


@pytest.mark.parametrize("seed", SEEDS)
def test_4_a_slice_equals_the_elastic_model_at_its_width(seed: int) -> None:
    model = hybrid(seed)
    half, full = model.config.width_levels["normal"], model.config.hidden_size
    mixed = [half if index % 2 else full for index in range(model.config.num_attention_layers)]
    for width in [*levels(model), mixed]:
        small = slice_width(model, width)
        assert_same(logits(model, tokens(seed), width=width), logits(small, tokens(seed)))
        if width != full:
            assert small.num_parameters() < model.num_parameters()
            assert not any(tensor.storage_offset() for tensor in small.state_dict().values())


@pytest.mark.parametrize("seed", SEEDS)
def test_5_cached_steps_equal_the_full_forward(seed: int) -> None:
    model, ids = hybrid(seed), tokens(seed)
    for width in levels(model):
        expected, cache, parts = logits(model, ids, width=width), None, []
        for part in ids.split([3, 9, 1, 1, 5], dim=1):  # crosses chunk boundaries, steps of one and of several
            with torch.no_grad():
                output = model(input_ids=part, past_key_values=cache, use_cache=True, width=width)
            cache = output.past_key_values
            parts.append(output.logits)
        assert_same(expected, torch.cat(parts, dim=1))


@pytest.mark.parametrize("seed", SEEDS)
def test_5_early_exit_leaves_the_cache_whole(seed: int) -> None:
    """Decoding with exits, row by row, equals one forward in which each token is frozen after the same layer."""
    model, ids = hybrid(seed), tokens(seed, batch=4, length=24)
    prompt = 6
    with torch.no_grad():
        cache = model(input_ids=ids[:, :prompt], use_cache=True).past_key_values
        parts, exits = [], [torch.full((4, prompt), model.config.num_hidden_layers - 1)]
        for position in range(prompt, ids.shape[1]):
            output = model(
                input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True, exit_threshold=0.5
            )
            parts.append(output.logits)
            exits.append(output.exit_layers)
    exit_layers = torch.cat(exits, dim=1)
    assert len(exit_layers[:, prompt:].unique()) > 1, "the test needs tokens that exit at different layers"
    expected = logits(model, ids, exit_layers=exit_layers)[:, prompt:]
    assert_same(expected, torch.cat(parts, dim=1))


@pytest.mark.parametrize("seed", SEEDS)
def test_6_left_padding_changes_nothing(seed: int) -> None:
    model, ids = hybrid(seed), tokens(seed, batch=3)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :1] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for width in levels(model):
        batch = logits(model, ids, attention_mask=mask, position_ids=positions, width=width)
        for row in range(3):
            alone = logits(model, ids[row : row + 1, mask[row].bool()], width=width)
            assert_same(alone[0], batch[row, mask[row].bool()])


@pytest.mark.parametrize("seed", SEEDS)
def test_6_left_padded_generation_equals_each_row_alone(seed: int) -> None:
    model, ids = hybrid(seed), tokens(seed, batch=3)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :1] = 0, 0
    ids = ids.masked_fill(mask == 0, 0)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for row in range(3):
        prompt = ids[row : row + 1, mask[row].bool()]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        assert torch.equal(alone[0, prompt.shape[1] :], together[row, ids.shape[1] :])


@pytest.mark.parametrize("seed", SEEDS)
def test_7_packed_documents_do_not_see_each_other(seed: int) -> None:
    model, ids = hybrid(seed), tokens(seed, batch=2, length=24)
    lengths = [[5, 12, 7], [1, 20, 3]]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    for width in levels(model):
        packed = logits(model, ids, position_ids=positions, width=width)
        for row, row_lengths in enumerate(lengths):
            start = 0
            for length in row_lengths:
                alone = logits(model, ids[row : row + 1, start : start + length], width=width)
                assert_same(alone[0], packed[row, start : start + length])
                start += length


@pytest.mark.parametrize("seed", SEEDS)
def test_8_threshold_one_never_exits(seed: int) -> None:
    model, prompt = hybrid(seed), tokens(seed, batch=2, length=6)
    for gate in model.model.exit_gates.values():
        gate.down_proj.bias.data.fill_(1e4)  # even a gate that is always sure
    plain = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(plain, model.generate(prompt, max_new_tokens=8, do_sample=False, exit_threshold=1.0))
    assert (model.last_generation.exit_layers == model.config.num_hidden_layers - 1).all()


@pytest.mark.parametrize("threshold", [None, 0.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_8_verify_is_lossless(seed: int, threshold: float | None) -> None:
    """Token for token the greedy full depth, for every exit layer, with and without the gate ending drafts."""
    model, prompt = hybrid(seed), tokens(seed, batch=1, length=7)
    plain = model.generate(prompt, max_new_tokens=14, do_sample=False)
    for layer in range(model.config.num_hidden_layers - 1):
        options = {"exit_mode": "verify", "exit_layer": layer, "exit_threshold": threshold}
        assert torch.equal(plain, model.generate(prompt, max_new_tokens=14, do_sample=False, **options))


def test_8_verify_keeps_the_sampling_distribution() -> None:
    """Two-token continuations, sampled 3,000 times each way, have the same frequencies (chi-square, 1 % level)."""
    model = hybrid(3, vocab_size=5, tie_word_embeddings=False, pad_token_id=None)
    prompt = torch.tensor([[3, 4, 2]])
    counts = {}
    for name, options in {
        "plain": {},
        "verify": {"exit_mode": "verify", "exit_layer": 1, "exit_threshold": 0.0},
    }.items():
        torch.manual_seed(0)
        pairs = [
            model.generate(prompt, max_new_tokens=3, do_sample=True, top_k=0, **options)[0, 4:].tolist()
            for _ in range(1000)
        ]
        assert name == "plain" or model.last_generation.num_drafted > 0
        counts[name] = torch.bincount(torch.tensor([first * 5 + second for first, second in pairs]), minlength=25)
    plain, verify = counts["plain"].double(), counts["verify"].double()
    used = plain + verify >= 10
    statistic = ((plain - verify)[used] ** 2 / (plain + verify)[used]).sum().item()
    degrees = int(used.sum()) - 1
    assert statistic < degrees + 2.33 * (2 * degrees) ** 0.5 + 4


LOADER = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert ("adamba" in sys.modules) == (sys.argv[3] == "installed"), "wrong code was loaded"
ids = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save({w: model(ids, width=w, use_cache=False).logits for w in model.config.width_levels}, sys.argv[2])
"""


@pytest.mark.parametrize("package", ["installed", "absent"])
def test_9_a_saved_model_loads_in_a_fresh_process(package: str, tmp_path: Path) -> None:
    model, ids = hybrid(1), tokens(1)
    model.save_pretrained(tmp_path / "model")
    exchange = tmp_path / "exchange.pt"
    torch.save(ids, exchange)
    source = str(Path(__file__).parents[1] / "src")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": source}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums of other lengths are rounded otherwise
    script = "import adamba.model\n" + LOADER
    if package == "absent":
        # A finder that refuses the package, wherever it is installed.
        script = "import sys\nsys.modules['adamba'] = None\ndel sys.modules['adamba']\n"
        script += "class Absent:\n    def find_spec(self, name, path=None, target=None):\n"
        script += "        if name.split('.')[0] == 'adamba': raise ModuleNotFoundError(name)\n"
        script += "sys.meta_path.insert(0, Absent())\n" + LOADER
    arguments = [str(tmp_path / "model"), str(exchange), package]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, env=environment, timeout=120)
    loaded = torch.load(exchange, weights_only=True)
    for width, expected in loaded.items():
        torch.testing.assert_close(logits(model, ids, width=width), expected, rtol=0, atol=1e-6)
