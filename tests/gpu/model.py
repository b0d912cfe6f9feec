"""The model of the GPU tests: DeepSeek-V3's architecture (MLA and MoE) made small, with weights that the engine makes
up from a fixed seed (`load_format: dummy`), and SmolLM2's tokenizer, whose vocabulary it has.

Importing it lets the others here find the project where it is not installed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/gpu"), str(ROOT / "tests/support")]

from dynamo_ray import models  # noqa: E402

NAME = "deepseek-v3-small"
NUM_LAYERS, KV_LORA_RANK, ROPE_DIM = 8, 512, 64
KV_BYTES_PER_TOKEN = NUM_LAYERS * (KV_LORA_RANK + ROPE_DIM) * 2
"""bf16; MLA keeps one compressed vector and one rotated key a layer."""

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": NUM_LAYERS,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 768,
    "kv_lora_rank": KV_LORA_RANK,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": ROPE_DIM,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_nextn_predict_layers": 0,
}

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def make(folder: Path) -> Path:
    """Write the model's folder; the tokenizer is taken from the one that `make models` has made."""
    source = models.folder("smollm2-135m-instruct")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    return folder
