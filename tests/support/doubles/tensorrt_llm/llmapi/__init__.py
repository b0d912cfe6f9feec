from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.sampling_params import GuidedDecodingParams, SamplingParams

__all__ = ["DisaggregatedParams", "GuidedDecodingParams", "SamplingParams"]
