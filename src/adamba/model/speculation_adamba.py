"""
Self-speculative decoding for a model with recurrent states (`exit_mode="verify"`).

LayerSkip (Elhoushi et al., 2024, section 4.3): the first layers draft tokens and the others check them all at once,
going on from the hidden states of the draft, so no layer sees a token twice. Acceptance is that of Leviathan et al.
(2023): greedy output is that of the full model, sampled output has its distribution. A rejection takes the last tokens
back: attention caches and convolution windows are cropped, and Mamba keeps its state after each drafted token.
"""

import torch
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .drafting_adamba import DraftPolicy
from .single_row_adamba import SingleRow


def start_recording(cache: Cache) -> None:
    """From now on the cache remembers what `take_back` needs."""
    for layer in cache.layers:
        if hasattr(layer, "activate_past_recording"):
            layer.activate_past_recording()
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.state_history = [layer.recurrent_states[0]]


def take_back(cache: Cache, count: int) -> None:
    """Forget the last `count` tokens; those before are final."""
    for layer in cache.layers:
        layer.crop(-count)
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.recurrent_states[0] = layer.state_history[-1 - count]
            layer.state_history = [layer.recurrent_states[0]]


def stop_recording(cache: Cache) -> None:
    """An ordinary cache again, with states of its own that later steps may write into."""
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = False
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            del layer.state_history
            layer.conv_states[0] = layer.conv_states[0].clone()
            layer.recurrent_states[0] = layer.recurrent_states[0].clone()


@torch.no_grad()
def speculative_decode(
    model,
    input_ids: torch.LongTensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    policy: DraftPolicy,
    threshold: float | None,
    trace,
    streamer=None,
    **model_kwargs,
) -> torch.LongTensor | GenerateDecoderOnlyOutput:
    """
    The decoding loop that `generate` calls for one row. A token that the draft is not sure of is not drafted: it goes
    on through the deep layers, together with those before it, which is what plain decoding would have done.

    Args:
        threshold: end a draft where the gate's probability is no higher; `None`: where going on would not pay.
        trace: the `GenerationTrace` to fill.
    """
    row = SingleRow(
        model, input_ids, logits_processor, stopping_criteria, generation_config, trace, streamer, model_kwargs
    )
    ends = generation_config._eos_token_tensor
    ends = set() if ends is None else set(ends.view(-1).tolist())
    max_length = stopping_criteria.max_length or float("inf")
    done, recording = row.prefill(), False
    while not done:
        start = row.input_ids.shape[1] - 1  # the place of the newest token, the only one not yet in the cache
        chosen = policy.choose()
        if recording != (chosen is not None):  # what is not drafted is not taken back
            (stop_recording if recording else start_recording)(row.cache)
            recording = not recording
        layer = row.last_layer if chosen is None else chosen.layer
        hidden: list[torch.Tensor] = []
        prefix, drafts, judged = row.input_ids, [], []
        standing = 1.0  # the chance that the whole draft so far is right
        while True:
            hidden.append(row.run(row.embed(prefix[:, -1:]), start + len(hidden), range(layer + 1)))
            if chosen is None or len(hidden) == min(chosen.length + 1, max_length - start - 1):
                break
            confidence = row.confidence(hidden[-1], layer)
            standing *= chosen.chance(confidence)
            if standing < chosen.break_even if threshold is None else confidence <= threshold:
                break
            drafts.append(row.choose(prefix, row.logits(hidden[-1])[:, -1]))
            judged.append(confidence)
            prefix = torch.cat((prefix, drafts[-1][0]), dim=1)
            if ends and int(drafts[-1][0]) in ends:
                break
        states = hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)
        if chosen is not None:
            states = row.run(states, start, range(layer + 1, row.last_layer + 1))
        logits = row.logits(states)
        accepted = emitted = 0
        right = True
        try:
            while right and not done and emitted < len(hidden):
                position = logits[:, emitted]
                if emitted < len(drafts):
                    right, token = _check(row, position, *drafts[emitted])
                    accepted += right
                else:
                    token = row.choose(row.input_ids, position)[0]
                done = row.emit(token, layer if emitted < len(drafts) and right else row.last_layer)
                emitted += 1
        except BaseException:  # of a streamer, say: the caller may go on from this cache
            if recording:
                take_back(row.cache, len(hidden) - (row.input_ids.shape[1] - 1 - start))
                stop_recording(row.cache)
            raise
        if recording:
            take_back(row.cache, len(hidden) - emitted)
        policy.learn(chosen, len(hidden), judged[: accepted + 1], len(drafts), accepted, emitted)
        trace.num_drafted += len(drafts)
        trace.num_accepted += accepted
    if recording:
        stop_recording(row.cache)
    return row.result()


def _check(row: SingleRow, logits: torch.Tensor, draft: torch.Tensor, q: torch.Tensor | None):
    """Whether the full model accepts a drafted token (drawn from `q` if sampling), and the token that stands there."""
    token, p = row.choose(row.input_ids, logits)
    if q is None or p is None:
        return torch.equal(token, draft), token
    if torch.rand((), device=p.device) * q.gather(1, draft) < p.gather(1, draft):
        return True, draft
    residual = (p - q).clamp(min=0)
    return False, (residual if bool(residual.any()) else p).multinomial(1)
