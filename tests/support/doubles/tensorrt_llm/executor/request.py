from tensorrt_llm.recorded import data_class

LoRARequest = data_class("LoRARequest", kw_only=False)
