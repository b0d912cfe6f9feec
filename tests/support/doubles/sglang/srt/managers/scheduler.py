"""srt/managers/scheduler.py: one attention DP rank a process, on the simulated engine.

Ranks beyond the first of an attention TP group only join the rendezvous. Every rank that serves says hello to the
manager, which waits for all, those of other nodes among them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, NoReturn

import msgspec
import zmq
import zmq.asyncio
from sglang.srt.disaggregation.bootstrap import ask, register
from sglang.srt.disaggregation.kv_events import KVEventBatch, ZmqEventPublisher
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.managers.load_snapshot import DisaggregationMetrics, LoadSnapshot

from backends.engine import (
    Command,
    EngineError,
    GenerateRequest,
    KVHandoff,
    LaunchSpec,
    Pause,
    Resume,
    Role,
    Sampling,
    Sleep,
    UpdateWeights,
    Wake,
)
from backends.simulated import SimulatedEngine
from backends.simulated_fabric import Fabric
from backends.simulated_tokens import first_state, fold, next_token

logger = logging.getLogger(__name__)

RENDEZVOUS_TIMEOUT_S = 60.0
COMMANDS: dict[str, Callable[[str], Command]] = {
    "pause": lambda _: Pause(),
    "continue": lambda _: Resume(),
    "update_weights": UpdateWeights,
    "release_memory": lambda _: Sleep(discard_weights=False),
    "resume_memory": lambda _: Wake(),
}
_stores: list[socket.socket] = []
"""Listens as long as the process lives."""
ROLES = {"null": Role.AGGREGATED, "prefill": Role.PREFILL, "decode": Role.DECODE}


def run_scheduler_process(server_args: Any, port_args: Any, gpu_id: int, tp_rank: int, *rest: Any) -> None:
    """`rest` is pp_rank, dp_rank and pipe_writer, in 0.5.16 after the ranks of three more groups."""
    dp_rank, pipe_writer = rest[-2:]
    logging.basicConfig(level=logging.INFO, format=f"[%(asctime)s TP{tp_rank}] %(message)s", stream=sys.stderr)
    try:
        model = server_args.model()
        time.sleep(model.get("start_s", 0.0))
        if "failure" in model:
            raise RuntimeError(model["failure"])
        _join(server_args, port_args, tp_rank)
        asyncio.run(_serve(server_args, port_args, tp_rank, dp_rank or 0, pipe_writer))
    except Exception:  # noqa: BLE001 - as the real one does
        _fail()


def _fail() -> NoReturn:
    """Say why, and end both this process and its parent."""
    logger.error("Scheduler hit an exception: %s", traceback.format_exc())
    sys.stderr.flush()
    os.kill(os.getppid(), signal.SIGQUIT)
    os._exit(1)


def start_schedulers(
    server_args: Any, port_args: Any, main: Callable[..., None], wrap: Callable[..., None] | None = None
) -> tuple[list[Any], list[Any]]:
    """This node's processes, and what each one's `ready` comes from."""
    context = multiprocessing.get_context("spawn")
    processes, readers = [], []
    for tp_rank in server_args.local_tp_ranks():
        reader, writer = context.Pipe(duplex=False)
        dp_rank = tp_rank // server_args.attn_tp_size if server_args.num_dp_ranks > 1 else None
        between = (0, 0, 0, 0) if server_args.version == "0.5.16" else (0,)
        arguments = (server_args, port_args, server_args.base_gpu_id, tp_rank, *between, dp_rank, writer)
        target, given = (main, arguments) if wrap is None else (wrap, (main, arguments))
        process = context.Process(target=target, args=given)
        process.start()
        writer.close()
        processes.append(process)
        readers.append(reader)
    return processes, readers


async def _serve(server_args: Any, port_args: Any, tp_rank: int, dp_rank: int, pipe_writer: Any) -> None:
    ready = {"status": "ready", **sizes(server_args)}
    if tp_rank % server_args.attn_tp_size:
        pipe_writer.send(ready)
        await asyncio.Event().wait()
    rank = Rank(server_args, port_args, dp_rank)
    await rank.start()
    pipe_writer.send(ready)
    await rank.serve()


def sizes(server_args: Any) -> dict[str, int]:
    """Scheduler.get_init_info"""
    pages = server_args.max_total_tokens // server_args.page_size
    tokens = pages * server_args.page_size
    return {
        "max_total_num_tokens": tokens,
        "max_req_input_len": min(server_args.model()["max_position_embeddings"], tokens) - 6,
    }


def _join(server_args: Any, port_args: Any, tp_rank: int) -> None:
    """torch.distributed's rendezvous: the first rank listens, and nobody goes on before all are there."""
    host, _, port = port_args.rendezvous.rpartition(":")
    size = server_args.tp_size
    if tp_rank:
        deadline = time.monotonic() + RENDEZVOUS_TIMEOUT_S
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(port))) as peer:
                assert peer.recv(1)
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"DistStoreError: rank {tp_rank} found nobody at {port_args.rendezvous}")
            time.sleep(0.05)
    store = socket.create_server((host, int(port)))
    store.settimeout(RENDEZVOUS_TIMEOUT_S)
    joined = [store.accept()[0] for _ in range(size - 1)]
    for peer in joined:
        peer.sendall(b"!")
        peer.close()
    _stores.append(store)


