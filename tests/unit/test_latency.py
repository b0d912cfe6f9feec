"""The default policy: seconds predicted from what was seen, and what becomes of the bookings they are made of."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.engine import RankLoad, Role
from backends.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch
from dynamo_ray.config import RouterConfig, SloConfig
from dynamo_ray.routing import latency
from dynamo_ray.routing.block_hash import chain_seed
from dynamo_ray.routing.chooser import Booked, Choice, Chooser, WorkerFacts
from dynamo_ray.routing.load import Booked as PeerBooked
from dynamo_ray.routing.pending import EVENT_GRACE_S, PendingPrefixes
from dynamo_ray.routing.policy import Ask
from dynamo_ray.routing.ranks import Holder
from dynamo_ray.routing.speeds import PREFILL, Line, Speeds

SIZE = 16
PROMPT = list(range(40 * SIZE))
RATE = 1 / PREFILL[1]
"""Tokens a second that are assumed before anything was seen."""


def workers(*roles: Role, attn_dp: int = 1, kv_blocks: int = 100_000, **options: Any) -> Chooser:
    chooser = Chooser("m", RouterConfig.model_validate(options))
    for number, role in enumerate(roles):
        chooser.up(WorkerFacts(f"w{number}", 1, role, attn_dp, SIZE, kv_blocks))
    return chooser


def aggregated(count: int, **options: Any) -> Chooser:
    return workers(*[Role.AGGREGATED] * count, **options)


def split(num_prefill: int, num_decode: int, **options: Any) -> Chooser:
    return workers(*[Role.PREFILL] * num_prefill, *[Role.DECODE] * num_decode, **options)


def ask(prompt: list[int] = PROMPT, max_tokens: int = 100, **options: Any) -> Ask:
    return Ask(prompt, chain_seed("m"), max_tokens, **options)


def choose(chooser: Chooser, request: Ask | None = None, now_s: float = 0.0) -> Choice:
    of_role = {role: sum(1 << c for c, facts in chooser._of_column.items() if facts.role is role) for role in Role}
    decode = of_role[Role.DECODE] | of_role[Role.AGGREGATED]
    return chooser.choose(request or ask(), of_role[Role.PREFILL] or None, decode, now_s)


def send(chooser: Chooser, request: Ask | None = None, now_s: float = 0.0) -> tuple[str, Booked]:
    """Where it computes its prompt, booked."""
    choice = choose(chooser, request, now_s)
    return (choice.prefill or choice.decode).holder.worker, chooser.book(choice, now_s)


def store(chooser: Chooser, worker: str, blocks: int, prompt: list[int] = PROMPT) -> None:
    names: list[int | bytes] = [hash(tuple(prompt[: (n + 1) * SIZE])) for n in range(blocks)]
    stored = BlockStored(names, None, prompt[: blocks * SIZE], SIZE)
    chooser.apply(Holder(worker, 1, 0), KVEventBatch(0, 0, [stored]))


def queue(chooser: Chooser, worker: str, queued_tokens: float, kv_tokens: int = 0, dp_rank: int = 0) -> None:
    chooser.table.book(Holder(worker, 1, dp_rank), int(queued_tokens), kv_tokens)


def test_a_prefix_is_worth_the_queue_that_its_computing_would_take() -> None:
    chooser = aggregated(2)
    store(chooser, "w1", 40)
    saved = (1 + latency.WORK_WEIGHT) * len(PROMPT)
    assert latency.work_weight(choose(chooser).decode.leg) == latency.WORK_WEIGHT
    queue(chooser, "w1", 0.7 * saved)
    assert choose(chooser).decode.holder.worker == "w1"
    queue(chooser, "w1", 0.4 * saved)
    assert choose(chooser).decode.holder.worker == "w0"


def test_under_overload_a_prefix_is_worth_more_but_never_all() -> None:
    chooser, weights = aggregated(2), []
    for _ in range(4):
        queue(chooser, "w0", 4000)
        queue(chooser, "w1", 4000)
        weights.append(latency.work_weight(choose(chooser).decode.leg))
    assert latency.WORK_WEIGHT < weights[0] < weights[1] < weights[3] == latency.MOST_WORK_WEIGHT


def test_of_idle_ranks_one_that_was_given_nothing_yet_takes_what_is_new() -> None:
    chooser = aggregated(3)
    for worker in ("w0", "w2"):
        chooser.table.free(chooser.table.book(Holder(worker, 1, 0), 1000, 0))
    assert choose(chooser).decode.holder.worker == "w1"


def test_a_rank_far_ahead_of_the_others_gives_its_prefix_up_to_be_computed_elsewhere() -> None:
    taken = []
    for tokens in (1_000, 30_000):
        chooser = aggregated(4)
        store(chooser, "w1", 40)
        chooser.table.free(chooser.table.book(Holder("w1", 1, 0), tokens, 0))
        taken.append(choose(chooser).decode.holder.worker == "w1")
    assert taken == [True, False]


def test_a_prompt_longer_than_what_any_rank_may_be_given_does_not_queue_for_a_few_cached_tokens() -> None:
    chooser = aggregated(8)
    store(chooser, "w1", 40)
    chooser.table.peer("another ingress", {Holder("w1", 1, 0): PeerBooked(300_000, 4, 0)})
    assert choose(chooser, ask([*PROMPT, *range(60_000)])).decode.holder.worker != "w1"


def test_being_ahead_of_the_others_weighs_as_much_as_computing_does() -> None:
    per_token = []
    for queued in (0, 40_000):
        chooser = aggregated(2)
        chooser.table.free(chooser.table.book(Holder("w1", 1, 0), 300_000, 0))
        for worker in ("w0", "w1"):
            queue(chooser, worker, queued)
        leg = choose(chooser).decode.leg
        terms = latency.terms(leg, SloConfig())
        per_token.append(terms["uneven_s"][1] / (terms["compute_s"][1] + terms["work_s"][1]))
        assert terms["uneven_s"].tolist()[0] == 0
        assert latency.latency(leg, SloConfig()) == pytest.approx(sum(terms.values()))
    assert per_token[0] > 0
    # Those that are queued are among what was given lately, the same for both.
    mean = 150_000, 190_000
    ahead = (300_640 - latency.MOST_GIVEN * mean[0], 340_640 - latency.MOST_GIVEN * mean[1])
    assert per_token[1] == pytest.approx(per_token[0] * (ahead[1] / ahead[0]) ** 2 * mean[0] / mean[1], rel=0.01)


def test_a_ttft_to_keep_makes_a_long_queue_dearer_than_its_prefix_is_worth() -> None:
    for slo, worker in ((None, "w1"), (0.02 + 0.8 * len(PROMPT) / RATE, "w0")):
        chooser = aggregated(2, slo={"ttft_s": slo})
        store(chooser, "w1", 30)
        queue(chooser, "w1", 1.2 * len(PROMPT))
        queue(chooser, "w0", 0.0)
        assert choose(chooser).decode.holder.worker == worker


def test_ranks_in_lockstep_wait_for_the_slowest_of_them() -> None:
    chooser = aggregated(2, attn_dp=2)
    queue(chooser, "w0", 6000, dp_rank=0)
    queue(chooser, "w1", 1500, dp_rank=0)
    queue(chooser, "w1", 1500, dp_rank=1)
    choice = choose(chooser)
    assert choice.decode.holder.worker == "w1", "w0's other rank is idle, and sits through the busy one's step"
    ahead = latency.tokens_ahead(choice.decode.leg, np.full(4, 100.0))
    assert ahead.tolist() == [6000, 6000 - 100, 1500, 1500]


def test_a_decode_step_is_as_long_as_that_of_the_fullest_rank() -> None:
    chooser = split(1, 2, attn_dp=2)
    queue(chooser, "w1", 0, 1_000_000, dp_rank=0)
    queue(chooser, "w2", 0, 500_000, dp_rank=0)
    queue(chooser, "w2", 0, 500_000, dp_rank=1)
    assert choose(chooser).decode.holder.worker == "w2"
    leg = choose(chooser).decode.leg
    steps = latency.step_tokens(leg, leg.load)
    assert steps[0] > steps[1] > steps[2] == steps[3]


def test_a_decode_rank_without_room_for_the_kv_is_left_alone() -> None:
    chooser = split(1, 2, kv_blocks=1000)
    queue(chooser, "w1", 0, 1000 * SIZE)
    for _ in range(5):
        queue(chooser, "w2", 0, 2800)
    assert latency.wait_for_room_s(choose(chooser).decode.leg) is not None
    assert choose(chooser).decode.holder.worker == "w2"


@pytest.mark.parametrize("slo", [None, 0.01, 10.0])
def test_a_link_that_was_seen_to_be_slow_is_avoided_as_a_pair(slo: float | None) -> None:
    chooser = split(2, 2, slo={"ttft_s": slo})
    queue(chooser, "w1", 10)
    queue(chooser, "w3", 0, 1000)
    before = choose(chooser)
    assert before.prefill is not None
    assert (before.prefill.holder.worker, before.decode.holder.worker) == ("w0", "w2"), "the idle ones"
    for _ in range(50):
        chooser.speeds.handed_over(("w1", "w2"), 1000, 0.01)
        chooser.speeds.handed_over(("w0", "w2"), 1000, 1.0)
    after = choose(chooser)
    assert after.prefill is not None
    assert (after.prefill.holder.worker, after.decode.holder.worker) != ("w0", "w2")


def test_equal_prompts_that_come_together_go_where_the_first_is_being_computed() -> None:
    chooser = aggregated(8)
    first, booked = send(chooser)
    again = choose(chooser)
    assert (again.decode.holder.worker, again.decode.overlap_blocks) == (first, 40)
    assert again.decode.leg.device_blocks.max() == 0
    longer = choose(chooser, ask([*PROMPT, *PROMPT[:100]]))
    assert (longer.decode.holder.worker, longer.decode.overlap_blocks) == (first, 40)
    booked.free(0.1)
    assert choose(chooser).decode.overlap_blocks == 0, "it was aborted: it will not be there"


def compute(chooser: Chooser, prompt: list[int] = PROMPT) -> str:
    """Where a prompt was computed, at 1.0 s."""
    worker, booked = send(chooser, ask(prompt))
    booked.first_token(1.0)
    booked.free(1.1, generated_tokens=10)
    return worker


def test_a_prefix_just_computed_counts_until_its_event_tells_however_late_it_is() -> None:
    chooser = aggregated(8)
    worker = compute(chooser)
    for now_s in (1.0, 1.0 + 0.99 * EVENT_GRACE_S):
        assert choose(chooser, now_s=now_s).decode.overlap_blocks == 40
    store(chooser, worker, 30)
    assert choose(chooser, now_s=2.0).decode.overlap_blocks == 40, "told of in part"
    store(chooser, worker, 40)
    assert len(chooser.pending) == 0
    assert choose(chooser, now_s=2.0).decode.overlap_blocks == 40
    chooser.apply(Holder(worker, 1, 0), KVEventBatch(0, 0, [BlockRemoved([hash(tuple(PROMPT))])]))
    assert choose(chooser, now_s=2.0).decode.overlap_blocks == 39, "evicted, for certain"


def test_a_prefix_just_computed_that_no_event_tells_of_does_not_count_for_long() -> None:
    chooser = aggregated(8)
    compute(chooser)
    assert choose(chooser, now_s=1.0 + EVENT_GRACE_S).decode.overlap_blocks == 0
    assert len(chooser.pending) == 0


def test_a_prefix_that_a_rank_has_told_nothing_of_is_not_there_once_it_tells_of_a_later_one() -> None:
    chooser = aggregated(1)
    later = [7] * 20 * SIZE
    for prompt in (PROMPT, later):
        compute(chooser, prompt)
    store(chooser, "w0", 20, later)
    assert len(chooser.pending) == 0
    assert choose(chooser, now_s=1.2).decode.overlap_blocks == 0


def test_a_prefix_just_computed_is_gone_with_the_cache() -> None:
    for empty in ("told", "flushed", "down"):
        chooser = aggregated(2)
        worker = compute(chooser)
        match empty:
            case "told":
                chooser.apply(Holder(worker, 1, 0), KVEventBatch(0, 0, [AllBlocksCleared()]))
            case "flushed":
                chooser.flushed(worker, 1)
            case "down":
                chooser.down(worker, 1)
        assert choose(chooser, now_s=1.2).decode.overlap_blocks == 0
        assert len(chooser.pending) == 0


def test_what_is_told_of_before_the_first_token_or_guessed_is_not_kept_twice() -> None:
    chooser = aggregated(1)
    _, booked = send(chooser)
    store(chooser, "w0", 40)
    booked.first_token(1.0)
    assert len(chooser.pending) == 0
    silent = Chooser("m")
    silent.up(WorkerFacts("w0", 1, Role.AGGREGATED, 1, SIZE, 1000, tells_events=False))
    compute(silent)
    assert len(silent.pending) == 0
    assert choose(silent, now_s=1.2).decode.overlap_blocks == 40


def test_nothing_piles_up_where_all_share_a_system_prompt() -> None:
    """Dynamo #737."""
    chooser = aggregated(8)
    system = PROMPT[: 20 * SIZE]
    sent = Counter(send(chooser, ask([*system, *[1000 + n] * 50 * SIZE]))[0] for n in range(160))
    assert max(sent.values()) <= 1.2 * 160 / 8


