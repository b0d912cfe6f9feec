"""Tokens to text in pieces must be what decoding all of them at once is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from dynamo_ray import models as prepared
from dynamo_ray.models import byte_tokenizer
from dynamo_ray.request.detokenise import Detokeniser, StopStrings, WindowDetokeniser
from dynamo_ray.request.tokens import Tokeniser

SMOLLM2 = prepared.folder("smollm2-135m-instruct")
needs_smollm2 = pytest.mark.skipif(not (SMOLLM2 / "tokenizer.json").is_file(), reason="SmolLM2 is not prepared here")


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte-tokenizer")
    byte_tokenizer.build(folder)
    return folder


@pytest.fixture(scope="module")
def smollm2() -> tuple[Tokeniser, Tokenizer]:
    return Tokeniser(SMOLLM2), Tokenizer.from_file(str(SMOLLM2 / "tokenizer.json"))


def run(detokeniser: Detokeniser, tokens: Sequence[int], sizes: Sequence[int]) -> list[str]:
    """Push in pieces of these sizes, the last one as often as it takes."""
    pieces, start, turn = [], 0, 0
    while start < len(tokens):
        size = sizes[min(turn, len(sizes) - 1)]
        pieces.append(detokeniser.push(tokens[start : start + size]))
        start, turn = start + size, turn + 1
    return [*pieces, detokeniser.finish()]


SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=8)


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 600), max_size=60), sizes=SIZES)
def test_random_bytes_come_out_as_decoded_at_once(byte_folder: Path, tokens: list[int], sizes: list[int]) -> None:
    whole = Tokenizer.from_file(str(byte_folder / "tokenizer.json")).decode(tokens)
    assert "".join(run(Tokeniser(byte_folder).detokeniser([]), tokens, sizes)) == whole


@settings(deadline=None)
@given(text=st.text(max_size=40), sizes=SIZES)
def test_a_replacement_character_is_never_shown_before_it_is_final(
    byte_folder: Path, text: str, sizes: list[int]
) -> None:
    pieces = run(Tokeniser(byte_folder).detokeniser([]), list(text.encode()), sizes)
    assert "".join(pieces) == text
    assert all(text.startswith("".join(pieces[: i + 1])) for i in range(len(pieces)))


@needs_smollm2
@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 49_151), max_size=40), sizes=SIZES)
def test_random_tokens_of_smollm2_come_out_as_decoded_at_once(
    smollm2: tuple[Tokeniser, Tokenizer], tokens: list[int], sizes: list[int]
) -> None:
    tokeniser, library = smollm2
    assert "".join(run(tokeniser.detokeniser([1, 2, 3]), tokens, sizes)) == library.decode(tokens)


@needs_smollm2
@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60), sizes=SIZES)
def test_the_window_detokeniser_agrees_on_every_text(
    smollm2: tuple[Tokeniser, Tokenizer], text: str, sizes: list[int]
) -> None:
    _, library = smollm2
    tokens = library.encode(text, add_special_tokens=False).ids
    assert "".join(run(WindowDetokeniser(library, []), tokens, sizes)) == library.decode(tokens)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Llama 2's kind: spaces inside tokens, bytes as fallback, the first space stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581Hello", "\u2581world", "!"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


HELLO, WORLD, BANG = 259, 260, 261


def byte_tokens(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


@settings(deadline=None)
@given(
    parts=st.lists(st.one_of(st.sampled_from([[HELLO], [WORLD], [BANG], [1]]), st.text(max_size=3).map(byte_tokens))),
    sizes=SIZES,
)
def test_byte_fallback_comes_out_as_decoded_at_once(
    sentencepiece: Tokenizer, parts: list[list[int]], sizes: list[int]
) -> None:
    tokens = [token for part in parts for token in part]
    # The library's Strip takes the answer's own first space; here a token of the prompt stands before it.
    whole = sentencepiece.decode([BANG, *tokens])[1:]
    assert "".join(run(WindowDetokeniser(sentencepiece, [BANG]), tokens, sizes)) == whole


def test_the_prompt_keeps_the_first_tokens_space(sentencepiece: Tokenizer) -> None:
    assert WindowDetokeniser(sentencepiece, [HELLO]).push([WORLD]) == " world"
    assert WindowDetokeniser(sentencepiece, []).push([WORLD]) == "world"
    assert WindowDetokeniser(sentencepiece, [HELLO, *byte_tokens("\u20ac")[:1]]).push([WORLD]) == "world"


def test_half_a_character_waits_and_is_replaced_only_at_the_end(sentencepiece: Tokenizer) -> None:
    first, *rest = byte_tokens("\u20ac")
    detokeniser = WindowDetokeniser(sentencepiece, [BANG])
    assert [detokeniser.push([first]), detokeniser.push(rest)] == ["", "\u20ac"]
    assert detokeniser.push([first]) == ""
    assert detokeniser.finish() == "\ufffd"


def test_bytes_that_never_become_a_character_do_not_pile_up(sentencepiece: Tokenizer) -> None:
    detokeniser = WindowDetokeniser(sentencepiece, [BANG])
    shown = [detokeniser.push([3 + 0xFF]) for _ in range(1000)]
    assert len("".join(shown)) > 900
    assert len("".join(shown)) + len(detokeniser.finish()) == 1000


def test_special_tokens_without_end_cost_the_same_each(sentencepiece: Tokenizer) -> None:
    detokeniser = WindowDetokeniser(sentencepiece, [BANG])
    decoded: list[int] = []

    class Counting:
        def decode(self, tokens: list[int]) -> str:
            decoded.append(len(tokens))
            return str(sentencepiece.decode(tokens))

    detokeniser._tokenizer = Counting()  # type: ignore[assignment]
    assert detokeniser.push([1] * 500 + [WORLD]) == " world"
    assert max(decoded) < 50


# Stop strings.

ALPHABET = st.text("ab\u20ac", min_size=1, max_size=4)


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The specification: generation ends with the character that completes a stop string."""
    for end in range(1, len(text) + 1):
        complete = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(complete)], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(text=st.text("ab\u20ac", max_size=30), stops=st.lists(ALPHABET, min_size=1, max_size=4), sizes=SIZES)
def test_stop_strings_cut_pieces_as_they_cut_the_whole(text: str, stops: list[str], sizes: list[int]) -> None:
    stream, shown, found, start, turn = StopStrings(stops), "", False, 0, 0
    while start < len(text) and not found:
        size = sizes[min(turn, len(sizes) - 1)]
        piece, found = stream.push(text[start : start + size])
        shown, start, turn = shown + piece, start + size, turn + 1
    if not found:
        shown += stream.finish()
    assert (shown, found) == cut(text, stops)


@settings(deadline=None)
@given(text=st.text("ab\u20ac", max_size=30), stops=st.lists(ALPHABET, min_size=1, max_size=4))
def test_only_a_beginning_of_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    stream, shown = StopStrings(stops), ""
    for end, character in enumerate(text, 1):
        piece, found = stream.push(character)
        if found:
            return
        shown += piece
        held = text[len(shown) : end]
        assert not held or any(stop.startswith(held) for stop in stops)


def push_all(stops: Sequence[str], pieces: Sequence[str]) -> list[str]:
    stream = StopStrings(stops)
    push: Callable[[str], tuple[str, bool]] = stream.push
    return [push(piece)[0] for piece in pieces]


def test_text_is_let_go_as_soon_as_it_cannot_become_a_stop_string() -> None:
    assert push_all(["END"], ["a E", "N", "x", "E", "D"]) == ["a ", "", "ENx", "", "ED"]
