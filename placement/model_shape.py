"""What of a model's config.json decides how much memory it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

SCALE_BLOCK = 128
"""Side of the square block of weights that shares one scale in `Precision.FP8`; no shard may cut one."""


class Precision(StrEnum):
    """How a weight is held."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"
    """DeepSeek's: an fp32 scale for each block of 128 x 128."""
    FP8_TENSOR = "fp8_tensor"
    NVFP4 = "nvfp4"
    """4 bits, and an e4m3 scale for each 16."""
    MXFP4 = "mxfp4"
    """4 bits, and an e8m0 scale for each 32 (OCP Microscaling 1.0)."""

    @property
    def bytes_per_weight(self) -> float:
        """Scales included."""
        return _BYTES_PER_WEIGHT[self]


_BYTES_PER_WEIGHT = {
    Precision.FP32: 4.0,
    Precision.BF16: 2.0,
    Precision.FP8: 1.0 + 4 / SCALE_BLOCK**2,
    Precision.FP8_TENSOR: 1.0,
    Precision.NVFP4: 0.5 + 1 / 16,
    Precision.MXFP4: 0.5 + 1 / 32,
}


class KvDtype(StrEnum):
    BF16 = "bf16"
    FP8 = "fp8"
    FP8_DS_MLA = "fp8_ds_mla"
    """FlashMLA's: the latent in fp8 with an fp32 scale for each 128, the rope part in bf16. MLA only."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """The precision of each kind of matrix; what is not named stays bf16 in every checkpoint we read."""

    attention: Precision = Precision.BF16
    dense_mlp: Precision = Precision.BF16
    shared_experts: Precision = Precision.BF16
    routed_experts: Precision = Precision.BF16
    mtp: bool = True
    """False: the MTP layers stay bf16, as NVFP4 checkpoints of DeepSeek leave them."""


@dataclass(frozen=True, slots=True)
class Indexer:
    """DeepSeek V3.2's choice of the tokens to attend to: replicated, with an fp8 key per token and layer."""

    num_heads: int
    head_dim: int

    @property
    def kv_bytes(self) -> int:
        """Per token and layer, whatever the KV dtype: fp8 and an fp32 scale for each 128 (vLLM 0.32, indexer.py)."""
        return self.head_dim + 4 * -(-self.head_dim // 128)


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    num_heads: int
    q_lora_rank: int
    """0: queries are projected from the hidden state at once (V2-Lite)."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    indexer: Indexer | None = None

    def parameters(self, hidden_size: int, attn_tp: int) -> int:
        """Of one layer on one rank: heads are sharded, the projections to the latents are on every rank."""
        query_in = self.q_lora_rank or hidden_size
        replicated = hidden_size * (self.q_lora_rank + self.kv_lora_rank + self.qk_rope_head_dim)
        if self.indexer:
            query = query_in * self.indexer.num_heads * self.indexer.head_dim
            replicated += query + hidden_size * (self.indexer.head_dim + self.indexer.num_heads)
        query_head = query_in * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        per_head = query_head + self.absorbed_parameters + self.v_head_dim * hidden_size
        return replicated + self.num_heads // attn_tp * per_head

    @property
    def absorbed_parameters(self) -> int:
        """Of one head and layer: the latent's projections to keys and values (kv_b_proj)."""
        return self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)

    def kv_bytes(self, dtype: KvDtype, attn_tp: int) -> int:
        """Of one token in one layer on one rank; attn_tp does not shard the latent."""
        elements = self.kv_lora_rank + self.qk_rope_head_dim
        latent = {
            KvDtype.BF16: 2 * elements,
            KvDtype.FP8: elements,
            KvDtype.FP8_DS_MLA: self.kv_lora_rank + 4 * -(-self.kv_lora_rank // 128) + 2 * self.qk_rope_head_dim,
        }[dtype]
        return latent + (self.indexer.kv_bytes if self.indexer else 0)


@dataclass(frozen=True, slots=True)
class Gqa:
    """Grouped-query attention.

    Raises:
        ValueError: The query heads do not divide among the KV heads.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} must be a multiple of num_key_value_heads={self.num_kv_heads}"
            )

    def kv_heads_per_rank(self, attn_tp: int) -> int:
        return max(1, self.num_kv_heads // attn_tp)

    def parameters(self, hidden_size: int, attn_tp: int) -> int:
        """Of one layer on one rank; KV heads are copied where there are more ranks than heads."""
        heads = self.num_heads // attn_tp + self.kv_heads_per_rank(attn_tp)
        return 2 * hidden_size * heads * self.head_dim

    def kv_bytes(self, dtype: KvDtype, attn_tp: int) -> int:
        """Of one token in one layer on one rank. Raises ValueError for MLA's own dtype."""
        if dtype is KvDtype.FP8_DS_MLA:
            raise ValueError(f"kv_dtype={dtype} needs MLA; this model has grouped-query attention")
        return 2 * self.kv_heads_per_rank(attn_tp) * self.head_dim * (2 if dtype is KvDtype.BF16 else 1)


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of one MoE layer."""

    num_routed: int
    num_shared: int
    intermediate_size: int
    """Of one expert, routed or shared."""
    num_per_token: int
    """Routed experts that compute one token."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only model. Biases, sinks and the norms inside attention (under 0.1% of any) are left out.

    Raises:
        ValueError: There is no layer, the layer tuples differ in length, MoE layers have no experts, or windowed
            layers no window.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    attention: Mla | Gqa
    dense_intermediate_size: int
    is_moe: tuple[bool, ...]
    """For each layer."""
    is_windowed: tuple[bool, ...]
    """For each layer: it attends to the last `window_tokens` only."""
    experts: Experts | None = None
    window_tokens: int = 0
    num_mtp_layers: int = 0
    quantisation: Quantisation = Quantisation()

    def __post_init__(self) -> None:
        if not self.is_moe or len(self.is_moe) != len(self.is_windowed):
            raise ValueError(f"is_moe has {len(self.is_moe)} layers and is_windowed {len(self.is_windowed)}")
        if any(self.is_moe) and self.experts is None:
            raise ValueError("is_moe names MoE layers, experts is None")
        if any(self.is_windowed) and self.window_tokens < 1:
            raise ValueError(f"window_tokens={self.window_tokens} must be at least 1 where layers are windowed")

    @property
    def num_layers(self) -> int:
        """Without MTP layers."""
        return len(self.is_moe)


def read_config(config: Mapping[str, Any], quantisation: Quantisation | None = None) -> ModelShape:
    """Read a model's config.json.

    Args:
        config: the parsed file.
        quantisation: what the engine is told to load, where that differs from `quantization_config`.

    Raises:
        ValueError: The model_type or the quantisation is not one we know, or a field is missing or impossible. Names
            the field, and the supported types.
    """
    model_type = config.get("model_type")
    if model_type not in _READERS:
        raise ValueError(f"config.json: model_type={model_type!r} is not supported; {_SUPPORTED}")
    try:
        return _READERS[model_type](config, quantisation)
    except ValueError as error:
        raise ValueError(f"config.json of {model_type}: {error}; {_SUPPORTED}") from None


def _deepseek(config: Mapping[str, Any], quantisation: Quantisation | None) -> ModelShape:
    num_layers = _int(config, "num_hidden_layers")
    first = _int(config, "first_k_dense_replace", minimum=0)
    if first > num_layers:
        raise ValueError(f"first_k_dense_replace={first} is more than num_hidden_layers={num_layers}")
    every = _int(config, "moe_layer_freq", default=1)
    # The siblings' configs must not be asked for an indexer.
    has_indexer = config["model_type"] in ("deepseek_v32", "glm_moe_dsa")
    indexer = Indexer(_int(config, "index_n_heads"), _int(config, "index_head_dim")) if has_indexer else None
    attention = Mla(
        num_heads=_int(config, "num_attention_heads"),
        q_lora_rank=_int(config, "q_lora_rank", minimum=0, default=0),
        kv_lora_rank=_int(config, "kv_lora_rank"),
        qk_nope_head_dim=_int(config, "qk_nope_head_dim"),
        qk_rope_head_dim=_int(config, "qk_rope_head_dim"),
        v_head_dim=_int(config, "v_head_dim"),
        indexer=indexer,
    )
    experts = Experts(
        num_routed=_int(config, "n_routed_experts"),
        num_shared=_int(config, "n_shared_experts", minimum=0, default=0),
        intermediate_size=_int(config, "moe_intermediate_size"),
        num_per_token=_int(config, "num_experts_per_tok"),
    )
    is_moe = tuple(layer >= first and layer % every == 0 for layer in range(num_layers))
    return _shape(config, quantisation, attention, is_moe, experts)


def _llama(config: Mapping[str, Any], quantisation: Quantisation | None) -> ModelShape:
    heads, hidden = _int(config, "num_attention_heads"), _int(config, "hidden_size")
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(f"hidden_size={hidden} must be a multiple of num_attention_heads={heads}")
    # transformers' defaults: both fields came with later versions of Llama.
    kv_heads = _int(config, "num_key_value_heads", default=heads)
    attention = Gqa(heads, kv_heads, _int(config, "head_dim", default=hidden // heads))
    return _shape(config, quantisation, attention, (False,) * _int(config, "num_hidden_layers"))


def _qwen3(config: Mapping[str, Any], quantisation: Quantisation | None) -> ModelShape:
    return _shape(config, quantisation, _gqa(config), (False,) * _int(config, "num_hidden_layers"))


def _qwen3_moe(config: Mapping[str, Any], quantisation: Quantisation | None) -> ModelShape:
    every, dense = _int(config, "decoder_sparse_step", default=1), _list(config, "mlp_only_layers")
    layers = range(_int(config, "num_hidden_layers"))
    is_moe = tuple(layer not in dense and (layer + 1) % every == 0 for layer in layers)
    experts = Experts(
        _int(config, "num_experts"), 0, _int(config, "moe_intermediate_size"), _int(config, "num_experts_per_tok")
    )
    return _shape(config, quantisation, _gqa(config), is_moe, experts)


def _gpt_oss(config: Mapping[str, Any], quantisation: Quantisation | None) -> ModelShape:
    experts = Experts(
        _int(config, "num_local_experts"), 0, _int(config, "intermediate_size"), _int(config, "num_experts_per_tok")
    )
    is_moe = (True,) * _int(config, "num_hidden_layers")
    return _shape(config, quantisation, _gqa(config), is_moe, experts)


_READERS: dict[str, Callable[[Mapping[str, Any], Quantisation | None], ModelShape]] = {
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "deepseek_v32": _deepseek,
    "glm_moe_dsa": _deepseek,
    "gpt_oss": _gpt_oss,
    "kimi_k2": _deepseek,
    "llama": _llama,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}
_SUPPORTED = f"supported types: {', '.join(_READERS)}"


def _shape(
    config: Mapping[str, Any],
    quantisation: Quantisation | None,
    attention: Mla | Gqa,
    is_moe: tuple[bool, ...],
    experts: Experts | None = None,
) -> ModelShape:
    is_windowed = _windowed(config, len(is_moe))
    return ModelShape(
        model_type=config["model_type"],
        hidden_size=_int(config, "hidden_size"),
        vocab_size=_int(config, "vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention=attention,
        dense_intermediate_size=_int(config, "intermediate_size"),
        is_moe=is_moe,
        is_windowed=is_windowed,
        experts=experts,
        window_tokens=_int(config, "sliding_window") if any(is_windowed) else 0,
        num_mtp_layers=_int(config, "num_nextn_predict_layers", minimum=0, default=0),
        quantisation=quantisation or _quantisation(config, is_moe),
    )


def _gqa(config: Mapping[str, Any]) -> Gqa:
    return Gqa(_int(config, "num_attention_heads"), _int(config, "num_key_value_heads"), _int(config, "head_dim"))


def _windowed(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """Without `layer_types` every layer counts as attending to everything, which never takes too little."""
    kinds = _list(config, "layer_types") or ["full_attention"] * num_layers
    unknown = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"})
    if len(kinds) != num_layers or unknown:
        raise ValueError(
            f"layer_types has {len(kinds)} layers of num_hidden_layers={num_layers}"
            + (f", and kinds we do not know: {', '.join(unknown)}" if unknown else "")
        )
    return tuple(kind == "sliding_attention" for kind in kinds)


def _int(config: Mapping[str, Any], name: str, *, minimum: int = 1, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        if default is None:
            raise ValueError(f"{name} is missing")
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {minimum}")
    return value


def _list(config: Mapping[str, Any], name: str) -> list[Any]:
    """Empty where the field is missing."""
    value = config.get(name)
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{name}={value!r} must be a list")
    return value or []


def _quantisation(config: Mapping[str, Any], is_moe: tuple[bool, ...]) -> Quantisation:
    """A kind of matrix counts as quantised if it is in the middle one of the layers that have it."""
    raw = config.get("quantization_config")
    if raw is None:
        return Quantisation()
    if not isinstance(raw, Mapping):
        raise ValueError(f"quantization_config={raw!r} must be a mapping")
    quantised = _precision(raw)
    if quantised is Precision.MXFP4:
        return Quantisation(routed_experts=quantised)
    lists = ("ignore", "exclude_modules", "modules_to_not_convert")
    kept = [str(pattern) for name in lists for pattern in _list(raw, name)]
    moe = [layer for layer, routed in enumerate(is_moe) if routed] or [0]
    dense = [layer for layer, routed in enumerate(is_moe) if not routed] or [0]

    def held(layer: int, *modules: str) -> Precision:
        names = [f"model.layers.{layer}.{module}" for module in modules]
        return Precision.BF16 if any(_is_named(name, kept) for name in names) else quantised

    # One matrix of attention left as it was counts for all of it, so that memory is never underestimated.
    projections = [f"self_attn.{name}" for name in ("q_proj", "q_b_proj", "kv_b_proj", "o_proj")]
    expert = "mlp.experts.0.down_proj"
    return Quantisation(
        attention=held(len(is_moe) // 2, *projections),
        dense_mlp=held(dense[len(dense) // 2], "mlp.down_proj"),
        shared_experts=held(moe[len(moe) // 2], "mlp.shared_experts.down_proj"),
        routed_experts=held(moe[len(moe) // 2], expert),
        mtp=held(len(is_moe), expert) is quantised,
    )


def _precision(raw: Mapping[str, Any]) -> Precision:
    method, algorithm = raw.get("quant_method"), raw.get("quant_algo")
    if method == "fp8":
        block = raw.get("weight_block_size")
        if block not in (None, [SCALE_BLOCK, SCALE_BLOCK]):
            raise ValueError(f"quantization_config.weight_block_size={block} must be [{SCALE_BLOCK}, {SCALE_BLOCK}]")
        return Precision.FP8 if block else Precision.FP8_TENSOR
    if method == "mxfp4":
        return Precision.MXFP4
    if method in ("modelopt", "modelopt_fp4") and algorithm in _MODELOPT:
        return _MODELOPT[algorithm]
    if method == "compressed-tensors":
        return _compressed_tensors(raw)
    raise ValueError(
        f"quantization_config: quant_method={method!r}, quant_algo={algorithm!r} is not one of fp8, mxfp4, "
        f"compressed-tensors of 8-bit floats, modelopt with {' or '.join(_MODELOPT)}; give the quantisation yourself"
    )


def _compressed_tensors(raw: Mapping[str, Any]) -> Precision:
    groups = raw.get("config_groups")
    weights = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, Mapping) else []
    if not weights or any((held.get("type"), held.get("num_bits")) != ("float", 8) for held in weights):
        raise ValueError("quantization_config.config_groups: only weights that are all 8-bit floats are known")
    block = [held.get("block_structure") for held in weights if held.get("strategy") == "block"]
    if any(size != [SCALE_BLOCK, SCALE_BLOCK] for size in block):
        raise ValueError(f"quantization_config.block_structure={block[0]} must be [{SCALE_BLOCK}, {SCALE_BLOCK}]")
    # A scale for each output channel is under 0.1% of its weights.
    return Precision.FP8 if block else Precision.FP8_TENSOR


_MODELOPT = {"NVFP4": Precision.NVFP4, "FP8": Precision.FP8_TENSOR, "FP8_PB_WO": Precision.FP8}


def _is_named(module: str, patterns: list[str]) -> bool:
    """A pattern names a module and all below it: by wildcards, or as whole parts of its dotted name."""
    return any(
        fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*") or f".{pattern}." in f".{module}."
        for pattern in patterns
    )
