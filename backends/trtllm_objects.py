"""A request as objects of TensorRT-LLM's own classes, which are imported when the first one comes."""

from __future__ import annotations

from typing import Any

from backends import trtllm_requests
from backends.engine import EngineError, GenerateRequest, LaunchSpec

ONE_REQUESTS_ERROR = "RequestError"
"""Of TensorRT-LLM's errors the class for what one request has done; it is elsewhere in 1.2 than in 1.3."""


def submit(llm: Any, request: GenerateRequest, rank: int, spec: LaunchSpec, version: str) -> Any:
    """Give the request to that rank; returns its RequestOutput, an asynchronous iterator of itself, a step each.

    On the loop that reads it: it makes its queue of answers for the loop that it is called on.

    Raises:
        EngineError: It was refused.
    """
    from tensorrt_llm import llmapi
    from tensorrt_llm.scheduling_params import SchedulingParams

    sampling = trtllm_requests.sampling_arguments(request.sampling, request.leg, version)
    guide = trtllm_requests.guide_arguments(request.sampling)
    if guide is not None:
        sampling["guided_decoding"] = llmapi.GuidedDecodingParams(**guide)
    args = trtllm_requests.call_arguments(request, version)
    if spec.attn_dp > 1:
        args["scheduling_params"] = SchedulingParams(**trtllm_requests.scheduling_arguments(rank))
    legs = trtllm_requests.disaggregation_arguments(request, version)
    if legs is not None:
        args["disaggregated_params"] = llmapi.DisaggregatedParams(**legs, **_first_logprobs(request))
    if request.lora is not None:
        args["lora_request"] = _lora_request(request.lora, spec)
    try:
        return llm.generate_async(sampling_params=llmapi.SamplingParams(**sampling), **args)
    except Exception as error:  # noqa: BLE001 - its classes differ by version; they are told apart by name
        if is_of_one_request(error) or isinstance(error, ValueError | TypeError):
            field = "prompt" if is_of_one_request(error) else None  # of what it checks before, its words tell
            raise EngineError(f"TensorRT-LLM refused the request: {first_line(error)}", False, field) from None
        raise EngineError(f"TensorRT-LLM took no request: {first_line(error)}") from None


def is_of_one_request(error: BaseException) -> bool:
    return type(error).__name__ == ONE_REQUESTS_ERROR


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _first_logprobs(request: GenerateRequest) -> dict[str, Any]:
    """Prefill's, for the decode side to go on from."""
    told = None if request.handoff is None else request.handoff.params.get(trtllm_requests.FIRST_LOGPROBS)
    if told is None:
        return {}
    from tensorrt_llm.executor.result import Logprob

    return {"first_gen_log_probs": [trtllm_requests.entries(told, Logprob)]}


def _lora_request(name: str, spec: LaunchSpec) -> Any:
    """Adapters are numbered from 1, the same on every worker of a role."""
    from tensorrt_llm.executor.request import LoRARequest

    return LoRARequest(name, list(spec.loras).index(name) + 1, spec.loras[name])
