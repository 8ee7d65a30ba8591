"""
What must not be written anywhere: tokens and passwords. `redacted` stands between the process's own words (its command
line, log lines) and files; the values of the environment's secrets are replaced wherever they turn up.
"""

import logging
import os
import re

HIDDEN = "***"
# Names of environment variables and recipe keys that hold a secret.
SECRET_NAME = re.compile(r"(?i)(^|_)(token|secret|password|passwd|api_?key|access_?key|credentials?)($|_)")
SHORTEST = 8  # characters; a shorter value is no secret, and would be found in ordinary words
# Tokens by their form, for those that stand in no variable: Hugging Face, GitHub, OpenAI and kin, AWS, Slack.
TOKEN_FORM = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16}"
    r"|xox[abp]-[\w-]{10,})"
)
NOT_SECRET = ("tokenizers_parallelism",)


def is_secret_name(name: str) -> bool:
    """Whether a variable or key of this name holds a secret: `HF_TOKEN`, `hub_token`, `WANDB_API_KEY`."""
    return name.lower() not in NOT_SECRET and SECRET_NAME.search(name) is not None


def redacted(text: str) -> str:
    """The text without the values of the environment's secrets and without anything of a token's form."""
    for value in secret_values():
        text = text.replace(value, HIDDEN)
    return TOKEN_FORM.sub(HIDDEN, text)


def secret_values() -> list[str]:
    """Of this process's environment, longest first."""
    values = {value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= SHORTEST}
    return sorted(values, key=len, reverse=True)


class RedactingFilter(logging.Filter):
    """On a handler: no line leaves it with a secret in it, whoever wrote the line."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        clean = redacted(message)
        if clean != message:
            record.msg, record.args = clean, None
        return True
