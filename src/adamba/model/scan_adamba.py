"""
The Mamba-2 recurrence in plain torch, for machines without kernels: fast, lean, and aware of document borders.

For each head with state S (P x N), step t:   S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,   y_t = S_t C_t + D x_t

Computed in chunks (Dao & Gu, 2024, section 6): inside a chunk as masked attention, between chunks as a recurrence of
states. Decay matrices are made per head, but scores C B^T once per *group*; transformers' fallback repeats B and C for
each head first.

Shape legend: B batch, L tokens, C chunks, Q tokens of a chunk, G groups, H heads, J heads of a group, P head_dim,
N state size.
"""

import torch
import torch.nn.functional as F


def chunk_scan(
    x_BLHP: torch.Tensor,
    dt_BLH: torch.Tensor,
    a_H: torch.Tensor,
    b_BLGN: torch.Tensor,
    c_BLGN: torch.Tensor,
    d_H: torch.Tensor,
    chunk_size: int,
    initial_state: torch.Tensor | None = None,
    document_BL: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns y (B, L, H, P) and the last state (B, H, P, N).

    Args:
        dt_BLH: step sizes, after bias and softplus.
        document_BL: a number for each document, changing at its border: no state crosses it.
    """
    batch, length, heads, head_dim = x_BLHP.shape
    groups, states = b_BLGN.shape[2:]
    per_group = heads // groups
    size = min(chunk_size, length)
    padding = -length % size
    chunks = (length + padding) // size

    def chunked(tensor: torch.Tensor, *tail: int) -> torch.Tensor:
        """(B, L, ...) -> (B, C, Q, *tail); what is appended has dt = 0, so it neither decays nor writes."""
        if padding:
            tensor = F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, padding))
        return tensor.reshape(batch, chunks, size, *tail)

    dt = chunked(dt_BLH, groups, per_group)
    x = chunked(x_BLHP, groups, per_group, head_dim)
    dx_BCGJQP = (x * dt[..., None]).permute(0, 1, 3, 4, 2, 5)
    b_BCGQN = chunked(b_BLGN, groups, states).transpose(2, 3)
    c_BCGQN = chunked(c_BLGN, groups, states).transpose(2, 3)
    decay_BCGJQ = (dt * a_H.view(groups, per_group)).permute(0, 1, 3, 4, 2).cumsum(-1)

    causal = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    whole_chunk = carried_in = None
    if document_BL is not None:
        document = F.pad(document_BL, (0, padding), mode="replicate") if padding else document_BL
        document = document.view(batch, chunks, size)
        causal = causal & (document[..., :, None] == document[..., None, :])
        causal = causal[:, :, None, None]
        last = document[..., -1]
        whole_chunk = (document == last[..., None])[:, :, None, None]  # reaches the end of the chunk
        before = torch.cat((document[:, :1, 0], last[:, :-1]), dim=1)
        carried_in = (document == before[..., None])[:, :, None, None]  # still the document that came in

    # Inside a chunk: attention with scores C B^T, weighted by the decay between the two places.
    between = decay_BCGJQ[..., :, None] - decay_BCGJQ[..., None, :]
    weights = between.masked_fill(~causal, float("-inf")).exp()
    scores = (c_BCGQN @ b_BCGQN.transpose(-1, -2))[:, :, :, None] * weights
    y = scores @ dx_BCGJQP

    # Between chunks: what each chunk adds to the state, and how much of the incoming state it leaves.
    to_end = (decay_BCGJQ[..., -1:] - decay_BCGJQ).exp()
    from_start = decay_BCGJQ.exp()
    if whole_chunk is not None:
        to_end, from_start = to_end * whole_chunk, from_start * carried_in
    added = (dx_BCGJQP * to_end[..., None]).transpose(-1, -2) @ b_BCGQN[:, :, :, None]
    kept = from_start[..., -1]
    if initial_state is None:
        state = added.new_zeros(batch, groups, per_group, head_dim, states)
    else:
        state = initial_state.to(added.dtype).view(batch, groups, per_group, head_dim, states)
    incoming = []
    for chunk in range(chunks):
        incoming.append(state)
        state = state * kept[:, chunk, ..., None, None] + added[:, chunk]
    carried = c_BCGQN[:, :, :, None] @ torch.stack(incoming, dim=1).transpose(-1, -2)
    y = y + carried * from_start[..., None]

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, length + padding, heads, head_dim)[:, :length]
    return y + x_BLHP * d_H[:, None], state.view(batch, heads, head_dim, states)


def scan_step(
    x_BHP: torch.Tensor,
    dt_BH: torch.Tensor,
    a_H: torch.Tensor,
    b_BGN: torch.Tensor,
    c_BGN: torch.Tensor,
    d_H: torch.Tensor,
    state_BHPN: torch.Tensor,
) -> torch.Tensor:
    """One token; `state_BHPN` is updated in place. Returns y (B, H, P)."""
    batch, heads, head_dim = x_BHP.shape
    groups = b_BGN.shape[1]
    state = state_BHPN.view(batch, groups, heads // groups, head_dim, -1)
    dx = (x_BHP * dt_BH[..., None]).view(batch, groups, -1, head_dim, 1)
    decay = (dt_BH * a_H).exp().view(batch, groups, -1, 1, 1)
    state.mul_(decay).addcmul_(dx.to(state.dtype), b_BGN[:, :, None, None].to(state.dtype))
    y = (state @ c_BGN[:, :, None, :, None].to(state.dtype)).view(batch, heads, head_dim)
    return y.to(x_BHP.dtype) + x_BHP * d_H[:, None]


def scan_states(
    x_BLHP: torch.Tensor,
    dt_BLH: torch.Tensor,
    a_H: torch.Tensor,
    b_BLGN: torch.Tensor,
    c_BLGN: torch.Tensor,
    d_H: torch.Tensor,
    state_BHPN: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A few tokens, none of which is final: y (B, L, H, P) and the state after each, (L, B, H, P, N)."""
    batch, length, heads, head_dim = x_BLHP.shape
    groups, size = b_BLGN.shape[2:]
    split = (batch, length, groups, heads // groups)
    x, dt, b, c = (part.to(state_BHPN.dtype) for part in (x_BLHP, dt_BLH, b_BLGN, c_BLGN))
    decay = (dt * a_H).exp().view(*split, 1, 1).to(state_BHPN.dtype)
    dx = (x * dt[..., None]).view(*split, head_dim, 1)
    states = (dx * b[:, :, :, None, None]).transpose(0, 1).contiguous()
    before = state_BHPN.view(batch, groups, heads // groups, head_dim, size)
    for step in range(length):
        before = states[step].addcmul_(before, decay[:, step])
    y = (states.transpose(0, 1) @ c[:, :, :, None, :, None]).reshape(batch, length, heads, head_dim)
    return y.to(x_BLHP.dtype) + x_BLHP * d_H[:, None], states.view(length, batch, heads, head_dim, size)


def short_conv(window_BXW: torch.Tensor, weight_XK: torch.Tensor, bias_X: torch.Tensor) -> torch.Tensor:
    """The causal convolution, then SiLU, of the last W - K + 1 places of a short window; cheaper than `conv1d`."""
    seen_BXLK = window_BXW.unfold(-1, weight_XK.shape[1], 1)
    return F.silu((seen_BXLK * weight_XK[:, None]).sum(-1) + bias_X[:, None])


def causal_conv(
    x_BLX: torch.Tensor, weight_XK: torch.Tensor, bias_X: torch.Tensor, document_BL: torch.Tensor
) -> torch.Tensor:
    """A causal depthwise convolution, then SiLU, that does not reach over document borders."""
    kernel = weight_XK.shape[1]
    out = x_BLX * weight_XK[:, -1] + bias_X
    for back in range(1, min(kernel, x_BLX.shape[1])):
        same = (document_BL[:, back:] == document_BL[:, :-back])[..., None]
        shifted = x_BLX[:, :-back] * (weight_XK[:, -1 - back] * same)
        out = out + F.pad(shifted, (0, 0, back, 0))
    return F.silu(out)
