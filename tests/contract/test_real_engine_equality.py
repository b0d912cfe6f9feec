"""Prefill on one vLLM engine and decode on another say what one engine says, from the KV that was handed over."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from engines import SMOLLM2, Answer, Site, answer, greedy, hand_over, prompt, wait_until_idle
from tokenizers import Tokenizer

from backends.engine import EngineError, KVHandoff, Role
from backends.vllm import VLLMEngine
from dynamo_ray import models

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.filterwarnings("default")]

ANSWER_TOKENS = 12
CONCURRENCY = 6
LENGTHS = (1, 2, 31, 32, 33, 64, 65, 127, 128, 129, 257)
"""Around multiples of the block size. tests/e2e/test_local.py has fifty, to 1,500 tokens, over the whole stack."""


def chat(question: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(models.prepare(SMOLLM2) / "tokenizer.json"))
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ids: list[int] = tokenizer.encode(text).ids
    return ids


def text_of(got: Answer) -> str:
    tokenizer = Tokenizer.from_file(str(models.prepare(SMOLLM2) / "tokenizer.json"))
    text: str = tokenizer.decode(got.tokens)
    return text


async def test_handed_over_prompts_are_answered_as_by_an_independent_engine(vllm_site: Site) -> None:
    decode = vllm_site.decode
    assert isinstance(decode, VLLMEngine)
    prompts = [prompt(length, seed=1000 + i) for i, length in enumerate(LENGTHS)]
    before = replace(decode.counters)
    gate = asyncio.Semaphore(CONCURRENCY)

    async def both(ids: list[int]) -> tuple[Answer, Answer]:
        async with gate:
            whole, split = await asyncio.gather(
                answer(vllm_site.aggregated, ids, greedy(ANSWER_TOKENS)),
                hand_over(vllm_site, ids, greedy(ANSWER_TOKENS)),
            )
            return whole, split

    results = await asyncio.gather(*(both(ids) for ids in prompts))
    different = [
        length for length, (whole, split) in zip(LENGTHS, results, strict=True) if whole.tokens != split.tokens
    ]
    assert different == [], "prompt lengths whose answers differ"
    assert len({token for whole, _ in results for token in whole.tokens}) > 30, "degenerate answers hide errors"
    await wait_until_idle(vllm_site.prefill)
    await wait_until_idle(decode)
    computed = decode.counters.computed_tokens - before.computed_tokens
    transferred = decode.counters.transferred_tokens - before.transferred_tokens
    assert computed + transferred == sum(LENGTHS)
    # A prompt of one token has nothing before its last, which the decode engine computes anyhow.
    assert transferred == sum(length for length in LENGTHS if length > 1)
    assert decode.counters.transferred_bytes > before.transferred_bytes
    assert decode.counters.failed_transfers == before.failed_transfers
    for length, (_, split) in zip(LENGTHS, results, strict=True):
        first = split.chunks[0]
        assert first.cached_tokens is not None
        assert first.transferred_tokens is not None
        recomputed = length - first.cached_tokens - first.transferred_tokens
        assert recomputed <= vllm_site.infos[Role.DECODE].block_size


async def test_a_decode_engine_answers_from_the_kv_and_not_from_the_prompt_it_is_sent(vllm_site: Site) -> None:
    ids = chat("What is the capital of Japan?")
    scrambled = prompt(len(ids), seed=2000)
    computed = await answer(vllm_site.prefill, ids, greedy(16), leg=Role.PREFILL)
    # The last token is computed by the decode engine itself, so it stays.
    sent = [*scrambled[:-1], ids[-1]]
    with_kv = await answer(
        vllm_site.decode, sent, greedy(16), leg=Role.DECODE, handoff=computed.handoff, cache_salt="scrambled"
    )
    without_kv = await answer(vllm_site.aggregated, sent, greedy(16))
    assert "Tokyo" in text_of(with_kv)
    assert "Tokyo" not in text_of(without_kv)


async def test_kv_that_is_gone_is_an_error_to_retry_and_the_decode_engine_goes_on(vllm_site: Site) -> None:
    ids = prompt(200, seed=3000)
    computed = await answer(vllm_site.prefill, ids, greedy(4), leg=Role.PREFILL)
    nobody = {"remote_engine_id": "gone", "remote_port": 1}  # no port of ours
    lost = KVHandoff({**computed.handoff.params, **nobody})
    with pytest.raises(EngineError) as failure:
        await answer(vllm_site.decode, ids, greedy(4), leg=Role.DECODE, handoff=lost)
    assert failure.value.retryable
    await vllm_site.prefill.release(computed.chunks[0].request_id)
    whole = await answer(vllm_site.aggregated, ids, greedy(4))
    split = await hand_over(vllm_site, ids, greedy(4))
    assert split.tokens == whole.tokens
