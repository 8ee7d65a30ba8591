"""
Adaptive decoding: how wide (`width`), how deep (`exit_threshold`), and whether a shallow answer is checked
(`exit_mode`). Everything goes through `model.generate`, and each option can live in the generation config.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin

EXIT_MODES = ("propagate", "verify")
OPTIONS = ("width", "exit_threshold", "exit_mode", "exit_layer")
MAX_DRAFT_TOKENS = 8


@dataclass
class GenerationTrace:
    """
    What the last `generate` did. `widths`: channels of each attention layer, per row if rows differ. `exit_layers`
    (B, new tokens): the last layer computed for each. `num_drafted`, `num_accepted`: tokens, in `verify`.
    """

    widths: list
    num_layers: int
    exit_layers: torch.Tensor | None = None
    num_drafted: int = 0
    num_accepted: int = 0
    steps: list[torch.Tensor] = field(default_factory=list, repr=False)


class AdaptiveGenerationMixin:
    """`generate` with width and exit options, in front of transformers' own."""

    last_generation: GenerationTrace | None = None

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config=None,
        *,
        width=None,
        exit_threshold: float | None = None,
        exit_mode: str | None = None,
        exit_layer: int | None = None,
        **kwargs,
    ):
        """
        Args:
            width: level name, channels, one of these per attention layer, or `"auto"` (the router decides from the
                prompt; rows that it sends to different widths are generated in groups). Default: full width.
            exit_threshold: stop at the first layer whose gate is surer than this. Default 1.0: never.
            exit_mode: `"propagate"` (lossy; skipped layers take their state from the exit state) or `"verify"`
                (lossless: the layers up to `exit_layer` draft, the full model checks; one row, else plain decoding).
            exit_layer: the layer that drafts in `verify`. Default: the middle one of those with a gate.

        Raises:
            ValueError: an option that does not exist, or a width that this checkpoint cannot run.
        """
        given = dict(zip(OPTIONS, (width, exit_threshold, exit_mode, exit_layer), strict=True))
        for config in (generation_config, self.generation_config):
            for key in OPTIONS:
                given[key] = getattr(config, key, None) if given[key] is None else given[key]
        width, exit_threshold, exit_mode, exit_layer = (given[key] for key in OPTIONS)
        exit_mode = exit_mode or "propagate"
        if exit_mode not in EXIT_MODES:
            raise ValueError(f"exit_mode: {exit_mode!r} is unknown; use {' or '.join(EXIT_MODES)}")
        if exit_threshold is not None and not 0 <= exit_threshold <= 1:
            raise ValueError(f"exit_threshold: {exit_threshold} must be a probability from 0 to 1")
        options = {"generation_config": generation_config, "exit_threshold": exit_threshold, "exit_mode": exit_mode}
        options |= {"exit_layer": exit_layer, **kwargs}
        if isinstance(width, str) and width == "auto":
            return self._generate_routed(inputs, options)
        return self._generate_at(inputs, self.config.resolve_width(width), **options)

    def _generate_at(self, inputs, widths, exit_threshold, exit_mode, exit_layer, **kwargs):
        trace = GenerationTrace(widths=widths, num_layers=self.config.num_hidden_layers)
        self.last_generation = trace
        rows = inputs if inputs is not None else kwargs.get("input_ids")
        if exit_mode == "verify" and rows is not None and rows.shape[0] == 1:
            layer = self._draft_layer(exit_layer)
            decode = partial(speculative_decode, draft_layer=layer, threshold=exit_threshold, trace=trace)
            decode = partial(decode, streamer=kwargs.pop("streamer", None))
            kwargs["custom_generate"] = decode
        elif exit_mode == "propagate" and exit_threshold is not None:
            kwargs["exit_threshold"] = exit_threshold
        if widths != self.config.attention_widths:
            kwargs["width"] = widths
        output = super().generate(inputs, **kwargs)
        if trace.steps:
            trace.exit_layers = torch.cat(trace.steps, dim=1)
            trace.steps.clear()
        return output

    def _draft_layer(self, exit_layer: int | None) -> int:
        gate_layers = self.config.gate_layers
        if not gate_layers:
            raise ValueError("exit_mode: verify needs a layer to exit from, but this model has no exit gates")
        if exit_layer is None:
            return gate_layers[(len(gate_layers) - 1) // 2]
        if not 0 <= exit_layer < self.config.num_hidden_layers - 1:
            raise ValueError(f"exit_layer: {exit_layer} must be from 0 to {self.config.num_hidden_layers - 2}")
        return exit_layer

    def route(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The router's width of each attention layer, (B, attention layers) channels, from the prompt alone."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        confidence = getattr(self.generation_config, "router_confidence", None) or 0.5
        choice = self.model.router.choose(self.model.embed_tokens(input_ids), mask, confidence)
        levels = torch.tensor(list(self.config.width_levels.values()), device=choice.device)
        limits = torch.tensor(self.config.attention_widths, device=choice.device)
        return torch.minimum(levels[choice], limits)

    def _generate_routed(self, inputs, options):
        """Rows of equal widths are generated together; sequences come back in their order, padded on the right."""
        rows = inputs if inputs is not None else options.pop("input_ids")
        mask = options.pop("attention_mask", None)
        widths = self.route(rows, mask)
        distinct, group_of = widths.unique(dim=0, return_inverse=True)
        if len(distinct) == 1:
            return self._generate_at(rows, distinct[0].tolist(), attention_mask=mask, **options)
        sequences: list[torch.Tensor] = [rows[0]] * rows.shape[0]
        for group, group_widths in enumerate(distinct.tolist()):
            members = (group_of == group).nonzero().squeeze(-1)
            group_mask = None if mask is None else mask[members]
            output = self._generate_at(rows[members], group_widths, attention_mask=group_mask, **options)
            output = output if isinstance(output, torch.Tensor) else output.sequences
            for member, sequence in zip(members.tolist(), output, strict=True):
                sequences[member] = sequence
        self.last_generation = GenerationTrace(widths=widths.tolist(), num_layers=self.config.num_hidden_layers)
        pad = self.generation_config.pad_token_id
        pad = self.config.pad_token_id if pad is None else pad
        return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad or 0)

    def _prepare_generation_config(self, generation_config, **kwargs):
        # Once a generation config has these fields, transformers would keep them there and not call forward with them.
        ours = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        return generation_config, {**model_kwargs, **ours}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        if self.last_generation is not None and getattr(outputs, "exit_layers", None) is not None:
            self.last_generation.steps.append(outputs.exit_layers[:, -1:])
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)


