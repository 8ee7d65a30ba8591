"""The calibrated threshold: exact bounds, a guarantee that holds in simulation, losses that are those of decoding."""

import math
import random

import pytest
import torch

from adamba.errors import UserError
from adamba.model import AdambaForCausalLM
from adamba.training.calibration import (
    CalibrationSettings,
    binomial_cdf,
    calibrate,
    calibration_metrics,
    calibration_settings,
    require_gates,
    risk_p_value,
    rows_to_calibrate_on,
    text_measure,
    upper_bound,
)
from adamba.training.evaluation import GameSettings, play_tasks, tell_not_played
from adamba.training.head_losses import IGNORED
from models import dense_base, hybrid, tokens


def test_the_binomial_tail_is_exact() -> None:
    for trials, count, rate in ((10, 3, 0.2), (400, 1, 0.01), (7, 7, 0.5), (5, 0, 0.9)):
        exact = sum(math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(count + 1))
        assert binomial_cdf(count, trials, rate) == pytest.approx(exact, rel=1e-9)


def test_bounds_are_those_of_the_tables() -> None:
    # Clopper & Pearson, one-sided 95 %: the rule of three exactly, and 1 in 20.
    assert upper_bound([0.0] * 299, 0.95) == pytest.approx(1 - 0.05 ** (1 / 299), rel=1e-6)
    assert upper_bound([1.0] + [0.0] * 19, 0.95) == pytest.approx(0.21611, abs=1e-4)
    # A fractional loss never gets a tighter bound than its mean.
    assert upper_bound([0.02] * 400, 0.95) > 0.02
    assert risk_p_value([0.02] * 400, 0.05) < 0.05 < risk_p_value([0.04] * 400, 0.05)


def test_the_search_ends_at_the_first_failure() -> None:
    asked = []

    def measure(threshold: float) -> dict[str, list[float]]:
        asked.append(threshold)
        lost = {0.9: 0, 0.8: 1, 0.7: 8}.get(threshold, 0)  # 0.6 would be fine again, but is not asked
        return {"easy": [0.0] * 500, "hard": [1.0] * lost + [0.0] * (500 - lost)}

    settings = CalibrationSettings(thresholds=[0.6, 0.7, 0.8, 0.9])
    found = calibrate(measure, settings)
    assert asked == [0.9, 0.8, 0.7] and found.threshold == 0.8
    assert found.bounds[0.8] <= settings.risk < found.bounds[0.7]
    metrics = calibration_metrics(found, settings, "episodes")
    assert metrics["calibrated_exit_threshold"] == 0.8
    assert metrics["calibration_loss_threshold_0.7"] == pytest.approx(8 / 500)
    never = calibrate(lambda threshold: {"task": [1.0] * 400}, settings)
    assert never.threshold == 1.0


def test_the_guarantee_holds() -> None:
    """True losses grow as the threshold falls; the chosen one is too risky in at most 5 % of 150 calibrations."""
    true_loss = {0.9: 0.002, 0.8: 0.02, 0.7: 0.055, 0.6: 0.08}
    settings = CalibrationSettings(risk=0.05, trials=200, thresholds=list(true_loss))
    rng = random.Random(0)
    chosen = [
        calibrate(lambda t: {"task": [float(rng.random() < true_loss[t]) for _ in range(200)]}, settings).threshold
        for _ in range(150)
    ]
    too_risky = sum(true_loss.get(threshold, 0.0) > settings.risk for threshold in chosen)
    assert too_risky <= 150 * 0.05 + 3 * (150 * 0.05 * 0.95) ** 0.5
    assert chosen.count(0.8) > 75, "and it is not needlessly careful"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"risk": 0.01, "trials": 100}, "100 trials cannot show a risk of 0.01 .* use at least trials=299"),
        ({"risk": 1.5}, "risk is 1.5; it must lie between 0 and 1"),
        ({"confidence": 0.0}, "confidence is 0.0; it must lie between"),
        ({"rsik": 0.1}, "'rsik' is unknown; use confidence, risk, trials"),
    ],
)
def test_settings_that_cannot_work(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^calibrate: {message}"):
        calibration_settings(given)
    assert calibration_settings({}) is None


def test_calibration_needs_trained_gates() -> None:
    trained = hybrid(0)
    require_gates(trained, "some/folder")
    for model in (AdambaForCausalLM(trained.config), dense_base("llama")):
        with pytest.raises(UserError, match="^calibrate: some/folder has no trained exit gates; phase 2 trains them"):
            require_gates(model, "some/folder")


def test_a_task_with_no_episodes_is_not_played() -> None:
    assert play_tasks(hybrid(0), None, GameSettings({"calculator": 0})) == {}


def test_a_task_of_the_mix_that_is_not_played_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="adamba")
    tell_not_played(["calculator", "fineweb"], {"calculator": 5})
    tell_not_played(["calculator"], {})  # losses alone were asked for
    assert caplog.messages == []
    tell_not_played(["sudoku", "fineweb"], {"calculator": 5, "sudoku": 0})
    assert caplog.messages == ["in the mix but not played: sudoku (--num_episodes sudoku=5 plays)"]


def test_text_losses_are_those_of_decoding_with_exits() -> None:
    model, ids = hybrid(2), tokens(2, batch=3, length=16)
    labels = ids.clone()
    labels[1, 12:] = labels[2, 9:] = IGNORED  # padding is not decoded: it would hide what exits change
    given = [{"input_ids": row, "labels": asked} for row, asked in zip(ids.tolist(), labels.tolist(), strict=True)]
    rows = rows_to_calibrate_on(given)
    assert rows == given[:2] and rows_to_calibrate_on([]) == []
    measure = text_measure(model, rows, batch_size=1)
    assert measure(1.0) == {"text": [0.0, 0.0]}
    losses = measure(0.5)["text"]
    for row, asked, loss in zip(ids, labels, losses, strict=False):
        with torch.no_grad():
            full = model(row[None], use_cache=False).logits[0].argmax(-1)
            cache, wrong = model(row[None, :8], use_cache=True).past_key_values, []
            for place in range(8, 15):
                step = model(row[None, place : place + 1], past_key_values=cache, use_cache=True, exit_threshold=0.5)
                if asked[place + 1] != IGNORED:
                    wrong.append(int(step.logits[0, -1].argmax() != full[place]))
        assert loss == pytest.approx(sum(wrong) / len(wrong))
    assert sum(losses) > 0, "the test needs exits that change a token"
