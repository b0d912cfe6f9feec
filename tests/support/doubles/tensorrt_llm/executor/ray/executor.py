"""Where 1.3 has it."""

from tensorrt_llm.executor.executor import RayExecutor

__all__ = ["RayExecutor"]
