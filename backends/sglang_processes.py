"""The mains of SGLang's processes: tied to our life, bound to the node's address, and quoted when they fail."""

from __future__ import annotations

import ctypes
import os
import signal
from functools import cache
from typing import Any

from backends.kv_publisher import pack_tokens
from backends.output import redirect_output
from backends.processes import die_with_parent

ADDRESS_VARIABLE = "DYNAMO_RAY_SGLANG_ADDRESS"
SIG_IGN = 1


def run_scheduler(*args: Any, **kwargs: Any) -> Any:
    """Main of a scheduler, which also runs the model, in place of SGLang's run_scheduler_process."""
    _begin()
    _bind_to_the_node()
    from sglang.srt.disaggregation import kv_events
    from sglang.srt.managers.scheduler import run_scheduler_process

    pack_tokens(kv_events)
    return run_scheduler_process(*args, **kwargs)


def run_detokenizer(*args: Any, **kwargs: Any) -> Any:
    """In place of run_detokenizer_process."""
    _begin()
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    return run_detokenizer_process(*args, **kwargs)


def run_controller(*args: Any, **kwargs: Any) -> Any:
    """Main of what feeds attention DP ranks, in place of run_data_parallel_controller_process."""
    _begin()
    from sglang.srt.managers.data_parallel_controller import run_data_parallel_controller_process

    return run_data_parallel_controller_process(*args, **kwargs)


@cache
def pack_in_actors() -> None:
    """Have SGLang's Ray engine make schedulers that tell token ids packed, as `run_scheduler` does.

    An actor does one thing after another: each packs when it has loaded the model, before its event loop begins.
    """
    from sglang.srt.ray import engine

    create = engine._create_scheduler_actor

    def create_packing(*args: Any, **kwargs: Any) -> Any:
        actor = create(*args, **kwargs)
        actor.__ray_call__.remote(_pack_here)
        return actor

    engine._create_scheduler_actor = create_packing


def ignore_failure_signal() -> None:
    """Survive the SIGQUIT that SGLang's processes send their parent when they fail; its default is a core dump.

    By way of libc, because Python takes handlers in its main thread only, and a Ray actor does not run there.
    """
    ctypes.CDLL(None).signal(signal.SIGQUIT, ctypes.c_void_p(SIG_IGN))


def _pack_here(actor: Any) -> None:
    from sglang.srt.disaggregation import kv_events

    pack_tokens(kv_events)


def _begin() -> None:
    redirect_output()
    die_with_parent()
    # Ignored in our parent and so in us; a controller whose scheduler fails must end of it.
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def _bind_to_the_node() -> None:
    """Have ZeroMQ bind the node's address where SGLang 0.5.16 names a wildcard, the only thing that it binds for
    KV events (disaggregation/kv_events.py)."""
    import zmq

    address = os.environ[ADDRESS_VARIABLE]
    bind = zmq.Socket.bind

    def bind_here(self: Any, endpoint: str) -> Any:
        return bind(self, endpoint.replace("tcp://*:", f"tcp://{address}:"))

    zmq.Socket.bind = bind_here  # type: ignore[assignment]