def test_single_turn_traffic_starves_nobody() -> None:
    """Dynamo #7836: also when each request has left before the next one comes."""
    chooser = split(3, 5)
    sent: Counter[str] = Counter()
    for number in range(100):
        choice = choose(chooser, ask([number] * 300), now_s=float(number))
        booked = chooser.book(choice, float(number))
        assert choice.prefill is not None
        sent.update((choice.prefill.holder.worker, choice.decode.holder.worker))
        booked.free(number + 0.5)
    shares = sorted(sent.values())
    assert shares[:5] == [20] * 5
    assert shares[5] > 0.8 * 33
    assert shares[7] < 1.2 * 33


@pytest.mark.parametrize("at", [64, 200, 320, 480, 600, 640])
def test_a_prompt_as_long_as_half_of_what_a_rank_has_makes_none_the_busiest(at: int) -> None:
    """Whenever it comes; where each goes to whoever was given least, it does if it comes late."""
    rng = random.Random(at)
    lengths = [rng.choice((64, 128, 256, 512, 1024)) for _ in range(640)]
    longest = int(0.55 * sum(lengths) / 16)
    lengths.insert(at, longest)
    chooser, work, by_least = aggregated(16), [0] * 16, [0] * 16
    for number, length in enumerate(lengths):
        choice = choose(chooser, ask([number] * length, max_tokens=1), now_s=float(number))
        chooser.book(choice, float(number)).free(number + 0.5)
        work[int(choice.decode.holder.worker[1:])] += length
        by_least[by_least.index(min(by_least))] += length
    most = 1.2 * sum(work) / 16
    assert max(work) < most
    assert max(by_least) > most or at < 480


