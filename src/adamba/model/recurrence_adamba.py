"""
The Mamba-2 recurrence one token, or a few tokens, at a time; `scan_adamba` has the equation and the shape legend.
"""

import torch


def scan_step(
    x_BHP: torch.Tensor,
    dt_BH: torch.Tensor,
    a_H: torch.Tensor,
    b_BGN: torch.Tensor,
    c_BGN: torch.Tensor,
    d_H: torch.Tensor,
    state_BHPN: torch.Tensor,
) -> torch.Tensor:
    """
    One token; `state_BHPN` is updated in place. Returns y (B, H, P). All is computed in the state's precision: as a
    bf16 number the decay of a slow head, 0.9985, is 1, and nothing would ever be forgotten.
    """
    batch, heads, head_dim = x_BHP.shape
    groups = b_BGN.shape[1]
    x, dt, b, c = (part.to(state_BHPN.dtype) for part in (x_BHP, dt_BH, b_BGN, c_BGN))
    state = state_BHPN.view(batch, groups, heads // groups, head_dim, -1)
    dx = (x * dt[..., None]).view(batch, groups, -1, head_dim, 1)
    decay = (dt * a_H).exp().view(batch, groups, -1, 1, 1)
    state.mul_(decay).addcmul_(dx, b[:, :, None, None])
    y = read(state.flatten(2, 3), c).view(batch, heads, head_dim)
    return torch.addcmul(y, x, d_H[:, None].to(x.dtype)).to(x_BHP.dtype)


def read(state: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """(..., X, N) and (..., N) -> (..., X), as a row times a matrix; a column takes a CPU six times as long."""
    return (c.unsqueeze(-2) @ state.transpose(-1, -2)).squeeze(-2)


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
    decay = (dt * a_H).exp().view(*split, 1, 1)
    dx = (x * dt[..., None]).view(*split, head_dim, 1)
    states = (dx * b[:, :, :, None, None]).transpose(0, 1).contiguous()
    before = state_BHPN.view(batch, groups, heads // groups, head_dim, size)
    for step in range(length):
        before = states[step].addcmul_(before, decay[:, step])
    y = read(states.transpose(0, 1).flatten(3, 4), c).view(batch, length, heads, head_dim)
    return y.to(x_BLHP.dtype) + x_BLHP * d_H[:, None], states.view(length, batch, heads, head_dim, size)
