"""The end of a process among several."""

import sys


def leave_process_group() -> None:
    """
    Close the group of processes, if there is one, while the interpreter is whole. Now and then a thread of gloo lets
    go of its last tensor after that, which aborts the process (pytorch/pytorch#179291): its work is done by then, but
    the launcher calls the whole run failed.
    """
    torch = sys.modules.get("torch")  # what has not loaded it is in no group
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
