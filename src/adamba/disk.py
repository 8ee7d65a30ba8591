"""Files in one piece; and before anything expensive: can the folder be written, is there room?"""

import os
import shutil
import tempfile
from pathlib import Path

from adamba.errors import UserError

GB = 1e9


def check_output_dir(output_dir: str | Path, num_bytes: int = 0, what: str = "the checkpoint") -> None:
    """
    Refuse an output folder that cannot be written or whose disk is too small.

    Args:
        output_dir: The folder itself need not exist; what is written aside stands beside it.
        num_bytes: Room that is needed beside all that lies there now.
        what: For the message.

    Raises:
        UserError: naming the folder, and both sizes.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():  # a device too, as /dev/null
        raise UserError(f"output_dir: {output_dir} is a file; name a folder")
    present = next(folder for folder in output_dir.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=present):
            pass
    except OSError as error:
        raise UserError(f"output_dir: {output_dir} cannot be written: {error.strerror}") from None
    free = shutil.disk_usage(present).free
    if free < num_bytes:
        raise UserError(
            f"output_dir: {output_dir} needs {num_bytes / GB:.3g} GB for {what}, but its disk has {free / GB:.3g} GB "
            f"free; free some, or name a folder on another disk"
        )


def write_whole(path: Path, text: str, durable: bool = False) -> None:
    """Put a text file in its place in one piece, or leave what was there; `durable`: on the disk first."""
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(aside, path)
