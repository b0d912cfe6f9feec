"""Bytes per GPU of one worker: what its weights take by component, and how many tokens of KV the rest holds.

Activations are not counted: SGLang takes them from outside `mem_fraction`. vLLM's fraction includes them, so give a
lower one for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from math import ceil

from placement.gpus import GIB, GpuType
from placement.model_shape import SCALE_BLOCK, Experts, Gqa, KvDtype, Mla, ModelShape, Precision, Quantisation
from placement.parallelism import Parallelism


@dataclass(frozen=True, slots=True)
class ByComponent:
    """One number for each component of a model: parameters or bytes, as its maker says."""

    attention: int = 0
    dense_mlp: int = 0
    shared_experts: int = 0
    routed_experts: int = 0
    gates: int = 0
    embedding: int = 0
    head: int = 0
    norms: int = 0
    mtp: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True, slots=True)
class Allowances:
    """Bytes of a GPU that neither weights nor KV may take. Measure yours and `replace` them."""

    all_to_all_bytes: int
    collectives_bytes: int = 411_041_792
    """NCCL on 4 or 8 GPUs: aiconfigurator's nccl_mem for H200."""
    cuda_graphs_bytes: int = 500_000_000
    """With the three others 3.5 GB for DeepSeek-R1 at EP72+32, as aiconfigurator's other_mem; the split is a guess."""
    runtime_bytes: int = 500_000_000
    """CUDA context, modules, workspaces."""
    absorbed_bytes: int = 0
    """MLA's kv_b_proj once more in bf16, transposed for decode (W_UK_T and W_UV in vLLM 0.32, mla_attention.py)."""

    @property
    def total(self) -> int:
        return sum(astuple(self))


def default_allowances(
    shape: ModelShape, parallelism: Parallelism, redundant_experts: int = 0, dispatch_tokens: int = 128
) -> Allowances:
    """What engines take by default; the all-to-all is DeepEP's low-latency mode, where experts are parallel.

    Args:
        dispatch_tokens: SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK; published recipes use up to 512.

    Source: DeepEP's `get_low_latency_rdma_size_hint`: two send and two receive buffers, each a message for every
    expert and token. A message is a bf16 hidden state and 16 bytes; the flags are left out.
    """
    all_to_all = absorbed = 0
    if shape.experts and parallelism.moe_ep > 1:
        experts = shape.experts.num_routed + redundant_experts
        all_to_all = 4 * experts * dispatch_tokens * (2 * shape.hidden_size + 16)
    if isinstance(shape.attention, Mla):
        layers = ceil(shape.num_layers / parallelism.pp)
        heads = shape.attention.num_heads // parallelism.attn_tp
        absorbed = 2 * layers * heads * shape.attention.absorbed_parameters
    return Allowances(all_to_all, absorbed_bytes=absorbed)


def check(shape: ModelShape, parallelism: Parallelism, redundant_experts: int = 0) -> None:
    """Raises ValueError, with every width that the model does not divide by and the field it meets."""
    if problems := list(_problems(shape, parallelism, redundant_experts)):
        raise ValueError("; ".join(problems))


def _problems(shape: ModelShape, parallelism: Parallelism, redundant_experts: int) -> Iterator[str]:
    attn_tp, heads = parallelism.attn_tp, shape.attention.num_heads
    if shape.num_layers < parallelism.pp:
        yield f"num_hidden_layers={shape.num_layers} must be at least pp={parallelism.pp}"
    if heads % attn_tp:
        yield f"num_attention_heads={heads} must be a multiple of attn_tp={attn_tp}"
    elif isinstance(shape.attention, Gqa) and attn_tp % (kv := shape.attention.num_kv_heads) and kv % attn_tp:
        yield f"num_key_value_heads={kv} must divide attn_tp={attn_tp} or be a multiple of it"
    if not all(shape.is_moe):
        precision = shape.quantisation.dense_mlp
        yield from _uncut("intermediate_size", shape.dense_intermediate_size, "attn_tp", attn_tp, precision)
    if redundant_experts < 0 or (redundant_experts and not shape.experts):
        yield f"redundant_experts={redundant_experts} must be at least 0, and 0 without experts"
    if experts := shape.experts:
        if (experts.num_routed + redundant_experts) % parallelism.moe_ep:
            yield (
                f"num_experts + redundant_experts = {experts.num_routed}+{redundant_experts} must be a multiple of "
                f"moe_ep={parallelism.moe_ep}"
            )
        size, held = experts.intermediate_size, shape.quantisation
        yield from _uncut("moe_intermediate_size", size, "moe_tp", parallelism.moe_tp, held.routed_experts)
        shared = size * experts.num_shared
        yield from _uncut("moe_intermediate_size * n_shared_experts", shared, "attn_tp", attn_tp, held.shared_experts)


