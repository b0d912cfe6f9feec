"""srt/server_args.py: the arguments, checked by name, and what follows from them."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import sglang

RECORDING = Path(__file__).parents[4] / "contract/recorded/sglang_signatures.json"
DEFAULTS: dict[str, Any] = {
    "attn_dp_size": 1,
    "base_gpu_id": 0,
    "disable_radix_cache": False,
    "disaggregation_bootstrap_port": 8998,
    "disaggregation_decode_enable_radix_cache": False,
    "disaggregation_mode": "null",
    "dist_init_addr": None,
    "dp_size": 1,
    "enable_dp_attention": False,
    "enable_lora": False,
    "enable_memory_saver": False,
    "enable_priority_scheduling": False,
    "grammar_backend": "xgrammar",
    "host": "127.0.0.1",
    "incremental_streaming_output": False,
    "kv_events_config": None,
    "lora_paths": None,
    "max_total_tokens": 65_536,
    "nnodes": 1,
    "node_rank": 0,
    "page_size": 1,
    "pp_size": 1,
    "skip_tokenizer_init": False,
    "tp_size": 1,
}
"""Of those that the double reads."""


@cache
def recorded() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(RECORDING.read_text())
    return made


class ServerArgs:
    """Attributes are what was given, else DEFAULTS."""

    def __init__(self, **given: Any) -> None:
        self.version: str = sglang.__version__
        for name in given:
            if name not in recorded()[self.version]["fields"]["ServerArgs"]:
                raise TypeError(f"ServerArgs.__init__() got an unexpected keyword argument {name!r}")
        self.__dict__.update(given)
        if not os.path.isdir(given["model_path"]):
            raise OSError(f"{given['model_path']} is not a local folder and is not a valid model identifier")
        if self.num_dp_ranks > 1 and self.version == "0.5.16" and not self.enable_dp_attention:
            raise NotImplementedError("the double has no replicas")
        assert self.tp_size % self.num_dp_ranks == 0, "tp_size must be divisible by dp_size"

    def __getattr__(self, name: str) -> Any:
        if name not in DEFAULTS:
            raise AttributeError(name)
        return DEFAULTS[name]

    @property
    def num_dp_ranks(self) -> int:
        return int(self.dp_size if self.version == "0.5.16" else self.attn_dp_size)

    @property
    def attn_tp_size(self) -> int:
        return int(self.tp_size) // self.num_dp_ranks

    @property
    def caches_prefixes(self) -> bool:
        if self.disaggregation_mode == "decode":
            return bool(self.disaggregation_decode_enable_radix_cache)
        return not self.disable_radix_cache

    def local_tp_ranks(self) -> range:
        """Of this node; without pipeline stages every node has its share of every stage's."""
        count = self.tp_size // self.nnodes
        return range(self.node_rank * count, (self.node_rank + 1) * count)

    def model(self) -> dict[str, Any]:
        """The doubled model: SGLang's config.json, and in `double.json` how it behaves."""
        folder = Path(self.model_path)
        extra = folder / "double.json"
        return json.loads((folder / "config.json").read_text()) | (
            json.loads(extra.read_text()) if extra.exists() else {}
        )


@dataclass
class PortArgs:
    """srt/server_args.py PortArgs.init_new, where dist_init_addr is given."""

    tokenizer_ipc_name: str
    scheduler_input_ipc_name: str
    nccl_port: int
    rendezvous: str
    """What torch.distributed listens on in the first rank."""
    instance_id: str

    @classmethod
    def init_new(cls, server_args: ServerArgs) -> PortArgs:
        host, _, port = server_args.dist_init_addr.rpartition(":")
        base = int(port) + 1
        return cls(
            f"tcp://{host}:{base}",
            f"tcp://{host}:{base + 4}",
            server_args.nccl_port,
            f"{host}:{port}",
            uuid.uuid4().hex[:12],
        )
