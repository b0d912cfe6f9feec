"""llmapi/llm.py: the class that users call."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from backends import arguments
from backends.engine import Role
from tensorrt_llm.executor.executor import RayExecutor
from tensorrt_llm.recorded import check, recorded

CHECKED = ("sampling_params", "lora_request", "disaggregated_params", "scheduling_params")


class LLM:
    version = ""

    def __init__(
        self,
        model: str,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        for key in kwargs:
            if key not in arguments.table("trtllm", self.version).fields:
                raise ValueError(f"LLM got invalid argument: {key}")
        assert kwargs["orchestrator_type"] == "ray"
        placement = kwargs.get("ray_placement_config") or {}
        assert placement.keys() <= recorded()[self.version]["fields"]["RayPlacementConfig"].keys()
        folder = Path(model)
        self.args = SimpleNamespace(
            model=model,
            version=self.version,
            tensor_parallel_size=tensor_parallel_size,
            enable_attention_dp=kwargs.get("enable_attention_dp", False),
            kv_cache_config=SimpleNamespace(**{"tokens_per_block": 32} | kwargs.get("kv_cache_config", {})),
            max_seq_len=kwargs.get("max_seq_len"),
            role=Role.PREFILL if "cache_transceiver_config" in kwargs else Role.AGGREGATED,
            behaviour=json.loads((folder / "double.json").read_text()),
            max_position_embeddings=json.loads((folder / "config.json").read_text())["max_position_embeddings"],
        )
        size = tensor_parallel_size * kwargs.get("pipeline_parallel_size", 1)
        self._executor: RayExecutor | None = RayExecutor({"llm_args": self.args}, size, None, True)

    def shutdown(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def _generate(self, given: dict[str, Any]) -> Any:
        if self._executor is None:
            raise RuntimeError("LLM is shutting down")
        sampling = given["sampling_params"]
        for name in CHECKED:
            check(given[name], self.version)
        check(sampling.guided_decoding, self.version)
        if sampling.end_id is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        legs = given["disaggregated_params"]
        if legs is not None and legs.request_type == "context_only":
            sampling = dataclasses.replace(sampling, max_tokens=1)
        return self._executor.generate_async(given["inputs"], sampling, given)


class _LLM12(LLM):
    version = "1.2"

    def generate_async(
        self,
        inputs: list[int],
        sampling_params: Any = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        _postproc_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: str | None = None,
    ) -> Any:
        return self._generate(locals())


class _LLM13(LLM):
    version = "1.3"

    def generate_async(
        self,
        inputs: list[int],
        sampling_params: Any = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        trace_headers: Any = None,
        _postproc_params: Any = None,
        scheduling_params: Any = None,
        conversation_params: Any = None,
        cache_salt: str | None = None,
        priority: float = 0.5,
    ) -> Any:
        return self._generate(locals())


LLMS = {llm.version: llm for llm in (_LLM12, _LLM13)}