def _uncut(field: str, size: int, width_name: str, width: int, precision: Precision) -> Iterator[str]:
    """Engines refuse shards that cut a block of weights with one scale."""
    block = SCALE_BLOCK if precision is Precision.FP8 and width > 1 else 1
    if size % (width * block):
        blocks = f" times its block of {block}" if block > 1 else ""
        yield f"{field}={size} must be a multiple of {width_name}={width}{blocks}"


def parameters(shape: ModelShape, parallelism: Parallelism, redundant_experts: int = 0, stage: int = 0) -> ByComponent:
    """Parameters on one GPU of a pipeline stage, without MTP; on one GPU in all, the model's own count.

    Replicated over attn_dp: all but routed experts. attn_tp shards attention, the dense MLP, shared experts,
    embedding and head (SGLang with moe_dense_tp_size = attn_tp and enable_dp_lm_head; vLLM). Tied embeddings are one
    matrix unless first and last stage differ.

    Raises:
        ValueError: A width does not divide the model; names both.
    """
    check(shape, parallelism, redundant_experts)
    layers = _layers(shape.num_layers, parallelism.pp, stage)
    num_moe = sum(shape.is_moe[layer] for layer in layers)
    body = _body(shape, parallelism, redundant_experts, num_dense=len(layers) - num_moe, num_moe=num_moe)
    vocabulary = ceil(shape.vocab_size / parallelism.attn_tp) * shape.hidden_size
    first, last = stage == 0, stage == parallelism.pp - 1
    return replace(
        body,
        embedding=vocabulary if first else 0,
        head=vocabulary if last and not (first and shape.tied_embeddings) else 0,
        norms=body.norms + (shape.hidden_size if last else 0),
    )


