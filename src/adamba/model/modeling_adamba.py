"""
AdambaForCausalLM: elastic attention layers and full-width Mamba-2 layers in turn, with exit gates and a width router.

    model(input_ids, width=512).logits                       # int, level name, or one per attention layer
    model.generate(**inputs, width="auto", exit_threshold=0.95, exit_mode="propagate")
"""

import copy
import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import is_flash_attention_requested

from .configuration_adamba import ATTENTION_LAYERS, AdambaConfig
from .decoding_adamba import AdaptiveGenerationMixin
from .documents_adamba import can_attend_in_documents, document_starts, number_documents
from .gates_adamba import ExitGate, Verdict, WidthRouter
from .layers_adamba import AttentionLayer, ElasticRMSNorm, rotations
from .mamba_adamba import Mamba2Mixer, MambaLayer, init_decay, init_time_steps


@dataclass
class AdambaModelOutput(ModelOutput):
    """
    last_hidden_state (B, L, D): after the final norm. exit_layers (B, L): last layer computed for each token.
    expanded (B,): whether the row's remaining layers went wider. gate_logits (B, L, gates): one per
    `config.gate_layers`, on request. exit_hidden_states: one (B, L, D), before the final norm, per layer asked for.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    exit_layers: torch.LongTensor | None = None
    expanded: torch.BoolTensor | None = None
    gate_logits: torch.FloatTensor | None = None
    exit_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AdambaCausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` and the extra fields of `AdambaModelOutput`."""

    exit_layers: torch.LongTensor | None = None
    expanded: torch.BoolTensor | None = None
    gate_logits: torch.FloatTensor | None = None
    exit_hidden_states: tuple[torch.FloatTensor, ...] | None = None


