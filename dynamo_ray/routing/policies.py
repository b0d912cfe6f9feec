"""The policies there are, by name, and how a user's own becomes one of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from dynamo_ray.config import RouterConfig
from dynamo_ray.routing import latency
from dynamo_ray.routing.policy import Costs, Floats, Leg, Policy, Scorer, cheapest


def blocks(
    leg: Leg,
    overlap_score_credit: float = 1.0,
    overlap_score_credit_decay: float = 0.0,
    host_cache_hit_weight: float = 0.75,
    disk_cache_hit_weight: float = 0.25,
    prefill_load_scale: float = 1.0,
    decode_active_request_weight: float = 0.0,
) -> Costs:
    """Blocks to compute plus blocks being held, in blocks (the published cost of Dynamo 1.6.1's router)."""
    held = leg.kv_tokens / leg.block_size + leg.prompt_blocks
    if decode_active_request_weight:
        held = held + decode_active_request_weight * leg.num_requests
    if not leg.computes_prompt:
        return {"decode_blocks": held}
    cached = overlap_score_credit * leg.device_blocks
    if overlap_score_credit_decay:
        excess_tokens = leg.queued_tokens - leg.queued_tokens.min()
        cached = cached / (1.0 + overlap_score_credit_decay * excess_tokens / leg.prompt_tokens)
    if leg.disk_blocks is not leg.device_blocks:
        cached = cached + host_cache_hit_weight * (leg.host_blocks - leg.device_blocks)
        cached = cached + disk_cache_hit_weight * (leg.disk_blocks - leg.host_blocks)
    to_compute = (leg.queued_tokens + leg.prompt_tokens) / leg.block_size
    return {"prefill_blocks": prefill_load_scale * np.maximum(to_compute - cached, 0.0), "decode_blocks": held}


def drawn(leg: Leg, costs: Floats, temperature: float) -> int:
    """A candidate at random, the cheaper the likelier: softmax of the costs, brought to [0, 1], over `temperature`."""
    finite = np.isfinite(costs)
    least, most = costs[finite].min(), costs[finite].max()
    if most == least:
        return cheapest(leg, costs)
    likely = np.where(finite, np.exp((least - costs) / ((most - least) * temperature)), 0.0).cumsum()
    return int(likely.searchsorted(_fraction(leg, 0) * likely[-1], side="right"))


def round_robin(leg: Leg) -> Floats:
    """Each candidate in turn, whatever it holds."""
    count = len(leg.pool)
    return np.mod(np.arange(count, dtype=np.float64) - leg.turn, count)


def random(leg: Leg, seed: int = 0) -> Floats:
    """Any candidate; the same one again for the same seed and turn."""
    costs = np.ones(len(leg.pool))
    costs[int(_fraction(leg, seed) * len(costs))] = 0.0
    return costs


def least_loaded(leg: Leg) -> Costs:
    """The fewest requests; of these the one that holds the smallest part of its KV."""
    return {"requests": leg.num_requests, "kv_usage": np.minimum(leg.kv_tokens / leg.pool.kv_total_tokens, 0.999)}


def session(leg: Leg) -> Costs:
    """Always the same rank for one session, on every ingress replica, for as long as it is there; without one, as
    `least_loaded`.

    Rendezvous hashing: the rank whose hash with the session's is the lowest. When it goes its sessions spread over
    all others, and no other session moves (Thaler and Ravishankar, 1998).
    """
    if leg.ask.session is None:
        return least_loaded(leg)
    mixed = leg.pool.hashes ^ np.uint64(xxh3_64_intdigest(leg.ask.session.encode("utf-8", "surrogatepass")))
    for shift, factor in _MIX:
        mixed = (mixed ^ (mixed >> shift)) * factor
    return (mixed >> np.uint64(11)).astype(np.float64)


_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
"""SplitMix64's finaliser (Steele, Lea and Flood, 2014)."""


def _fraction(leg: Leg, seed: int) -> float:
    """In [0, 1), by seed, role and turn."""
    return xxh3_64_intdigest(f"{leg.role} {leg.turn}".encode(), seed) / 2.0**64


def _blocks(config: RouterConfig) -> Policy:
    score = partial(
        blocks,
        overlap_score_credit=config.overlap_score_credit,
        overlap_score_credit_decay=config.overlap_score_credit_decay,
        host_cache_hit_weight=config.host_cache_hit_weight,
        disk_cache_hit_weight=config.disk_cache_hit_weight,
        prefill_load_scale=config.prefill_load_scale,
        decode_active_request_weight=config.decode_active_request_weight,
    )
    pick = partial(drawn, temperature=config.router_temperature) if config.router_temperature else cheapest
    return Policy(score, pick=pick, reads_coming=False)


def _latency(config: RouterConfig) -> Policy:
    slo = config.slo
    return Policy(
        partial(latency.latency, slo=slo), partial(latency.terms, slo=slo), pair=partial(latency.pair, slo=slo)
    )


_BUILT_IN: dict[str, Callable[[RouterConfig], Policy]] = {
    "latency": _latency,
    "blocks": _blocks,
    "round_robin": lambda _: Policy(round_robin, reads_overlap=False, waits=False),
    "random": lambda config: Policy(partial(random, seed=config.seed), reads_overlap=False, waits=False),
    "least_loaded": lambda _: Policy(least_loaded, reads_overlap=False, waits=False),
    "session": lambda _: Policy(session, reads_overlap=False),
}
_REGISTERED: dict[str, Policy | Scorer] = {}


def register_policy(name: str, policy: Policy | Scorer) -> None:
    """Make a policy known by name in this process, for `RouterConfig.policy` and the simulator.

    Processes that serve do not import the caller's program: in a served file, name the policy by import path.

    Raises:
        ValueError: The name is a built-in policy's or an import path, or the policy cannot be called with a leg.
    """
    if not isinstance(name, str):
        raise ValueError(f"{name!r} is no name; write register_policy(name, policy)")
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


def _check_parts(name: str, policy: Policy) -> None:
    parts = {"score": policy.score, "pick": policy.pick, "terms": policy.terms, "pair": policy.pair}
    for field, part in parts.items():
        if not callable(part) and (part is not None or field in ("score", "pick")):
            raise ValueError(f"{name}: {field} of the Policy is a {type(part).__name__}; it must be a function")
    if not isinstance(policy.filters, tuple) or not all(map(callable, policy.filters)):
        raise ValueError(f"{name}: filters of the Policy must be a tuple of functions, as in (f,)")


def _check(name: str, found: Any, arguments: dict[str, Any]) -> Policy:
    if isinstance(found, Policy):
        if arguments:
            raise ValueError(f"policy_args: {name} is a Policy, which takes none; name a function that makes one")
        _check_parts(name, found)
        return found
    if not callable(found):
        raise ValueError(f"{name} is a {type(found).__name__}; it must be a function of a Leg, or a Policy")
    try:
        inspect.signature(found).bind(None, **arguments)
    except TypeError as error:
        raise ValueError(f"{name} cannot be called as policy(leg, **policy_args): {error}") from None
    return Policy(partial(found, **arguments) if arguments else found)
