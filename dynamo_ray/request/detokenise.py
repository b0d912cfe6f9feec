"""Tokens to text as they come: incremental detokenisers and stop strings. Pure; one instance a choice."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6
"""Prompt tokens an answer is decoded after, where decoding depends on what stands before (SentencePiece strips the
first token's space); as many as vLLM takes (v1/engine/detokenizer.py, 5 and the last)."""
MAX_HELD_TOKENS = 32
"""A character is at most 4 bytes, each at most a token; what is still undecided after this many never will be."""


class Detokeniser(Protocol):
    """Joined, what `push` and `finish` return is the text of all tokens; special tokens have none.

    A character whose bytes are not all there yet is held back, so U+FFFD appears only where it is final.
    """

    def push(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class TokenBytes(dict[int, bytes]):
    """Token id -> its bytes in the text, filled as tokens appear; for byte-level vocabularies only.

    Special tokens and ids the tokenizer does not know have none, as in `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, byte_characters: Sequence[str]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._bytes = {character: byte for byte, character in enumerate(byte_characters)}
        added = tokenizer.get_added_tokens_decoder()
        self.update((token_id, b"") for token_id, token in added.items() if token.special)

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        self[token_id] = content = b"" if token is None else self.spell(token)
        return content

    def spell(self, token: str) -> bytes:
        """One vocabulary entry's bytes; an added token stands for itself (tokenizers, byte_level.rs)."""
        try:
            return bytes([self._bytes[character] for character in token])
        except KeyError:
            return token.encode()


class ByteLevelDetokeniser:
    """For byte-level vocabularies, where the text is the UTF-8 decoding of all tokens' bytes. Exact; < 1 us a token."""

    __slots__ = ("_table", "_tail")

    def __init__(self, table: TokenBytes) -> None:
        self._table = table
        self._tail = b""

    def push(self, token_ids: Sequence[int]) -> str:
        table = self._table
        data = table[token_ids[0]] if len(token_ids) == 1 else b"".join([table[token_id] for token_id in token_ids])
        if self._tail:
            data = self._tail + data
        text, used = utf_8_decode(data, "replace", False)
        self._tail = data[used:]
        return text

    def finish(self) -> str:
        text, _ = utf_8_decode(self._tail, "replace", True)
        self._tail = b""
        return text


class WindowDetokeniser:
    """For every other tokenizer: decodes the last tokens again with the new one and returns what is new.

    Exact where a token's text depends on its neighbours only, and for valid UTF-8. A byte-fallback decoder turns a
    whole run of bytes into U+FFFD when one of them is invalid; here those already shown stay. `DecodeStream` of
    `tokenizers` works alike, but has no way to flush, holds undecodable bytes for ever and raises on such runs.
    """

    __slots__ = ("_context", "_context_text", "_held", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt[-CONTEXT_TOKENS:])
        self._context_text: str = tokenizer.decode(self._context)
        if self._context_text.endswith(REPLACEMENT):
            self._context, self._context_text = [], ""
        self._held: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push(token_id) for token_id in token_ids])

    def _push(self, token_id: int) -> str:
        self._held.append(token_id)
        text: str = self._tokenizer.decode([*self._context, *self._held])
        if text.endswith(REPLACEMENT):
            return "" if len(self._held) < MAX_HELD_TOKENS else self.finish()
        fresh = text[len(self._context_text) :]
        if fresh:
            # What has text of its own is context enough for what follows; a special token has none.
            self._context, self._held = self._held, []
            self._context_text = self._tokenizer.decode(self._context)
        elif len(self._held) >= MAX_HELD_TOKENS:
            self._held.clear()  # special tokens without end, as under ignore_eos
        return fresh

    def finish(self) -> str:
        # Without the context: a run of bytes decodes to nothing but U+FFFD, the ones already shown among them.
        text: str = self._tokenizer.decode(self._held)
        self._held = []
        return text


class StopStrings:
    """Cuts a text before the stop string that is complete first, however the text arrives in pieces.

    Only what may be the beginning of a stop string is held back. Of stop strings complete at the same character the
    longest counts.
    """

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may be shown now, and whether a stop string was found; after that, push nothing more."""
        text = self._held + text if self._held else text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        held = max([_overlap(text, stop) for stop in self._stops])
        if not held:
            self._held = ""
            return text, False
        self._held = text[-held:]
        return text[:-held], False

    def finish(self) -> str:
        """The text held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are a beginning of `stop`, which `text` does not contain."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