def snapshot(cache: Cache) -> list[dict]:
    """
    The cache as it is now. Attention tensors are kept by reference (an update makes new ones); Mamba states are
    copied (an update writes into them).
    """
    saved = []
    for layer in cache.layers:
        state = dict(vars(layer))
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for key, value in state.items():
                if isinstance(value, dict):
                    state[key] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in value.items()}
        saved.append(state)
    return saved


def restore(cache: Cache, saved: list[dict]) -> None:
    """Put the cache back as `snapshot` found it; the snapshot stays usable."""
    for layer, state in zip(cache.layers, saved, strict=True):
        for key, value in state.items():
            if isinstance(value, dict):
                value = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in value.items()}
            setattr(layer, key, value)


@torch.no_grad()
def speculative_decode(
    model,
    input_ids: torch.LongTensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    draft_layer: int,
    threshold: float | None,
    trace: GenerationTrace,
    streamer=None,
    **model_kwargs,
) -> torch.LongTensor:
    """
    Self-speculative decoding (LayerSkip, Elhoushi et al., 2024; acceptance of Leviathan et al., 2023) for a model
    with recurrent states: layers 0..draft_layer propose a few tokens, one full pass checks them all, and on a
    rejection every cache, Mamba states included, goes back to the last accepted token. Greedy output is that of the
    full model; sampled output has its distribution.
    """
    width = model_kwargs.get("width")
    cache = model_kwargs.get("past_key_values")
    cache = DynamicCache(config=model.config) if cache is None else cache
    mask = model_kwargs.get("attention_mask")
    last_layer = model.config.num_hidden_layers - 1

    def run(tokens: torch.Tensor, **options):
        seen = cache.get_seq_length() + tokens.shape[1]
        # Nothing after the prompt is padding, so the prompt's mask is only ever extended by ones.
        padding = None if mask is None else torch.nn.functional.pad(mask, (0, seen - mask.shape[1]), value=1)
        positions = torch.arange(seen - tokens.shape[1], seen, device=tokens.device)[None]
        if mask is not None:
            positions = (positions - int((mask == 0).sum())).clamp(min=0)
        return model(
            tokens,
            attention_mask=padding,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            width=width,
            **options,
        )

    def distribution(prefix: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        scores = logits_processor(prefix, logits.float())
        if generation_config.do_sample:
            return scores.softmax(-1)
        return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)

    def emit(token: torch.Tensor, layer: int) -> bool:
        nonlocal input_ids
        input_ids = torch.cat((input_ids, token.view(1, 1)), dim=1)
        trace.steps.append(torch.full((1, 1), layer))
        if streamer is not None:
            streamer.put(token.view(1).cpu())
        return bool(stopping_criteria(input_ids, None).all())

    prefill = run(input_ids[:, cache.get_seq_length() :], logits_to_keep=1)
    done = emit(distribution(input_ids, prefill.logits[:, -1]).multinomial(1), last_layer)
    draft_length = 2
    while not done:
        before = snapshot(cache)
        prefix, drafts, draft_probs = input_ids, [], []
        for _ in range(draft_length):
            shallow = run(prefix[:, -1:], stop_layer=draft_layer, exit_hidden_layers=[draft_layer])
            probs = distribution(prefix, shallow.logits[:, -1])
            token = probs.multinomial(1)
            drafts.append(token)
            draft_probs.append(probs)
            prefix = torch.cat((prefix, token), dim=1)
            gate = model.model.exit_gates[str(draft_layer)] if str(draft_layer) in model.model.exit_gates else None
            if threshold is not None and gate is not None:
                if gate(shallow.exit_hidden_states[0]).sigmoid().item() <= threshold:
                    break
        restore(cache, before)
        full = run(prefix[:, input_ids.shape[1] - 1 :])
        start, accepted = input_ids.shape[1], 0
        for index, (token, q) in enumerate(zip(drafts, draft_probs, strict=True)):
            p = distribution(prefix[:, : start + index], full.logits[:, index])
            if torch.rand(()) * q.gather(1, token) > p.gather(1, token) or p.gather(1, token) == 0:
                residual = (p - q).clamp(min=0)
                done = emit(residual.multinomial(1), last_layer)
                break
            accepted += 1
            done = emit(token, draft_layer)
            if done:
                break
        else:
            done = emit(distribution(prefix, full.logits[:, -1]).multinomial(1), last_layer)
        trace.num_drafted += len(drafts)
        trace.num_accepted += accepted
        if not done and accepted < len(drafts):
            restore(cache, before)
            run(prefix[:, start - 1 : start + accepted])
        draft_length = min(draft_length + 1, MAX_DRAFT_TOKENS) if accepted == len(drafts) else max(1, accepted)
    if streamer is not None:
        streamer.end()
    return input_ids