COUNTS = st.tuples(st.integers(0, 50_000), st.integers(0, 200_000), st.integers(0, 40))


@settings(max_examples=30, deadline=None)
@given(st.lists(COUNTS, min_size=2, max_size=6), st.sampled_from([Role.AGGREGATED, Role.DECODE]))
def test_the_short_way_to_a_cost_leads_to_the_sum_of_its_terms(counts: list[tuple[int, int, int]], role: Role) -> None:
    chooser = workers(Role.PREFILL, *[role] * len(counts), kv_blocks=8000)
    for number, (queued, kv, blocks) in enumerate(counts):
        queue(chooser, f"w{number + 1}", queued, kv)
        if blocks:
            store(chooser, f"w{number + 1}", blocks)
    choice = choose(chooser)
    for pick in (choice.prefill, choice.decode):
        if pick is not None:
            assert np.allclose(latency.latency(pick.leg, SloConfig()), sum(pick.terms.values()), rtol=1e-9)


def test_rates_are_learned_from_what_requests_took() -> None:
    chooser = split(2, 2)
    rng = np.random.default_rng(0)
    now_s = 0.0
    for _ in range(300):
        tokens = int(rng.integers(100, 8000))
        choice = choose(chooser, ask(rng.integers(0, 1 << 30, tokens).tolist()), now_s)
        booked = chooser.book(choice, now_s)
        noise = rng.uniform(0.8, 1.25, 3)
        done_s = now_s + (0.05 + tokens / 100_000) * noise[0]
        first_s = done_s + (0.002 + tokens / 1e6 + 0.03) * noise[1]
        booked.prefill_done(done_s)
        booked.first_token(first_s)
        booked.free(first_s + 49 * 0.03 * noise[2], generated_tokens=50)
        now_s += 1.0
    speeds = chooser.speeds
    assert speeds.prefill[Role.PREFILL](5000) == pytest.approx(0.1, rel=0.1)
    assert speeds.step[Role.DECODE](5000) == pytest.approx(0.03, rel=0.1)
    assert speeds.link(5000) == pytest.approx(0.007, rel=0.8)
    assert speeds.answer_tokens == pytest.approx(50, rel=0.01)
    predicted = choose(chooser, ask([7] * 5000), now_s).predict()
    assert predicted.ttft_s == pytest.approx(0.1 + 0.037, rel=0.15)


