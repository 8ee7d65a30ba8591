"""
Elastic attention, MLP and norm: at width `w` they use the first `w` channels, heads and units, by true slicing.

Shape legend: B batch, L tokens, W channels in use, H query heads, K key/value heads, P head_dim, U MLP units.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .configuration_adamba import AdambaConfig
from .documents_adamba import attend_in_documents
from .linear_adamba import linear
from .norm_adamba import rms_norm


class ElasticRMSNorm(nn.Module):
    """
    `x[:w] / sqrt(sum(x[:w]²) / min(w, base_width) + eps) * gain[:w]`, statistic in fp32.

    At the model's first hidden size this is RMSNorm (Zhang & Sennrich, 2019). After a width expansion the new
    channels start at zero and add nothing to the sum, so dividing by the *old* width keeps the function.
    """

    def __init__(self, size: int, base_width: int, eps: float, gain: bool = True):
        super().__init__()
        self.base_width = base_width
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if gain else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        if width <= self.base_width and x.dtype in (torch.float32, torch.float64):
            # The same operations in one call; halves are rounded elsewhere in torch's than in Llama's.
            weight = None if self.weight is None else first_channels(self.weight, width).to(x.dtype)
            return rms_norm(x, weight, self.eps)
        x_float = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        # A slice that is all would cost a copy in the backward pass.
        known = x_float if width <= self.base_width else x_float[..., : self.base_width]
        mean_square = known.pow(2).mean(-1, keepdim=True)
        if width > self.base_width:
            # Apart and in fp64, so that channels that are zero do not even change the rounding: fp32 logits stay
            # the same to the last bit through insertion and expansion (MPS has no fp64).
            dtype = torch.float64 if x.dtype == torch.float32 and x.device.type != "mps" else None
            added = x_float[..., self.base_width :].pow(2).sum(-1, keepdim=True, dtype=dtype)
            mean_square = mean_square + (added / self.base_width).to(x_float.dtype)
        normed = (x_float * torch.rsqrt(mean_square + self.eps)).to(x.dtype)
        if self.weight is None:
            return normed
        return (self.weight if width == self.weight.shape[0] else self.weight[:width]) * normed

    def extra_repr(self) -> str:
        size = None if self.weight is None else self.weight.shape[0]
        return f"{size}, base_width={self.base_width}, eps={self.eps}"


class ElasticLinear(nn.Linear):
    """A linear layer whose input is a prefix of its channels and whose output may be one: only that part is read."""

    def forward(self, x: torch.Tensor, out_features: int | None = None) -> torch.Tensor:
        out_features = self.out_features if out_features is None else out_features
        weight, bias = self.weight, self.bias
        if x.shape[-1] < self.in_features or out_features < self.out_features:
            weight = weight[:out_features, : x.shape[-1]]
            bias = None if bias is None else bias[:out_features]
        return linear(x, weight, bias, self.training)


def first_channels(hidden: torch.Tensor, width: int) -> torch.Tensor:
    """hidden[..., :width], but at full width the tensor itself: a slice costs a copy in the backward pass."""
    return hidden if width == hidden.shape[-1] else hidden[..., :width]


def rotations(cos_BLP: torch.Tensor, sin_BLP: torch.Tensor, sign: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rotate` takes, (B, 1, L, P): the sine has the minus of the first half, once for all layers."""
    first, second = (sin_BLP * sign).chunk(2, dim=-1)
    return cos_BLP.unsqueeze(1), torch.cat((-first, second), dim=-1).unsqueeze(1)


