from tensorrt_llm.recorded import data_class

SamplingParams = data_class("SamplingParams")
GuidedDecodingParams = data_class("GuidedDecodingParams")