@pytest.mark.parametrize("attn_dp", [1, 2])
@pytest.mark.parametrize("roles", [(Role.AGGREGATED,), (Role.PREFILL, Role.DECODE)])
def test_what_waits_here_for_a_rank_costs_newcomers_but_is_in_no_prediction(
    attn_dp: int, roles: tuple[Role, ...]
) -> None:
    chooser = workers(*roles, attn_dp=attn_dp)
    holders = [Holder(f"w{number}", 1, rank) for number in range(len(roles)) for rank in range(attn_dp)]
    for holder in holders:
        chooser.table.book(holder, 3000, 5000)
    alone = choose(chooser)
    for holder in holders:
        chooser.table.wait(holder, 70_000, 70_000)
    crowded = choose(chooser)
    assert crowded.predict() == alone.predict()
    assert crowded.decode.cost > alone.decode.cost


@pytest.mark.parametrize("overhead_s", [0.001, 0.5])
@pytest.mark.parametrize("s_per_token", [1e-6, 1e-3])
@pytest.mark.parametrize("tokens", [(1000, 1000), (100, 30_000)])
def test_a_line_follows_any_other_and_one_stalled_request_does_not_bend_it(
    overhead_s: float, s_per_token: float, tokens: tuple[int, int]
) -> None:
    line, samples = Line(*PREFILL), np.random.default_rng(0).integers(tokens[0], tokens[1] + 1, 150)
    for sample in samples.tolist():
        line.observe(sample, overhead_s + s_per_token * sample)
    expected = overhead_s + s_per_token * samples.mean()
    assert line(samples.mean()) == pytest.approx(expected, rel=0.1)
    line.observe(samples.mean(), 1e6)
    assert line(samples.mean()) < 1.2 * expected
    assert line.s_per_token > 0
    line.observe(samples.mean(), float("nan"))
    assert line(samples.mean()) > 0


