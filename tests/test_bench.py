"""The arithmetic of the benches: what counts as a regression, a slope, an MFU. Nothing is timed against a limit."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/ by name, and forgets it and its neighbours afterwards."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    names = {path.stem for path in (ROOT / "bench").glob("*.py")}
    before = names & sys.modules.keys()

    def load(name: str):
        module = __import__(name)
        assert Path(module.__file__).parent == ROOT / "bench"
        return module

    yield load
    for name in names - before:
        sys.modules.pop(name, None)


def test_a_ratio_beyond_the_noise_is_a_regression(bench):
    quick = bench("quick")
    steady = quick.summarise("steady", "group", [2.0, 2.01, 1.99, 2.0, 2.0])
    noisy = quick.summarise("noisy", "group", [1.6, 2.4, 2.0, 1.8, 2.2])
    assert steady["ratio"] == pytest.approx(2.0, rel=1e-3) and noisy["log_deviation"] > steady["log_deviation"]
    stored = {"steady": steady, "noisy": noisy}
    assert quick.regressions(stored, {"steady": 1.9, "noisy": 1.5}) == {}
    assert quick.regressions(stored, {"steady": 5.0, "noisy": 5.0}) == {}
    assert list(quick.regressions(stored, {"steady": 1.5, "noisy": 1.5})) == ["steady"]
    assert list(quick.regressions(stored, {"steady": 2.0, "noisy": 0.9})) == ["noisy"]
    assert list(quick.regressions(stored, {"steady": float("nan"), "noisy": 2.0})) == ["steady"]


def test_a_case_that_cannot_be_compared_is_named(bench):
    quick = bench("quick")
    stored = {"old": quick.summarise("old", "group", [1.0, 1.1])}
    wrong = quick.regressions(stored, {"new": 1.0})
    assert set(wrong) == {"old", "new"} and "--store" in wrong["new"]


def test_every_stored_ratio_belongs_to_a_group_that_is_measured(bench):
    import json

    quick = bench("quick")
    rows = json.loads((ROOT / "bench/results/quick.json").read_text())["rows"]
    assert {row["group"] for row in rows} == set(quick.GROUPS)


def test_slopes_of_powers(bench):
    slope = bench("growth_cost").slope
    assert slope({256: 1.0, 512: 2.0, 1024: 4.0}) == pytest.approx(1.0)
    assert slope({256: 3.0, 512: 12.0, 2048: 192.0}) == pytest.approx(2.0)
    assert slope({1: 5.0, 2: 5.0}) == pytest.approx(0.0)


def test_twin_without_widths_computes_the_same(bench):
    import torch

    training = bench("training_step")
    model = training.build("adamba", 64, 2)
    twin = training.plain_twin(model)
    ids = training.token_ids(64, 16, 32)
    torch.testing.assert_close(twin(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    changed = [type(module) for module in twin.modules() if type(module) in training.PLAIN]
    assert not changed and any(type(module) in training.PLAIN.values() for module in twin.modules())


def test_peers_are_of_one_size(bench):
    training = bench("training_step")
    sizes = {kind: training.trained(training.build(kind, 128, 2)) for kind in training.KINDS}
    assert max(sizes.values()) < 1.03 * min(sizes.values()), sizes


def test_mfu_is_model_flops_over_the_rated_speed(bench, monkeypatch):
    gpu = bench("gpu")
    phase = next(phase for phase in gpu.read_plan(ROOT / "recipes/tiny") if phase.name == "phase1")
    monkeypatch.setattr(gpu, "flops_per_second", lambda phase, num_steps: 4e14)
    row = gpu.measure(gpu.on_one_gpu(phase, 128, tokens=512), rated=1e15, num_steps=2)
    assert row["mfu"] == pytest.approx(0.4) and row["rows"] == 4
    assert 0.2 < row["mfu_by_document"] < 0.4  # scores inside a quarter of the row
    assert row["tokens_per_second"] * gpu.on_one_gpu(phase, 128).flops_per_token == pytest.approx(4e14)
    monkeypatch.undo()


def test_gpu_report_runs_at_tiny_size_and_layers_shrink_to_fit(bench):
    gpu = bench("gpu")
    phases = {phase.name: phase for phase in gpu.read_plan(ROOT / "recipes/tiny")}
    row = gpu.measure(gpu.on_one_gpu(phases["phase2"], 64, tokens=128), rated=1e15, num_steps=1)
    assert 0 < row["mfu"] < 1 and row["layers"] == phases["phase2"].config.num_hidden_layers
    full = next(phase for phase in gpu.read_plan(ROOT / "recipes") if phase.name == "phase5")
    small, large = (gpu.as_fits(gpu.on_one_gpu(full, 2048), memory) for memory in (80.0, 140.0))
    assert 2 <= small.config.num_hidden_layers < large.config.num_hidden_layers
    assert sum(gpu.memory_gib(large).values()) <= 140.0
    small = next(phase for phase in gpu.read_plan(ROOT / "recipes/smollm2") if phase.name == "phase1")
    filled = gpu.as_fits(gpu.on_one_gpu(small, 2048), 140.0)
    assert filled.config.num_hidden_layers == small.config.num_hidden_layers
    assert filled.values["per_device_train_batch_size"] == 32  # 64 would not fit
