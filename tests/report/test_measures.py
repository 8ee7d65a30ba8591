"""Numbers derived from the metrics."""

import json
import shutil
from pathlib import Path

import pytest

from adamba.report import Family, Phase, read_family
from adamba.report.measures import (
    best_saving,
    compute_curve,
    gate_bins,
    headline,
    log_curve,
    main_loss,
    percent,
    points,
    smooth,
    step_curve,
    surgery_rows,
    width_curves,
    wilson_interval,
)
from adamba.report.pictures import loss_against_compute
from adamba.report.style import LIGHT


@pytest.mark.parametrize(
    ("rate", "count", "low", "high"),
    [(0.5, 100, 0.4038, 0.5962), (1.0, 300, 0.9874, 1.0), (0.0, 300, 0.0, 0.0126), (0.1, 10, 0.0179, 0.4042)],
)
def test_wilson_interval_against_published_values(rate: float, count: int, low: float, high: float) -> None:
    assert wilson_interval(rate, count) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_needs_trials() -> None:
    with pytest.raises(ValueError, match="count=0"):
        wilson_interval(0.5, 0)


def test_compute_curve_pairs_value_and_flops_of_the_same_width() -> None:
    metrics = {
        "eval_loss_width_64": 2.0,
        "eval_loss_width_128": 1.5,
        "eval_loss_width_96": 1.7,
        "eval_loss_width_64_calculator": 9.0,
        "flops_per_token_width_64": 1e6,
        "flops_per_token_width_128": 3e6,
    }
    curve = compute_curve(
        Phase("phase2", Path("."), metrics=metrics, width_names={128: "think"}), "eval_loss", "width"
    )
    assert [(point.x, point.y, point.label) for point in curve] == [(1e6, 2.0, "64"), (3e6, 1.5, "think")]


def test_widths_that_nobody_has_trained_do_not_set_the_scale() -> None:
    def measured(name: str, narrow: float) -> Phase:
        metrics = {"eval_loss_width_64": narrow, "eval_loss_width_128": 1.5}
        return Phase(name, Path("."), metrics=metrics | {f"flops_per_token_width_{w}": w * 1e4 for w in (64, 128)})

    def highest(*phases: Phase) -> float:
        figure = loss_against_compute(Family("f", Path("."), phases), LIGHT)
        assert figure is not None
        return max(y for line in figure.axes[0].get_lines() for y in line.get_ydata())

    assert highest(measured("phase1", 6.0), measured("phase2", 1.8)) == 1.8
    assert highest(measured("phase1", 6.0)) == 6.0  # there is nothing else to show


def test_empty_gate_bins_are_left_out() -> None:
    metrics = {"gate_bin_0_confidence": 0.1, "gate_bin_0_agreement": 0.2, "gate_bin_0_count": 7}
    metrics |= {"gate_bin_1_confidence": 0.0, "gate_bin_1_agreement": 0.0, "gate_bin_1_count": 0}
    metrics |= {"gate_bin_2_confidence": 0.25}
    bins = gate_bins(Phase("phase2", Path("."), metrics=metrics))
    assert [(b.confidence, b.agreement, b.count) for b in bins] == [(0.1, 0.2, 7)]


def test_surgery_rows_take_the_worst_width_and_both_losses(family_dir: Path) -> None:
    rows = surgery_rows(read_family(family_dir))
    assert [row.what for row in rows] == ["insert Mamba", "expand 64→96", "expand 96→128"]
    assert all(row.is_exact for row in rows)
    row = rows[1]
    worse = type(row)(row.phase, row.what, 1e-6, {64.0: 2e-4}, 3.0, 3.0)
    assert worse.largest == 2e-4 and worse.is_exact is False
    assert type(row)(row.phase, row.what, 1e-6, {}, 3.0, 3.002).is_exact is False
    assert type(row)(row.phase, row.what, None, {}, 3.0, 3.0).is_exact is None


def test_best_saving_is_the_most_skipped_that_costs_at_most_a_point(family_dir: Path) -> None:
    saving = best_saving(read_family(family_dir))
    assert saving is not None
    assert saving.phase.name == "phase6_grpo" and saving.threshold == 0.9 and saving.num_episodes == 100
    assert saving.accuracy_lost == pytest.approx(0.01)
    assert saving.skipped == saving.phase.number("exit_fraction_threshold_0.9")


def test_accuracy_with_exits_is_compared_on_the_same_questions() -> None:
    metrics = {"accuracy_calculator": 0.9, "accuracy_calculator_width_64": 0.8, "accuracy_calculator_width_128": 0.995}
    metrics |= {"accuracy_calculator_threshold_0.9": 0.98, "exit_fraction_threshold_0.9": 0.3}
    metrics |= {"accuracy_calculator_threshold_0.99": 0.99, "exit_fraction_threshold_0.99": 0.1}
    saving = best_saving(Family("tiny", Path("."), (Phase("phase5", Path("."), metrics=metrics),)))
    assert saving is not None and saving.threshold == 0.99