def test_a_slow_group_is_avoided_and_tried_again_later() -> None:
    speeds = Speeds()
    speeds.up("a", [0, 1])
    speeds.up("b", [2])
    columns = np.arange(3)
    for _ in range(30):
        speeds.prefilled(Role.PREFILL, "a", 1000, 0.1)
        speeds.prefilled(Role.PREFILL, "b", 1000, 0.4)
    slow = speeds.slowness(columns)
    assert not isinstance(slow, float)
    assert slow[0] == slow[1] < slow[2]
    for _ in range(3000):
        speeds.prefilled(Role.PREFILL, "a", 1000, 0.1)
    assert speeds.slowness(columns) == 1.0


def test_a_prompt_is_known_by_few_of_its_blocks_and_its_first_owner_answers_for_them() -> None:
    pending, hashes = PendingPrefixes(), list(range(1000, 1512))
    mine = pending.add(3, hashes, held_blocks=16)
    assert len(mine) < 80
    assert pending.add(3, hashes, held_blocks=16) == []
    theirs = pending.add(1, hashes[:20], held_blocks=0)
    assert pending.lookup(hashes, -1) == [(1 << 3, 512), (1 << 1, 20)]
    assert pending.lookup(hashes[:40], ~(1 << 1)) == [(1 << 3, 40)]
    assert pending.lookup([*hashes[:90], *[7] * 300], 1 << 3) == [(1 << 3, 80)]
    pending.remove(3, mine)
    assert pending.lookup(hashes, -1) == [(1 << 1, 20)]
    pending.remove(1, theirs)
    assert len(pending) == 0


