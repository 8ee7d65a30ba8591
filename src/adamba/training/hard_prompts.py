"""Prompts worth training on: instances that the model does not solve yet, and some that it does."""

import random

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adamba.errors import UserError
from adamba.training.agent_rows import own_columns
from adamba.training.play import play
from adamba.training.session import logger


def unsolved_first(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, fraction: float, *, max_new_tokens: int
) -> Dataset:
    """
    Play every row once, likeliest tokens only, and keep all that scored below 1 with as many solved ones as make them
    `fraction` of the result. Where nearly all candidates of a group score the same, GRPO learns nothing; this puts the
    groups where they differ. Processes share the episodes and get the same rows.

    Raises:
        UserError: the model solves everything.
    """
    state = PartialState()
    plain = [own_columns(row) for row in rows]
    own = range(state.process_index, len(plain), state.num_processes)
    episodes = play(model, tokenizer, [plain[index] for index in own], max_new_tokens=max_new_tokens)
    played = zip(own, (episode.outcome["score"] for episode in episodes), strict=True)
    scores = dict(gather_object(list(played)))
    unsolved = [index for index in range(len(plain)) if scores[index] < 1.0]
    if not unsolved:
        raise UserError(f"unsolved_fraction: the model solves all of {len(plain)} prompts; make the task harder")
    solved = [index for index in range(len(plain)) if scores[index] >= 1.0]
    kept = unsolved + solved[: round(len(unsolved) * (1 - fraction) / fraction)]
    random.Random(f"unsolved/{len(kept)}").shuffle(kept)
    logger.info(
        "%d of %d prompts are not solved yet; training on %d of both kinds", len(unsolved), len(plain), len(kept)
    )
    return rows.select(kept)
