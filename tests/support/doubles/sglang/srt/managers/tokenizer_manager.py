"""srt/managers/tokenizer_manager.py: requests in, outputs out, on the event loop that first uses it."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import fastapi
import msgspec
import zmq
import zmq.asyncio
from sglang.srt.disaggregation.bootstrap import BootstrapServer
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.load_snapshot import LoadSnapshot, LoadSnapshotReader, shm_path_for
from sglang.srt.server_args import recorded


@dataclass
class ReqState:
    out_list: list[dict[str, Any]]
    finished: bool
    event: asyncio.Event
    obj: GenerateReqInput
    abort_sent: bool = False
    output_ids: list[int] = field(default_factory=list)
    output_token_logprobs: list[Any] = field(default_factory=list)
    output_top_logprobs: list[Any] = field(default_factory=list)
    cached_tokens: int = 0


class TokenizerManager:
    def __init__(self, server_args: Any, port_args: Any) -> None:
        self.server_args = server_args
        model = server_args.model()
        self.model_config = SimpleNamespace(vocab_size=model["vocab_size"])
        self.context_len = model["max_position_embeddings"]
        self.rid_to_state: dict[str, ReqState] = {}
        self.asyncio_tasks: set[asyncio.Task[Any]] = set()
        self.event_loop: asyncio.AbstractEventLoop | None = None
        self.is_pause = False
        self.is_pause_cond = asyncio.Condition()
        self.load_snapshot_reader = LoadSnapshotReader(shm_path_for(port_args.instance_id))
        context = zmq.asyncio.Context()
        self.send_to_scheduler = context.socket(zmq.ROUTER, socket_class=zmq.Socket)
        self.send_to_scheduler.bind(port_args.scheduler_input_ipc_name)
        self.recv_from_detokenizer = context.socket(zmq.PULL)
        self.recv_from_detokenizer.bind(port_args.tokenizer_ipc_name)
        self._subprocess_watchdog: Any = None
        self._num_inside = 0
        """Holders of the real one's model_update_lock."""
        self._flushed: asyncio.Queue[bool] = asyncio.Queue()
        self._round_robin = itertools.count()
        self.bootstrap_server: BootstrapServer | None = None
        if server_args.disaggregation_mode == "prefill":
            self.bootstrap_server = BootstrapServer(server_args.host, server_args.disaggregation_bootstrap_port)

    def auto_create_handle_loop(self) -> None:
        if self.event_loop is not None:
            return
        self.event_loop = loop = asyncio.get_running_loop()
        self.asyncio_tasks.add(loop.create_task(self.handle_loop()))
        if threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGTERM, lambda: os._exit(0))
            loop.add_signal_handler(signal.SIGQUIT, lambda: os._exit(131))

    async def handle_loop(self) -> None:
        while True:
            message = msgspec.msgpack.decode(await self.recv_from_detokenizer.recv())
            if "load" in message:
                self.load_snapshot_reader.newest[message["rank"]] = msgspec.convert(message["load"], LoadSnapshot)
            elif "flushed" in message:
                self._flushed.put_nowait(message["flushed"])
            else:
                self._handle_output(message["output"], message["rank"])

    async def generate_request(
        self, obj: GenerateReqInput, request: fastapi.Request | None = None
    ) -> AsyncGenerator[dict[str, Any]]:
        self.auto_create_handle_loop()
        self._check(obj)
        rid = obj.rid or uuid.uuid4().hex
        if rid in self.rid_to_state:
            raise ValueError(f"Duplicate request ID detected: {rid}")
        state = ReqState([], False, asyncio.Event(), obj)
        self.rid_to_state[rid] = state
        try:
            async with self.is_pause_cond:
                await self.is_pause_cond.wait_for(lambda: not self.is_pause)
            self._num_inside += 1
            try:
                self._validate(obj)
                self._dispatch(obj, rid)
                async for out in self._responses(state, bool(obj.stream)):
                    yield out
            finally:
                self._num_inside -= 1
        except BaseException as error:
            self._forget(rid, state, error)
            raise

    async def freeze_gc(self) -> None:
        pass

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        if not abort_all and rid not in self.rid_to_state:
            return
        self._send_to_all({"abort": "" if abort_all else rid})

    async def pause_generation(self, obj: Any) -> None:
        async with self.is_pause_cond:
            self.is_pause = True
            if obj.mode != "abort":
                self._send_to_all({"command": "pause", "path": ""})
                return
            while True:
                self.abort_request(abort_all=True)
                if not self._num_inside:
                    return
                await asyncio.sleep(0.05)  # the real one: 1 s

    async def continue_generation(self, obj: Any) -> None:
        async with self.is_pause_cond:
            self.is_pause = False
            self._send_to_all({"command": "continue", "path": ""})
            self.is_pause_cond.notify_all()

    async def flush_cache_communicator(self, obj: Any) -> list[SimpleNamespace]:
        self._send_to_all({"flush": True})
        return [SimpleNamespace(success=await self._flushed.get()) for _ in range(self.server_args.num_dp_ranks)]

    async def update_weights_from_disk(self, obj: Any, request: Any = None) -> tuple[bool, str, int]:
        if not os.path.isdir(obj.model_path):
            return False, f"Failed to get model config: {obj.model_path} is not a local folder.", 0
        self._send_to_all({"command": "update_weights", "path": obj.model_path})
        return True, "Succeeded to update model weights.", 0

    async def release_memory_occupation(self, obj: Any, request: Any = None) -> None:
        assert self.server_args.enable_memory_saver
        self._send_to_all({"command": "release_memory", "path": ""})

    async def resume_memory_occupation(self, obj: Any, request: Any = None) -> None:
        assert self.server_args.enable_memory_saver
        self._send_to_all({"command": "resume_memory", "path": ""})

    def _forget(self, rid: str, state: ReqState, error: BaseException) -> None:
        """0.5.16 leaves a request whose generator was closed until its output comes; 0.5.23 aborts it."""
        if self.rid_to_state.get(rid) is not state:
            return
        if self.server_args.version != "0.5.16":
            self.abort_request(rid)
        elif not isinstance(error, Exception):
            return
        del self.rid_to_state[rid]

    def _check(self, obj: GenerateReqInput) -> None:
        """GenerateReqInput's own constructor does this, by its version's fields."""
        fields = recorded()[self.server_args.version]["fields"]
        for name in obj.given:
            if name not in fields["GenerateReqInput"]:
                raise TypeError(f"GenerateReqInput.__init__() got an unexpected keyword argument {name!r}")
        for name in obj.sampling_params:
            if name not in fields["SamplingParams"]:
                raise TypeError(f"Unexpected keyword argument {name!r}")

    def _validate(self, obj: GenerateReqInput) -> None:
        args, params = self.server_args, obj.sampling_params
        if len(obj.input_ids) >= self.context_len:
            raise ValueError(
                f"The input ({len(obj.input_ids)} tokens) is longer than the model's context length "
                f"({self.context_len} tokens)."
            )
        if params.get("temperature", 1.0) < 0.0:
            raise ValueError(f"temperature must be non-negative, got {params['temperature']}.")
        if not 0.0 < params.get("top_p", 1.0) <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {params['top_p']}.")
        if obj.routed_dp_rank is not None and not 0 <= obj.routed_dp_rank < args.num_dp_ranks:
            raise ValueError(f"routed_dp_rank={obj.routed_dp_rank} out of range [0, {args.num_dp_ranks})")
        if obj.lora_path is not None and obj.lora_path not in (args.lora_paths or {}):
            raise ValueError(f"LoRA adapters not loaded: {obj.lora_path}")
        if params.get("min_new_tokens") and args.skip_tokenizer_init:
            raise ValueError("min_new_tokens needs the tokenizer")

    def _dispatch(self, obj: GenerateReqInput, rid: str) -> None:
        """DataParallelController: a pinned rank, else in a prefill worker that of the room, else the next one."""
        args = self.server_args
        rank = obj.routed_dp_rank
        if rank is None and args.disaggregation_mode == "prefill" and obj.bootstrap_room is not None:
            rank = obj.bootstrap_room % args.num_dp_ranks
        if rank is None:
            rank = next(self._round_robin) % args.num_dp_ranks
        names = (
            "input_ids",
            "sampling_params",
            "return_logprob",
            "top_logprobs_num",
            "bootstrap_host",
            "bootstrap_port",
            "bootstrap_room",
            "disagg_prefill_dp_rank",
            "lora_path",
            "priority",
        )
        fields = {name: getattr(obj, name) for name in names}
        fields |= {"rid": rid, "salt": obj.extra_key or obj.cache_salt}
        self._send(rank, {"generate": fields})

    def _send_to_all(self, message: dict[str, Any]) -> None:
        for rank in range(self.server_args.num_dp_ranks):
            self._send(rank, message)

    def _send(self, rank: int, message: dict[str, Any]) -> None:
        self.send_to_scheduler.send_multipart([str(rank).encode(), msgspec.msgpack.encode(message)])

    def _handle_output(self, output: dict[str, Any], rank: int) -> None:
        state = self.rid_to_state.get(output["rid"])
        if state is None:
            return
        obj, reason = state.obj, output["finish_reason"]
        incremental = bool(obj.stream and self.server_args.incremental_streaming_output)
        offset = len(state.output_ids)
        state.output_ids.extend(output["token_ids"])
        if output["cached_tokens"] is not None:
            state.cached_tokens = output["cached_tokens"]
        meta: dict[str, Any] = {
            "id": output["rid"],
            "finish_reason": reason,
            "prompt_tokens": len(obj.input_ids),
            "weight_version": "default",
            "num_retractions": 0,
            "reasoning_tokens": 0,
            "completion_tokens": len(state.output_ids),
            "cached_tokens": state.cached_tokens,
            "dp_rank": rank,
        }
        if obj.return_logprob:
            self._add_logprobs(meta, state, output, offset if incremental else 0)
        state.finished = reason is not None
        if state.finished:
            meta["e2e_latency"] = 0.0
            del self.rid_to_state[output["rid"]]
        if obj.stream or state.finished:
            state.out_list.append({"output_ids": state.output_ids[offset if incremental else 0 :], "meta_info": meta})
            state.event.set()

    def _add_logprobs(self, meta: dict[str, Any], state: ReqState, output: dict[str, Any], offset: int) -> None:
        """(logprob, token, text) a position; alternatives only where some were asked for."""
        for logprob, token, top in output["logprobs"]:
            state.output_token_logprobs.append((logprob, token, None))
            state.output_top_logprobs.append([(value, other, None) for other, value in top])
        meta["output_token_logprobs"] = state.output_token_logprobs[offset:]
        if state.obj.top_logprobs_num:
            meta["output_top_logprobs"] = state.output_top_logprobs[offset:]

    async def _responses(self, state: ReqState, is_stream: bool) -> AsyncGenerator[dict[str, Any]]:
        while True:
            await state.event.wait()
            outputs, state.out_list, finished = state.out_list, [], state.finished
            state.event.clear()
            incremental = is_stream and self.server_args.incremental_streaming_output
            out = _coalesced(outputs) if incremental else outputs[-1]
            reason = out["meta_info"]["finish_reason"]
            if finished and reason["type"] == "abort" and not is_stream:
                if reason["status_code"] == HTTPStatus.BAD_REQUEST:
                    raise ValueError(reason["message"])
                if reason["status_code"] is not None:
                    raise fastapi.HTTPException(status_code=reason["status_code"], detail=reason["message"])
            yield out
            if finished:
                return


def _coalesced(outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Several steps at once: their tokens and logprobs in a row, the rest of the newest."""
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]
    meta = dict(last["meta_info"])
    for key in ("output_token_logprobs", "output_top_logprobs"):
        if key in meta:
            meta[key] = [entry for out in outputs for entry in out["meta_info"].get(key, ())]
    return last | {"output_ids": [token for out in outputs for token in out["output_ids"]], "meta_info": meta}