def _is_2d(attention_mask) -> bool:
    """Whether it says which tokens are padding; else it is a mask of scores, or one for each kind of layer."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


class AdambaPreTrainedModel(PreTrainedModel):
    config_class = AdambaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AttentionLayer", "MambaLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mamba2Mixer):
            device = module.A_log.device
            init.copy_(module.A_log, init_decay(torch.empty(module.num_heads)).to(device))
            init.copy_(module.dt_bias, init_time_steps(torch.empty(module.num_heads)).to(device))
            init.ones_(module.D)
            init.kaiming_uniform_(module.conv1d.weight, a=5**0.5)
        elif isinstance(module, ElasticRMSNorm) and module.weight is not None:
            init.ones_(module.weight)
        elif isinstance(module, ExitGate):
            init.ones_(module.temperature)
        elif isinstance(module, Verdict):
            init.zeros_(module.weight)


class AdambaModel(AdambaPreTrainedModel):
    def __init__(self, config: AdambaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        widths = iter(config.attention_widths)
        self.layers = nn.ModuleList(
            AttentionLayer(config, index, next(widths)) if kind in ATTENTION_LAYERS else MambaLayer(config, index)
            for index, kind in enumerate(config.layer_types)
        )
        norm_args = (config.hidden_size, config.norm_base_width, config.rms_norm_eps)
        self.embed_norm = ElasticRMSNorm(*norm_args, gain=config.norm_gain) if config.embedding_norm else None
        self.norm = ElasticRMSNorm(*norm_args, gain=config.norm_gain)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.exit_gates = nn.ModuleDict({str(index): ExitGate(config) for index in config.gate_layers})
        self.router = WidthRouter(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        width: int | str | list | None = None,
        exit_threshold: float | None = None,
        expand_threshold: float | None = None,
        exit_layers: torch.LongTensor | None = None,
        stop_layer: int | None = None,
        exit_hidden_layers: list[int] | None = None,
        output_gates: bool = False,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> AdambaModelOutput:
        """
        Args:
            attention_mask: 0 where a token is padding, which stands on the left of what a cache goes on from: Mamba's
                convolution and state would remember it between two turns.
            position_ids: where they begin anew and nothing is padding, another document begins, and there is no cache.
            width: channels of the attention layers (`AdambaConfig.resolve_width`); `None` is full width.
            exit_threshold: in single-token decoding a row stops after the first gate whose probability exceeds it,
                and its exit state fills the caches of the layers it skips. 1.0 or `None` never stops.
            expand_threshold: in single-token decoding a row whose gates, from the entrance of the last quarter of the
                layers on, have all stayed under this probability runs the remaining layers at full width. Give it with
                every call on a cache, the prompt's too: those layers then cache keys and values of both widths.
            exit_layers: (B, L) forced exits: token t is left as it is after layer `exit_layers[b, t]`; the reference
                that cached early exit is tested against.
            stop_layer: run no layer after this one, and fill no cache there (a draft).
            exit_hidden_layers: layers whose raw output is returned as `exit_hidden_states`.
            output_gates: return `gate_logits`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = hidden.shape[:2]
        documents = None
        if position_ids is not None:
            documents = self._documents(position_ids.expand(batch, -1), attention_mask, past_key_values, use_cache)
        if documents is not None:
            attention_mask, use_cache = None, False
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        twice = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if twice and (use_cache or isinstance(past_key_values, Cache)):
            raise ValueError("use_cache: gradient checkpointing would write into a cache twice; it must be False")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if not use_cache and not isinstance(past_key_values, Cache):
            past_key_values = None
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + length, device=hidden.device)[None]
        starts = None
        if documents is not None and self._can_attend_in_documents(hidden):
            starts, masks = document_starts(documents), dict.fromkeys(self.config.layer_types)
        else:
            masks = self._masks(hidden, attention_mask, position_ids, past_key_values, set(self.config.layer_types))
            if documents is not None and is_flash_attention_requested(self.config):
                # Without these it would keep the documents of a single row apart, and those of several rows not.
                borders = document_starts(documents)
                kwargs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
                kwargs |= {"max_length_q": length, "max_length_k": length}
        cos, sin = self.rotary_emb(hidden, position_ids)
        rope = rotations(cos, sin, self.config.rope_sign)
        resolved = self.config.resolve_width(width)
        widths, limits = iter(resolved), iter(self.config.attention_widths)
        if self.embed_norm is not None:
            hidden = self.embed_norm(hidden)

        last_layer = self.config.num_hidden_layers - 1 if stop_layer is None else stop_layer
        taken = torch.full((batch, length), last_layer, device=hidden.device)
        may_exit = exit_threshold is not None and exit_threshold < 1 and length == 1 and past_key_values is not None
        active: torch.Tensor | None = None
        narrow = expand_threshold is not None and resolved != self.config.attention_widths
        expandable = narrow and past_key_values is not None
        wide: torch.Tensor | None = None
        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        gate_logits, kept_hidden, all_hidden = [], [], [hidden] if keep_all else []
        for index, (kind, layer) in enumerate(zip(self.config.layer_types, self.layers, strict=True)):
            if index > last_layer:
                break
            before = hidden
            layer_width, limit = (next(widths), next(limits)) if kind in ATTENTION_LAYERS else (None, None)
            idle = active is not None and active.numel() == 0
            if expandable and layer_width is not None and index >= self.config.expand_start and layer_width < limit:
                both = (layer_width, limit)
                hidden = layer.forward_either(
                    hidden, both, rope, masks[kind], past_key_values, active, wide, position_ids=position_ids, **kwargs
                )
            elif idle and layer_width is not None:
                layer.fill(hidden, layer_width, rope, past_key_values)
            elif layer_width is not None:
                hidden = layer(
                    hidden,
                    layer_width,
                    rope,
                    masks[kind],
                    cache=past_key_values,
                    active=active,
                    position_ids=position_ids,
                    starts=starts,
                    **kwargs,
                )
            else:
                hidden = layer(hidden, past_key_values, masks[kind], documents, active)
            if exit_layers is not None:
                hidden = torch.where((exit_layers < index)[..., None], before, hidden)
            if keep_all:
                all_hidden.append(hidden)
            if exit_hidden_layers is not None and index in exit_hidden_layers:
                kept_hidden.append(hidden)
            if str(index) in self.exit_gates:
                if output_gates:
                    gate_logits.append(self.exit_gates[str(index)](hidden))
                if expandable and length == 1 and index >= self.config.expand_start - 1:
                    unsure = self.exit_gates[str(index)](hidden).sigmoid().squeeze(-1) < expand_threshold
                    wide = unsure if wide is None else wide & unsure
                if may_exit:
                    active, taken = self._exit(index, hidden, exit_threshold, active, taken)
        if exit_layers is not None:
            taken = torch.minimum(taken, exit_layers)
        normed = self.norm(hidden)  # also the last of `hidden_states`, as in every model of transformers
        return AdambaModelOutput(
            last_hidden_state=normed,
            past_key_values=past_key_values if use_cache else None,
            exit_layers=taken,
            expanded=wide,
            gate_logits=torch.stack(gate_logits, dim=-1) if gate_logits else None,
            exit_hidden_states=tuple(kept_hidden) or None,
            hidden_states=(*all_hidden[:-1], normed) if keep_all else None,
        )

    def cached_masks(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache, layers: range
    ) -> dict[str, torch.Tensor | None]:
        """Masks for some layers only, which may have seen more or fewer tokens than the others."""
        view = copy.copy(cache)
        view.layers = cache.layers[layers.start : layers.stop]
        kinds = {self.config.layer_types[index] for index in layers} & set(ATTENTION_LAYERS)
        return self._masks(hidden, attention_mask, None, view, kinds)

    def _masks(self, hidden, attention_mask, position_ids, past_key_values, kinds) -> dict[str, torch.Tensor | None]:
        if isinstance(attention_mask, dict):  # `generate` makes those for a static cache itself
            return attention_mask
        # One token sees all that a growing cache holds. `generate` always brings a mask, mostly of ones.
        if hidden.shape[1] == 1 and type(past_key_values) is DynamicCache:
            if attention_mask is None or bool(attention_mask.all()):
                return dict.fromkeys(kinds)
        args = {
            "config": self.config,
            "inputs_embeds": hidden,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        builders = {
            "full_attention": create_causal_mask,
            "sliding_attention": create_sliding_window_causal_mask,
            "linear_attention": create_recurrent_attention_mask,
        }
        masks = {kind: builders[kind](**args) for kind in kinds}
        if hidden.shape[1] == 1 and "linear_attention" in kinds and _is_2d(attention_mask):
            # transformers takes a single token for a generated one; it may be the first of a padded row's prompt.
            newest = attention_mask[:, -1:]
            masks["linear_attention"] = None if bool(newest.all()) else newest
        return masks

    def _documents(self, position_ids, attention_mask, past_key_values, use_cache) -> torch.Tensor | None:
        """
        The document of each token in rows that are packed: positions begin anew and nothing is padding.

        Raises:
            ValueError: packed rows and a cache, which would carry one document into the next.
        """
        documents = number_documents(position_ids)
        if documents is None:
            return None
        if attention_mask is not None and not (_is_2d(attention_mask) and bool(attention_mask.all())):
            return None
        if use_cache or isinstance(past_key_values, Cache):
            raise ValueError("position_ids: rows of several documents go without a cache; use_cache must be False")
        return documents

    def _can_attend_in_documents(self, hidden: torch.Tensor) -> bool:
        dropout = self.config.attention_dropout if self.training else 0.0
        return can_attend_in_documents(hidden, self.config._attn_implementation, self.config.head_dim, dropout)

    def _exit(self, index, hidden, threshold, active, taken) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Drop the rows whose gate is sure enough from `active`, and note where they left."""
        if active is not None and active.numel() == 0:
            return active, taken
        alive = hidden if active is None else hidden[active]
        sure = self.exit_gates[str(index)](alive).sigmoid().squeeze(-1) > threshold
        if active is None and not bool(sure.any()):
            return None, taken  # all rows go on: no row needs to be picked out
        if active is None:
            active = torch.arange(hidden.shape[0], device=hidden.device)
        taken[active[sure]] = index
        return active[~sure], taken


class AdambaForCausalLM(AdaptiveGenerationMixin, AdambaPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: AdambaConfig):
        super().__init__(config)
        self.model = AdambaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Marked as derived, a saved generation config loses `width` and the like when it is loaded.
        self.generation_config._from_model_config = False
        self.post_init()

    def head(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """Normed hidden states -> logits (B, L, vocab), with the base's soft cap if it has one."""
        logits = self.lm_head(hidden_BLD)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        width: int | str | list | None = None,
        exit_threshold: float | None = None,
        expand_threshold: float | None = None,
        exit_layers: torch.LongTensor | None = None,
        stop_layer: int | None = None,
        exit_hidden_layers: list[int] | None = None,
        output_gates: bool = False,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> AdambaCausalLMOutput | tuple:
        """See `AdambaModel.forward`; `labels` (B, L) are shifted here, -100 is ignored."""
        return_dict = kwargs.pop("return_dict", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            width=width,
            exit_threshold=exit_threshold,
            expand_threshold=expand_threshold,
            exit_layers=exit_layers,
            stop_layer=stop_layer,
            exit_hidden_layers=exit_hidden_layers,
            output_gates=output_gates,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0 keeps all
        logits = self.head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, num_items_in_batch=num_items_in_batch)
        output = AdambaCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            exit_layers=outputs.exit_layers,
            expanded=outputs.expanded,
            gate_logits=outputs.gate_logits,
            exit_hidden_states=outputs.exit_hidden_states,
        )
        as_tuple = not (self.config.return_dict if return_dict is None else return_dict)
        return output.to_tuple() if as_tuple else output


# `generate` looks it up at every token of a model that brings its own code: a fiftieth of a token.
vars(AdambaForCausalLM)["forward"].__signature__ = inspect.signature(AdambaForCausalLM.forward)

__all__ = ["AdambaForCausalLM", "AdambaModel", "AdambaPreTrainedModel"]
