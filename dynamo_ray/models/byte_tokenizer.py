"""A tokenizer of one token a byte, for simulated engines and tiny random models: no download, no torch."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = ("<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")
NUM_BYTES = 256
MAX_POSITION_EMBEDDINGS = 8192

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build(folder: Path, vocab_size: int = 512) -> None:
    """Write tokenizer.json, tokenizer_config.json and config.json; token id == byte value, specials from 256 on.

    The ids left up to `vocab_size` are ordinary tokens that no text encodes to and that decode to their number, so
    that the answers of a random model over this vocabulary can be told apart.

    Raises:
        ValueError: `vocab_size` has no room for the bytes and the special tokens.
    """
    num_needed = NUM_BYTES + len(SPECIALS)
    if vocab_size < num_needed:
        raise ValueError(f"vocab_size={vocab_size} is too small; the bytes and special tokens need {num_needed}")
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    vocabulary |= {token: NUM_BYTES + index for index, token in enumerate(SPECIALS)}
    vocabulary |= {f"<{token_id}>": token_id for token_id in range(num_needed, vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|eos|>",
            "model_max_length": MAX_POSITION_EMBEDDINGS,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write_json(
        folder / "config.json",
        {
            "model_type": "simulated",
            "vocab_size": vocab_size,
            "max_position_embeddings": MAX_POSITION_EMBEDDINGS,
            "bos_token_id": NUM_BYTES,
            "eos_token_id": NUM_BYTES + 1,
        },
    )


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE.

    Source: `bytes_to_unicode` in openai/gpt-2, src/encoder.py.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(NUM_BYTES, NUM_BYTES * 2))
    return [chr(byte if byte in printable else next(others)) for byte in range(NUM_BYTES)]


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