STEPS = st.tuples(st.sampled_from("bbbptfdurlx"), st.integers(0, 3), st.integers(0, 9))


@settings(max_examples=100, deadline=None)
@given(st.booleans(), st.lists(STEPS, max_size=50))
def test_no_walk_of_requests_leaves_anything_booked(is_split: bool, steps: list[tuple[str, int, int]]) -> None:
    """b: book, p: prefill done, t: first token, f: finished or aborted, d: a worker dies (its requests are booked again
    elsewhere, as replays are), u: it is back, r: it reports, l: another ingress tells, x: its lease ends."""
    chooser = split(2, 2) if is_split else aggregated(4)
    roles = {facts.name: facts.role for facts, _ in chooser._workers.values()}
    epochs = Counter(dict.fromkeys(roles, 1))
    live: list[Booked] = []
    done: list[Booked] = []
    now_s = 0.0
    for step, which, number in steps:
        name, now_s = f"w{which}", now_s + 0.1
        holder = Holder(name, epochs[name], 0)
        up = Counter(facts.role for facts, _ in chooser._workers.values())
        can = up[Role.AGGREGATED] or (up[Role.PREFILL] and up[Role.DECODE])
        match step:
            case "b" if can:
                live.append(send(chooser, ask([which] * (number * 3 * SIZE + 1)), now_s)[1])
            case "p" if live:
                live[number % len(live)].prefill_done(now_s)
            case "t" if live:
                live[number % len(live)].first_token(now_s)
            case "f" if live:
                done.append(live.pop(number % len(live)))
                done[-1].free(now_s, generated_tokens=number * 5)
            case "d":
                chooser.down(name, epochs[name])
            case "u" if name not in chooser._workers:
                epochs[name] += 1
                chooser.up(WorkerFacts(name, epochs[name], roles[name], 1, SIZE, 1000))
            case "r":
                chooser.heard(holder, RankLoad(0, number, number % 3, number, 1000))
            case "l":
                chooser.table.peer(f"r{number % 2}", {holder: PeerBooked(number, number, number)})
            case "x":
                chooser.table.forget(f"r{number % 2}")
        assert (chooser.table.values >= 0).all()
    for booked in (*live, *done):
        booked.free(now_s)
        booked.first_token(now_s)
    for replica in ("r0", "r1"):
        chooser.table.forget(replica)
    for facts, _ in chooser._workers.values():
        chooser.heard(facts.holders[0], RankLoad(0, 0, 0, 0, 1000))
    if chooser._workers:
        chooser.pending.expire(now_s + EVENT_GRACE_S)
    assert chooser.table.num_bookings == 0
    assert not chooser.table.values.any()
    assert len(chooser.pending) == 0 or not chooser._workers