class Simulation(SimulatedEngine):
    """Tells when KV has been fetched, when its load changes, and its KV events in SGLang's encoding."""

    def __init__(self, spec: LaunchSpec, changed: Callable[[], None], publish: Callable[[list[Any]], None]) -> None:
        super().__init__(spec)
        self._fabric = Fabric(spec.place.address, self._landed)
        self._changed, self._publish_events = changed, publish
        self.landings: dict[str, asyncio.Event] = {}

    def landing(self, key: str) -> asyncio.Event:
        return self.landings.setdefault(key, asyncio.Event())

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def fabric_address(self) -> str:
        assert self._fabric.address is not None
        return self._fabric.address

    def let_go(self, key: str) -> None:
        self._release_held(key)

    def first_token(self, request: GenerateRequest) -> int:
        """What prefill samples; the decode side starts with it too."""
        prompt, sampling = request.token_ids, request.sampling
        state = fold(prompt, first_state(self._condition.weights or "", request.lora))
        return next_token(state, None if sampling.temperature == 0.0 else sampling.seed or 0, len(prompt), self.args)

    def _landed(self, key: str) -> None:
        self._release_held(key)
        self.landing(key).set()

    def _publish(self) -> None:
        for pool in self._ranks:
            events, pool.events = pool.events, []
            if events:
                self._publish_events(events)
        self._changed()

    def _drop(self, sequence: Any) -> None:
        super()._drop(sequence)
        self._changed()

    def _release_held(self, key: str) -> None:
        super()._release_held(key)
        self._changed()


