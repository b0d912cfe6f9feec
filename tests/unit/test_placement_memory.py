"""Bytes per GPU, against published sizes and the planning table of DeepSeek-R1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.gpus import GIB, GPU_TYPES, gpu_type
from placement.memory import (
    check,
    default_allowances,
    fit,
    kv_cost,
    parameters,
    weights,
)
from placement.model_shape import KvDtype, ModelShape, Precision, Quantisation, read_config
from placement.parallelism import Parallelism

# Fields as published in each model's config.json on Hugging Face; those that memory does not depend on are left out.
DEEPSEEK_R1: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
DEEPSEEK_V32 = {**DEEPSEEK_R1, "model_type": "deepseek_v32", "index_n_heads": 64, "index_head_dim": 128}
DEEPSEEK_V2_LITE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "num_experts_per_tok": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1408,
    "intermediate_size": 10944,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LLAMA_1B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
QWEN3_32B: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "intermediate_size": 25600,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
QWEN3_235B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "intermediate_size": 12288,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
GPT_OSS_120B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "num_hidden_layers": 36,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
}
ALL_FP8 = Quantisation(Precision.FP8, Precision.FP8, Precision.FP8, Precision.FP8)
ALL_FP8_TENSOR = Quantisation(Precision.FP8_TENSOR, Precision.FP8_TENSOR, Precision.FP8_TENSOR, Precision.FP8_TENSOR)
NVFP4_EXPERTS = Quantisation(Precision.FP8, Precision.FP8, Precision.FP8, Precision.NVFP4)
R1 = read_config(DEEPSEEK_R1)
ONE = Parallelism()
H100 = gpu_type("H100")


def dep(width: int) -> Parallelism:
    return Parallelism(attn_dp=width, moe_ep=width)


def tp(width: int) -> Parallelism:
    return Parallelism(attn_tp=width, moe_tp=width)


@pytest.mark.parametrize(
    ("config", "published", "tolerance"),
    [
        (DEEPSEEK_R1, 671.03e9, 0.001),
        (DEEPSEEK_V2_LITE, 15.7e9, 0.01),
        (LLAMA_70B, 70.55e9, 0.01),
        (LLAMA_1B, 1.236e9, 0.01),
        (QWEN3_32B, 32.76e9, 0.01),
        (QWEN3_235B, 235.1e9, 0.01),
        (GPT_OSS_120B, 116.8e9, 0.02),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_a_config_gives_the_published_number_of_parameters(
    config: dict[str, Any], published: float, tolerance: float
) -> None:
    assert parameters(read_config(config), ONE).total == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize(
    ("width", "redundant", "experts_gib", "total_gib"),
    [
        (8, 0, 76.1, 94.1),
        (16, 0, 38.1, 56.0),
        (32, 0, 19.0, 37.0),
        (32, 32, 21.4, 39.4),
        (48, 32, 14.3, 32.2),
        (72, 32, 9.5, 27.5),
        (144, 32, 4.8, 22.7),
    ],
)
def test_deepseek_r1_in_fp8_takes_what_the_planning_table_says(
    width: int, redundant: int, experts_gib: float, total_gib: float
) -> None:
    taken = weights(R1, dep(width), redundant)
    assert taken.routed_experts / GIB == pytest.approx(experts_gib, rel=0.03)
    assert taken.total / GIB == pytest.approx(total_gib, rel=0.03)
    assert (taken.total - taken.routed_experts) / GIB == pytest.approx(17.96, rel=0.01)


def test_ep64_with_32_redundant_is_an_average_that_no_engine_accepts() -> None:
    """The table's 10.7/28.7 GiB are 4.5 experts a GPU: half way between no and 64 redundant ones."""
    four, five = weights(R1, dep(64), 0), weights(R1, dep(64), 64)
    assert (four.routed_experts + five.routed_experts) / 2 / GIB == pytest.approx(10.7, rel=0.03)
    assert (four.total + five.total) / 2 / GIB == pytest.approx(28.7, rel=0.03)
    with pytest.raises(ValueError, match=r"256\+32 must be a multiple of moe_ep=64"):
        weights(R1, dep(64), 32)


