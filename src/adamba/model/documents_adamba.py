"""
Rows that hold several documents, one behind the other: which token belongs to which, and attention that stays inside.

On a GPU, halves meet torch's own FlashAttention for sequences of many lengths, which never looks at another document;
anywhere else a mask hides them.

Shape legend: B batch, L tokens, T tokens of all rows, H query heads, K key/value heads, P head_dim.
"""

import torch
import torch.nn.functional as F

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

STARTS_MULTIPLE = 64  # so that their number, which a compiled layer is made for, seldom changes


def number_documents(position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """Packed rows: a number for each document, (B, L), new where `position_ids` does not go on by one; else `None`."""
    if position_ids is None or position_ids.shape[1] == 1:
        return None
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(starts.any()):
        return None
    return F.pad(starts.int().cumsum(-1, dtype=torch.int32), (1, 0))


def document_starts(number_BL: torch.Tensor) -> torch.Tensor:
    """Where documents begin in the tokens of all rows, then T up to a multiple of 64 entries, at least once."""
    is_first = F.pad(number_BL[:, 1:] != number_BL[:, :-1], (1, 0), value=True)
    starts = is_first.flatten().nonzero().squeeze(-1)
    missing = STARTS_MULTIPLE - starts.shape[0] % STARTS_MULTIPLE
    return F.pad(starts, (0, missing), value=number_BL.numel()).int()


def can_attend_in_documents(hidden: torch.Tensor, attention: str, head_dim: int, dropout: float) -> bool:
    """Whether `attend_in_documents` takes what this model makes of `hidden`: halves on a GPU, as sdpa would."""
    if varlen_attn is None or not hidden.is_cuda or attention != "sdpa" or dropout > 0:
        return False
    if torch.cuda.get_device_capability(hidden.device) < (8, 0):  # before Ampere there is no FlashAttention
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype
    return dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256


def attend_in_documents(
    query_BHLP: torch.Tensor,
    key_BKLP: torch.Tensor,
    value_BKLP: torch.Tensor,
    starts: torch.Tensor,
    scaling: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Causal attention of each token to its own document, (B, L, H, P) in the dtype of `value`, which is a half."""
    batch, heads, length, _ = query_BHLP.shape
    groups = heads // key_BKLP.shape[1]
    key, value = (part.repeat_interleave(groups, 1) if groups > 1 else part for part in (key_BKLP, value_BKLP))
    tokens = (part.transpose(1, 2).flatten(0, 1).to(value.dtype) for part in (query_BHLP, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    # A document is at most as long as a row; the exact maximum would be another number for each batch.
    out = varlen_attn(*tokens, starts, starts, length, length, scale=scaling, window_size=window)
    return out.view(batch, length, heads, -1)