def test_a_dense_base_is_one_point() -> None:
    metrics = {"eval_loss": 2.5, "flops_per_token": 1e6, "hidden_size": 64}
    curve = compute_curve(Phase("base", Path("."), metrics=metrics), "eval_loss", "width")
    assert [(point.x, point.y, point.label) for point in curve] == [(1e6, 2.5, "64")]
    assert compute_curve(Phase("base", Path("."), metrics={"eval_loss": 2.5}), "eval_loss", "width") == []


def test_log_curve_prefers_tokens_and_else_spreads_steps() -> None:
    log = [{"step": 5, "loss": 3.0, "tokens_seen": 50}, {"step": 10, "loss": 2.0, "tokens_seen": 100}, {"step": 20}]
    assert log_curve(Phase("base", Path("."), log=log), "loss") == [(50.0, 3.0), (100.0, 2.0)]
    by_step = [{key: value for key, value in entry.items() if key != "tokens_seen"} for entry in log]
    phase = Phase("base", Path("."), metrics={"tokens_seen": 1000}, log=by_step)
    assert log_curve(phase, "loss") == [(250.0, 3.0), (500.0, 2.0)]
    assert log_curve(phase, "absent") == []


def test_main_loss_is_that_of_the_whole_model() -> None:
    log = [{"step": s, "loss": 9.0, "loss_full": 3.0 - s / 10, "loss_width_32": 4.0} for s in (1, 2)]
    phase = Phase("phase2", Path("."), metrics={"hidden_size": 64}, log=log)
    assert [value for _, value in main_loss(phase)] == [2.9, 2.8]
    assert list(width_curves(phase)) == [32, 64]


def test_smooth_keeps_lines_and_quiets_noise() -> None:
    line = [3.0 - 0.1 * index for index in range(30)]
    assert smooth(line, 8) == pytest.approx(line)
    zigzag = smooth([1.0 if index % 2 else -1.0 for index in range(40)], 8)
    assert max(map(abs, zigzag)) < 0.35
    assert smooth([2.0], 5) == [2.0]


def test_rounding_never_claims_a_whole() -> None:
    texts = [percent(rate) for rate in (1.0, 0.9996, 0.984, 0.0, 0.0004, None)]
    assert [text.replace("\u00a0", " ") for text in texts] == ["100 %", "99.96 %", "98.4 %", "0 %", "0.04 %", "–"]
    assert points(-0.0102) == "−1.0 points" and points(0.0001) == "±0 points"


def test_headline_of_a_family_that_measured_nothing_is_empty(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "metrics.json").write_text("{}")
    assert headline(read_family(tmp_path)) == []


def test_headline_marks_a_missed_goal(family_dir: Path) -> None:
    tiles = {tile.title: tile for tile in headline(read_family(family_dir))}
    assert tiles["Skipped by early exit"].met is False and "24.3" in tiles["Skipped by early exit"].value
    assert tiles["Calculator"].met is True and tiles["Held-out loss"].met is None
    assert tiles["Tic-tac-toe"].met is True and "14.0" in tiles["Tic-tac-toe"].note


def test_headline_shows_each_way_of_phase_6(family_dir: Path) -> None:
    games = [tile for tile in headline(read_family(family_dir)) if tile.title == "Tic-tac-toe"]
    assert ["DPO" in tile.note for tile in games] == [True, False]
    assert all("phase 5: " in tile.note for tile in games)
    metrics = json.loads((family_dir / "phase6_dpo" / "metrics.json").read_text())
    (family_dir / "phase6_dpo" / "metrics.json").write_text(
        json.dumps(metrics | {"loss_rate_tic_tac_toe_perfect": 0.99})
    )
    games = [tile for tile in headline(read_family(family_dir)) if tile.title == "Tic-tac-toe"]
    assert [tile.met for tile in games] == [False, True], "one way that fails does not hide behind the other"


def test_ways_of_phase_6_are_not_compared_with_each_other(family_dir: Path) -> None:
    shutil.rmtree(family_dir / "phase5")
    games = [tile for tile in headline(read_family(family_dir)) if tile.title == "Tic-tac-toe"]
    assert len(games) == 2 and all(tile.met is None and "goal" not in tile.note for tile in games)


def test_what_was_not_a_number_is_left_out_of_curves() -> None:
    log = [{"step": 1, "reward": 0.5, "tokens_seen": None}, {"step": 2, "reward": None}, {"step": 3, "reward": 0.7}]
    phase = Phase("phase6_grpo", Path("."), log=log)
    assert step_curve(phase, "reward") == log_curve(phase, "reward") == [(1.0, 0.5), (3.0, 0.7)]
