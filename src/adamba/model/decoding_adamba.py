"""
Adaptive decoding: how wide (`width`), how deep (`exit_threshold`), whether a shallow answer is checked (`exit_mode`),
and when to go wider again (`expand_threshold`). Everything goes through `model.generate`, and each option can live in
the generation config.
"""

from functools import partial

import torch
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin
from transformers.generation.configuration_utils import SynthIDTextWatermarkingConfig
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module
from transformers.utils import logging

from .configuration_adamba import ATTENTION_LAYERS
from .drafting_adamba import DraftPolicy, draft_policy
from .groups_adamba import GenerationTrace, allowed_in_batch, merge_outputs, merge_traces
from .single_row_adamba import plain_decode, propagate_decode
from .speculation_adamba import speculative_decode

EXIT_MODES = ("propagate", "verify")
OPTIONS = ("width", "exit_threshold", "exit_mode", "exit_layer", "expand_threshold")
# What only transformers' own loop can return or do.
PER_STEP_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
OTHER_DECODERS = (
    *("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate"),
    *("penalty_alpha", "dola_layers"),
)
OTHER_INPUTS = ("inputs_embeds", "position_ids", "synced_gpus")
LAZY_ATTENTION = ("sdpa", "eager")  # their masks can be cut to the queries that are left

logger = logging.get_logger(__name__)


