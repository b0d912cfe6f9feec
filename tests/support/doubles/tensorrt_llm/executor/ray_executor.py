"""Where 1.2 has it."""

from tensorrt_llm.executor.executor import RayExecutor

__all__ = ["RayExecutor"]
