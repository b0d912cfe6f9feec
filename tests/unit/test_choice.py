"""From an engine's chunks to what a client sees of one choice."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.engine import Sampling, TokenChunk, TokenLogprob
from dynamo_ray.errors import InternalError
from dynamo_ray.models import byte_tokenizer
from dynamo_ray.request.choice import Choice, Delta
from dynamo_ray.request.tokens import Tokeniser

END = 257


@pytest.fixture(scope="module")
def tokeniser(tmp_path_factory: pytest.TempPathFactory) -> Tokeniser:
    folder = tmp_path_factory.mktemp("byte-tokenizer")
    byte_tokenizer.build(folder)
    return Tokeniser(folder)


def make(tokeniser: Tokeniser, *stops: str, **sampling: Any) -> Choice:
    options = {"max_tokens": 1000, "stop_token_ids": (END,)} | sampling
    return Choice(0, Sampling(**options), tokeniser.detokeniser([]), stops)


def play(choice: Choice, tokens: list[int], reason: Any, size: int, logprobs: bool = False) -> list[Delta]:
    """Feed the tokens in chunks of that size until the choice has ended."""
    deltas: list[Delta] = []
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        values = [TokenLogprob(token, -1.0) for token in part] if logprobs else None
        delta = choice.take(TokenChunk("", part, reason if start + size >= len(tokens) else None, values))
        if delta is not None:
            deltas.append(delta)
        if choice.finish_reason is not None:
            break
    return deltas


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_an_end_token_counts_but_has_no_text(tokeniser: Tokeniser) -> None:
    choice = make(tokeniser, stop_token_ids=(ord("z"),))
    assert text_of(play(choice, [*b"abz"], "stop", 3)) == "ab"
    assert (choice.num_tokens, choice.finish_reason) == (3, "stop")


def test_an_end_token_that_did_not_end_the_answer_is_text(tokeniser: Tokeniser) -> None:
    choice = make(tokeniser, stop_token_ids=(ord("z"),))
    assert text_of(play(choice, [*b"az"], "length", 1)) == "az"


def test_half_a_character_at_the_end_is_replaced(tokeniser: Tokeniser) -> None:
    deltas = play(make(tokeniser), [*"a\u20ac".encode()[:-1]], "length", 1)
    assert [delta.text for delta in deltas] == ["a", "\ufffd"]
    assert deltas[-1].finish_reason == "length"


def test_the_last_delta_comes_even_without_text(tokeniser: Tokeniser) -> None:
    assert play(make(tokeniser), [END], "stop", 1) == [Delta("", (), "stop")]


@settings(deadline=None)
@given(
    text=st.text("ab\u20ac", min_size=1, max_size=20),
    stops=st.lists(st.text("ab\u20ac", min_size=1, max_size=3), max_size=3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    min_tokens=st.integers(0, 8),
    logprobs=st.booleans(),
)
def test_how_an_engine_chunks_its_tokens_changes_nothing(
    tokeniser: Tokeniser, text: str, stops: list[str], sizes: tuple[int, int], min_tokens: int, logprobs: bool
) -> None:
    seen = []
    for size in sizes:
        choice = make(tokeniser, *stops, min_tokens=min_tokens)
        deltas = play(choice, [*text.encode(), END], "stop", size, logprobs)
        located = [(offset, one.token_id) for delta in deltas for offset, one in delta.logprobs]
        seen.append((text_of(deltas), choice.num_tokens, choice.finish_reason, located))
    assert seen[0] == seen[1]
    assert text.startswith(seen[0][0])


def test_a_stop_string_ends_the_answer_at_the_token_that_completes_it(tokeniser: Tokeniser) -> None:
    choice = make(tokeniser, "lo")
    assert text_of(play(choice, [*b"hello world"], None, 11)) == "hel"
    assert (choice.num_tokens, choice.finish_reason) == (5, "stop")


def test_text_held_for_a_stop_string_is_shown_when_the_answer_ends(tokeniser: Tokeniser) -> None:
    choice = make(tokeniser, "END")
    assert text_of(play(choice, [*b"the EN"], "length", 2)) == "the EN"
    assert choice.finish_reason == "length"


def test_stop_strings_wait_for_min_tokens(tokeniser: Tokeniser) -> None:
    assert text_of(play(make(tokeniser, "b", min_tokens=3), [*b"abcabc"], "length", 6)) == "abca"


def test_logprobs_tell_where_their_tokens_stand(tokeniser: Tokeniser) -> None:
    deltas = play(make(tokeniser), [*"a\u20acb".encode(), END], "stop", 6, logprobs=True)
    located = [(offset, one.token_id) for delta in deltas for offset, one in delta.logprobs]
    assert located == [(0, 0x61), (1, 0xE2), (1, 0x82), (1, 0xAC), (2, 0x62)]


def test_logprobs_wait_for_their_text_and_go_with_what_is_cut_off(tokeniser: Tokeniser) -> None:
    deltas = play(make(tokeniser, "cd"), [*b"abcxcd"], None, 1, logprobs=True)
    shown = [(delta.text, [one.token_id for _, one in delta.logprobs]) for delta in deltas]
    assert shown == [("a", [97]), ("b", [98]), ("cx", [99, 120]), ("", [])]


def test_an_abort_nobody_asked_for_is_an_error(tokeniser: Tokeniser) -> None:
    with pytest.raises(InternalError):
        make(tokeniser).take(TokenChunk("", [], "abort"))
