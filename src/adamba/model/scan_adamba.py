"""
The Mamba-2 recurrence in plain torch, for machines without kernels: fast, lean, and aware of document borders.

For each head with state S (P x N), step t:   S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,   y_t = S_t C_t + D x_t

Computed in chunks (Dao & Gu, 2024, section 6): inside a chunk as masked attention, between chunks as a recurrence of
states. Decay matrices are made per head, but scores C B^T once per *group*, and what a group's heads write to and read
from their states is one product; transformers' fallback repeats B and C for each head first.

The backward pass is written out: it makes the decay matrices again instead of keeping them, and a decay's gradient is
row sums minus column sums, so training needs neither the memory nor half of autograd's passes over them.

Shape legend: B batch, L tokens, C chunks, Q tokens of a chunk, G groups, H heads, J heads of a group, P head_dim,
N state size.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Numbers of a block on a CPU: what fits a core's second-level cache beside its temporaries.
BLOCK_SIZE = 2**18


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
    Returns y (B, L, H, P) and the last state (B, H, P, N), in fp32 or, for an fp64 dt, fp64, which all is computed in;
    x, B and C may be halves, which are converted a block at a time.

    Args:
        dt_BLH: step sizes, after bias and softplus.
        document_BL: a number for each document, changing at its border: no state crosses it.
    """
    length = x_BLHP.shape[1]
    size = min(chunk_size, length)
    padding = -length % size
    dtype = torch.promote_types(dt_BLH.dtype, torch.float32)
    tensors = [x_BLHP, dt_BLH.to(dtype), b_BLGN, c_BLGN]
    if padding:  # what is appended has dt = 0, so it neither decays nor writes
        tensors = [F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, padding)) for tensor in tensors]
        if document_BL is not None:
            document_BL = F.pad(document_BL, (0, padding), mode="replicate")
    x, dt, b, c = tensors
    if initial_state is not None:
        initial_state = initial_state.to(dtype)
    with torch.autocast(x_BLHP.device.type, enabled=False):
        y, last_state = ChunkScan.apply(x, dt, a_H.to(dtype), b, c, d_H.to(dtype), size, initial_state, document_BL)
    return y[:, :length] if padding else y, last_state


