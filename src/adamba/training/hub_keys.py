"""The Hub keys of a training recipe, as `adamba.hub.HubArguments` has them for the other scripts."""

from dataclasses import dataclass, field


@dataclass
class HubKeys:
    """Put before a class of `TrainingArguments`: no token, which has no place in a recipe, and private by default."""

    hub_private: bool = field(default=True, metadata={"help": "Make the repository private if it is new."})
    hub_private_repo: bool | None = field(default=None, init=False)  # hub_private says it
    hub_token: str | None = field(default=None, init=False)  # HF_TOKEN or `hf auth login`
