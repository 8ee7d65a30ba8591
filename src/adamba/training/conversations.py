"""
Turns of many conversations at once, whose caches are kept in between: a next turn reads only what is new, the tools'
answers. transformers' `generate` starts from nothing each time and computes every row until the longest has ended.

Rows leave the batch when they end. Equal prompts, as GRPO's groups have, are read once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

Layers = list[tuple[torch.Tensor, torch.Tensor]]  # of one row: keys and values, or the states of the Mamba mixer


def fits(config) -> bool:
    """Whether each layer of this model caches what can be cut and joined by rows: no sliding window."""
    return set(config.layer_types) <= {"full_attention", "linear_attention"}


def sampler(config: GenerationConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits (B, vocab) -> tokens (B,), as `generate` takes them with these settings."""
    if not config.do_sample:
        return lambda logits: logits.argmax(-1)
    warpers = LogitsProcessorList()
    if config.temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1:
        warpers.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        warpers.append(MinPLogitsWarper(config.min_p))
    unread = torch.empty(0, dtype=torch.long)  # none of these looks at the tokens
    return lambda logits: warpers(unread, logits).softmax(-1).multinomial(1).squeeze(-1)


@dataclass
class _Batch:
    """Rows that are computed together: their cache, and which of its places hold tokens (B, places)."""

    cache: DynamicCache
    mask: torch.Tensor

    def feed(self, model, ids: torch.Tensor) -> torch.Tensor:
        """Read `ids` (B, L); the logits after the last one, (B, vocab)."""
        return self.feed_masked(model, ids, torch.ones_like(ids))

    def feed_masked(self, model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.mask = torch.cat((self.mask, mask), dim=1)
        places = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=places,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def select(self, rows: torch.Tensor) -> None:
        self.mask = self.mask[rows]
        for layer in self.cache.layers:
            if isinstance(layer, LinearAttentionLayer):
                layer.conv_states[0] = layer.conv_states[0][rows]
                layer.recurrent_states[0] = layer.recurrent_states[0][rows]
            else:
                layer.batch_select_indices(rows)

    def row(self, index: int) -> Layers:
        """A copy of what the cache holds of one row, without its padding."""
        start = self.mask.shape[1] - int(self.mask[index].sum())
        kept: Layers = []
        for layer in self.cache.layers:
            if isinstance(layer, LinearAttentionLayer):
                kept.append((layer.conv_states[0][index].clone(), layer.recurrent_states[0][index].clone()))
            else:
                kept.append((layer.keys[index, :, start:].clone(), layer.values[index, :, start:].clone()))
        return kept


def _join(config, rows: Sequence[Layers], device) -> _Batch:
    """Rows of several lengths in one cache, padded on the left."""
    cache = DynamicCache(config=config)
    lengths = [0] * len(rows)
    for layer, parts in zip(cache.layers, zip(*rows, strict=True), strict=True):
        first, second = zip(*parts, strict=True)
        if isinstance(layer, LinearAttentionLayer):
            convs, states = torch.stack(first), torch.stack(second)
            layer.update_conv_state(convs, conv_kernel_size=convs.shape[-1])
            layer.update_recurrent_state(states)
        else:
            assert type(layer) is DynamicLayer, layer
            lengths = [keys.shape[1] for keys in first]
            layer.update(_left_padded(first), _left_padded(second))
    longest = max(lengths)
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths], device=device)
    return _Batch(cache, mask)


