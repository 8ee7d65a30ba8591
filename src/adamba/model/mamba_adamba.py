"""
The Mamba-2 layer (Dao & Gu, 2024, "Transformers are SSMs"), always at full width: transformers' kernel entry points on
a GPU that has `mamba_ssm`, the plain torch twin of `scan_adamba` elsewhere.

Shape legend: B batch, L tokens, D hidden, I inner channels, H SSM heads, P head_dim, G groups, N state size.
"""

import math

import torch
from torch import nn
from torch.nn.functional import softplus
from transformers.cache_utils import Cache
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mamba2.modeling_mamba2 import (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba2_chunk_scan,
    mamba2_selective_state_update,
    mamba2_split_conv1d_scan_combined,
)

from .configuration_adamba import AdambaConfig
from .convolution_adamba import causal_conv, convolve_rows, kernel_takes, short_conv
from .kernels_adamba import has_kernels
from .layers_adamba import ElasticLinear, ElasticRMSNorm
from .norm_adamba import GatedRMSNorm
from .recurrence_adamba import scan_states, scan_step
from .scan_adamba import chunk_scan

SHORT = 16  # tokens up to which the convolution is cheaper as a plain sum on a CPU
TIME_STEP_MIN, TIME_STEP_MAX, TIME_STEP_FLOOR = 1e-3, 1e-1, 1e-4


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
        self.in_proj = ElasticLinear(config.hidden_size, self.inner_size + self.conv_size + self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(self.conv_size, self.conv_size, self.conv_kernel, groups=self.conv_size)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GatedRMSNorm(
            self.inner_size, group_size=self.inner_size // self.num_groups, eps=config.rms_norm_eps
        )
        self.out_proj = ElasticLinear(self.inner_size, config.hidden_size, bias=False)

    @property
    def decay_rates(self) -> torch.Tensor:
        """A of each head, below zero; of a model in halves in fp32, as its kernels expect."""
        return -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()

    @force_accelerate_hooks(["conv1d", "norm"])  # their weights are read without calling them
    def forward(
        self,
        x_BLD: torch.Tensor,
        cache: Cache | None,
        padding_mask: torch.Tensor | None,
        documents: torch.Tensor | None,
        active: torch.Tensor | None,
        num_live: int | None = None,
    ) -> torch.Tensor:
        if padding_mask is not None:
            x_BLD = x_BLD * padding_mask[..., None].to(x_BLD.dtype)
        y = self._mix(self.in_proj(x_BLD), x_BLD.dtype, cache, padding_mask, documents, active, num_live)
        return self.out_proj(y) if y.numel() else x_BLD[:0]

    def _mix(
        self,
        projected: torch.Tensor,
        dtype: torch.dtype,
        cache: Cache | None,
        padding_mask: torch.Tensor | None,
        documents: torch.Tensor | None,
        active: torch.Tensor | None,
        num_live: int | None,
    ) -> torch.Tensor:
        """All between both projections: gate, x, B, C and dt (B, L, ...) -> (rows, tokens, I), what is asked for."""
        whole = cache is None and active is None and num_live is None
        if whole and has_kernels("mamba_ssm", projected) and kernel_takes(projected, self.conv1d.weight.squeeze(1)):
            if padding_mask is not None:  # what no token sees is a document of its own
                documents = padding_mask.to(torch.int32)
            mixed = self._mix_by_kernel(projected, documents)
            if mixed is not None:  # what transformers gives where it found no such kernel
                return mixed
        batch, length, _ = projected.shape
        gate, conv_in, dt = projected.split([self.inner_size, self.conv_size, self.num_heads], dim=-1)
        state = cache.get_recurrent_state(self.layer_idx) if cache is not None else None
        conv_out = self._convolve(conv_in, cache, documents)
        if padding_mask is not None:
            # The convolution's bias reaches padding too; without this the state would see it.
            conv_out = conv_out * padding_mask[..., None].to(conv_out.dtype)
        x, b, c = self._split(conv_out)
        history = state_history(cache, self.layer_idx)
        if history is not None and state is not None:
            y, states = scan_states(x, softplus(dt + self.dt_bias), self.decay_rates, b, c, self.D, state)
            history.extend(states)
            cache.layers[self.layer_idx].recurrent_states[0] = states[-1]
        elif length == 1 and state is not None:
            y = self._step(x, dt, b, c, state)
        else:
            y, last_state = self._scan(x, dt, b, c, state, documents)
            if cache is not None:
                cache.update_recurrent_state(last_state, self.layer_idx)
        y = y.to(dtype).reshape(batch, length, self.inner_size)
        if num_live is not None:
            y, gate = y[:, -num_live:], gate[:, -num_live:]
        if active is not None:
            y, gate = y[active], gate[active]
        return self.norm(y, gate) if y.numel() else y

    def _mix_by_kernel(self, projected: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor | None:
        """Convolution, scan and gated norm in one, which keeps little and makes the convolution again in backward."""
        return mamba2_split_conv1d_scan_combined(
            projected,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            self.decay_rates,
            D=self.D,
            chunk_size=self.chunk_size,
            seq_idx=documents,
            rmsnorm_weight=self.norm.weight,
            rmsnorm_eps=self.norm.variance_epsilon,
            headdim=self.head_dim,
            ngroups=self.num_groups,
            norm_before_gate=False,
        )

    def _convolve(self, conv_in: torch.Tensor, cache: Cache | None, documents: torch.Tensor | None) -> torch.Tensor:
        length = conv_in.shape[1]
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        channels_first = conv_in.transpose(1, 2)
        conv_state = cache.get_conv_state(self.layer_idx) if cache is not None else None
        if conv_state is None:
            if cache is not None:
                cache.update_conv_state(channels_first, self.layer_idx, conv_kernel_size=self.conv_kernel)
            return convolve_rows(conv_in, weight, bias, documents)
        # Tokens may come in another precision than the prompt did (autocast around one and not the other).
        by_kernel = kernel_takes(conv_in, weight) and conv_state.dtype == conv_in.dtype
        recording = state_history(cache, self.layer_idx) is not None
        if recording or 1 < length <= SHORT and not conv_state.is_cuda:
            window = cache.update_conv_state(channels_first, self.layer_idx, conv_kernel_size=self.conv_kernel)
            out = short_conv(window[..., -(self.conv_kernel - 1 + length) :], weight, bias)
        elif length == 1 and not by_kernel:
            window = torch.cat((conv_state[..., 1:], channels_first), dim=-1)
            conv_state.copy_(window)
            out = short_conv(window[..., -self.conv_kernel :], weight, bias)
        elif length == 1:
            out = causal_conv1d_update(channels_first, conv_state, weight, bias, activation="silu")
        else:
            window = cache.update_conv_state(channels_first, self.layer_idx, conv_kernel_size=self.conv_kernel)
            if has_kernels("causal_conv1d", window) and not kernel_takes(window, weight):
                return causal_conv(window.transpose(1, 2), weight, bias)[:, -length:]
            out = causal_conv1d_fn(window, weight, bias, activation="silu")[:, :, -length:]
        return out.transpose(1, 2)

    def _split(self, conv_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, b, c = conv_out.split([self.inner_size, self.group_state_size, self.group_state_size], dim=-1)
        lead = conv_out.shape[:-1]
        return (
            x.reshape(*lead, self.num_heads, self.head_dim),
            b.reshape(*lead, self.num_groups, self.state_size),
            c.reshape(*lead, self.num_groups, self.state_size),
        )

    def _step(self, x_BLHP, dt_BLH, b_BLGN, c_BLGN, state_BHPN: torch.Tensor) -> torch.Tensor:
        """One token; the state is updated in place. Returns y (B, H, P)."""
        x, dt, b, c = (part.squeeze(1) for part in (x_BLHP, dt_BLH, b_BLGN, c_BLGN))
        a_H = self.decay_rates
        if has_kernels("mamba_ssm", x):
            shape = (self.num_heads, self.head_dim)
            return mamba2_selective_state_update(
                state_BHPN,
                x,
                dt[..., None].expand(-1, *shape),
                a_H[:, None, None].expand(*shape, self.state_size),
                b,
                c,
                self.D[:, None].expand(*shape),
                dt_bias=self.dt_bias[:, None].expand(*shape),
                dt_softplus=True,
            )
        return scan_step(x, softplus(dt + self.dt_bias), a_H, b, c, self.D, state_BHPN)

    def _scan(self, x_BLHP, dt_BLH, b_BLGN, c_BLGN, state, documents) -> tuple[torch.Tensor, torch.Tensor]:
        """Many tokens. Returns y (B, L, H, P) and the last state (B, H, P, N)."""
        a_H = self.decay_rates
        if has_kernels("mamba_ssm", x_BLHP):
            return mamba2_chunk_scan(
                x_BLHP,
                dt_BLH,
                a_H,
                b_BLGN,
                c_BLGN,
                chunk_size=self.chunk_size,
                D=self.D,
                dt_bias=self.dt_bias,
                dt_softplus=True,
                initial_states=state,
                seq_idx=None if documents is None else documents.int(),
                return_final_states=True,
            )
        dt_BLH = softplus(dt_BLH + self.dt_bias)
        return chunk_scan(x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN, self.D, self.chunk_size, state, documents)


def state_history(cache: Cache | None, layer_idx: int) -> list[torch.Tensor] | None:
    """The states since the last token that is final, while `speculation_adamba` drafts on this cache; else `None`."""
    return None if cache is None else getattr(cache.layers[layer_idx], "state_history", None)


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
        documents: torch.Tensor | None = None,
        active: torch.Tensor | None = None,
        num_live: int | None = None,
    ) -> torch.Tensor:
        """
        hidden (B, L, D) -> the same shape; rows that are not `active` only advance their state, and so do all but the
        last `num_live` tokens, which alone are returned.
        """
        mixed = self.mixer(self.norm(hidden), cache, padding_mask, documents, active, num_live)
        if num_live is not None:
            hidden = hidden[:, -num_live:]
        if active is not None and active.numel() == 0:
            return hidden
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
