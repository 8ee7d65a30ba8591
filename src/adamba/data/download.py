"""Fetches a dataset's files from the Hub: resumable, verified, all or the first few."""

import hashlib
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download

from adamba.data.cards import Card
from adamba.data.files import SUFFIXES
from adamba.data.sources import DOWNLOAD_DIR
from adamba.errors import UserError, one_line


def download(card: Card, max_files: int | None = None, folder: Path = DOWNLOAD_DIR) -> list[Path]:
    """The dataset's data files under `folder/<id>`, complete and verified; what is there already is not fetched again.

    An interrupted download goes on where it stopped. Sizes and checksums are compared with what the Hub says.

    Args:
        max_files: only the first so many, in the order of their names.

    Raises:
        UserError: the card has no Hub repository, it cannot be reached, or a file is not what the Hub says.
    """
    if card.loader != "hub":
        raise UserError(f"{card.id}: nothing to download, its loader is {card.loader!r}; see {card.file}")
    assert card.path is not None
    try:
        info = HfApi().dataset_info(card.path, revision=card.revision, files_metadata=True)
        chosen = choose_files(info.siblings or [], card.data_files)[:max_files]
        paths = []
        for entry in chosen:
            path = folder / card.id / entry.rfilename
            if not (path.is_file() and _problem(path, entry) is None):
                hf_hub_download(
                    card.path,
                    entry.rfilename,
                    repo_type="dataset",
                    revision=info.sha,
                    local_dir=folder / card.id,
                )
            problem = _problem(path, entry)
            if problem is not None:
                raise UserError(f"{path}: {problem}; delete it and download again")
            paths.append(path)
    except (OSError, RuntimeError) as error:
        fallback = f" (or its fallback {card.fallback})" if card.fallback else ""
        raise UserError(
            f"{card.id}: {card.path}{fallback} cannot be downloaded: {one_line(error)[:200]}; fetch the files "
            f"by hand, put them into {folder / card.id}/ or pass them with --data-files {card.id}=FILE_OR_FOLDER"
        ) from error
    if not paths:
        raise UserError(f"{card.id}: {card.path} holds no data file ({', '.join(SUFFIXES)})")
    return paths


def choose_files(entries: Sequence[Any], patterns: Sequence[str]) -> list[Any]:
    """The repository's files that match the card's patterns, or that look like data; sorted by name."""

    def is_wanted(name: str) -> bool:
        if patterns:
            return any(fnmatch(name, pattern) for pattern in patterns)
        bare = name.lower().removesuffix(".gz").removesuffix(".bz2").removesuffix(".xz")
        return bare.endswith((*SUFFIXES, ".zip", ".tar")) and not bare.endswith(".md")

    return sorted((entry for entry in entries if is_wanted(entry.rfilename)), key=lambda entry: entry.rfilename)


def _problem(path: Path, entry: Any) -> str | None:
    """What is wrong with a file, compared with the Hub's size and checksum; None when it is right."""
    num_bytes = path.stat().st_size
    if entry.size is not None and num_bytes != entry.size:
        return f"{num_bytes} bytes, the Hub says {entry.size}"
    if entry.lfs is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return None if digest == entry.lfs.sha256 else "its sha256 is not the Hub's"
    blob = hashlib.sha1(f"blob {num_bytes}\0".encode() + path.read_bytes(), usedforsecurity=False).hexdigest()
    return None if entry.blob_id in (None, blob) else "its content is not the Hub's"