def rotate(x_BHLP: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """
    Rotary embedding (Su et al., 2021) of channel pairs that are half a head apart, as in Llama and rounded as there:
    a fused `addcmul` would be 1e-5 away in the logits of a trained base.
    """
    cos, signed_sin = rope
    return x_BHLP * cos + x_BHLP.roll(x_BHLP.shape[-1] // 2, -1) * signed_sin


class ElasticAttention(nn.Module):
    """Grouped-query attention on the first heads of a layer; `active` rows attend, the others only fill the cache."""

    def __init__(self, config: AdambaConfig, layer_idx: int, max_width: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm
        self.width_step = config.width_step  # channels that go with one key/value head
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        self.use_rope = bool(config.rope_layers[layer_idx])
        num_heads, num_kv_heads = config.heads_at(max_width)
        query_size, kv_size = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = ElasticLinear(max_width, query_size, bias=config.attention_bias)
        self.k_proj = ElasticLinear(max_width, kv_size, bias=config.attention_bias)
        self.v_proj = ElasticLinear(max_width, kv_size, bias=config.attention_bias)
        self.o_proj = ElasticLinear(query_size, max_width, bias=config.attention_output_bias)
        if self.qk_norm is not None:
            norm_args = (self.head_dim, self.head_dim, config.rms_norm_eps, config.norm_gain)
            self.q_norm = ElasticRMSNorm(*norm_args)
            self.k_norm = ElasticRMSNorm(*norm_args)

    def _heads(self, x_BLX: torch.Tensor, num_heads: int) -> torch.Tensor:
        return x_BLX.view(*x_BLX.shape[:-1], num_heads, self.head_dim).transpose(1, 2)

    def _position(self, x_BHLP: torch.Tensor, norm: nn.Module | None, rope: tuple[torch.Tensor, torch.Tensor]):
        if norm is not None and self.qk_norm == "before_rope":
            x_BHLP = norm(x_BHLP)
        if self.use_rope:
            x_BHLP = rotate(x_BHLP, rope)
        if norm is not None and self.qk_norm == "after_rope":
            x_BHLP = norm(x_BHLP)
        return x_BHLP

    def key_value(
        self, x_BLW: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, K, L, P) of the heads that belong to W channels."""
        num_kv_heads = x_BLW.shape[-1] // self.width_step
        kv_size = num_kv_heads * self.head_dim
        norm = self.k_norm if self.qk_norm is not None else None
        key = self._position(self._heads(self.k_proj(x_BLW, kv_size), num_kv_heads), norm, rope)
        return key, self._heads(self.v_proj(x_BLW, kv_size), num_kv_heads)

    def attend(
        self,
        x_BLW: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        starts: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """What L queries read from keys and values, (B, L, W); with `starts`, each from its own document."""
        width = x_BLW.shape[-1]
        num_heads = width // self.width_step * self.num_key_value_groups
        norm = self.q_norm if self.qk_norm is not None else None
        query = self._position(self._heads(self.q_proj(x_BLW, num_heads * self.head_dim), num_heads), norm, rope)
        if starts is not None:
            out_BLHP = attend_in_documents(query, key, value, starts, self.scaling, self.sliding_window)
            return self.o_proj(out_BLHP.reshape(*x_BLW.shape[:-1], -1), width)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out_BLHP, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(out_BLHP.reshape(*x_BLW.shape[:-1], -1), width)

    def forward(
        self,
        x_BLW: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        active: torch.Tensor | None,
        num_live: int | None = None,
        **kwargs,
    ) -> torch.Tensor:
        key, value = self.key_value(x_BLW, rope)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if num_live is not None:
            x_BLW, rope = x_BLW[:, -num_live:], tuple(part[:, :, -num_live:] for part in rope)
        if active is not None:
            x_BLW, key, value = x_BLW[active], key[active], value[active]
            rope, attention_mask = rows_of(rope, attention_mask, active)
        return self.attend(x_BLW, key, value, rope, attention_mask, **kwargs)


def rows_of(rope, attention_mask, rows: torch.Tensor):
    """Rotations and mask of some rows; what is the same for all rows has one row."""
    rope = tuple(part if part.shape[0] == 1 else part[rows] for part in rope)
    if attention_mask is not None and attention_mask.shape[0] > 1:
        attention_mask = attention_mask[rows]
    return rope, attention_mask


class ElasticMLP(nn.Module):
    def __init__(self, config: AdambaConfig, max_width: int):
        super().__init__()
        units = config.units_at(max_width)
        self.intermediate_size, self.hidden_size = config.intermediate_size, config.hidden_size
        self.gated = config.mlp_gated
        self.act = ACT2FN[config.hidden_act]
        if self.gated:
            self.gate_proj = ElasticLinear(max_width, units, bias=config.mlp_bias)
        self.up_proj = ElasticLinear(max_width, units, bias=config.mlp_bias)
        self.down_proj = ElasticLinear(units, max_width, bias=config.mlp_bias)

    def forward(self, x_BLW: torch.Tensor) -> torch.Tensor:
        width = x_BLW.shape[-1]
        units = width * self.intermediate_size // self.hidden_size
        up_BLU = self.up_proj(x_BLW, units)
        hidden_BLU = self.act(self.gate_proj(x_BLW, units)) * up_BLU if self.gated else self.act(up_BLU)
        return self.down_proj(hidden_BLU, width)


class AttentionLayer(GradientCheckpointingLayer):
    """norm -> attention -> norm -> MLP on the first `width` residual channels; the others pass by untouched."""

    def __init__(self, config: AdambaConfig, layer_idx: int, max_width: int):
        super().__init__()
        norm_args = (max_width, config.norm_base_width, config.rms_norm_eps, config.norm_gain)
        self.input_layernorm = ElasticRMSNorm(*norm_args)
        self.self_attn = ElasticAttention(config, layer_idx, max_width)
        self.post_attention_layernorm = ElasticRMSNorm(*norm_args)
        self.mlp = ElasticMLP(config, max_width)

    def forward(
        self,
        hidden: torch.Tensor,
        width: int,
        rope: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        active: torch.Tensor | None = None,
        num_live: int | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        hidden (B, L, hidden_size) -> the same shape. `active` (indices of rows) limits who is computed; with
        `num_live` only the last so many tokens are, and returned. The others only fill the cache.
        """
        x = first_channels(hidden, width)
        attended = self.self_attn(self.input_layernorm(x), rope, attention_mask, cache, active, num_live, **kwargs)
        if num_live is not None:
            hidden = hidden[:, -num_live:]
            x = first_channels(hidden, width)
        x = (x if active is None else x[active]) + attended
        x = x + self.mlp(self.post_attention_layernorm(x))
        if active is not None:
            hidden = hidden.clone()
            hidden[active, :, :width] = x
            return hidden
        return x if width == hidden.shape[-1] else torch.cat((x, hidden[..., width:]), dim=-1)

    def fill(self, hidden: torch.Tensor, width: int, rope: tuple[torch.Tensor, torch.Tensor], cache: Cache) -> None:
        """Tokens that skip this layer: their keys and values alone."""
        key, value = self.self_attn.key_value(self.input_layernorm(hidden[..., :width]), rope)
        cache.update(key, value, self.self_attn.layer_idx)

    def forward_either(
        self,
        hidden: torch.Tensor,
        widths: tuple[int, int],
        rope: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache,
        active: torch.Tensor | None,
        wide: torch.Tensor | None,
        **kwargs,
    ) -> torch.Tensor:
        """
        A layer whose tokens run at one of two widths. The cache holds the keys and values of both, side by side on
        the heads' axis, so each row finds every earlier token at its own width. `wide` (B,): who takes the larger;
        `None`: nobody.
        """
        normed = [self.input_layernorm(hidden[..., :width]) for width in widths]
        pairs = [self.self_attn.key_value(x, rope) for x in normed]
        key, value = (torch.cat(both, dim=1) for both in zip(*pairs, strict=True))
        key, value = cache.update(key, value, self.self_attn.layer_idx)
        num_heads = [pair[0].shape[1] for pair in pairs]
        live = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        live[slice(None) if active is None else active] = True
        wide = torch.zeros_like(live) if wide is None else wide
        result = hidden.clone()
        heads = zip(key.split(num_heads, dim=1), value.split(num_heads, dim=1), strict=True)
        for width, x, (k, v), chosen in zip(widths, normed, heads, (live & ~wide, live & wide), strict=True):
            rows = chosen.nonzero().squeeze(-1)
            if rows.numel():
                row_rope, mask = rows_of(rope, attention_mask, rows)
                y = hidden[rows, :, :width] + self.self_attn.attend(
                    x[rows], k[rows], v[rows], row_rope, mask, **kwargs
                )
                result[rows, :, :width] = y + self.mlp(self.post_attention_layernorm(y))
        return result
