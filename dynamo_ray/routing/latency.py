"""The default policy: the seconds a request will take on each rank, by what ranks of its role have been seen to take.

Costs are in seconds. Per (prefill or aggregated) rank: the queue ahead, the prompt's own uncached tokens, what
computing them costs those who come behind, and how far ahead of the others it would put the rank. Per (decode or
aggregated) rank: the time between two tokens once the request is in, for as many tokens as answers have, and the wait
for KV room. Ranks of one engine step together, so that each waits for the slowest of them. Prefill and decode are
chosen as a pair where they depend on one another.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from backends.engine import Role
from dynamo_ray.config import SloConfig
from dynamo_ray.routing.policy import Floats, Leg, Places

WORK_WEIGHT = 1.0
"""Seconds that later requests lose for each second that this one computes, while no queue has built up: what makes a
cached prefix worth more than it saves this request."""
QUEUE_WEIGHT = 1.0
"""The same for each request that waits on a rank on average: under overload, what is saved is saved for all."""
MOST_WORK_WEIGHT = 8.0
"""However many wait. More would keep a prefix that everybody wants on the one rank that has it (Dynamo #737)."""
MOST_GIVEN = 1.1
"""What a rank may be given lately, in what all were given on average, before its being ahead counts. Below that the
best fit is taken: of ranks alike, whoever was given most. So some stay behind, and a prompt that is as long as all
that a rank has to do finds one of those; were all kept level, it would make its rank the busiest by far. (That online
scheduling does best to keep some machines behind: Bartal, Fiat, Karloff, Vohra, New algorithms for an ancient
scheduling problem, 1995.)"""
FIT_WEIGHT = 0.2
"""Seconds, for each second that the prompt takes, by which a rank that was given nothing fits worse than a full one."""
UNEVEN_WEIGHT = 10.0
"""Of what a rank's own tokens count as more for its being ahead: the excess, as often as it goes into the mean. Its
square forgives what chance brings; but a prefix with which more than one rank's share of the work begins is computed
on a second rank long before its holder does everything, however much computing weighs."""
FEW_PROMPTS = 8
"""While ranks have had fewer than so many each on average, being ahead says as little as it would with so many."""
LOCKSTEP_TOKENS = 8192
"""Prompt tokens a rank computes in one step at most: for so many of the slowest rank's tokens the others wait too
(SGLang's and vLLM's default chunk on large GPUs)."""
REQUEST_TOKENS = 1024
"""A running request costs a decode step as much as the KV of so many tokens: its own row in every layer."""
OWN_SHARE = 0.1
"""Weight of a rank's own decode load beside its group's slowest: below that one, all would cost the same."""
LATE_WEIGHT = 5.0
"""What a second beyond an SLO costs more than one within it."""


def latency(leg: Leg, slo: SloConfig) -> Floats:
    """Seconds for each candidate: the sum of `terms`, in one product where nothing in it is bent or differs by rank."""
    if leg.pool.lockstep or leg.speeds.any_slow or slo.ttft_s is not None or slo.itl_s is not None:
        return sum(terms(leg, slo).values(), start=np.zeros(len(leg.pool)))
    load, coming = leg.load, leg.coming_blocks
    if leg.role is Role.DECODE:
        uncached_s = leg.speeds.link.s_per_token
        costs = coming * (-leg.block_size * uncached_s)
        costs += leg.prompt_tokens * uncached_s
    else:
        per_token_s = leg.speeds.prefill[leg.role].s_per_token
        work_s = (1.0 + work_weight(leg)) * per_token_s
        own = leg.prompt_tokens - leg.block_size * coming
        badness, ahead = fit(leg, own)
        badness *= per_token_s
        badness += work_s
        costs = own * badness
        costs += load[0] * per_token_s
        ahead *= work_s
        costs += ahead
    if leg.role is not Role.PREFILL:
        answer_s = num_answer_tokens(leg) * leg.speeds.step[leg.role].s_per_token
        costs += load[1] * (REQUEST_TOKENS * answer_s)
        costs += load[2] * answer_s
        costs += (leg.prompt_tokens + REQUEST_TOKENS) * answer_s
        room_s = wait_for_room_s(leg)
        if room_s is not None:
            costs += room_s
    return costs


def terms(leg: Leg, slo: SloConfig) -> dict[str, Floats]:
    """Seconds by cause, for each candidate."""
    found = {}
    slow = leg.slowness
    if leg.computes_prompt:
        line = leg.speeds.prefill[leg.role]
        own = leg.uncached_tokens
        compute_s = own * (line.s_per_token * slow)
        wait_s = tokens_ahead(leg, own) * (line.s_per_token * slow)
        found["wait_s"] = wait_s
        found["compute_s"] = compute_s
        work = work_weight(leg)
        found["work_s"] = work * compute_s
        badness, ahead = fit(leg, own)
        found["fit_s"] = badness * compute_s
        found["uneven_s"] = ahead * ((1.0 + work) * line.s_per_token * slow)
        if slo.ttft_s is not None:
            late_s = np.maximum(wait_s + compute_s - (slo.ttft_s - line.overhead_s), 0.0)
            found["late_s"] = LATE_WEIGHT * late_s
    if leg.role is not Role.PREFILL:
        step_s = slow * (leg.speeds.step[leg.role].s_per_token * step_tokens(leg, leg.load))
        found["decode_s"] = num_answer_tokens(leg) * step_s
        if slo.itl_s is not None:
            late_s = np.maximum(step_s - (slo.itl_s - leg.speeds.step[leg.role].overhead_s), 0.0)
            found["late_itl_s"] = (LATE_WEIGHT * num_answer_tokens(leg)) * late_s
        room_s = wait_for_room_s(leg)
        if room_s is not None:
            found["room_s"] = room_s
    if leg.role is Role.DECODE:
        found["handoff_s"] = leg.uncached_tokens * leg.speeds.link.s_per_token
    return found


def work_weight(leg: Leg) -> float:
    """What a second of computing costs others, in seconds."""
    return min(WORK_WEIGHT + QUEUE_WEIGHT * _mean(leg.queued_tokens) / leg.speeds.uncached_tokens, MOST_WORK_WEIGHT)


def fit(leg: Leg, own: Floats) -> tuple[Floats, Floats]:
    """How badly the prompt fills what each rank may be given, 0 to `FIT_WEIGHT`; and the tokens that its own count as
    more there for going further beyond that than where it goes least beyond.
    """
    mean = max(_mean(leg.recent_tokens), 1.0)
    room = MOST_GIVEN * mean - leg.recent_tokens
    room -= own
    badness = np.maximum(room, 0.0)
    badness *= FIT_WEIGHT / (MOST_GIVEN * mean)
    ahead = np.minimum(room, 0.0)
    ahead -= ahead.max()
    ahead *= ahead
    ahead *= UNEVEN_WEIGHT / max(mean, FEW_PROMPTS * leg.speeds.uncached_tokens)
    return badness, ahead


def num_answer_tokens(leg: Leg) -> float:
    """Tokens that the answer is expected to have."""
    return min(leg.ask.max_tokens, leg.speeds.answer_tokens)


def tokens_ahead(leg: Leg, own: Floats) -> Floats:
    """Prompt tokens whose computing each candidate sits through before its own."""
    queued = leg.queued_tokens
    if not leg.pool.lockstep:
        return queued
    mine = queued + own
    return np.minimum(np.maximum(mine, leg.pool.slowest(queued)), mine + LOCKSTEP_TOKENS) - own


def step_tokens(leg: Leg, load: Floats) -> Floats:
    """What each candidate's step would have to read, in tokens of KV, with this request in beside that load."""
    own: Floats = load[2] + REQUEST_TOKENS * load[1] + (leg.prompt_tokens + REQUEST_TOKENS)
    if not leg.pool.lockstep:
        return own
    return np.maximum(own, leg.pool.slowest(own - (leg.prompt_tokens + REQUEST_TOKENS))) + OWN_SHARE * own


def wait_for_room_s(leg: Leg) -> Floats | None:
    """Seconds until each candidate has KV room for the prompt, if its requests end evenly; None: all have it now."""
    most = leg.kv_tokens.item(leg.kv_tokens.argmax()) + leg.prompt_tokens
    if most <= leg.pool.least_kv_tokens:
        return None
    lacking = np.maximum(leg.kv_tokens + (leg.prompt_tokens - leg.pool.kv_total_tokens), 0.0)
    life_s = leg.speeds.answer_tokens * leg.speeds.step[leg.role](most)
    return life_s * lacking / np.maximum(leg.kv_tokens, 1.0)


def ready_s(leg: Leg, own: Floats) -> Floats:
    """When each candidate has computed the prompt, from now."""
    line = leg.speeds.prefill[leg.role]
    return (line.overhead_s + line.s_per_token * (tokens_ahead(leg, own) + own)) * leg.slowness


def pair(prefill: Leg, rows: Places, decode: Leg, columns: Places, slo: SloConfig) -> Floats | None:
    """What a pair takes beyond both legs: its own link, and the SLO on both; less the waits that pass side by side."""
    slow_links, room_s = decode.speeds.slow_links, wait_for_room_s(decode)
    if room_s is None and slo.ttft_s is None and not slow_links:
        return None
    ready = ready_s(prefill, prefill.uncached_tokens)[rows, None]
    room = np.zeros(len(columns)) if room_s is None else room_s[columns]
    link_s = decode.speeds.link.overhead_s + decode.speeds.link.s_per_token * decode.uncached_tokens[columns]
    excess = np.zeros((len(rows), len(columns)))
    if slow_links:
        for i, p in enumerate(rows.tolist()):
            for j, d in enumerate(columns.tolist()):
                excess[i, j] = slow_links.get((prefill.pool.groups[p], decode.pool.groups[d]), 1.0) - 1.0
    excess *= link_s
    beyond = excess - np.minimum(ready, room)
    if slo.ttft_s is not None:
        late_s = np.maximum(np.maximum(ready, room) + link_s + excess - slo.ttft_s, 0.0)
        beyond += LATE_WEIGHT * (late_s - np.maximum(ready - slo.ttft_s, 0.0))
    return beyond


class Prediction(NamedTuple):
    """What a placement is expected to take, and by what, so that what it took can teach `Speeds`."""

    prefill_tokens: float
    """Queued ahead, and the prompt's own."""
    moved_tokens: float
    """Handed over; 0 where one rank does both."""
    step_tokens: float
    ttft_s: float
    itl_s: float


def predict(prefill: tuple[Leg, int] | None, decode: tuple[Leg, int]) -> Prediction:
    """Of each leg and the place chosen in it, whatever policy chose, for one that goes now.

    What waits in this ingress comes behind it. Counted in, it would teach that a token costs next to nothing.
    """
    leg, place = decode
    computing, at = prefill or decode
    speeds, own, queued = leg.speeds, _uncached(computing, at), computing.sent.item(0, at)
    tokens = queued + own
    if computing.pool.lockstep:
        slowest = computing.pool.slowest(computing.sent[0]).item(at)
        tokens = min(max(tokens, slowest), tokens + LOCKSTEP_TOKENS)
    arriving = leg.prompt_tokens + REQUEST_TOKENS
    load = leg.sent.item(2, place) + REQUEST_TOKENS * leg.sent.item(1, place) + arriving
    if leg.pool.lockstep:
        load = step_tokens(leg, leg.sent).item(place)
    itl_s = speeds.step[leg.role](load) * _at(leg.slowness, place)
    ttft_s = speeds.prefill[computing.role](tokens) * _at(computing.slowness, at)
    moved = 0.0
    if prefill is not None:
        moved = _uncached(leg, place)
        groups = computing.pool.groups[at], leg.pool.groups[place]
        ttft_s += speeds.link(moved) * speeds.slow_links.get(groups, 1.0) + itl_s
    return Prediction(tokens, moved, load, ttft_s, itl_s)


def _mean(values: Floats) -> float:
    return float(np.add.reduce(values)) / len(values)


def _uncached(leg: Leg, place: int) -> float:
    return leg.prompt_tokens - leg.block_size * leg.coming_blocks.item(place)


def _at(slowness: Floats | float, place: int) -> float:
    return slowness if isinstance(slowness, float) else slowness.item(place)
