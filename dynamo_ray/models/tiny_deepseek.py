"""A random model of DeepSeek-V3's shape (MLA, MoE with group routing, a shared expert), small enough for a laptop.

What it says means nothing; that two engines say the same does. The sizes are what vLLM's CPU kernels take:
kv_lora_rank 512 with a 64-wide rotary part, and hidden sizes in multiples of 32. YaRN with factor 1.0 is used, as
the real model uses YaRN: with rope_type "default" vLLM 0.32 leaves the query's rotary part unrotated in prefill.
The weights are wide (initializer_range 0.15) so that greedy answers are not one token repeated, which would hide
errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MAX_POSITION_EMBEDDINGS = 2048
SEED = 20240501


def build(target: Path) -> None:
    """Write the byte tokenizer, and an fp32 model over its vocabulary; some seconds, about 20 MB."""
    import json

    from tokenizers import Tokenizer

    from dynamo_ray.models import byte_tokenizer

    byte_tokenizer.build(target)
    vocab_size = Tokenizer.from_file(str(target / "tokenizer.json")).get_vocab_size()
    # The tokenizer comes with a config of its own: its special tokens stay, the model's shape is ours.
    special = json.loads((target / "config.json").read_text())
    write_model(target, vocab_size, {key: special[key] for key in special if key.endswith("_token_id")})


def model_config(vocab_size: int, special_token_ids: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of transformers' DeepseekV3Config."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": 256,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": 128,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": MAX_POSITION_EMBEDDINGS,
        "initializer_range": 0.15,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 1.0,
            "original_max_position_embeddings": MAX_POSITION_EMBEDDINGS,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        **special_token_ids,
    }


def write_model(target: Path, vocab_size: int, special_token_ids: dict[str, Any]) -> None:
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(**model_config(vocab_size, special_token_ids))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = DeepseekV3ForCausalLM(config).to(torch.float32)
        for name, buffer in model.named_buffers():
            # As trained models have it: a bias that changes which experts are chosen.
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.rand_like(buffer) * 0.1)
    model.save_pretrained(target)