@pytest.mark.parametrize(
    ("width", "redundant", "experts_gib", "total_gib"), [(8, 0, 42.8, 60.8), (32, 0, 10.7, 28.7), (48, 32, 8.0, 26.0)]
)
def test_nvfp4_experts_take_what_the_planning_table_says(
    width: int, redundant: int, experts_gib: float, total_gib: float
) -> None:
    taken = weights(read_config(DEEPSEEK_R1, NVFP4_EXPERTS), dep(width), redundant)
    assert taken.routed_experts / GIB == pytest.approx(experts_gib, rel=0.03)
    assert taken.total / GIB == pytest.approx(total_gib, rel=0.03)


def test_llama_70b_takes_two_bytes_for_each_parameter() -> None:
    assert weights(read_config(LLAMA_70B), ONE).total == pytest.approx(70.55e9 * 2, rel=0.01)


def test_gpt_oss_120b_takes_what_its_checkpoint_does() -> None:
    """60.8 GiB (model card, arXiv:2508.10925, table 1)."""
    assert weights(read_config(GPT_OSS_120B), ONE).total / GIB == pytest.approx(60.8, rel=0.01)


def test_the_mtp_layer_adds_11_6_billion_parameters_to_the_last_stage() -> None:
    staged = replace(dep(8), pp=2)
    assert weights(R1, ONE, with_mtp=True).mtp == pytest.approx(11.6e9, rel=0.02)
    assert weights(R1, ONE).mtp == 0
    assert weights(R1, staged, with_mtp=True, stage=0).mtp == 0
    embedding = 2 * 129280 * 7168
    assert weights(R1, staged, with_mtp=True, stage=1).mtp == weights(R1, dep(8), with_mtp=True).mtp + embedding


def test_an_mtp_layer_that_was_not_quantised_takes_two_bytes() -> None:
    kept = replace(R1, quantisation=replace(R1.quantisation, mtp=False))
    assert weights(kept, ONE, with_mtp=True).mtp == pytest.approx(2 * 11.6e9, rel=0.02)


def test_mtp_of_a_model_without_one_is_refused() -> None:
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0"):
        weights(read_config(LLAMA_70B), ONE, with_mtp=True)


@pytest.mark.parametrize(
    ("config", "dtype", "num_bytes"),
    [
        (DEEPSEEK_R1, KvDtype.BF16, 70_272),
        (DEEPSEEK_R1, KvDtype.FP8, 35_136),
        (DEEPSEEK_R1, KvDtype.FP8_DS_MLA, 40_016),
        (DEEPSEEK_V32, KvDtype.FP8_DS_MLA, 61 * (656 + 132)),
        (LLAMA_70B, KvDtype.BF16, 327_680),
        (LLAMA_70B, KvDtype.FP8, 163_840),
    ],
)
def test_a_token_of_kv_takes_what_its_attention_keeps(config: dict[str, Any], dtype: KvDtype, num_bytes: int) -> None:
    assert kv_cost(read_config(config), ONE, dtype).per_token_bytes == num_bytes


@pytest.mark.parametrize(("config", "shares"), [(DEEPSEEK_R1, [1, 1, 1]), (LLAMA_70B, [2, 8, 8])])
def test_tensor_parallelism_shards_kv_heads_but_not_the_latent(config: dict[str, Any], shares: list[int]) -> None:
    shape = read_config(config)
    whole = kv_cost(shape, ONE).per_token_bytes
    assert [whole / kv_cost(shape, tp(width)).per_token_bytes for width in (2, 8, 16)] == shares


def test_windowed_layers_cost_a_window_for_each_sequence_and_nothing_for_each_token() -> None:
    cost = kv_cost(read_config(GPT_OSS_120B), ONE)
    one_layer = 2 * 8 * 64 * 2
    assert cost.per_token_bytes == 18 * one_layer
    assert cost.per_sequence_bytes == 18 * 128 * one_layer


def test_windows_of_more_sequences_leave_fewer_tokens() -> None:
    shape, gpu = read_config(GPT_OSS_120B), gpu_type("H200")
    few, many = (fit(shape, ONE, gpu, num_sequences=count) for count in (1, 1000))
    assert few.kv_budget_bytes - many.kv_budget_bytes == 999 * few.kv.per_sequence_bytes


def test_the_dtype_of_mla_is_refused_for_grouped_queries() -> None:
    with pytest.raises(ValueError, match="kv_dtype=fp8_ds_mla needs MLA"):
        kv_cost(read_config(LLAMA_70B), ONE, KvDtype.FP8_DS_MLA)


