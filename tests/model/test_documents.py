"""Rows of several documents: where they begin, and attention inside each, with a plain stand-in for torch's kernel."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, modeling_flash_attention_utils

from adamba.model import documents_adamba
from adamba.model.documents_adamba import document_starts, number_documents
from models import hybrid, tokens


def positions(*borders: int, length: int) -> torch.Tensor:
    edges = (0, *borders, length)
    return torch.cat([torch.arange(end - start) for start, end in zip(edges, edges[1:], strict=False)])


def test_documents_are_numbered_and_begin_where_positions_start_anew() -> None:
    rows = torch.stack((positions(3, 4, length=9), positions(length=9)))
    numbers = number_documents(rows)
    assert numbers is not None
    assert numbers.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2, 2], [0] * 9]
    starts = document_starts(numbers)
    assert starts.dtype == torch.int32 and starts[:5].tolist() == [0, 3, 4, 9, 18] and set(starts[5:].tolist()) == {18}
    assert number_documents(rows[1:]) is None and number_documents(None) is None


@pytest.mark.parametrize("num_documents", [1, 63, 64, 65])
def test_starts_end_with_the_number_of_tokens_and_are_as_many_for_similar_batches(num_documents: int) -> None:
    numbers = torch.arange(num_documents)[None].repeat_interleave(2, dim=1)
    starts = document_starts(numbers)
    assert len(starts) % 64 == 0 and len(starts) > num_documents
    assert starts[:num_documents].tolist() == list(range(0, 2 * num_documents, 2))
    assert set(starts[num_documents:].tolist()) == {2 * num_documents}


def plain_varlen(query, key, value, starts_q, starts_k, max_q, max_k, *, scale, window_size):
    """Softmax attention of (T, H, P) document by document; causal, with the window to the left."""
    assert torch.equal(starts_q, starts_k) and query.dtype == key.dtype == value.dtype and window_size[1] == 0
    assert query.shape == key.shape == value.shape
    out = torch.zeros_like(query)
    for start, end in zip(starts_q.tolist(), starts_q.tolist()[1:], strict=False):
        assert end - start <= max_q == max_k
        place = torch.arange(end - start)
        seen = place[:, None] - place[None]
        visible = (seen >= 0) & ((seen <= window_size[0]) if window_size[0] >= 0 else True)
        q, k, v = (part[start:end].transpose(0, 1) for part in (query, key, value))
        out[start:end] = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale).transpose(0, 1)
    return out


@pytest.mark.parametrize("seed", range(6))  # GQA and MHA, sliding or not, norms of q and k, with and without RoPE
@pytest.mark.parametrize("shared", [False, True])  # one row of positions for all
def test_attention_by_documents_is_that_of_the_mask(seed: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = hybrid(seed), tokens(seed)
    rows = torch.stack((positions(5, 6, length=19), positions(12, length=19)))[: 1 if shared else 2]

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        logits = model(ids, position_ids=rows, use_cache=False, width="normal").logits
        logits.square().mean().backward()
        return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    masked, masked_gradients = run()
    called = []
    monkeypatch.setattr(
        documents_adamba, "varlen_attn", lambda *args, **kw: called.append(1) or plain_varlen(*args, **kw)
    )
    monkeypatch.setattr("adamba.model.modeling_adamba.can_attend_in_documents", lambda *args: True)
    found, gradients = run()
    assert called
    torch.testing.assert_close(found, masked, rtol=1e-5, atol=1e-5)
    for name, gradient in masked_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_cpu_and_full_precision_keep_the_mask() -> None:
    hidden = torch.zeros(1, 2, 8, dtype=torch.bfloat16)
    assert not documents_adamba.can_attend_in_documents(hidden, "sdpa", 8, 0.0)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_without_flash_attention_keeps_the_mask(capability, expected: bool, monkeypatch) -> None:
    on_gpu = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert documents_adamba.can_attend_in_documents(on_gpu, "sdpa", 64, 0.0) is expected


@pytest.mark.parametrize("mask", [None, torch.ones(1, 12, dtype=torch.long)], ids=["no mask", "ones"])
@pytest.mark.parametrize("training", [False, True])
def test_packed_documents_are_apart_unless_told_otherwise(mask: torch.Tensor | None, training: bool) -> None:
    """In evaluation a forward makes a cache by itself, which knows one document a row."""
    model, ids = hybrid(0).train(training), tokens(0, batch=1, length=12)
    with torch.no_grad():
        packed = model(ids, position_ids=positions(5, 6, length=12)[None], attention_mask=mask)
        alone = [model(ids[:, start:end], use_cache=False).logits for start, end in ((0, 5), (5, 6), (6, 12))]
    assert packed.past_key_values is None
    torch.testing.assert_close(packed.logits, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


def test_packed_documents_and_a_cache_do_not_go_together() -> None:
    model, ids = hybrid(0), tokens(0, batch=1, length=12)
    packed = {"position_ids": positions(5, length=12)[None]}
    for cache in ({"use_cache": True}, {"past_key_values": DynamicCache(config=model.config)}):
        with pytest.raises(ValueError, match="position_ids: rows of several documents go without a cache"):
            model(ids, **packed, **cache)


def test_a_padded_row_may_be_fed_one_token_first() -> None:
    model, ids = hybrid(0), tokens(0, length=8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    whole = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=whole, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        for start, end in ((0, 1), (1, 2), (2, 8)):
            logits = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=whole[:, start:end],
                past_key_values=cache,
                use_cache=True,
            ).logits
    torch.testing.assert_close(logits, expected[:, 2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_rows", [1, 2])  # transformers finds the documents of one row by itself
def test_flash_attention_keeps_the_documents_of_every_row_apart(
    seed: int, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = hybrid(seed), tokens(seed)[:num_rows]
    rows = torch.stack((positions(5, 6, length=19), positions(12, length=19)))[:num_rows]
    masked = model(ids, position_ids=rows, use_cache=False).logits

    def varlen(query, key, value, *, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale, **options):
        assert causal and cu_seqlens_q.dtype == torch.int32
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        longest, window = (options["max_seqlen_q"], options["max_seqlen_k"]), options.get("window_size", (-1,))
        return plain_varlen(
            query, key, value, cu_seqlens_q, cu_seqlens_k, *longest, scale=softmax_scale, window_size=(window[0], 0)
        )

    def options(is_causal, softmax_scale, sliding_window=None, key_length=0, **kwargs) -> dict:
        found = {key: kwargs[key] for key in ("max_seqlen_q", "max_seqlen_k") if kwargs.get(key) is not None}
        if sliding_window is not None and key_length > sliding_window:
            found["window_size"] = (sliding_window - 1, sliding_window - 1)
        return found | {"causal": is_causal, "softmax_scale": softmax_scale}

    def dense(query, key, value, causal, softmax_scale, **options):  # whoever comes here sees a whole row
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)

    package = (dense, varlen, None, None, None), (options, options)
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *args: package)
    model.config._attn_implementation = "flash_attention_2"
    found = model(ids, position_ids=rows, use_cache=False).logits
    torch.testing.assert_close(found, masked, rtol=1e-5, atol=1e-5)
