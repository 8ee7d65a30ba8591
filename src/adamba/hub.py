"""Publishing a finished run on the Hub: one repository a family, one branch a phase. The local copy is never touched
by what goes wrong there."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session, validate_repo_id

from adamba.card_pictures import draw_pictures
from adamba.disk import write_whole
from adamba.errors import UserError, one_line
from adamba.model_card import model_card

logger = logging.getLogger("adamba")

# Of the HTTP library that this huggingface_hub is built on.
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
# An upload's failure comes inside a RuntimeError; ValueError: an answer that is no Hub's.
FAILURES: tuple[type[Exception], ...] = (HfHubHTTPError, TRANSPORT_ERROR, OSError, RuntimeError, ValueError)
WAITS_SECONDS = (2.0, 8.0, 32.0, 128.0)  # after each failure but the last
PATIENCE_SECONDS = 120.0  # without one byte; huggingface_hub itself would wait for ever
NO_PERMISSION = (401, 403, 404)
WORTH_RETRYING = (408, 409, 412, 425, 429)  # and every 5xx; 409 and 412: another commit came between
# Nothing that unpickles, and nothing half-written, leaves this machine.
NEVER_PUSHED = ["*.tmp", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", ".cache/*"]
Result = TypeVar("Result")


@dataclass
class HubArguments:
    """The Hub keys of the scripts that are no Trainer's."""

    push_to_hub: bool = field(default=False, metadata={"help": "Push the finished folder to the Hub."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository, for instance me/adamba."})
    hub_revision: str | None = field(default=None, metadata={"help": "Branch. Default: the name of output_dir."})
    hub_private: bool = field(default=True, metadata={"help": "Make the repository private if it is new."})


@dataclass(frozen=True)
class HubTarget:
    """Where a run goes."""

    repo_id: str
    branch: str
    private: bool


def hub_target(args: Any, output_dir: str | Path) -> HubTarget | None:
    """
    The target of a run whose recipe says `push_to_hub: true`, its repository made and its permissions checked; None
    when it does not. Called before anything expensive.

    Raises:
        UserError: no repository named, no token, no permission, or no Hub.
    """
    if not args.push_to_hub:
        return None
    if args.hub_model_id is None:
        raise UserError("hub_model_id: missing; push_to_hub needs a repository, for instance me/adamba")
    target = HubTarget(args.hub_model_id, args.hub_revision or Path(output_dir).name, args.hub_private)
    try:
        validate_repo_id(target.repo_id)
    except HFValidationError as error:
        raise UserError(f"hub_model_id: {one_line(error)}") from None
    try:
        _patiently(lambda api: _prepare(api, target), f"reach {target.repo_id}")
    except FAILURES as error:
        raise UserError(f"hub_model_id: {target.repo_id}: {_reason(error)}") from None
    return target


def push_folder(folder: str | Path, target: HubTarget) -> str:
    """
    Upload a published folder to its branch in one commit, and return the commit's address. Files that the branch has
    and the folder lacks are removed there.

    Raises:
        UserError: it cannot be done now; the folder is whole, and the message says how to push it later.
    """
    folder = Path(folder)

    def upload(api: HfApi) -> str:
        _prepare(api, target)
        commit = api.upload_folder(
            repo_id=target.repo_id,
            folder_path=folder,
            revision=target.branch,
            commit_message=f"{folder.name}: {target.branch}",
            ignore_patterns=NEVER_PUSHED,
            delete_patterns="*",
        )
        return str(commit.commit_url)

    try:
        return _patiently(upload, f"push {folder} to {target.repo_id}")
    except FAILURES as error:
        raise UserError(
            f"push_to_hub: {target.repo_id}: {_reason(error)}; {folder} is complete here, push it later with "
            f"`hf upload {target.repo_id} {folder} --revision {target.branch}`"
        ) from None


def push_run(folder: str | Path, target: HubTarget) -> str:
    """Draw the run's pictures, write its card for this repository and push all. Returns the commit's address."""
    folder = Path(folder)
    draw_pictures(folder)
    write_whole(folder / "README.md", model_card(folder, target.repo_id, target.branch))
    return push_folder(folder, target)


def _prepare(api: HfApi, target: HubTarget) -> None:
    api.create_repo(target.repo_id, private=target.private, exist_ok=True)
    api.auth_check(target.repo_id, write=True)  # an existing one is found without permission too
    if target.branch != "main":
        api.create_branch(target.repo_id, branch=target.branch, exist_ok=True)


def _patiently(work: Callable[[HfApi], Result], what: str) -> Result:
    """Run it, again after a while when the Hub or the way there failed; what is uploaded is not uploaded again."""
    for wait in (*WAITS_SECONDS, None):
        try:
            get_session().timeout = PATIENCE_SECONDS
            return work(HfApi())
        except FAILURES as error:
            if wait is None or not _may_pass(error):
                raise
            logger.warning("could not %s (%s); again in %g s", what, _reason(error), wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _cause(error: BaseException) -> BaseException:
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


def _may_pass(error: BaseException) -> bool:
    error = _cause(error)
    if isinstance(error, (OfflineModeIsEnabled, LocalTokenNotFoundError, FileNotFoundError, PermissionError)):
        return False
    if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
        return False  # a card or an answer that is wrong, and will be
    status = _status(error)
    return status is None or status >= 500 or status in WORTH_RETRYING


def _status(error: BaseException) -> int | None:
    error = _cause(error)
    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    return getattr(response, "status_code", None)


def _reason(error: BaseException) -> str:
    error, status = _cause(error), _status(error)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "not logged in, or the token is no longer valid; run `hf auth login` or set HF_TOKEN"
    if status in NO_PERMISSION:
        return f"no permission to write there (HTTP {status}); use a repository of yours and a token that may write"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or leave out push_to_hub"
    return f"HTTP {status}" if status else f"{type(error).__name__}: {one_line(error)[:160]}"
