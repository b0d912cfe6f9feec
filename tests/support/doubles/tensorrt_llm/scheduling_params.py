from tensorrt_llm.recorded import data_class

SchedulingParams = data_class("SchedulingParams")
