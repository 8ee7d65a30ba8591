"""
The Mamba-2 layer (Dao & Gu, 2024, "Transformers are SSMs"), always at full width, on transformers' own Mamba-2
functions: hub kernels or `mamba_ssm` where present, plain torch otherwise.

Shape legend: B batch, L tokens, D hidden, I inner channels, H SSM heads, P head_dim, G groups, N state size.
"""

import math

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mamba2.modeling_mamba2 import (
    MambaRMSNormGated,
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba2_chunk_scan,
    mamba2_selective_state_update,
)

from .configuration_adamba import AdambaConfig
from .layers_adamba import ElasticRMSNorm

TIME_STEP_MIN, TIME_STEP_MAX, TIME_STEP_FLOOR = 1e-3, 1e-1, 1e-4


class DocumentRows:
    """
    Packed rows seen as one row a document, so that neither the convolution nor the state crosses a boundary.

    A boundary is where `position_ids` does not go on by one. `split` turns (B, L, X) into (documents, longest, X),
    padded on the right; `join` is its inverse.
    """

    def __init__(self, position_ids: torch.Tensor):
        batch, length = position_ids.shape
        starts = torch.ones_like(position_ids, dtype=torch.bool)
        starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
        start_at = starts.flatten().nonzero().squeeze(-1)
        ends = torch.cat((start_at[1:], start_at.new_tensor([batch * length])))
        self.lengths = ends - start_at
        offsets = torch.arange(int(self.lengths.max()), device=position_ids.device)
        self.inside = offsets < self.lengths[:, None]
        self.index = torch.where(self.inside, start_at[:, None] + offsets, start_at[:, None])

    @classmethod
    def find(cls, position_ids: torch.Tensor | None) -> "DocumentRows | None":
        """`None` unless some row holds more than one document."""
        if position_ids is None or position_ids.shape[1] == 1:
            return None
        if bool((position_ids[:, 1:] == position_ids[:, :-1] + 1).all()):
            return None
        return cls(position_ids)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1)[self.index] * self.inside[..., None]

    def join(self, rows: torch.Tensor, batch: int, length: int) -> torch.Tensor:
        return rows[self.inside].view(batch, length, *rows.shape[2:])


