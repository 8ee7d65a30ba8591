"""The Hub keys of a training recipe, as `adamba.hub.HubArguments` has them for the other scripts."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class HubKeys(TrainingArguments):
    """`TrainingArguments` without a token, which has no place in a recipe, and private unless said otherwise."""

    hub_private: bool = field(default=True, metadata={"help": "Make the repository private if it is new."})
    hub_private_repo: bool | None = field(default=None, init=False)  # hub_private says it
    hub_token: str | None = field(default=None, init=False)  # HF_TOKEN or `hf auth login`
