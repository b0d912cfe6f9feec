"""Text to tokens: the model's chat template and tokenizer, read from its folder; no torch, transformers or network."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer

from dynamo_ray.errors import InvalidRequest, Problem, StartError
from dynamo_ray.models.byte_tokenizer import byte_characters
from dynamo_ray.request.chat_template import compile_template
from dynamo_ray.request.detokenise import ByteLevelDetokeniser, Detokeniser, TokenBytes, WindowDetokeniser

OFF_LOOP_CHARACTERS = 4096
"""Longer texts are tokenised in a thread. Measured: 0.5-0.7 us a character, so up to 3 ms on the loop against 0.13 ms
for the hop; `encode_batch_fast` lets go of the GIL (longest hold 0.7 ms over 100,000 characters, `encode` 60 ms)."""

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokeniser:
    """One model's; safe to use from several tasks at once."""

    def __init__(self, folder: Path) -> None:
        """Read the model folder's tokenizer.json, tokenizer_config.json, chat template and EOS tokens.

        Raises:
            StartError: A file is missing or unreadable; names it.
        """
        path = folder / "tokenizer.json"
        content = _read_json(path, required=True)
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise _unusable(path, str(error)) from error
        # What a file was saved with for training batches must not cut or pad prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = _read_json(folder / "tokenizer_config.json")
        self._special_tokens = {name: _text(settings[name]) for name in SPECIAL_TOKENS if settings.get(name)}
        self._bos_to_add = self._token_id("bos_token") if settings.get("add_bos_token") else None
        config = _read_json(folder / "config.json")
        self.eos_token_ids = _eos_token_ids(folder, config, self._token_id("eos_token"))
        """Every token that ends an answer."""
        self.vocab_size = max(self._tokenizer.get_vocab_size(), config.get("vocab_size") or 0)
        template = _find_template(folder, settings)
        self._template = None if template is None else compile_template(template)
        self._knows_developer = template is not None and "developer" in template
        self._byte_level = (content.get("decoder") or {}).get("type") == "ByteLevel"
        self._token_bytes = TokenBytes(self._tokenizer, byte_characters())

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The text's tokens; with special tokens, those that the model expects around a plain text."""
        if len(text) > OFF_LOOP_CHARACTERS:
            return await asyncio.to_thread(self._encode, text, add_special_tokens)
        return self._encode(text, add_special_tokens)

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of the conversation in the model's own form, ready for the assistant's turn.

        Raises:
            InvalidRequest: The model has no chat template, or its template refuses these messages.
        """
        text = self.render(messages)
        # The template has written the special tokens itself.
        return await self.encode(text, add_special_tokens=False)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as text; raises InvalidRequest as `encode_chat` does."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", "messages")
        if not self._knows_developer:
            # Templates skip roles they do not know; OpenAI's newer name for `system` must not get lost.
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error

    def detokeniser(self, prompt: Sequence[int]) -> Detokeniser:
        """A fresh one, for one answer to that prompt."""
        if self._byte_level:
            return ByteLevelDetokeniser(self._token_bytes)
        return WindowDetokeniser(self._tokenizer, prompt)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for on its own, special tokens included; part of a character perhaps."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return self._token_bytes.spell(token)
        fallback = _BYTE_FALLBACK.fullmatch(token)
        return bytes.fromhex(fallback[1]) if fallback else token.replace("\u2581", " ").encode()

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        token_ids: list[int] = encoding.ids
        bos = self._bos_to_add
        # transformers rebuilds the post-processor from add_bos_token; DeepSeek-V3's tokenizer.json lacks it.
        if add_special_tokens and bos is not None and token_ids[:1] != [bos]:
            return [bos, *token_ids]
        return token_ids

    def _token_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        token_id: int | None = None if token is None else self._tokenizer.token_to_id(token)
        return token_id


def _eos_token_ids(folder: Path, config: Mapping[str, Any], tokenizer_eos: int | None) -> tuple[int, ...]:
    """All that any of the model's files name: chat models end a turn with another token than a document."""
    found = {tokenizer_eos} if tokenizer_eos is not None else set()
    for source in (_read_json(folder / "generation_config.json"), config):
        value = source.get("eos_token_id")
        found |= set(value) if isinstance(value, list) else {value} if isinstance(value, int) else set()
    return tuple(sorted(found))


def _find_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """In transformers' order: chat_template.jinja, chat_template.json, tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(template, list):
        template = next((named["template"] for named in template if named["name"] == "default"), None)
    return template


def _read_json(path: Path, required: bool = False) -> dict[str, Any]:
    if not required and not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _unusable(path, "is not there; set it to a folder with the model's Hugging Face files") from error
    except (OSError, ValueError) as error:
        raise _unusable(path, f"cannot be read: {error}") from error
    return content


def _unusable(path: Path, reason: str) -> StartError:
    return StartError(str(Problem("model.path", f"{path}: {reason}")))


def _text(token: str | dict[str, Any]) -> str:
    """A special token is a string, or an AddedToken written as an object."""
    return token if isinstance(token, str) else str(token["content"])