class Rank:
    """Takes the manager's messages, answers with outputs and loads."""

    def __init__(self, server_args: Any, port_args: Any, dp_rank: int) -> None:
        self.args, self.ports, self.dp_rank = server_args, port_args, dp_rank
        self.role = ROLES[server_args.disaggregation_mode]
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._load_due = False
        self._publisher: ZmqEventPublisher | None = None
        model = server_args.model()
        self._poison: int | None = model.get("poison")
        """A token on which a step fails, as on an illegal memory access."""
        spec = LaunchSpec(
            "sglang-double",
            self.role,
            "double",
            server_args.model_path,
            kv_events=False,
            loras=server_args.lora_paths or {},
            engine_args={
                "block_size": server_args.page_size,
                "kv_blocks": server_args.max_total_tokens // server_args.page_size,
                "max_model_len": min(model["max_position_embeddings"], server_args.max_total_tokens),
                "step_s": model.get("step_s", 0.001),
                "handoff": "concurrent",
                "lease_s": 300.0,
                "token_low": model.get("token_low", 97),
                "token_high": model.get("token_high", 122),
            },
        )
        self.engine = Simulation(spec, self._send_load_soon, self._publish_events)

    async def start(self) -> None:
        if self.args.kv_events_config is not None and self.args.caches_prefixes:
            self._publisher = ZmqEventPublisher(self.args.version, self.args.kv_events_config, self.dp_rank)
        context = zmq.asyncio.Context()
        self._in = context.socket(zmq.DEALER)
        self._in.setsockopt(zmq.IDENTITY, str(self.dp_rank).encode())
        self._in.connect(self.ports.scheduler_input_ipc_name)
        self._out = context.socket(zmq.PUSH)
        self._out.connect(self.ports.tokenizer_ipc_name)
        await self.engine.start()
        if self.role is Role.PREFILL:
            host, _, _ = self.ports.rendezvous.rpartition(":")
            address = (host, self.args.disaggregation_bootstrap_port)
            await asyncio.to_thread(register, address, self.dp_rank, self.engine.fabric_address)
        await self._in.send(b"hello")

    async def serve(self) -> None:
        while True:
            await self._take(msgspec.msgpack.decode(await self._in.recv()))

    async def _take(self, message: dict[str, Any]) -> None:
        match message:
            case {"generate": fields}:
                self._tasks[fields["rid"]] = asyncio.create_task(self._run(fields))
                await asyncio.sleep(0)  # it begins, so that an abort ends it from within
            case {"abort": rid}:
                for name in [name for name in self._tasks if name.startswith(rid)]:
                    self._tasks[name].cancel()
            case {"flush": _}:
                await self._send(flushed=not self._tasks)
            case {"command": name, "path": path}:
                if name in ("update_weights", "release_memory") and self._tasks:
                    logger.error("AssertionError: Cache flush failed after updating weights")
                    _fail()
                await self.engine.control(COMMANDS[name](path))

    async def _run(self, fields: dict[str, Any]) -> None:
        rid, started = fields["rid"], False
        try:
            async for output in self._outputs(fields):
                started = True
                await self._send(output=output | {"rid": rid})
        except EngineError as error:
            status = HTTPStatus.INTERNAL_SERVER_ERROR if error.retryable else HTTPStatus.BAD_REQUEST
            await self._abort(rid, error.message, status)
        except asyncio.CancelledError:
            in_transfer = fields["bootstrap_room"] is not None and not started
            status = HTTPStatus.INTERNAL_SERVER_ERROR if in_transfer else None
            await self._abort(rid, "Aborted by AbortReq." if in_transfer else "Aborted", status)
        except Exception:  # noqa: BLE001 - as the real one's step does
            _fail()
        finally:
            del self._tasks[rid]

    async def _outputs(self, fields: dict[str, Any]) -> Any:
        made = await self._request(fields)
        if made.leg is Role.PREFILL:
            yield await self._prefill(made, fields)
            return
        count = 0
        async for chunk in self.engine.generate(made):
            count += len(chunk.token_ids)
            yield {
                "token_ids": chunk.token_ids,
                "finish_reason": _finish(chunk, count),
                "cached_tokens": chunk.cached_tokens,
                "logprobs": [(e.logprob, e.token_id, e.top) for e in chunk.logprobs or ()],
            }

    async def _prefill(self, made: GenerateRequest, fields: dict[str, Any]) -> dict[str, Any]:
        """The answer comes when the decode side has its copy, and holds the first token."""
        room = str(fields["bootstrap_room"])
        if self.dp_rank != int(room) % self.args.num_dp_ranks and fields["disagg_prefill_dp_rank"] is None:
            raise EngineError(
                f"Prefill bootstrap failed: follow_bootstrap_room conflict: dispatched to dp_rank {self.dp_rank} but "
                f"bootstrap_room {room} implies dp_rank {int(room) % self.args.num_dp_ranks}."
            )
        try:
            async for chunk in self.engine.generate(made):
                cached = chunk.cached_tokens
            if fields["bootstrap_host"] == FAKE_BOOTSTRAP_HOST:
                self.engine.let_go(room)
            else:
                await self.engine.landing(room).wait()
        finally:
            self.engine.let_go(room)
            self.engine.landings.pop(room, None)
        return {
            "token_ids": [self.engine.first_token(made)],
            "finish_reason": {"type": "length", "length": 0},
            "cached_tokens": cached,
            "logprobs": [],
        }

    async def _request(self, fields: dict[str, Any]) -> GenerateRequest:
        params, room = fields["sampling_params"], fields["bootstrap_room"]
        if self._poison in fields["input_ids"]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.role is not Role.AGGREGATED and room is None:
            raise EngineError("Invalid request: Disaggregated request received without bootstrap room id.", False)
        if any(params.get(kind) for kind in ("json_schema", "regex", "ebnf")) and self.args.grammar_backend == "none":
            raise EngineError("Grammar-based generation is not supported with --grammar-backend none", False)
        leg, handoff = self.role, None
        if self.role is Role.DECODE and fields["bootstrap_host"] == FAKE_BOOTSTRAP_HOST:
            leg = Role.AGGREGATED
        elif self.role is Role.DECODE:
            handoff = KVHandoff({"bootstrap_address": await self._find_prefill(fields), "bootstrap_room": room})
        elif self.role is Role.PREFILL:
            handoff = KVHandoff({"bootstrap_address": "", "bootstrap_room": room})
        sampling = Sampling(
            params["max_new_tokens"],
            temperature=params.get("temperature", 1.0),
            seed=params.get("sampling_seed"),
            min_tokens=params.get("min_new_tokens", 0),
            stop_token_ids=() if params.get("ignore_eos") else tuple(params.get("stop_token_ids") or ()),
            logprobs=fields["top_logprobs_num"] or 0 if fields["return_logprob"] else None,
        )
        return GenerateRequest(
            fields["rid"],
            fields["input_ids"],
            sampling,
            leg,
            handoff=handoff,
            cache_salt=fields["salt"],
            lora=fields["lora_path"],
            priority=fields["priority"] or 0,
        )

    async def _find_prefill(self, fields: dict[str, Any]) -> str:
        """Where the prefill rank of that room is, from its bootstrap server."""
        address = fields["bootstrap_host"], fields["bootstrap_port"]
        try:
            known = await asyncio.to_thread(ask, address)
        except OSError as error:
            raise EngineError(f"Decode handshake failed for {fields['bootstrap_room']}: {error}") from error
        rank = fields["disagg_prefill_dp_rank"]
        found: str = known[fields["bootstrap_room"] % len(known) if rank is None else rank]
        return found

    async def _abort(self, rid: str, message: str, status: int | None) -> None:
        reason = {"type": "abort", "message": message, "status_code": status, "err_type": None}
        await self._send(
            output={"rid": rid, "token_ids": [], "finish_reason": reason, "cached_tokens": 0, "logprobs": []}
        )

    def _publish_events(self, events: list[Any]) -> None:
        if self._publisher is not None:
            self._publisher.publish(KVEventBatch(time.time(), events))

    def _send_load_soon(self) -> None:
        """Once, when the step is over."""
        if not self._load_due:
            self._load_due = True
            asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(self._send_load()))

    async def _send_load(self) -> None:
        self._load_due = False
        (load,) = self.engine.load() or (None,)
        if load is None:
            return
        disaggregation, waiting = None, load.num_waiting
        if self.role is Role.PREFILL:
            disaggregation = DisaggregationMetrics("prefill", prefill_inflight_queue_reqs=self.engine.num_held)
        elif self.role is Role.DECODE:
            disaggregation = DisaggregationMetrics("decode", decode_transfer_queue_reqs=waiting)
        page = self.args.page_size
        await self._send(
            load=LoadSnapshot(
                time.time(),
                self.dp_rank,
                load.num_running,
                waiting,
                load.kv_used_blocks * page,
                load.kv_total_blocks * page,
                disaggregation,
            )
        )

    async def _send(self, **message: Any) -> None:
        await self._out.send(msgspec.msgpack.encode(message | {"rank": self.dp_rank}))


def _finish(chunk: Any, count: int) -> dict[str, Any] | None:
    if chunk.finish_reason == "stop":
        return {"type": "stop", "matched": chunk.token_ids[-1]}
    if chunk.finish_reason == "length":
        return {"type": "length", "length": count}
    return None