def _left_padded(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """(heads, length, head_dim) of each row -> (B, heads, longest, head_dim)"""
    longest = max(part.shape[1] for part in parts)
    whole = parts[0].new_zeros(len(parts), parts[0].shape[0], longest, parts[0].shape[2])
    for row, part in zip(whole, parts, strict=True):
        row[:, longest - part.shape[1] :] = part
    return whole


class Conversations:
    """
    Contexts that the model has read, by their token ids.

    Args:
        eos_token_ids: each ends a turn.
        config: how tokens are chosen, and `max_new_tokens` of a turn.
    """

    def __init__(self, config: GenerationConfig, eos_token_ids: Sequence[int], pad_token_id: int):
        self.max_new_tokens: int = config.max_new_tokens
        self.choose = sampler(config)
        self.ends = frozenset(eos_token_ids)
        self.pad = pad_token_id
        self.kept: dict[tuple[int, ...], Layers] = {}

    @torch.no_grad()
    def turn(self, model, contexts: Sequence[Sequence[int]]) -> list[list[int]]:
        """One turn after every context: new ids up to and including the end of turn, when it came."""
        read = [self._known_prefix(context) for context in contexts]
        answers: list[list[int]] = [[] for _ in contexts]
        kept, self.kept = self.kept, {}
        for is_known in (True, False):
            rows = [row for row, length in enumerate(read) if bool(length) == is_known]
            if not rows:
                continue
            if is_known:
                layers = [kept[tuple(contexts[row][: read[row]])] for row in rows]
                unread = [list(contexts[row][read[row] :]) for row in rows]
                batch = _join(model.config, layers, model.device)
                together = min(map(len, unread))
                logits = batch.feed(model, torch.tensor([ids[:together] for ids in unread], device=model.device))
                unread = [ids[together:] for ids in unread]
            else:
                batch, logits = self._read_prompts(model, [contexts[row] for row in rows])
                unread = [[] for _ in rows]
            new = self._write(model, batch, logits, [contexts[row] for row in rows], unread)
            for row, ids in zip(rows, new, strict=True):
                answers[row] = ids
        return answers

    def _known_prefix(self, context: Sequence[int]) -> int:
        """How many of these tokens have been read; 0 if they are new."""
        whole = tuple(context)
        lengths = sorted({len(ids) for ids in self.kept if len(ids) < len(whole)}, reverse=True)
        return next((length for length in lengths if whole[:length] in self.kept), 0)

    def _read_prompts(self, model, contexts: Sequence[Sequence[int]]) -> tuple[_Batch, torch.Tensor]:
        """All prompts from their start, each different one once."""
        different = list(dict.fromkeys(map(tuple, contexts)))
        longest = max(map(len, different))
        ids = torch.tensor([[self.pad] * (longest - len(item)) + list(item) for item in different])
        mask = torch.tensor([[0] * (longest - len(item)) + [1] * len(item) for item in different])
        batch = _Batch(DynamicCache(config=model.config), torch.empty(len(different), 0, dtype=torch.long))
        batch.mask = batch.mask.to(model.device)
        logits = batch.feed_masked(model, ids.to(model.device), mask.to(model.device))
        number = {item: index for index, item in enumerate(different)}
        rows = torch.tensor([number[tuple(context)] for context in contexts], device=model.device)
        batch.select(rows)
        return batch, logits[rows]

    def _write(self, model, batch: _Batch, logits: torch.Tensor, contexts, unread: list[list[int]]) -> list[list[int]]:
        """Decode until every row has ended; rows with unread tokens take those first."""
        new: list[list[int]] = [[] for _ in contexts]
        live = list(range(len(contexts)))
        while True:
            chosen = self.choose(logits).tolist()
            following, staying = [], []
            for index, row in enumerate(live):
                if unread[row]:
                    token = unread[row].pop(0)
                else:
                    token = chosen[index]
                    new[row].append(token)
                    if token in self.ends or len(new[row]) == self.max_new_tokens:
                        self.kept[(*contexts[row], *new[row][:-1])] = batch.row(index)
                        continue
                following.append(token)
                staying.append(index)
            if not staying:
                return new
            if len(staying) < len(live):
                batch.select(torch.tensor(staying, device=model.device))
                live = [live[index] for index in staying]
            logits = batch.feed(model, torch.tensor(following, device=model.device)[:, None])
