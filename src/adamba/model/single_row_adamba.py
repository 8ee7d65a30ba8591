"""
Decoding one row without what transformers' loop prepares anew for each token: at full depth, with exits whose skipped
layers are filled later, and (`speculation_adamba`) with drafts that are verified.
"""

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .configuration_adamba import ATTENTION_LAYERS
from .layers_adamba import rotations

ROPE_AHEAD = 64  # rotations are computed for so many places at once


class SingleRow:
    """One row being generated: the model, its cache, the tokens so far, and how the next one is chosen."""

    def __init__(
        self, model, input_ids, logits_processor, stopping_criteria, generation_config, trace, streamer, model_kwargs
    ):
        self.model, self.decoder, self.config = model, model.model, model.config
        self.input_ids = input_ids
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        self.generation_config, self.trace, self.streamer = generation_config, trace, streamer
        cache = model_kwargs.get("past_key_values")
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        self.widths = model.config.resolve_width(model_kwargs.get("width"))
        mask = model_kwargs.get("attention_mask")
        # Nothing after the prompt is padding, so its mask is only ever extended by ones.
        self.mask = None if mask is None or bool(mask.all()) else mask
        self.num_padding = 0 if self.mask is None else int((self.mask == 0).sum())
        self.sampling = generation_config.do_sample
        self.last_layer = model.config.num_hidden_layers - 1
        attention = [index for index, kind in enumerate(model.config.layer_types) if kind in ATTENTION_LAYERS]
        self.width_of = dict(zip(attention, self.widths, strict=True))
        rope_type = (model.config.rope_parameters or {}).get("rope_type", "default")
        self.rope_ahead = 0 if rope_type in ("dynamic", "longrope") else ROPE_AHEAD  # these depend on the length
        self.rope_start = 0
        self.rope_table: tuple[torch.Tensor, torch.Tensor] | None = None
        self.no_rows = torch.empty(0, dtype=torch.long, device=input_ids.device)

    def prefill(self) -> bool:
        """Run the prompt through all layers and emit the first token; whether that was the last."""
        seen = self.cache.get_seq_length()
        seeing = torch.ones_like(self.input_ids) if self.mask is None else self.mask
        output = self.model(
            input_ids=self.input_ids[:, seen:],
            attention_mask=self.mask,
            position_ids=(seeing.cumsum(-1) - 1).clamp(min=0)[:, seen:],
            past_key_values=self.cache,
            use_cache=True,
            width=self.widths,
            logits_to_keep=1,
        )
        return self.emit(self.choose(self.input_ids, output.logits[:, -1].float())[0], self.last_layer)

    def embed(self, token: torch.Tensor) -> torch.Tensor:
        hidden = self.decoder.embed_tokens(token)
        return hidden if self.decoder.embed_norm is None else self.decoder.embed_norm(hidden)

    def rope(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotations of the tokens at places `start` to `end`."""
        first, last = start - self.num_padding, end - self.num_padding
        stop = first if self.rope_table is None else self.rope_start + self.rope_table[0].shape[2]
        if self.rope_ahead and (self.rope_table is None or not self.rope_start <= first or last > stop):
            self.rope_start, self.rope_table = first, self._rotations(first, last + self.rope_ahead)
        elif not self.rope_ahead and last > stop:
            # A place keeps those of the step in which it was new, whenever a layer gets to it, as in plain decoding.
            tables = [self._rotations(place, place + 1) for place in range(stop, last)]
            if self.rope_table is None:
                self.rope_start = first
            else:
                tables = [self.rope_table, *tables]
            cos, sin = (torch.cat(parts, dim=2) for parts in zip(*tables, strict=True))
            self.rope_table = cos, sin
        first, last = first - self.rope_start, last - self.rope_start
        return self.rope_table[0][:, :, first:last], self.rope_table[1][:, :, first:last]

    def _rotations(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotations of some positions, computed together."""
        positions = torch.arange(first, last, device=self.input_ids.device)[None]
        # The embedding itself would do but where accelerate offloads it.
        like = torch.empty(0, dtype=self.decoder.embed_tokens.weight.dtype, device=positions.device)
        cos, sin = self.decoder.rotary_emb(like, positions)
        return rotations(cos, sin, self.config.rope_sign)

    def run(self, hidden: torch.Tensor, start: int, layers: range, num_live: int | None = None) -> torch.Tensor:
        """
        `layers` on the raw hidden states (1, L, D) of the tokens from place `start` on; with `num_live`, the last so
        many are computed and returned, and the others only fill the caches.
        """
        length = hidden.shape[1]
        mask = self.mask
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, start + length - mask.shape[1]), value=1)
        masks = self.decoder.cached_masks(hidden, mask, self.cache, layers)
        if num_live is not None:
            masks = {kind: value if value is None else value[:, :, -num_live:] for kind, value in masks.items()}
        rope = self.rope(start, start + length)
        for index in layers:
            layer = self.decoder.layers[index]
            if index in self.width_of:
                kind = self.config.layer_types[index]
                hidden = layer(hidden, self.width_of[index], rope, masks[kind], cache=self.cache, num_live=num_live)
            else:
                hidden = layer(hidden, self.cache, num_live=num_live)
        return hidden

    def fill(self, hidden: torch.Tensor, start: int, layer: int) -> None:
        """A layer's caches for tokens that skip it."""
        if layer in self.width_of:
            rope = self.rope(start, start + hidden.shape[1])
            self.decoder.layers[layer].fill(hidden, self.width_of[layer], rope, self.cache)
        else:
            self.decoder.layers[layer](hidden, self.cache, active=self.no_rows)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.head(self.decoder.norm(hidden)).float()

    def confidence(self, hidden: torch.Tensor, layer: int) -> float:
        """The gate's probability for the last token; 1 after a layer without a gate."""
        gates = self.decoder.exit_gates
        return gates[str(layer)](hidden[:, -1:]).sigmoid().item() if str(layer) in gates else 1.0

    def choose(self, prefix: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The next token (1, 1) and, when sampling, the distribution it was drawn from."""
        scores = self.logits_processor(prefix, logits)
        if not self.sampling:
            return scores.argmax(-1, keepdim=True), None
        probs = scores.softmax(-1)
        return probs.multinomial(1), probs

    def emit(self, token: torch.Tensor, layer: int) -> bool:
        """Append a token that was computed up to `layer`; whether generation ends with it."""
        self.input_ids = torch.cat((self.input_ids, token), dim=1)
        self.trace.steps.append(torch.full((1, 1), layer))
        if self.streamer is not None:
            self.streamer.put(token.view(1).cpu())
        return bool(self.stopping_criteria(self.input_ids, None).all())

    def result(self) -> torch.LongTensor | GenerateDecoderOnlyOutput:
        if self.streamer is not None:
            self.streamer.end()
        if self.generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=self.input_ids, past_key_values=self.cache)
        return self.input_ids


@torch.no_grad()
def plain_decode(
    model,
    input_ids: torch.LongTensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    trace,
    streamer=None,
    **model_kwargs,
) -> torch.LongTensor | GenerateDecoderOnlyOutput:
    """Every token through all layers: the tokens of transformers' own loop, sampled ones with the same draws."""
    row = SingleRow(
        model, input_ids, logits_processor, stopping_criteria, generation_config, trace, streamer, model_kwargs
    )
    done, layers = row.prefill(), range(row.last_layer + 1)
    while not done:
        place = row.input_ids.shape[1] - 1
        hidden = row.run(row.embed(row.input_ids[:, -1:]), place, layers)
        done = row.emit(row.choose(row.input_ids, row.logits(hidden)[:, -1])[0], row.last_layer)
    return row.result()


@torch.no_grad()
def propagate_decode(
    model,
    input_ids: torch.LongTensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    threshold: float,
    trace,
    streamer=None,
    **model_kwargs,
) -> torch.LongTensor | GenerateDecoderOnlyOutput:
    """
    `exit_mode="propagate"` for one row: a token stops after the first layer whose gate is surer than `threshold`. The
    layers it skips take their keys, values and Mamba states from its exit state, not at once but when a later token
    gets there, all that are missing in one call. The result is that of filling each at once.
    """
    row = SingleRow(
        model, input_ids, logits_processor, stopping_criteria, generation_config, trace, streamer, model_kwargs
    )
    done = row.prefill()
    first_place = row.input_ids.shape[1] - 1
    exit_states: list[torch.Tensor] = []  # of the tokens from first_place on
    filled = [first_place] * (row.last_layer + 1)  # by layer: the first place that its cache lacks
    gate_layers = [*row.config.gate_layers, row.last_layer]
    try:
        while not done:
            place = row.input_ids.shape[1] - 1
            hidden, next_layer = row.embed(row.input_ids[:, -1:]), 0
            for layer in gate_layers:
                for index in range(next_layer, layer + 1):
                    missing = place - filled[index]
                    if missing:
                        hidden = torch.cat((*exit_states[-missing:], hidden), dim=1)
                        hidden = row.run(hidden, filled[index], range(index, index + 1), num_live=1)
                    else:
                        hidden = row.run(hidden, place, range(index, index + 1))
                    filled[index] = place + 1
                next_layer = layer + 1
                if layer == row.last_layer or row.confidence(hidden, layer) > threshold:
                    break
            exit_states.append(hidden)
            done = row.emit(row.choose(row.input_ids, row.logits(hidden)[:, -1])[0], layer)
    finally:  # also where a streamer raises: the caller may go on from this cache
        end = first_place + len(exit_states)
        if generation_config.return_dict_in_generate or getattr(row.cache, "_is_user_defined", False):
            for index, place in enumerate(filled):
                if place < end:
                    row.fill(torch.cat(exit_states[place - end :], dim=1), place, index)
    return row.result()
