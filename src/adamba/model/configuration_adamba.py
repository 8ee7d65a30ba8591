"""Configuration of an elastic attention + Mamba-2 hybrid."""

from numbers import Number
from operator import index

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

ATTENTION_LAYERS = ("full_attention", "sliding_attention")
COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "norm_base_width", "sliding_window", "exit_gate_size", "router_size"),
    *("mamba_head_dim", "mamba_state_size", "mamba_num_groups", "mamba_expand", "mamba_conv_kernel"),
    "mamba_chunk_size",
)


@strict
class AdambaConfig(PreTrainedConfig):
    r"""
    One block serves every supported base: what differs between Llama, Qwen3, SmolLM3 and NanoChat is a field here.

    Args:
        layer_types: one of `full_attention`, `sliding_attention`, `linear_attention` (Mamba-2) for each layer.
            Default: attention and Mamba-2 in turn.
        head_dim: channels of one attention head; never changes under surgery, so rotary positions stay valid.
        norm_base_width: the first hidden size of the model's life. Norms over `w` channels divide the sum of squares
            by `min(w, norm_base_width)`, which makes width expansion exact at every width.
        width_levels: name -> width of the sub-networks that are trained and reported, ascending, the last one being
            the hidden size.
        attention_widths: the widest that each attention layer of *this* checkpoint can run (fewer than
            `hidden_size` after `slice_width`). Default: `hidden_size` for each.
        expanded_from: the hidden size before the last expansion, so that training can tell old weights from new.
        mlp_gated: `down(act(gate(x)) * up(x))` when true, `down(act(up(x)))` otherwise.
        norm_gain: whether norms have a learned gain.
        embedding_norm: a norm right after the embedding (NanoChat).
        qk_norm: `None`, `"before_rope"` (Qwen3) or `"after_rope"` (NanoChat).
        rope_sign: 1 for the usual rotation, -1 for NanoChat's.
        rope_layers: for each layer, 1 if it rotates queries and keys (SmolLM3 leaves every fourth one out).
        logit_softcap: `c` in `c * tanh(logits / c)`, or `None`.
        first_exit_layer: the first layer (index) with an exit gate; each later layer but the last has one too.
        exit_gate_size, router_size: hidden units of an exit gate and of the width router.
        mamba_head_dim, mamba_state_size, mamba_num_groups, mamba_expand, mamba_conv_kernel, mamba_chunk_size: the
            Mamba-2 mixer (Dao & Gu, 2024). `mamba_num_groups` B/C groups are also the groups of the gated norm.
    """

    model_type = "adamba"
    keys_to_ignore_at_inference = ["past_key_values", "exit_layers", "expanded", "gate_logits", "exit_hidden_states"]

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    layer_types: list[str] | None = None
    hidden_act: str = "silu"
    mlp_gated: bool = True
    mlp_bias: bool = False
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    attention_dropout: float = 0.0
    norm_base_width: int | None = None
    norm_gain: bool = True
    rms_norm_eps: float = 1e-6
    embedding_norm: bool = False
    qk_norm: str | None = None
    rope_parameters: dict | None = None
    rope_sign: int = 1
    rope_layers: list[int] | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    logit_softcap: float | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    width_levels: dict[str, int] | None = None
    attention_widths: list[int] | None = None
    expanded_from: int | None = None
    first_exit_layer: int | None = None
    exit_gate_size: int = 32
    router_size: int = 32

    mamba_head_dim: int | None = None
    mamba_state_size: int = 64
    mamba_num_groups: int | None = None
    mamba_expand: int = 2
    mamba_conv_kernel: int = 4
    mamba_chunk_size: int = 64

    def __post_init__(self, **kwargs):
        for key in COUNTS:
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"AdambaConfig.{key}: {getattr(self, key)!r} must be at least 1")
        if self.layer_types is None:
            pair = ("full_attention", "linear_attention")
            self.layer_types = [pair[index % 2] for index in range(self.num_hidden_layers)]
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.norm_base_width is None:
            self.norm_base_width = self.hidden_size
        if self.rope_layers is None:
            self.rope_layers = [1] * self.num_hidden_layers
        if self.mamba_num_groups is None:
            # The largest count of at most 8 that grows whenever the attention heads can.
            self.mamba_num_groups = max(g for g in range(1, 9) if self.num_key_value_heads % g == 0)
        if self.mamba_head_dim is None:
            channels = self.mamba_expand * self.hidden_size // self.mamba_num_groups
            self.mamba_head_dim = max(size for size in range(1, 65) if channels % size == 0)
        if self.attention_widths is None:
            self.attention_widths = [self.hidden_size] * self.num_attention_layers
        if self.width_levels is None:
            self.width_levels = default_width_levels(self.width_step, self.hidden_size)
        # JSON sorts keys; the order of the levels is that of their widths.
        self.width_levels = dict(sorted(self.width_levels.items(), key=lambda level: level[1]))
        if self.first_exit_layer is None:
            self.first_exit_layer = max(1, self.num_hidden_layers // 4)
        super().__post_init__(**kwargs)
        self._check()

    @property
    def num_attention_layers(self) -> int:
        return sum(layer_type in ATTENTION_LAYERS for layer_type in self.layer_types)

    @property
    def width_step(self) -> int:
        """Channels that go with one key/value head: every multiple up to the hidden size is a valid width."""
        return max(1, self.hidden_size // self.num_key_value_heads)

    @property
    def mamba_inner_size(self) -> int:
        return self.mamba_expand * self.hidden_size

    @property
    def mamba_num_heads(self) -> int:
        return self.mamba_inner_size // self.mamba_head_dim

    @property
    def gate_layers(self) -> list[int]:
        """Indices of the layers after which an exit gate may stop."""
        return list(range(self.first_exit_layer, self.num_hidden_layers - 1))

    @property
    def expand_start(self) -> int:
        """
        The first layer that may go wider on its own (`expand_threshold`): the last quarter, and at least the last
        attention layer. The gate before it is the first that is asked.
        """
        return min(self.num_hidden_layers - self.num_hidden_layers // 4, self._last_attention)

    @property
    def expand_gates(self) -> list[int]:
        """The layers whose gates decide whether a token's remaining layers go wider."""
        return list(range(max(0, self.expand_start - 1), self._last_attention))

    @property
    def _last_attention(self) -> int:
        return max(index for index, kind in enumerate(self.layer_types) if kind in ATTENTION_LAYERS)

    def heads_at(self, width: int) -> tuple[int, int]:
        """Query heads and key/value heads of an attention layer that runs at `width` channels."""
        kv_heads = width * self.num_key_value_heads // self.hidden_size
        return kv_heads * self.num_attention_heads // self.num_key_value_heads, kv_heads

    def units_at(self, width: int) -> int:
        """MLP units of an attention layer that runs at `width` channels."""
        return width * self.intermediate_size // self.hidden_size

    def resolve_width(self, width) -> list[int]:
        """
        `None`, a level name, an int or one of these per attention layer -> channels of each attention layer.

        Raises:
            ValueError: a name that is no level, what is no whole number, a width that is no multiple of `width_step`,
                or one that is wider than this checkpoint's layer.
        """
        count = self.num_attention_layers
        if width is None:
            return list(self.attention_widths)
        if isinstance(width, (str, Number)):  # NumPy's too
            width = [width] * count
        width = list(width)
        if len(width) != count:
            raise ValueError(f"width: {len(width)} values given for {count} attention layers")
        return [self._resolve_one(value, limit) for value, limit in zip(width, self.attention_widths, strict=True)]

    def _resolve_one(self, value, limit: int) -> int:
        if isinstance(value, str):
            if value not in self.width_levels:
                raise ValueError(f"width: unknown level {value!r}; the levels are {', '.join(self.width_levels)}")
            value = min(self.width_levels[value], limit)
        try:
            value = index(value)
        except TypeError:
            raise ValueError(
                f"width: {value!r} is no number of channels; use a level ({', '.join(self.width_levels)}) or a "
                f"multiple of {self.width_step} from {self.width_step} to {limit}"
            ) from None
        if value < self.width_step or value > limit or value % self.width_step:
            nearest = min(range(self.width_step, limit + 1, self.width_step), key=lambda width: abs(width - value))
            raise ValueError(
                f"width: {value} is not possible here; use a multiple of {self.width_step} (one key/value head "
                f"group) from {self.width_step} to {limit}; the nearest is {nearest}"
            )
        return value

    def _check(self) -> None:
        """One clear line for each setting that cannot work."""

        def require(condition: bool, key: str, value: object, advice: str) -> None:
            if not condition:
                raise ValueError(f"AdambaConfig.{key}: {value!r} {advice}")

        allowed = (*ATTENTION_LAYERS, "linear_attention")
        require(
            len(self.layer_types) == self.num_hidden_layers,
            "layer_types",
            self.layer_types,
            f"must name num_hidden_layers = {self.num_hidden_layers} layers",
        )
        for layer_type in self.layer_types:
            require(layer_type in allowed, "layer_types", layer_type, f"is unknown; use one of {', '.join(allowed)}")
        require(
            self.num_attention_layers > 0,
            "layer_types",
            self.layer_types,
            "must have an attention layer, by which a cache counts its tokens",
        )
        for key, count in (("rope_layers", self.num_hidden_layers), ("attention_widths", self.num_attention_layers)):
            require(len(getattr(self, key)) == count, key, getattr(self, key), f"must have {count} entries")
        require(
            "sliding_attention" not in self.layer_types or (self.sliding_window or 0) > 1,
            "sliding_window",
            self.sliding_window,
            "must be 2 tokens or more, because layer_types has a sliding_attention layer",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"must divide num_attention_heads = {self.num_attention_heads}",
        )
        require(
            self.hidden_size % self.num_key_value_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"must be a multiple of num_key_value_heads = {self.num_key_value_heads}",
        )
        require(
            self.norm_base_width <= self.hidden_size,
            "norm_base_width",
            self.norm_base_width,
            f"must be at most hidden_size = {self.hidden_size}, which only grows from it",
        )
        group_size, rest = divmod(self.mamba_inner_size, self.mamba_num_groups)
        require(
            rest == 0 and group_size % self.mamba_head_dim == 0,
            "mamba_head_dim",
            self.mamba_head_dim,
            f"must divide the {self.mamba_inner_size} / {self.mamba_num_groups} channels of one Mamba group",
        )
        require(self.rope_sign in (1, -1), "rope_sign", self.rope_sign, "must be 1 or -1")
        require(
            self.qk_norm in (None, "before_rope", "after_rope"),
            "qk_norm",
            self.qk_norm,
            "must be null, before_rope or after_rope",
        )
        levels = list(self.width_levels.values())
        require(
            bool(levels) and len(set(levels)) == len(levels) and levels[-1] == self.hidden_size,
            "width_levels",
            self.width_levels,
            f"must differ and end at hidden_size = {self.hidden_size}",
        )
        for level in levels:
            require(
                level > 0 and level % self.width_step == 0,
                "width_levels",
                level,
                f"must be a multiple of {self.width_step} (one key/value head group)",
            )
        for width in self.attention_widths:
            require(
                0 < width <= self.hidden_size and width % self.width_step == 0,
                "attention_widths",
                width,
                f"must be a multiple of {self.width_step} up to {self.hidden_size}",
            )
        require(
            0 <= self.first_exit_layer < self.num_hidden_layers,
            "first_exit_layer",
            self.first_exit_layer,
            f"must be from 0 to {self.num_hidden_layers - 1}",
        )

    @classmethod
    def from_depth(cls, depth: int, **overrides) -> "AdambaConfig":
        """
        The one-dial size for training from scratch: `depth` layers, attention and Mamba-2 in turn, 64 channels a
        layer (depth 4 -> hidden 256, 6 -> 384, 20 -> 1280). Any field can be overridden.
        """
        if depth < 2 or depth % 2:
            raise ValueError(f"depth: {depth!r} must be an even number of layers from 2 up (attention, Mamba-2, …)")
        sizes = {
            "num_hidden_layers": depth,
            "hidden_size": 64 * depth,
            "intermediate_size": 192 * depth,
            "num_attention_heads": depth,
            "num_key_value_heads": depth,
            "head_dim": 64,
        }
        return cls(**{**sizes, **overrides})


def default_width_levels(step: int, hidden_size: int) -> dict[str, int]:
    """The four compute modes at 1/32, 1/8, 1/4 and 1 of the hidden size (DESIGN: 128, 512, 1024 of 4096), each rounded
    up to a valid width; levels that fall together are named by the larger one."""
    fractions = {"ghost": 32, "whisper": 8, "normal": 4, "think": 1}
    widths = {name: -(-hidden_size // (fraction * step)) * step for name, fraction in fractions.items()}
    names = {min(width, hidden_size): name for name, width in widths.items()}
    return {name: width for width, name in sorted(names.items())}


__all__ = ["AdambaConfig"]