class AdaptiveGenerationMixin:
    """`generate` with width and exit options, in front of transformers' own."""

    last_generation: GenerationTrace | None = None
    _draft_policy: tuple[tuple, DraftPolicy] | None = None

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
        expand_threshold: float | None = None,
        **kwargs,
    ):
        """
        Args:
            width: level name, channels, one of these per attention layer, or `"auto"` (the router decides from the
                prompt; rows that it sends to different widths are generated in groups). Default: full width.
            exit_threshold: stop at the first layer whose gate is surer than this. Default 1.0: never. In `verify` it
                ends drafts instead; the default there is where drafting on would not pay.
            exit_mode: `"propagate"` (lossy; skipped layers take their state from the exit state) or `"verify"`
                (lossless: early layers draft, the others check). Verify is for one row: several are decoded plainly,
                with a warning.
            exit_layer: the layer that drafts in `verify`. Default: chosen while decoding, by what is accepted.
            expand_threshold: below full width, a token whose gates in the last quarter of the layers all stay under
                this probability runs the remaining layers at full width. Default: never.

        Raises:
            ValueError: an option that does not exist, a width that this checkpoint cannot run, or options that do not
                go together.
        """
        given = dict(zip(OPTIONS, (width, exit_threshold, exit_mode, exit_layer, expand_threshold), strict=True))
        for config in (generation_config, self.generation_config):
            for key in OPTIONS:
                given[key] = getattr(config, key, None) if given[key] is None else given[key]
        width = given.pop("width")
        given["exit_mode"] = given["exit_mode"] or "propagate"
        self._check_options(given, generation_config, kwargs)
        options = {"generation_config": generation_config, **given, **kwargs}
        if isinstance(width, str) and width == "auto":
            if self.model.router.down_proj.is_trained:
                return self._generate_routed(inputs, options)
            logger.warning_once(
                'width: "auto" needs a trained router; this checkpoint\'s is not, so the width is full'
            )
            width = None
        widths = self.config.resolve_width(width)
        trained = {*self.config.width_levels.values(), *self.config.attention_widths}
        if untrained := sorted(set(widths) - trained):
            levels = ", ".join(map(str, self.config.width_levels.values()))
            logger.warning_once(f"width: {untrained[0]} was never trained; the trained ones are {levels}")
        return self._generate_at(inputs, widths, **options)

    def _check_options(self, given: dict, generation_config, kwargs: dict) -> None:
        """Refuse what cannot work. Without trained gates exits and expansion are switched off, with a warning."""
        if given["exit_mode"] not in EXIT_MODES:
            raise ValueError(f"exit_mode: {given['exit_mode']!r} is unknown; use {' or '.join(EXIT_MODES)}")
        for key in ("exit_threshold", "expand_threshold"):
            if given[key] is not None and not 0 <= given[key] <= 1:
                raise ValueError(f"{key}: {given[key]} must be a probability from 0 to 1")
        verify = given["exit_mode"] == "verify"
        if verify and not self.config.gate_layers:
            raise ValueError("exit_mode: verify needs a layer to exit from, but this model has no exit gates")
        last = self.config.num_hidden_layers - 2
        if verify and given["exit_layer"] is not None and not 0 <= given["exit_layer"] <= last:
            raise ValueError(f"exit_layer: {given['exit_layer']} must be from 0 to {last}")
        if verify:
            self._check_verify(given, generation_config, kwargs)
        if given["expand_threshold"] and not set(self.config.gate_layers) & set(self.config.expand_gates):
            raise ValueError(
                f"expand_threshold: needs an exit gate after one of the layers {self.config.expand_gates}, and this "
                f"model's first gate is after layer {self.config.first_exit_layer}"
            )
        exits = verify or (given["exit_threshold"] is not None and given["exit_threshold"] < 1)
        if (exits or given["expand_threshold"]) and not self.gates_are_trained():
            logger.warning_once(
                "exit_threshold, exit_mode and expand_threshold need trained exit gates; this checkpoint's are not, "
                "so every token takes all layers (phase 2 trains gates)"
            )
            given |= {"exit_threshold": None, "exit_mode": "propagate", "expand_threshold": None}

    def _check_verify(self, given: dict, generation_config, kwargs: dict) -> None:
        option = partial(self._option, generation_config, kwargs)
        if (option("num_beams") or 1) > 1:
            raise ValueError(
                f"num_beams: {option('num_beams')} does not go with exit_mode verify, which checks one row; use "
                "num_beams=1, or exit_mode propagate"
            )
        if given["expand_threshold"]:
            raise ValueError("expand_threshold: does not go with exit_mode verify; use exit_mode propagate")
        for key in OTHER_DECODERS:
            if option(key) is not None:
                raise ValueError(f"{key}: is another way of decoding; leave it out, or exit_mode verify")
        for key in PER_STEP_OUTPUTS:
            if option(key):
                raise ValueError(f"{key}: exit_mode verify has no such output for each step; leave one of them out")
        keeps_own_state = {
            "guidance_scale": option("guidance_scale") not in (None, 1),
            "watermarking_config": isinstance(option("watermarking_config"), SynthIDTextWatermarkingConfig),
        }
        for key in (key for key, keeps in keeps_own_state.items() if keeps):
            raise ValueError(
                f"{key}: remembers what it saw, and a rejected draft could not be taken back; leave it out, or "
                "exit_mode verify"
            )

    def _check_cache(self, cache: Cache | None, widths: list[int], expands: bool) -> None:
        """Refuse a cache that has no place for Mamba states, or the keys of another width."""
        layers = getattr(cache, "layers", [])
        if cache is not None and not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
            if "linear_attention" in self.config.layer_types:
                raise ValueError(
                    "past_key_values: has no place for Mamba states; make it by DynamicCache(config=model.config)"
                )
        keys = [
            getattr(layer, "keys", None)
            for layer, kind in zip(layers, self.config.layer_types, strict=False)
            if kind in ATTENTION_LAYERS
        ]
        for key, width in zip(keys, widths, strict=False):
            if key is not None and key.numel() and not expands and key.shape[1] != self.config.heads_at(width)[1]:
                raise ValueError(
                    "past_key_values: holds the keys of another width; go on at that width, or without it"
                )

    def _check_prompt(self, rows: torch.Tensor | None, kwargs: dict) -> None:
        """Refuse a prompt without a new token: the next one would be read off nothing, or off a token seen before."""
        if rows is None or kwargs.get("inputs_embeds") is not None:
            return
        cache = kwargs.get("past_key_values")
        seen = int(cache.get_seq_length()) if cache is not None and _is_whole(rows, kwargs) else 0
        if rows.shape[1] <= seen:
            raise ValueError(
                f"input_ids: no token is new, {rows.shape[1]} are given and past_key_values holds {seen}; give the "
                "whole text so far and at least one token more, or only what is new with the mask of all"
            )

    def _option(self, generation_config, kwargs: dict, key: str):
        """An option of transformers' own `generate`, as it will resolve it; `None` when nobody set it."""
        given = (kwargs.get(key), *(getattr(c, key, None) for c in (generation_config, self.generation_config)))
        return next((value for value in given if value is not None), None)

    def gates_are_trained(self) -> bool:
        return any(gate.down_proj.is_trained for gate in self.model.exit_gates.values())

    def _generate_at(
        self, inputs, widths, exit_threshold, exit_mode, exit_layer, expand_threshold, generation_config=None, **kwargs
    ):
        self._check_cache(kwargs.get("past_key_values"), widths, bool(expand_threshold))
        trace = GenerationTrace(widths=widths, num_layers=self.config.num_hidden_layers)
        self.last_generation = trace
        rows = inputs if inputs is not None else kwargs.get("input_ids")
        self._check_prompt(rows, kwargs)
        option = partial(self._option, generation_config, kwargs)
        one_row = rows is not None and rows.shape[0] == 1 and (option("num_return_sequences") or 1) == 1
        own_loop = one_row and _is_whole(rows, kwargs) and self._suits_own_loops(option, kwargs)
        loop = None
        if exit_mode == "verify" and own_loop:
            policy = self._policy(widths, exit_layer, bool(option("do_sample")))
            loop = partial(speculative_decode, policy=policy, threshold=exit_threshold)
        elif exit_mode == "verify":
            logger.warning_once(
                "exit_mode: verify checks one row of input_ids at a time, in a growing cache; anything else, as here, "
                "is decoded plainly, at full depth"
            )
        else:
            exits = exit_threshold is not None and exit_threshold < 1
            if (exits or expand_threshold) and option("use_cache") is False:
                logger.warning_once("use_cache: without a cache no token leaves early or goes wider; all run in full")
            if own_loop and not expand_threshold and self._is_plain(option):
                loop = partial(propagate_decode, threshold=exit_threshold) if exits else plain_decode
            elif exits:
                kwargs["exit_threshold"] = exit_threshold
        if loop is not None:
            # transformers hands the prompt to a streamer, but no streamer to a loop of ours.
            kwargs["custom_generate"] = partial(loop, trace=trace, streamer=kwargs.get("streamer"))
        if expand_threshold:
            kwargs["expand_threshold"] = expand_threshold
        if widths != self.config.attention_widths:
            kwargs["width"] = widths
        output = super().generate(inputs, generation_config=generation_config, **kwargs)
        # Beams change places from step to step, and rows are repeated for several answers.
        if trace.steps and (option("num_beams") or 1) == 1:
            trace.exit_layers = torch.cat(trace.steps, dim=1)
        trace.steps.clear()
        return output

    def _suits_own_loops(self, option, kwargs: dict) -> bool:
        """Whether the input, the cache and the launch are what the loops for one row expect."""
        if any(kwargs.get(key) is not None for key in OTHER_INPUTS):
            return False
        if "prepare_inputs_for_generation" in vars(self):  # PEFT's prompt tuning puts its tokens in front there
            return False
        cache = kwargs.get("past_key_values")
        growing = option("use_cache") is not False and not option("cache_implementation")
        splits = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self)  # all processes take equally many steps
        return growing and (cache is None or type(cache) is DynamicCache) and not splits

    def _is_plain(self, option) -> bool:
        """Whether nothing is asked for that only transformers' own loop can return or do."""
        if (option("num_beams") or 1) > 1 or any(option(key) for key in (*OTHER_DECODERS, *PER_STEP_OUTPUTS)):
            return False
        return self.config._attn_implementation in LAZY_ATTENTION

    def _policy(self, widths: list[int], exit_layer: int | None, sampling: bool) -> DraftPolicy:
        """What is known about drafting at these widths. Sampled text depends on what is drafted, so it starts new."""
        if sampling:
            return draft_policy(self, widths, exit_layer)
        key = (tuple(widths), exit_layer)
        if self._draft_policy is None or self._draft_policy[0] != key:
            self._draft_policy = (key, draft_policy(self, widths, exit_layer))
        return self._draft_policy[1]

    def route(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, confidence: float | None = None
    ) -> torch.Tensor:
        """
        The router's width of each attention layer, (B, attention layers) channels, from the prompt alone: the
        narrowest whose chance to suffice reaches `confidence`, by default the checkpoint's `router_confidence` or 0.5.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        confidence = confidence or getattr(self.generation_config, "router_confidence", None) or 0.5
        choice = self.model.router.choose(self.model.embed_tokens(input_ids), mask, confidence)
        levels = torch.tensor(list(self.config.width_levels.values()), device=choice.device)
        limits = torch.tensor(self.config.attention_widths, device=choice.device)
        return torch.minimum(levels[choice], limits)

    def _visible(self, rows: torch.Tensor, options: dict) -> torch.Tensor:
        """The mask of a prompt that came without one, as transformers infers it."""
        pad, end = (self._option(options["generation_config"], options, f"{key}_token_id") for key in ("pad", "eos"))
        ends = end if isinstance(end, list) else [end]
        return rows.ne(pad).long() if pad is not None and pad not in ends else torch.ones_like(rows)

    def _generate_routed(self, inputs, options):
        """Rows of equal widths are generated together; sequences come back in their order, padded on the right."""
        rows = inputs if inputs is not None else options.pop("input_ids", None)
        if rows is None:
            raise ValueError('width: "auto" is chosen from input_ids; with inputs_embeds alone give a width')
        mask = options.pop("attention_mask", None)
        mask = self._visible(rows, options) if mask is None else mask
        seen = mask[:, -rows.shape[1] :]  # after a cache the mask may be of all, and the rows what is new
        widths = self.route(rows, seen, getattr(options["generation_config"], "router_confidence", None))
        distinct, group_of = widths.unique(dim=0, return_inverse=True)
        if len(distinct) == 1:
            return self._generate_at(rows, distinct[0].tolist(), attention_mask=mask, **options)
        for key in ("past_key_values", "position_ids", "inputs_embeds", "negative_prompt_ids"):
            if options.get(key) is not None:
                raise ValueError(
                    f'{key}: goes with one width; width "auto" gives these rows {len(distinct)} different ones'
                )
        allowed = options.get("prefix_allowed_tokens_fn")
        option = partial(self._option, options["generation_config"], options)
        answers = 1 if (option("num_beams") or 1) > 1 else option("num_return_sequences") or 1
        groups = []
        for group, group_widths in enumerate(distinct.tolist()):
            members = (group_of == group).nonzero().squeeze(-1)
            if allowed is not None:
                options["prefix_allowed_tokens_fn"] = partial(allowed_in_batch, allowed, members, answers)
            output = self._generate_at(rows[members], group_widths, attention_mask=mask[members], **options)
            groups.append((members, output, self.last_generation))
        self.last_generation = merge_traces(groups, widths.tolist())
        pad = self.generation_config.pad_token_id
        pad = self.config.pad_token_id if pad is None else pad
        return merge_outputs(groups, pad or 0)

    def prepare_inputs_for_generation(
        self, input_ids, attention_mask=None, inputs_embeds=None, is_first_iteration=False, **kwargs
    ):
        """A prompt, even of one token, runs through all layers at its width: in a batch as in our own loops."""
        if is_first_iteration:
            kwargs.pop("exit_threshold", None)
            if "expand_threshold" in kwargs:
                kwargs["expand_threshold"] = 0.0  # no gate is so unsure, and both widths are cached
        # Both stand in the signature because transformers looks for them there.
        kwargs |= {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        return super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)

    def _extract_generation_mode_kwargs(self, custom_generate, kwargs, *args):
        # transformers takes the tokenizer that `stop_strings` need out, and drops it for any loop that is not its own.
        tokenizer = kwargs.get("tokenizer")
        extracted = super()._extract_generation_mode_kwargs(custom_generate, kwargs, *args)
        ours = isinstance(custom_generate, partial) and "trace" in custom_generate.keywords
        return {**extracted, "tokenizer": tokenizer} if ours and tokenizer is not None else extracted

    def _get_logits_processor(self, *args, model_kwargs=None, **kwargs):
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        for processor in processors:
            # It calls the model itself, for the same text without the prompt: at the same width.
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) and processor.model is self:
                processor.model = partial(self.__call__, width=(model_kwargs or {}).get("width"))
        return processors

    def _prepare_generation_config(self, generation_config, **kwargs):
        # Once a generation config has these fields, transformers would keep them there and not call forward with them.
        ours = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        return generation_config, {**model_kwargs, **ours}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        trace = self.last_generation
        if trace is not None and getattr(outputs, "exit_layers", None) is not None:
            trace.steps.append(outputs.exit_layers[:, -1:])
        if trace is not None and getattr(outputs, "expanded", None) is not None:
            trace.num_expanded += int(outputs.expanded.sum())
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)


def _is_whole(rows: torch.Tensor, kwargs: dict) -> bool:
    """Whether the rows are all of the text so far; after a cache, a longer mask says that they are what is new."""
    mask = kwargs.get("attention_mask")
    return kwargs.get("past_key_values") is None or mask is None or mask.shape[-1] == rows.shape[1]