def test_ep72_with_32_redundant_holds_about_1_1_million_tokens_on_h100() -> None:
    found = fit(R1, dep(72), H100, 0.85, redundant_experts=32, kv_dtype=KvDtype.FP8)
    assert found.fits
    assert found.kv_tokens == pytest.approx(1.1e6, rel=0.03)
    assert found.explain().startswith("EP72+32 fp8 fits H100: 27.5 GiB of weights and 5.2 GiB of allowances leave 35.3")
    assert found.explain().endswith("of 68.0 GiB usable at mem_fraction 0.85 for 1,079,398 KV tokens")


def test_the_allowances_beside_the_absorbed_projections_are_the_3_5_gb_of_the_planning_table() -> None:
    taken = default_allowances(R1, dep(72), 32)
    assert taken.total - taken.absorbed_bytes == pytest.approx(3.5e9, rel=0.02)
    assert default_allowances(R1, dep(72), 32, dispatch_tokens=256).all_to_all_bytes == 2 * taken.all_to_all_bytes
    assert default_allowances(read_config(LLAMA_70B), tp(8)).all_to_all_bytes == 0


def test_a_caller_s_allowances_replace_the_defaults() -> None:
    lean = replace(default_allowances(R1, dep(32)), absorbed_bytes=0)
    default, changed = fit(R1, dep(32), H100), fit(R1, dep(32), H100, allowances=lean)
    assert changed.kv_budget_bytes - default.kv_budget_bytes == default.allowances.absorbed_bytes > 0


def test_a_misfit_says_what_it_takes_and_the_smallest_width_that_fits() -> None:
    found = fit(R1, dep(8), H100)
    assert not found.fits
    assert found.kv_tokens == 0
    assert found.smallest == dep(16)
    assert found.explain().startswith("EP8 fp8 does not fit H100: 94.1 GiB of 80 ")
    assert found.explain().endswith("the smallest multiple that fits is EP16 fp8")


def test_a_dense_misfit_is_widened_by_tensor_parallelism() -> None:
    found = fit(read_config(LLAMA_70B), tp(1), H100)
    assert found.explain().startswith("TP1 bf16 does not fit H100: 131.4 GiB of 80 ")
    assert found.smallest == tp(2)


def test_weights_that_fit_without_the_tokens_asked_for_do_not_fit() -> None:
    found = fit(R1, dep(16), H100, min_kv_tokens=200_000)
    assert not found.fits
    assert found.smallest == dep(32)
    assert f"room for {found.kv_tokens:,} KV tokens of 200,000" in found.explain()


def test_what_no_multiple_makes_fit_is_said() -> None:
    found = fit(R1, dep(8), replace(H100, memory_gib=20))
    assert found.smallest is None
    assert found.explain().endswith("no multiple of this width fits")


def test_tensor_parallel_attention_shards_all_but_the_projections_to_the_latents() -> None:
    one, eight = parameters(R1, ONE), parameters(R1, Parallelism(attn_tp=8, moe_ep=8))
    replicated = 61 * 7168 * (1536 + 576)
    assert eight.attention - replicated == (one.attention - replicated) / 8
    for name in ("dense_mlp", "shared_experts", "routed_experts", "embedding", "head"):
        assert getattr(eight, name) * 8 == getattr(one, name)
    assert (eight.gates, eight.norms) == (one.gates, one.norms)