def blocks(tensor: torch.Tensor, size: int, numbers: int) -> Iterator[tuple[slice, slice]]:
    """
    Rows and tokens of a tensor (B, L, ...) that are taken together, in their order: all on a GPU; on a CPU what its
    cache holds, when `size` tokens, which stay together, make `numbers` numbers.
    """
    batch, length = tensor.shape[:2]
    parts = length // size
    together = batch * parts
    if tensor.device.type == "cpu":
        together = max(1, BLOCK_SIZE // numbers)
    num_rows, num_tokens = max(1, together // parts), min(parts, together) * size
    for row in range(0, batch, num_rows):
        for start in range(0, length, num_tokens):
            yield slice(row, row + num_rows), slice(start, min(start + num_tokens, length))


class Chunks:
    """
    What both passes need of a block. Inside a chunk each head has a matrix of its own: (B, C, G, J, Q, ...). Between
    chunks a group's heads share B and C, and their channels stand side by side: (B, C, G, Q, J P). Both are views or
    copies of what tokens are in: (B, C, Q, G, J, P).
    """

    def __init__(self, x, dt, a_H, b, c, size: int, document: torch.Tensor | None, block: tuple[slice, slice]):
        rows, tokens = block
        x, dt, b, c = (tensor[rows, tokens].to(dt.dtype) for tensor in (x, dt, b, c))
        batch, length, heads, head_dim = x.shape
        groups, states = b.shape[2:]
        split = (batch, length // size, size, groups)
        self.split = (*split, heads // groups, head_dim)
        self.x, self.dt = x.view(self.split), dt.view(self.split[:-1])
        self.dx = self.x * self.dt[..., None]
        self.b = b.reshape(*split, states).transpose(2, 3).contiguous()
        self.c = c.reshape(*split, states).transpose(2, 3).contiguous()
        decay = (dt * a_H).view(self.split[:-1]).permute(0, 1, 3, 4, 2).cumsum(-1)
        # Nobody sees what comes later, where the decay would be above 1 and could overflow.
        self.weights = (decay[..., :, None] - decay[..., None, :]).clamp_(max=0.0).exp_()
        self.other_document = None
        to_end, from_start = (decay[..., -1:] - decay).exp_(), decay.exp_()
        if document is not None:
            came_in = document[rows, max(tokens.start - 1, 0), None]
            document = document[rows, tokens].reshape(batch, -1, size)
            self.other_document = (document[..., :, None] != document[..., None, :])[:, :, None]
            last = document[..., -1]
            before = torch.cat((came_in, last[:, :-1]), dim=1)
            to_end *= (document == last[..., None])[:, :, None, None]  # reaches the end of the chunk
            from_start *= (document == before[..., None])[:, :, None, None]  # still what came in
        self.scores = self.visible(self.c @ self.b.transpose(-1, -2))[:, :, :, None] * self.weights
        self.kept = from_start[..., -1, None, None]
        self.to_end, self.from_start = (part.permute(0, 1, 4, 2, 3)[..., None] for part in (to_end, from_start))

    def visible(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, C, G, Q, Q) in place: zero for later tokens and for other documents."""
        scores = scores.tril_()
        return scores if self.other_document is None else scores.masked_fill_(self.other_document, 0.0)

    def heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, C, Q, G, J, P) -> (B, C, G, J, Q, P)"""
        return tensor.permute(0, 1, 3, 4, 2, 5).contiguous()

    def groups(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, C, Q, G, J, P) -> (B, C, G, Q, J P)"""
        return tensor.flatten(4).transpose(2, 3).contiguous()

    def tokens(self, tensor: torch.Tensor) -> torch.Tensor:
        """From either of both: -> (B, C, Q, G, J, P), a view"""
        if tensor.ndim == 6:
            return tensor.permute(0, 1, 4, 2, 3, 5)
        return tensor.transpose(2, 3).unflatten(-1, self.split[-2:])


class ChunkScan(torch.autograd.Function):
    """x, b and c of one floating type, the rest in that of dt; L a multiple of the chunk size; see `chunk_scan`."""

    @staticmethod
    def forward(ctx, x, dt, a_H, b, c, d_H, size, initial_state, document):
        (batch, length, heads, head_dim), (groups, states) = x.shape, b.shape[2:]
        state_shape = (groups, heads // groups, head_dim, states)
        y = dt.new_empty(x.shape)
        incoming = dt.new_empty(batch, length // size, *state_shape)
        last_state = dt.new_zeros(batch, *state_shape)
        if initial_state is not None:
            last_state.copy_(initial_state.view(last_state.shape))
        for block in blocks(x, size, heads * size**2):
            rows, tokens = block
            chunks = slice(tokens.start // size, tokens.stop // size)
            part = Chunks(x, dt, a_H, b, c, size, document, block)
            # Between chunks: what each chunk adds to the state, and how much of the incoming state it leaves.
            added = (part.groups(part.dx * part.to_end).transpose(-1, -2) @ part.b).unflatten(3, state_shape[1:3])
            state = last_state[rows]
            for chunk in range(added.shape[1]):
                incoming[rows, chunks.start + chunk] = state
                state = torch.addcmul(added[:, chunk], state, part.kept[:, chunk])
            last_state[rows] = state
            carried = part.c @ incoming[rows, chunks].flatten(3, 4).transpose(-1, -2)
            out = y[block].view(part.split).copy_(part.x).mul_(d_H.view(groups, -1, 1))
            out.addcmul_(part.tokens(carried), part.from_start)
            out += part.tokens(part.scores @ part.heads(part.dx))
        ctx.save_for_backward(x, dt, a_H, b, c, d_H, incoming, document)
        ctx.size, ctx.has_state = size, initial_state is not None
        return y, last_state.view(batch, heads, head_dim, states)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_last):
        x, dt, a_H, b, c, d_H, incoming, document = ctx.saved_tensors
        grad_x, grad_dt, grad_b, grad_c = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, b, c)
        )
        per_group = incoming.shape[2:4]
        a, d = (tensor.view(per_group) for tensor in (a_H, d_H))
        grad_a, grad_d = torch.zeros_like(a), torch.zeros_like(d)
        grad_state = grad_last.reshape(incoming[:, 0].shape).clone()
        for block in reversed([*blocks(x, ctx.size, x.shape[2] * ctx.size**2)]):
            rows, tokens = block
            part = Chunks(x, dt, a_H, b, c, ctx.size, document, block)
            before = incoming[rows, tokens.start // ctx.size : tokens.stop // ctx.size]
            to_y = grad_y[block].view(part.split)
            grad_d += (to_y * part.x).sum((0, 1, 2, 5))

            # Between chunks, backwards: what reached y from the incoming states, then the states' recurrence.
            weighted = to_y * part.from_start
            read = part.tokens(part.c @ before.flatten(3, 4).transpose(-1, -2))
            from_start = (weighted * read).sum(-1)
            weighted = part.groups(weighted)
            to_c = weighted @ before.flatten(3, 4)
            to_incoming = (weighted.transpose(-1, -2) @ part.c).unflatten(3, before.shape[3:5])
            state = grad_state[rows]
            added = torch.empty_like(before)
            for chunk in reversed(range(added.shape[1])):
                added[:, chunk] = state
                state = torch.addcmul(to_incoming[:, chunk], state, part.kept[:, chunk])
            grad_state[rows] = state
            from_start[:, :, -1] += (added * before).sum((-1, -2)) * part.from_start[:, :, -1, ..., 0]
            to_b = part.groups(part.dx * part.to_end) @ added.flatten(3, 4)
            to_dx = part.tokens(part.b @ added.flatten(3, 4).transpose(-1, -2)) * part.to_end
            to_end = (to_dx * part.dx).sum(-1)

            # Inside a chunk.
            out, dx = part.heads(to_y), part.heads(part.dx)
            to_dx += part.tokens(part.scores.transpose(-1, -2) @ out)
            to_scores = out @ dx.transpose(-1, -2)
            to_products = part.visible((to_scores * part.weights).sum(3))
            to_c += to_products @ part.b
            to_b += to_products.transpose(-1, -2) @ part.c
            to_decay = to_scores.mul_(part.scores)
            decay = (to_decay.sum(-1) - to_decay.sum(-2)).permute(0, 1, 4, 2, 3) + from_start - to_end
            decay[:, :, -1] += to_end.sum(2)

            step = decay.flip(2).cumsum(2).flip(2)
            in_place = grad_x[block].view(part.split) if grad_x.dtype == dt.dtype else None
            to_x = torch.mul(to_y, d[..., None], out=in_place).addcmul_(to_dx, part.dt[..., None])
            if in_place is None:
                grad_x[block] = to_x.view(grad_x[block].shape)
            grad_dt[block] = (to_dx * part.x).sum(-1).addcmul_(step, a).flatten(1, 2).flatten(2)
            grad_a += (step * part.dt).sum((0, 1, 2))
            grad_b[block], grad_c[block] = (part.transpose(2, 3).flatten(1, 2) for part in (to_b, to_c))
        grad_initial = grad_state.flatten(1, 2) if ctx.has_state else None
        return grad_x, grad_dt, grad_a.flatten(), grad_b, grad_c, grad_d.flatten(), None, grad_initial, None
