"""The policies there are, by name, and how a user's own becomes one of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from dynamo_ray.config import RouterConfig
from dynamo_ray.routing.policy import Costs, Floats, Leg, Policy, Scorer


def blocks(
    leg: Leg,
    overlap_score_credit: float = 1.0,
    prefill_load_scale: float = 1.0,
) -> Costs:
    """Blocks to compute plus blocks being held, in blocks (the published cost of Dynamo 1.6.1's router)."""
    held = leg.kv_tokens / leg.block_size + leg.prompt_blocks
    if not leg.computes_prompt:
        return {"decode_blocks": held}
    to_compute = (leg.queued_tokens + leg.prompt_tokens) / leg.block_size
    uncached = np.maximum(to_compute - overlap_score_credit * leg.device_blocks, 0.0)
    return {"prefill_blocks": prefill_load_scale * uncached, "decode_blocks": held}


def round_robin(leg: Leg) -> Floats:
    """Each candidate in turn, whatever it holds."""
    count = len(leg.pool)
    return np.mod(np.arange(count, dtype=np.float64) - leg.turn, count)


def _blocks(config: RouterConfig) -> Policy:
    credit, scale = config.overlap_score_credit, config.prefill_load_scale
    return Policy(partial(blocks, overlap_score_credit=credit, prefill_load_scale=scale))


_BUILT_IN: dict[str, Callable[[RouterConfig], Policy]] = {
    "blocks": _blocks,
    "round_robin": lambda _: Policy(round_robin, reads_overlap=False),
}
_REGISTERED: dict[str, Policy | Scorer] = {}


def register_policy(name: str, policy: Policy | Scorer) -> None:
    """Make a policy known by name in this process, for `RouterConfig.policy` and the simulator.

    Processes that serve do not import the caller's program: in a served file, name the policy by import path.

    Raises:
        ValueError: The name is a built-in policy's or an import path, or the policy cannot be called with a leg.
    """
    if name in _BUILT_IN or ":" in name or not name:
        raise ValueError(f"{name!r} is taken or is an import path; give the policy another name")
    _check(name, policy, {})
    _REGISTERED[name] = policy


def resolve(config: RouterConfig) -> Policy:
    """The policy that the configuration names.

    Raises:
        ValueError: There is none of that name, the import path leads nowhere, or what is there cannot be called with
            a leg and `policy_args`; says what to write instead.
    """
    made = _BUILT_IN.get(config.policy)
    if made is not None:
        if config.policy_args:
            raise ValueError(f"policy_args: {config.policy} takes none; its parameters are fields of `router`")
        return made(config)
    found = _REGISTERED.get(config.policy)
    if found is None:
        found = _imported(config.policy)
    return _check(config.policy, found, config.policy_args)


def names() -> tuple[str, ...]:
    """Every policy known by name here."""
    return (*_BUILT_IN, *_REGISTERED)


def _imported(path: str) -> Any:
    module, colon, attribute = path.partition(":")
    if not colon:
        raise ValueError(f"no policy is called {path!r}; known: {', '.join(names())}, or write module:function")
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing a user's module can raise anything
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return found


def _check(name: str, found: Any, arguments: dict[str, Any]) -> Policy:
    if isinstance(found, Policy):
        if arguments:
            raise ValueError(f"policy_args: {name} is a Policy, which takes none; name a function that makes one")
        return found
    if not callable(found):
        raise ValueError(f"{name} is a {type(found).__name__}; it must be a function of a Leg, or a Policy")
    try:
        inspect.signature(found).bind(None, **arguments)
    except TypeError as error:
        raise ValueError(f"{name} cannot be called as policy(leg, **policy_args): {error}") from None
    return Policy(partial(found, **arguments) if arguments else found)