def test_attention_data_parallelism_shards_routed_experts_only() -> None:
    one, eight = parameters(R1, ONE), parameters(R1, dep(8))
    assert eight == replace(one, routed_experts=one.routed_experts // 8)


def test_the_stages_of_a_pipeline_hold_every_layer_once_and_the_fullest_counts() -> None:
    width = replace(dep(8), pp=4)
    stages = [weights(R1, width, stage=stage) for stage in range(4)]
    whole = weights(R1, dep(8))
    assert sum(stage.total for stage in stages) == pytest.approx(whole.total, rel=1e-6)
    assert [stage.routed_experts / whole.routed_experts * 58 for stage in stages] == pytest.approx([12, 15, 16, 15])
    assert fit(R1, width, H100).weights == stages[2]


def test_tied_embeddings_are_one_matrix_unless_a_pipeline_parts_them() -> None:
    shape = read_config(LLAMA_1B)
    assert parameters(shape, ONE).head == 0
    assert parameters(shape, Parallelism(pp=2), stage=1).head == 128256 * 2048


def test_every_width_that_does_not_divide_is_named_at_once() -> None:
    with pytest.raises(ValueError, match="moe_ep=72") as caught:
        check(R1, Parallelism(attn_tp=3, attn_dp=24, moe_ep=72, pp=62))
    for part in ("num_hidden_layers=61", "pp=62", "num_attention_heads=128", "attn_tp=3", "256+0"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("config", "width", "redundant", "message"),
    [
        (LLAMA_70B, Parallelism(attn_tp=32, moe_tp=32), 1, "redundant_experts=1"),
        (
            DEEPSEEK_R1,
            Parallelism(attn_tp=32, moe_ep=32),
            0,
            "n_shared_experts=2048 must be a multiple of attn_tp=32 t",
        ),
        (QWEN3_235B, dep(8), -8, "redundant_experts=-8"),
        ({**LLAMA_70B, "num_attention_heads": 96, "num_key_value_heads": 6}, tp(4), 0, "num_key_value_heads=6"),
        ({**LLAMA_70B, "intermediate_size": 28671}, tp(2), 0, "intermediate_size=28671"),
        (
            {**QWEN3_235B, "quantization_config": DEEPSEEK_R1["quantization_config"]},
            tp(8),
            0,
            "moe_intermediate_size=1536 must be a multiple of moe_tp=8 times its block of 128",
        ),
    ],
)
def test_a_width_the_model_cannot_have_is_refused(
    config: dict[str, Any], width: Parallelism, redundant: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(read_config(config), width, H100, redundant_experts=redundant)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mem_fraction": 0.0}, "mem_fraction=0 "),
        ({"mem_fraction": 85.0}, "mem_fraction=85 "),
        ({"num_sequences": 0}, "num_sequences=0"),
        ({"min_kv_tokens": 0}, "min_kv_tokens=0"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(R1, dep(32), H100, **options)


def test_an_unknown_model_type_lists_the_supported_ones() -> None:
    with pytest.raises(ValueError, match="model_type='mamba' is not supported") as caught:
        read_config({"model_type": "mamba"})
    for name in ("deepseek_v2", "deepseek_v3", "deepseek_v32", "gpt_oss", "llama", "qwen3", "qwen3_moe"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (DEEPSEEK_R1, {"kv_lora_rank": None}, "kv_lora_rank is missing"),
        (DEEPSEEK_R1, {"model_type": "deepseek_v32"}, "index_n_heads is missing"),
        (DEEPSEEK_R1, {"hidden_size": "7168"}, "hidden_size='7168' must be a whole number"),
        (DEEPSEEK_R1, {"vocab_size": True}, "vocab_size=True must be a whole number"),
        (DEEPSEEK_R1, {"n_routed_experts": 0}, "n_routed_experts=0 must be a whole number of at least 1"),
        (DEEPSEEK_R1, {"first_k_dense_replace": 62}, "first_k_dense_replace=62 is more than num_hidden_layers=61"),
        (QWEN3_32B, {"head_dim": None}, "head_dim is missing"),
        (QWEN3_32B, {"num_key_value_heads": 7}, "num_attention_heads=64 must be a multiple of num_key_value_heads=7"),
        (LLAMA_70B, {"head_dim": None, "hidden_size": 8191}, "hidden_size=8191 must be a multiple"),
        (GPT_OSS_120B, {"layer_types": ["full_attention"]}, "layer_types has 1 layers"),
        (GPT_OSS_120B, {"layer_types": ["linear_attention"] * 36}, "kinds we do not know: linear_attention"),
        (GPT_OSS_120B, {"layer_types": "full_attention"}, "layer_types='full_attention' must be a list"),
        (GPT_OSS_120B, {"sliding_window": None}, "sliding_window is missing"),
        (QWEN3_235B, {"mlp_only_layers": 3}, "mlp_only_layers=3 must be a list"),
        (LLAMA_70B, {"quantization_config": "fp8"}, "quantization_config='fp8' must be a mapping"),
        (LLAMA_70B, {"quantization_config": {"quant_method": "awq"}}, "quant_method='awq'"),
        (LLAMA_70B, {"quantization_config": {"quant_method": "modelopt"}}, "quant_algo=None"),
        (
            LLAMA_70B,
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 32]}},
            r"weight_block_size=\[1, 32\]",
        ),
    ],
)
def test_a_missing_or_impossible_field_is_named_beside_the_supported_types(
    config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_config({**config, **change})
    assert "supported types: deepseek_v2, " in str(caught.value)


FLOAT8 = {"type": "float", "num_bits": 8}


def compressed(*weights: dict[str, Any]) -> dict[str, Any]:
    groups = {f"group_{index}": {"targets": ["Linear"], "weights": held} for index, held in enumerate(weights)}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (compressed(), "all 8-bit floats"),
        (compressed(FLOAT8, {"type": "int", "num_bits": 4}), "all 8-bit floats"),
        (compressed(FLOAT8 | {"strategy": "block", "block_structure": [64, 64]}), r"\[64, 64\] must be \[128, 128\]"),
        ({"quant_method": "awq"}, "compressed-tensors of 8-bit floats"),
    ],
)
def test_weights_held_in_ways_we_do_not_know_are_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config({**DEEPSEEK_R1, "quantization_config": raw})


