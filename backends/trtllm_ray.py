"""What TensorRT-LLM's adapter needs of Ray; imported when it is called, by engines that run in a Ray actor only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

NODE_LOCAL = ("RAY_RAYLET_PID", "RAY_NODE_IP_ADDRESS")
"""What a raylet tells its workers of itself: wrong on other nodes, to whose workers TensorRT-LLM 1.2 gives it."""


def current_group() -> Any:
    """The placement group that this actor is in; None outside any."""
    return import_module("ray.util").get_current_placement_group()


def kill(worker: Any) -> None:
    """End one of TensorRT-LLM's workers, whatever it is doing."""
    import_module("ray").kill(worker, no_restart=True)


def restore_old_names() -> None:
    """TensorRT-LLM 1.2 imports a name from where Ray had it before 2.55."""
    module, name = import_module("ray.util.placement_group"), "PlacementGroupSchedulingStrategy"
    if not hasattr(module, name):
        setattr(module, name, getattr(import_module("ray.util.scheduling_strategies"), name))


@contextmanager
def without_node_variables() -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in NODE_LOCAL if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