def _layers(num_layers: int, pp: int, stage: int) -> range:
    """vLLM 0.32's `get_pp_indices`: what does not divide goes to the stages before the last."""
    sizes = [num_layers // pp] * pp
    for i in range(num_layers % pp):
        sizes[-2 - i] += 1
    return range(sum(sizes[:stage]), sum(sizes[: stage + 1]))


def _body(
    shape: ModelShape, width: Parallelism, redundant_experts: int, *, num_dense: int, num_moe: int
) -> ByComponent:
    """Parameters of so many layers on one GPU. An MLP is gate, up and down."""
    hidden, experts = shape.hidden_size, shape.experts or Experts(0, 0, 0, 0)
    expert = 3 * hidden * experts.intermediate_size
    on_rank = (experts.num_routed + redundant_experts) // width.moe_ep
    return ByComponent(
        attention=(num_dense + num_moe) * shape.attention.parameters(hidden, width.attn_tp),
        dense_mlp=num_dense * 3 * hidden * shape.dense_intermediate_size // width.attn_tp,
        shared_experts=num_moe * experts.num_shared * expert // width.attn_tp,
        routed_experts=num_moe * on_rank * expert // width.moe_tp,
        gates=num_moe * hidden * experts.num_routed,
        norms=(num_dense + num_moe) * 2 * hidden,
    )


def weights(
    shape: ModelShape,
    parallelism: Parallelism,
    redundant_experts: int = 0,
    *,
    with_mtp: bool = False,
    stage: int = 0,
) -> ByComponent:
    """Bytes of weights on one GPU of a pipeline stage; MTP layers are on the last and share its head.

    Raises:
        ValueError: A width does not divide the model, or it has no MTP layers; names the field.
    """
    if with_mtp and not shape.num_mtp_layers:
        raise ValueError(f"with_mtp: num_nextn_predict_layers={shape.num_mtp_layers} must be at least 1")
    held = _bytes(parameters(shape, parallelism, redundant_experts, stage), shape.quantisation)
    if not with_mtp or stage != parallelism.pp - 1:
        return held
    layer = _body(shape, parallelism, redundant_experts, num_dense=0, num_moe=1)
    one = _bytes(layer, shape.quantisation if shape.quantisation.mtp else Quantisation()).total
    # eh_proj joins the embedding and the hidden state (DeepSeek-V3, arXiv:2412.19437, section 2.2); bf16.
    projection = 2 * 2 * shape.hidden_size**2
    # Their embedding is the model's, which only a first stage has (vLLM 0.32 shares it at pp=1 only).
    embedding = 0 if stage == 0 else held.head
    return replace(held, mtp=shape.num_mtp_layers * (one + projection) + embedding)


def _bytes(counts: ByComponent, precision: Quantisation) -> ByComponent:
    def held(count: int, as_: Precision) -> int:
        return ceil(count * as_.bytes_per_weight)

    return ByComponent(
        attention=held(counts.attention, precision.attention),
        dense_mlp=held(counts.dense_mlp, precision.dense_mlp),
        shared_experts=held(counts.shared_experts, precision.shared_experts),
        routed_experts=held(counts.routed_experts, precision.routed_experts),
        # bf16 in checkpoints; engines that route in fp32 hold them so (vLLM 0.32, gate_linear.py).
        gates=held(counts.gates, Precision.FP32),
        embedding=held(counts.embedding, Precision.BF16),
        head=held(counts.head, Precision.BF16),
        norms=held(counts.norms, Precision.BF16),
    )


@dataclass(frozen=True, slots=True)
class KvCost:
    """Bytes of KV on one GPU."""

    per_token_bytes: int
    """What each further token of a sequence takes: layers that attend to everything."""
    per_sequence_bytes: int
    """What a sequence takes at most in layers with a sliding window."""


def kv_cost(
    shape: ModelShape,
    parallelism: Parallelism,
    kv_dtype: KvDtype = KvDtype.BF16,
    *,
    with_mtp: bool = False,
    stage: int = 0,
) -> KvCost:
    """KV of the layers of a pipeline stage, and of the MTP layers on the last.

    An engine that does not free what left a window (vLLM with the hybrid KV cache manager off) takes more.

    Raises:
        ValueError: The dtype is not one for this attention.
    """
    layers = _layers(shape.num_layers, parallelism.pp, stage)
    windowed = sum(shape.is_windowed[layer] for layer in layers)
    mtp = shape.num_mtp_layers if with_mtp and stage == parallelism.pp - 1 else 0
    one = shape.attention.kv_bytes(kv_dtype, parallelism.attn_tp)
    return KvCost((len(layers) - windowed + mtp) * one, windowed * shape.window_tokens * one)


@dataclass(frozen=True, slots=True)
class Fit:
    """What one GPU of the pipeline stage with the least room holds."""

    shape: ModelShape
    parallelism: Parallelism
    redundant_experts: int
    gpu: GpuType
    mem_fraction: float
    weights: ByComponent
    """Bytes."""
    allowances: Allowances
    kv: KvCost
    num_sequences: int
    min_kv_tokens: int
    smallest: Parallelism | None = None
    """For what does not fit: the least multiple of its width that does."""

    @property
    def label(self) -> str:
        """The widths that shard, and the precision, as in "EP72+32 fp8"."""
        width, held = self.parallelism, self.shape.quantisation
        experts, redundant = self.shape.experts, f"+{self.redundant_experts}" if self.redundant_experts else ""
        parts = [
            f"PP{width.pp}" if width.pp > 1 else "",
            f"TP{width.attn_tp}" if width.attn_tp > 1 or not experts else "",
            f"EP{width.moe_ep}{redundant}" if experts else "",
            f"expert-TP{width.moe_tp}" if experts and width.moe_tp > 1 else "",
            held.routed_experts if experts else held.dense_mlp,
        ]
        return " ".join(part for part in parts if part)

    @property
    def usable_bytes(self) -> int:
        return int(self.mem_fraction * self.gpu.memory_bytes)

    @property
    def kv_budget_bytes(self) -> int:
        """What is left for tokens after weights, allowances and windows; negative where they do not fit."""
        windows = self.num_sequences * self.kv.per_sequence_bytes
        return self.usable_bytes - self.weights.total - self.allowances.total - windows

    @property
    def kv_tokens(self) -> int:
        # A stage of windowed layers only takes nothing for a token; another stage then has the least room.
        return max(0, self.kv_budget_bytes) // max(1, self.kv.per_token_bytes)

    @property
    def fits(self) -> bool:
        return self.kv_budget_bytes > 0 and self.kv_tokens >= self.min_kv_tokens

    def explain(self) -> str:
        """A sentence: what it takes of what there is, and for a misfit the smallest width that fits."""
        held = f"{_gib(self.weights.total)} GiB"
        beside = f"{_gib(self.allowances.total)} GiB of allowances"
        usable = f"{_gib(self.usable_bytes)} GiB usable at mem_fraction {self.mem_fraction:g}"
        if self.fits:
            return (
                f"{self.label} fits {self.gpu.name}: {held} of weights and {beside} leave "
                f"{_gib(self.kv_budget_bytes)} of {usable} for {self.kv_tokens:,} KV tokens"
            )
        room = f", room for {self.kv_tokens:,} KV tokens of {self.min_kv_tokens:,}" if self.kv_budget_bytes > 0 else ""
        smallest = self.smallest and replace(self, parallelism=self.smallest).label
        return (
            f"{self.label} does not fit {self.gpu.name}: {held} of {self.gpu.memory_gib:g} ({beside}, {usable}{room}); "
            + (f"the smallest multiple that fits is {smallest}" if smallest else "no multiple of this width fits")
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"


def fit(
    shape: ModelShape,
    parallelism: Parallelism,
    gpu: GpuType,
    mem_fraction: float = 0.85,
    *,
    redundant_experts: int = 0,
    kv_dtype: KvDtype = KvDtype.BF16,
    with_mtp: bool = False,
    allowances: Allowances | None = None,
    num_sequences: int = 256,
    min_kv_tokens: int = 1,
) -> Fit:
    """Whether a worker of that width fits, on its fullest GPU; where not, the least multiple of the width that does.

    The multiple widens attn_dp and moe_ep together, or attn_tp where there are no experts.

    Args:
        mem_fraction: of the GPU's memory, for weights, allowances and KV; above 0, at most 1.
        allowances: instead of `default_allowances`, for every width tried.
        num_sequences: that one GPU runs at once; each takes its sliding windows.
        min_kv_tokens: fewer on a GPU count as not fitting.

    Raises:
        ValueError: A width does not divide the model, or a value is out of range; names the field.
    """
    if not 0 < mem_fraction <= 1:
        raise ValueError(f"mem_fraction={mem_fraction:g} must be above 0 and at most 1")
    if num_sequences < 1 or min_kv_tokens < 1:
        raise ValueError(f"num_sequences={num_sequences} and min_kv_tokens={min_kv_tokens} must be at least 1")

    check(shape, parallelism, redundant_experts)

    def on_stage(width: Parallelism, stage: int) -> Fit:
        return Fit(
            shape=shape,
            parallelism=width,
            redundant_experts=redundant_experts,
            gpu=gpu,
            mem_fraction=mem_fraction,
            weights=weights(shape, width, redundant_experts, with_mtp=with_mtp, stage=stage),
            allowances=allowances or default_allowances(shape, width, redundant_experts),
            kv=kv_cost(shape, width, kv_dtype, with_mtp=with_mtp, stage=stage),
            num_sequences=num_sequences,
            min_kv_tokens=min_kv_tokens,
        )

    def at(width: Parallelism) -> Fit:
        stages = [on_stage(width, stage) for stage in range(width.pp)]
        return min(stages, key=lambda stage: (stage.kv_tokens, stage.kv_budget_bytes))

    here = at(parallelism)
    if here.fits:
        return here
    wider = _multiples(shape, parallelism, redundant_experts)
    return replace(here, smallest=next((width for width in wider if at(width).fits), None))


def _multiples(shape: ModelShape, width: Parallelism, redundant_experts: int) -> Iterator[Parallelism]:
    """Wider ones that divide the model, narrowest first."""
    experts = shape.experts
    most = (experts.num_routed + redundant_experts) // width.moe_ep if experts else shape.attention.num_heads
    for times in range(2, most + 1):
        if experts:
            wider = replace(width, attn_dp=width.attn_dp * times, moe_ep=width.moe_ep * times)
        else:
            wider = replace(width, attn_tp=width.attn_tp * times, moe_tp=width.moe_tp * times)
        if not any(_problems(shape, wider, redundant_experts)):
            yield wider
