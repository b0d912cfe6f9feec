from tensorrt_llm.recorded import data_class

DisaggregatedParams = data_class("DisaggregatedParams")