@pytest.mark.parametrize(
    ("raw", "quantisation"),
    [
        (None, Quantisation()),
        (DEEPSEEK_R1["quantization_config"], ALL_FP8),
        ({"quant_method": "fp8"}, ALL_FP8_TENSOR),
        (GPT_OSS_120B["quantization_config"], Quantisation(routed_experts=Precision.MXFP4)),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "NVFP4",
                "ignore": ["lm_head", "model.layers.*.self_attn*", "model.layers.61*", "model.layers.30.mlp.gate"],
            },
            Quantisation(Precision.BF16, Precision.NVFP4, Precision.NVFP4, Precision.NVFP4, mtp=False),
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["shared_experts", "mlp.gate"]},
            Quantisation(Precision.FP8_TENSOR, Precision.FP8_TENSOR, Precision.BF16, Precision.FP8_TENSOR),
        ),
        (compressed(FLOAT8 | {"strategy": "channel"}), ALL_FP8_TENSOR),
        (compressed(FLOAT8 | {"strategy": "block", "block_structure": [128, 128]}), ALL_FP8),
    ],
)
def test_quantization_config_gives_each_kind_of_matrix_its_precision(
    raw: dict[str, Any] | None, quantisation: Quantisation
) -> None:
    assert read_config({**DEEPSEEK_R1, "quantization_config": raw}).quantisation == quantisation


def test_the_indexer_of_v3_2_is_on_every_rank_beside_its_attention() -> None:
    v32 = read_config(DEEPSEEK_V32)
    indexer = 61 * (1536 * 64 * 128 + 7168 * (128 + 64))
    assert parameters(v32, tp(8)).attention - parameters(R1, tp(8)).attention == indexer


def test_qwen3_moe_layers_that_are_dense_are_counted_as_such() -> None:
    shape = read_config({**QWEN3_235B, "decoder_sparse_step": 2, "mlp_only_layers": [1]})
    assert shape.is_moe[:4] == (False, False, False, True)


def test_a_shape_that_contradicts_itself_is_refused() -> None:
    for change in ({"is_windowed": ()}, {"is_moe": (), "is_windowed": ()}, {"experts": None}):
        with pytest.raises(ValueError, match=r"is_windowed|experts"):
            replace(R1, **change)
    with pytest.raises(ValueError, match="window_tokens=0"):
        replace(R1, is_windowed=(True,) * 61)


def test_an_unknown_gpu_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown GPU 'h100'") as caught:
        gpu_type("h100")
    assert all(name in str(caught.value) for name in GPU_TYPES)
    assert "did you mean H100" in str(caught.value)
    with pytest.raises(ValueError, match=r"GB300$"):
        gpu_type("TPU")


@given(st.sampled_from([8, 16, 32, 64]), st.sampled_from([0, 128]), st.sampled_from(sorted(GPU_TYPES)))
def test_a_wider_group_never_takes_more_of_a_gpu(width: int, redundant: int, gpu: str) -> None:
    narrow, wide = (
        fit(R1, dep(ep), GPU_TYPES[gpu], redundant_experts=redundant, kv_dtype=KvDtype.FP8) for ep in (width, 2 * width)
    )
    assert wide.weights.total < narrow.weights.total
    assert wide.kv_tokens >= narrow.kv_tokens


@pytest.mark.parametrize("shape", [R1, read_config(LLAMA_70B)], ids=["moe", "dense"])
def test_the_width_that_a_misfit_names_does_fit(shape: ModelShape) -> None:
    found = fit(shape, ONE, H100)
    assert found.smallest is not None
    assert fit(shape, found.smallest, H100).fits
