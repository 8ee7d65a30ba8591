"""What `max_length` leaves of DPO's pairs: a pair whose two answers are cut to the same teaches nothing, silently."""

import logging
from collections.abc import Iterable, Mapping, Sequence

from trl import DPOConfig

from adamba.errors import UserError

logger = logging.getLogger("adamba")


def check_lengths(rows: Iterable[Mapping[str, Sequence[int]]], num_given: int, args: DPOConfig) -> None:
    """
    Log how many pairs are cut.

    Args:
        rows: what the trainer kept, as it tokenized them: `prompt_ids`, `chosen_ids`, `rejected_ids`.
        num_given: pairs before it dropped those whose prompt alone fills `max_length`.

    Raises:
        UserError: most pairs have no difference left, or no answer if they had none.
    """
    if args.max_length is None:
        return
    num_kept = num_cut = num_lost = longest = 0
    for row in rows:
        prompt, chosen, rejected = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        length = len(prompt) + max(len(chosen), len(rejected))
        longest = max(longest, length)
        num_kept += 1
        if length > args.max_length:
            num_cut += 1
            answers = [_cut(len(prompt), answer, args) for answer in (chosen, rejected)]
            # An imitated pair is the same twice: its answer is learnt as long as something is left of it.
            num_lost += answers[0] == answers[1] if chosen != rejected else not answers[0]
    num_dropped = num_given - num_kept
    if 2 * (num_dropped + num_lost) > num_given:
        tokens = f"; the longest has {longest} tokens" if longest > args.max_length else ""
        raise UserError(
            f"max_length: {args.max_length} leaves nothing to learn in {num_dropped + num_lost} of {num_given} pairs "
            f"({num_dropped} prompts fill it, {num_lost} answers are cut before they differ){tokens}"
        )
    if num_dropped + num_cut:
        logger.warning(
            "max_length: %d cuts %d of %d pairs, %d of them before their answers differ; %d more are dropped, as "
            "their prompt fills it",
            *(args.max_length, num_cut, num_given, num_lost, num_dropped),
        )


def _cut(num_prompt_tokens: int, answer: Sequence[int], args: DPOConfig) -> Sequence[int]:
    """What TRL's collator keeps of an answer."""
    if args.truncation_mode == "keep_end":
        return answer[-args.max_length :]
    return answer[: max(0, args.max_length - num_prompt_tokens)]