class Mamba2Mixer(nn.Module):
    """`in_proj` makes gate, x, B, C and dt; a short causal convolution; the selective scan; a gated group norm."""

    def __init__(self, config: AdambaConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.mamba_num_heads
        self.head_dim = config.mamba_head_dim
        self.num_groups = config.mamba_num_groups
        self.state_size = config.mamba_state_size
        self.inner_size = config.mamba_inner_size
        self.chunk_size = config.mamba_chunk_size
        self.conv_kernel = config.mamba_conv_kernel
        self.group_state_size = self.num_groups * self.state_size
        self.conv_size = self.inner_size + 2 * self.group_state_size
        self.in_proj = nn.Linear(config.hidden_size, self.inner_size + self.conv_size + self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(self.conv_size, self.conv_size, self.conv_kernel, groups=self.conv_size)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = MambaRMSNormGated(
            self.inner_size, group_size=self.inner_size // self.num_groups, eps=config.rms_norm_eps
        )
        self.out_proj = nn.Linear(self.inner_size, config.hidden_size, bias=False)

    def forward(
        self,
        x_BLD: torch.Tensor,
        cache: Cache | None,
        padding_mask: torch.Tensor | None,
        documents: DocumentRows | None,
        active: torch.Tensor | None,
    ) -> torch.Tensor:
        batch, length, _ = x_BLD.shape
        if padding_mask is not None:
            x_BLD = x_BLD * padding_mask[..., None].to(x_BLD.dtype)
        gate, conv_in, dt = self.in_proj(x_BLD).split([self.inner_size, self.conv_size, self.num_heads], dim=-1)
        if documents is not None:
            conv_in, dt = documents.split(conv_in), documents.split(dt)
        state = cache.get_recurrent_state(self.layer_idx) if cache is not None else None
        conv_out = self._convolve(conv_in, cache)
        if padding_mask is not None:
            # The convolution's bias reaches padding too; without this the state would see it.
            conv_out = conv_out * padding_mask[..., None].to(conv_out.dtype)
        if length == 1 and state is not None:
            y = self._step(conv_out.squeeze(1), dt.squeeze(1), state).unsqueeze(1)
        else:
            y = self._scan(conv_out, dt, state, cache)
        if documents is not None:
            y = documents.join(y, batch, length)
        if active is not None:
            y, gate = y[active], gate[active]
        return self.out_proj(self.norm(y, gate))

    def _convolve(self, conv_in: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        length = conv_in.shape[1]
        channels_first = conv_in.transpose(1, 2)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        conv_state = cache.get_conv_state(self.layer_idx) if cache is not None else None
        if conv_state is not None and length == 1:
            out = causal_conv1d_update(channels_first, conv_state, weight, bias, activation="silu")
        else:
            if cache is not None:
                channels_first = cache.update_conv_state(
                    channels_first, self.layer_idx, conv_kernel_size=self.conv_kernel
                )
            out = causal_conv1d_fn(channels_first, weight, bias, activation="silu")[:, :, -length:]
        return out.transpose(1, 2)

    def _split(self, conv_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, b, c = conv_out.split([self.inner_size, self.group_state_size, self.group_state_size], dim=-1)
        lead = conv_out.shape[:-1]
        return (
            x.reshape(*lead, self.num_heads, self.head_dim),
            b.reshape(*lead, self.num_groups, self.state_size),
            c.reshape(*lead, self.num_groups, self.state_size),
        )

    def _step(self, conv_out_BX: torch.Tensor, dt_BH: torch.Tensor, state_BHPN: torch.Tensor) -> torch.Tensor:
        """One token; the state is updated in place."""
        x_BHP, b_BGN, c_BGN = self._split(conv_out_BX)
        per_channel = (self.num_heads, self.head_dim)
        y_BHP = mamba2_selective_state_update(
            state_BHPN,
            x_BHP,
            dt_BH[..., None].expand(-1, *per_channel),
            -self.A_log.exp()[:, None, None].expand(*per_channel, self.state_size),
            b_BGN,
            c_BGN,
            self.D[:, None].expand(*per_channel),
            dt_bias=self.dt_bias[:, None].expand(*per_channel),
            dt_softplus=True,
        )
        return y_BHP.flatten(-2)

    def _scan(
        self, conv_out: torch.Tensor, dt: torch.Tensor, state: torch.Tensor | None, cache: Cache | None
    ) -> torch.Tensor:
        x_BLHP, b_BLGN, c_BLGN = self._split(conv_out)
        y, last_state = mamba2_chunk_scan(
            x_BLHP,
            dt,
            -self.A_log.exp(),
            b_BLGN,
            c_BLGN,
            chunk_size=min(self.chunk_size, conv_out.shape[1]),
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            initial_states=state,
            return_final_states=True,
        )
        if cache is not None:
            cache.update_recurrent_state(last_state, self.layer_idx)
        return y.to(conv_out.dtype).flatten(-2)


class MambaLayer(GradientCheckpointingLayer):
    """norm -> Mamba-2 mixer, added to the residual stream at full width: the memory backbone of every sub-network."""

    def __init__(self, config: AdambaConfig, layer_idx: int):
        super().__init__()
        self.norm = ElasticRMSNorm(config.hidden_size, config.norm_base_width, config.rms_norm_eps, config.norm_gain)
        self.mixer = Mamba2Mixer(config, layer_idx)

    def forward(
        self,
        hidden: torch.Tensor,
        cache: Cache | None = None,
        padding_mask: torch.Tensor | None = None,
        documents: DocumentRows | None = None,
        active: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden (B, L, D) -> the same shape; rows that are not `active` only advance their state."""
        mixed = self.mixer(self.norm(hidden), cache, padding_mask, documents, active)
        if active is None:
            return hidden + mixed
        hidden = hidden.clone()
        hidden[active] = hidden[active] + mixed
        return hidden


@torch.no_grad()
def init_time_steps(dt_bias: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Fill `dt_bias` so that softplus(dt_bias) is log-uniform in [1e-3, 1e-1] (Mamba, section 3.6)."""
    span = math.log(TIME_STEP_MAX) - math.log(TIME_STEP_MIN)
    uniform = torch.rand(dt_bias.shape, generator=generator)
    dt = torch.exp(uniform * span + math.log(TIME_STEP_MIN)).clamp(min=TIME_STEP_FLOOR)
    inverse_softplus = dt + torch.log(-torch.expm1(-dt))
    return dt_bias.copy_(inverse_softplus)


@torch.no_grad()
def init_decay(a_log: torch.Tensor) -> torch.Tensor:
    """Fill `A_log` with log(1), log(2), … modulo 16: real, distinct decays (Mamba-2's range, A in [1, 16])."""
    heads = torch.arange(a_log.shape[0], dtype=torch.float32)
    return a_log.copy_(torch.log(heads % 16 + 1))

