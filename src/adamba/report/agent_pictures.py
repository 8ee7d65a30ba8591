"""The pictures of the agents: scores before and after RL, and the rewards during it."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from .loss_pictures import loss_per_phase, loss_per_source, loss_per_width
from .measures import AGENT_SCORES, AgentScore, agent_phases, percent, smooth, step_curve, trials, wilson_interval
from .pictures import (
    Picture,
    accuracy_against_compute,
    exit_tradeoff,
    gate_reliability,
    loss_against_compute,
)
from .reading import Family, Phase
from .style import Theme, label, percent_axis

STAGES = {"phase5": "SFT", "phase6_grpo": "GRPO", "phase6_dpo": "DPO"}


def agent_scores(family: Family, theme: Theme) -> Figure | None:
    """Each score after SFT and after RL, with its 95 % Wilson interval where the number of trials is known."""
    phases = agent_phases(family)
    scores = [score for score in AGENT_SCORES if any(phase.number(score.key) is not None for phase in phases)]
    if not scores:
        return None
    num_columns = min(3, len(scores))
    num_rows = -(-len(scores) // num_columns)
    figure = Figure(figsize=(10, 0.6 + (0.95 + 0.36 * len(phases)) * num_rows))
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes, score in zip(panels, scores, strict=False):
        _score_panel(axes, score, phases, theme)
    for axes in panels[len(scores) :]:
        axes.set_axis_off()
    return figure


def _score_panel(axes: Axes, score: AgentScore, phases: list[Phase], theme: Theme) -> None:
    ends: list[float] = []
    for row, phase in enumerate(phases):
        rate = phase.number(score.key)
        color = theme.phase(phase.name)
        if rate is None:
            axes.text(0.5, row, "not measured", transform=axes.get_yaxis_transform(), color=theme.muted,
                      ha="center", va="center", fontsize=8.5)  # fmt: skip
            continue
        count = trials(phase, score)
        low, high = wilson_interval(rate, count) if count else (rate, rate)
        ends += [low, high]
        axes.plot([low, high], [row, row], color=color, linewidth=5, alpha=0.3)
        axes.plot([rate], [row], "o", color=color, markersize=8)
        label(axes, percent(rate), (rate, row), theme.ink, (0, 11), fontsize=8.5, fontweight="bold")
    span = max(max(ends) - min(ends), 0.01)
    middle = (min(ends) + max(ends)) / 2
    axes.set_xlim(middle - 0.68 * span, middle + 0.68 * span)
    axes.set_ylim(len(phases) - 0.4, -0.8)
    axes.set_yticks(range(len(phases)), [f"{STAGES[phase.name]}" for phase in phases])
    for tick, phase in zip(axes.get_yticklabels(), phases, strict=True):
        tick.set(color=theme.phase(phase.name), fontweight="bold")
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(*axes.get_xlim())
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if 0 <= tick <= 1]))
    axes.xaxis.set_major_formatter(percent_axis())
    axes.set_title(f"{score.title}  {'↑' if score.higher_is_better else '↓'}")
    axes.grid(axis="y", visible=False)


def reward_per_step(family: Family, theme: Theme) -> Figure | None:
    """Mean reward of the sampled episodes along reinforcement learning."""
    phase = family.get("phase6_grpo")
    curve = step_curve(phase, "reward") if phase else []
    if phase is None or len(curve) < 2:
        return None
    figure = Figure(figsize=(10, 3.6))
    axes = figure.subplots()
    color = theme.phase(phase.name)
    steps, rewards = [step for step, _ in curve], [value for _, value in curve]
    average = smooth(rewards, span=max(3.0, len(rewards) / 8))
    axes.plot(steps, rewards, color=color, linewidth=0.9, alpha=0.35)
    axes.plot(steps, average, color=color)
    label(axes, f"{average[-1]:.2f}", (steps[-1], average[-1]), color, (7, 0), fontweight="bold")
    axes.set(xlabel="GRPO step", ylabel="mean reward", xlim=(0, steps[-1] * 1.06))
    return figure


PICTURES = (
    Picture(
        "loss_per_phase",
        "Loss along the whole plan",
        "Training loss at full width, every phase joined along its tokens; thin lines are the raw log. Dots are the "
        "held-out loss at the end of a phase. Dashed lines are surgeries: they must not move the loss. The tool-call "
        "phase learns from other text, so its level is not comparable with the phases before it.",
        "log_history.json (loss, tokens_seen) and eval_loss",
        loss_per_phase,
        logged=("loss",),
    ),
    Picture(
        "loss_per_source",
        "Loss of each task and dataset",
        "The same training, each part of the mix apart. Where a line is missing, the phase did not train on it.",
        "log_history.json (loss_<task or dataset>)",
        loss_per_source,
        logged=("loss",),
    ),
    Picture(
        "loss_per_width",
        "Every width learns",
        "Training loss of each width level in the elastic phases, smoothed.",
        "log_history.json (loss_full and loss_width_*)",
        loss_per_width,
        logged=("loss_full",),
    ),
    Picture(
        "loss_against_compute",
        "Held-out loss against compute",
        "Each point is one width of one checkpoint: further left is cheaper, lower is better. Hollow points, where "
        "measured, are exit thresholds at full width. Phases before their narrow widths are trained are not in it.",
        "eval_loss_width_* and flops_per_token_width_*",
        loss_against_compute,
        metrics=("eval_loss_width_", "flops_per_token_width_"),
    ),
    Picture(
        "accuracy_against_compute",
        "Calculator accuracy against compute",
        "Two ways to spend less on a token: narrower layers (filled points, named by width) and leaving early (hollow "
        "points, numbered by exit threshold).",
        "accuracy_calculator_width_*, accuracy_calculator_threshold_* and flops_per_token_*",
        accuracy_against_compute,
        metrics=("accuracy_calculator_width_", "accuracy_calculator_threshold_"),
    ),
    Picture(
        "exit_tradeoff",
        "What early exits save and what they cost",
        "Further right skips more; the lines show what stays the same. 100 % means nothing is lost.",
        "exit_fraction_threshold_*, agreement_threshold_* and accuracy_calculator_threshold_*",
        exit_tradeoff,
        metrics=("exit_fraction_threshold_",),
    ),
    Picture(
        "gate_reliability",
        "Can the exit gates be believed?",
        "A gate says how likely the next token would stay the same if it stopped here. On the dashed line that "
        "probability is exactly how often it is right. The bars count the predictions in each bin.",
        "gate_bin_*, gate_ece and gate_ece_layer_*",
        gate_reliability,
        metrics=("gate_bin_",),
    ),
    Picture(
        "agent_scores",
        "Agent scores before and after RL",
        "Held-out tasks after supervised training and after reinforcement learning. Light bars are 95 % Wilson "
        "intervals; arrows say which way is better. Every panel has its own scale.",
        "accuracy_calculator, *_tic_tac_toe_* and their episode counts after phases 5 and 6",
        agent_scores,
        metrics=("accuracy_calculator", "legal_move_rate_"),
    ),
    Picture(
        "reward_per_step",
        "Reward during RL",
        "Mean reward of the episodes sampled at each step, raw and smoothed.",
        "log_history.json of phase6_grpo (reward)",
        reward_per_step,
        logged=("reward",),
    ),
)
