"""Which rank a request goes to, by each policy, and what becomes of a policy that is wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dynamo_ray
from backends.engine import Role
from backends.kv_events import BlockStored, KVEventBatch
from dynamo_ray.config import RouterConfig
from dynamo_ray.routing import policies
from dynamo_ray.routing.block_hash import chain_seed
from dynamo_ray.routing.chooser import Chooser, Pick, WorkerFacts
from dynamo_ray.routing.policy import Ask, Floats, Leg, Policy
from dynamo_ray.routing.ranks import Holder

SIZE = 16
PROMPT = list(range(10 * SIZE))


def workers(count: int = 3, attn_dp: int = 1, **options: Any) -> Chooser:
    """Aggregated workers w0, w1, ..."""
    chooser = Chooser("m", RouterConfig.model_validate(options))
    for number in range(count):
        chooser.up(WorkerFacts(f"w{number}", 1, Role.AGGREGATED, attn_dp, SIZE, 1000))
    return chooser


def store(chooser: Chooser, worker: str, blocks: int, prompt: list[int] = PROMPT, dp_rank: int = 0) -> None:
    tokens = prompt[: blocks * SIZE]
    stored = BlockStored(list(range(blocks)), None, tokens, SIZE)
    chooser.apply(Holder(worker, 1, dp_rank), KVEventBatch(0, dp_rank, [stored]))


def ask(prompt: list[int] = PROMPT, **options: Any) -> Ask:
    return Ask(prompt, chain_seed("m"), **options)


def every(chooser: Chooser) -> int:
    return (1 << chooser.ranks.num_columns) - 1


def chosen(chooser: Chooser, request: Ask | None = None) -> str:
    """Where it goes when it is also booked, and stays."""
    choice = chooser.choose(request or ask(), None, every(chooser), 0.0)
    chooser.book(choice, 0.0)
    return choice.decode.holder.worker


def load(chooser: Chooser, worker: str, queued_tokens: int, kv_tokens: int) -> None:
    chooser.table.book(Holder(worker, 1, 0), queued_tokens, kv_tokens)


def test_blocks_takes_the_prefix_when_all_are_idle_and_leaves_it_for_much_less_work() -> None:
    chooser = workers(policy="blocks")
    store(chooser, "w1", 8)
    load(chooser, "w1", 4 * SIZE, 3 * SIZE)
    assert chosen(chooser) == "w1"
    load(chooser, "w1", 20 * SIZE, 20 * SIZE)
    assert chosen(chooser) != "w1"


def test_blocks_costs_what_the_published_formula_says() -> None:
    chooser = workers(policy="blocks", overlap_score_credit=0.5, prefill_load_scale=2.0)
    store(chooser, "w1", 8)
    load(chooser, "w1", 4 * SIZE, 3 * SIZE)
    choice = chooser.choose(ask(), None, every(chooser), 0.0)
    assert choice.decode.costs.tolist() == [2 * 10 + 10, 2 * (4 + 10 - 0.5 * 8) + 3 + 10, 2 * 10 + 10]


def test_a_decode_leg_goes_where_least_is_held() -> None:
    chooser = Chooser("m", RouterConfig(policy="blocks"))
    for number, role in enumerate((Role.PREFILL, Role.DECODE, Role.DECODE)):
        chooser.up(WorkerFacts(f"w{number}", 1, role, 1, SIZE, 1000))
    load(chooser, "w1", 0, 5 * SIZE)
    load(chooser, "w2", 0, 3 * SIZE)
    store(chooser, "w1", 10)
    choice = chooser.choose(ask(), chooser.mask("w0"), chooser.mask("w1") | chooser.mask("w2"), 0.0)
    assert choice.prefill is not None
    assert (choice.prefill.holder.worker, choice.decode.holder.worker) == ("w0", "w2")
    assert choice.decode.costs.tolist() == [15.0, 13.0]
    booked = chooser.book(choice, 0.0)
    assert chooser.table.load(Holder("w0", 1, 0)).queued_tokens == len(PROMPT)
    assert chooser.table.load(Holder("w2", 1, 0)).queued_tokens == 0
    booked.free(1.0)
    assert chooser.table.num_bookings == 2


@pytest.mark.parametrize("policy", ["blocks", "round_robin"])
def test_equals_share_the_work(policy: str) -> None:
    chooser = workers(policy=policy)
    assert sorted(chosen(chooser) for _ in range(6)) == ["w0", "w0", "w1", "w1", "w2", "w2"]


@pytest.mark.parametrize("policy", ["blocks"])
def test_equals_share_the_work_of_requests_that_leave_at_once(policy: str) -> None:
    chooser = workers(policy=policy)
    taken = []
    for _ in range(6):
        choice = chooser.choose(ask(), None, every(chooser), 0.0)
        taken.append(choice.decode.holder.worker)
        chooser.book(choice, 0.0).free(0.0)
    assert sorted(taken) == ["w0", "w0", "w1", "w1", "w2", "w2"]


def test_round_robin_ignores_what_ranks_hold() -> None:
    chooser = workers(policy="round_robin")
    store(chooser, "w1", 9)
    assert [chosen(chooser) for _ in range(4)] == ["w0", "w1", "w2", "w0"]


def test_only_the_ranks_of_the_mask_are_candidates() -> None:
    chooser = workers(policy="blocks")
    store(chooser, "w1", 9)
    mask = chooser.mask("w0") | chooser.mask("w2")
    choice = chooser.choose(ask(), None, mask, 0.0)
    assert [holder.worker for holder in choice.decode.leg.holders] == ["w0", "w2"]
    with pytest.raises(ValueError, match="no known rank"):
        chooser.choose(ask(), None, 0, 0.0)


@pytest.mark.parametrize("count", [3, 40])
def test_overlaps_reach_the_right_candidates_few_or_many(count: int) -> None:
    chooser = workers(count, attn_dp=2, policy="blocks")
    held = {f"w{number}": number % 7 for number in range(count)}
    for worker, blocks in held.items():
        if blocks:
            store(chooser, worker, blocks, dp_rank=1)
    mask = every(chooser) & ~chooser.mask("w1")
    leg = chooser.choose(ask(), None, mask, 0.0).decode.leg
    assert [int(depth) for depth in leg.device_blocks] == [
        held[holder.worker] * holder.dp_rank for holder in leg.holders
    ]


def test_a_worker_that_is_up_again_with_other_ranks_has_those_and_no_others() -> None:
    chooser = workers(attn_dp=2, policy="blocks")
    chooser.up(WorkerFacts("w0", 2, Role.AGGREGATED, 3, SIZE, 7))
    busy = chooser.ranks.column(Holder("w0", 2, 1))
    assert busy is not None
    mask = (chooser.mask("w0") | chooser.mask("w2")) & ~(1 << busy)
    leg = chooser.choose(ask(), None, mask, 0.0).decode.leg
    assert leg.holders == (Holder("w0", 2, 0), Holder("w0", 2, 2), Holder("w2", 1, 0), Holder("w2", 1, 1))
    assert leg.pool.kv_total_tokens.tolist() == [7 * SIZE, 7 * SIZE, 1000 * SIZE, 1000 * SIZE]
    assert leg.pool.slowest(np.array([1.0, 4.0, 3.0, 2.0])).tolist() == [4.0, 4.0, 3.0, 3.0]
    assert [chooser.ranks.column(holder) for holder in leg.holders] == leg.pool.columns.tolist()


def test_a_worker_that_is_up_again_starts_with_nothing() -> None:
    chooser = workers(policy="blocks")
    store(chooser, "w1", 9)
    chooser.book(chooser.choose(ask(), None, chooser.mask("w1"), 0.0), 0.0)
    chooser.up(WorkerFacts("w1", 2, Role.AGGREGATED, 1, SIZE, 1000))
    chooser.down("w1", 1)
    picked = chooser.choose(ask(), None, chooser.mask("w1"), 0.0).decode
    assert picked.holder == Holder("w1", 2, 0)
    assert (picked.overlap_blocks, picked.leg.num_requests.tolist(), chooser.table.num_bookings) == (0, [0.0], 0)


def test_what_a_silent_rank_caches_is_guessed_from_what_was_sent_there() -> None:
    chooser = Chooser("m", RouterConfig(policy="blocks"))
    for number in range(2):
        chooser.up(WorkerFacts(f"w{number}", 1, Role.AGGREGATED, 1, SIZE, 1000, tells_events=False))
    first = chooser.choose(ask(), None, every(chooser), 0.0)
    chooser.book(first, 0.0).free(0.0)
    again = chooser.choose(ask(), None, every(chooser), 1.0).decode
    assert (again.holder, again.overlap_blocks) == (first.decode.holder, 10)
    chooser.flushed(again.holder.worker, 1)
    assert chooser.choose(ask(), None, every(chooser), 1.0).decode.overlap_blocks == 0


def fewest_kv_tokens(leg: Leg, weight: float = 1.0) -> Floats:
    return leg.kv_tokens * weight


NOT_A_POLICY = 3
NEVER_W0 = Policy(fewest_kv_tokens, filters=(lambda leg: np.array([h.worker != "w0" for h in leg.holders]),))


def test_a_user_s_policy_is_taken_by_import_path_with_its_arguments() -> None:
    here = f"{__name__}:fewest_kv_tokens"
    chooser = workers(policy=here, policy_args={"weight": -1.0})
    load(chooser, "w2", 0, 5)
    assert chosen(chooser) == "w2"
    assert workers(policy=f"{__name__}:NEVER_W0").choose(ask(), None, 1 << 1 | 1, 0.0).decode.holder.worker == "w1"


def test_a_user_s_policy_is_taken_by_the_name_it_was_registered_under(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "_REGISTERED", {})
    policies.register_policy("mine", fewest_kv_tokens)
    chooser = workers(policy="mine")
    load(chooser, "w0", 0, 5)
    assert chosen(chooser) != "w0"
    with pytest.raises(ValueError, match="is taken"):
        policies.register_policy("blocks", fewest_kv_tokens)


@pytest.mark.parametrize(
    ("policy", "arguments", "says"),
    [
        ("block", {}, "no policy is called 'block'; known: .*blocks"),
        ("no_such_module:policy", {}, "cannot be imported: ModuleNotFoundError"),
        (f"{__name__}:no_such_name", {}, "cannot be imported: AttributeError"),
        (f"{__name__}:NOT_A_POLICY", {}, "is a int; it must be a function of a Leg"),
        (f"{__name__}:fewest_kv_tokens", {"wieght": 2}, "cannot be called as policy.*wieght"),
        (f"{__name__}:NEVER_W0", {"weight": 2}, "takes none"),
        ("blocks", {"weight": 2}, "takes none"),
    ],
)
def test_a_policy_that_cannot_be_says_what_to_write(policy: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        workers(policy=policy, policy_args=arguments)


def fails(leg: Leg) -> Floats:
    raise KeyError("mine")


@pytest.mark.parametrize(
    ("name", "policy", "said"),
    [
        (None, fails, "None is no name; write register_policy"),
        ("p", 3, "p is a int; it must be a function of a Leg, or a Policy"),
        ("p", Policy(3), "p: score of the Policy is a int; it must be a function"),  # type: ignore[arg-type]
        ("p", Policy(fails, pick=None), "p: pick of the Policy is a NoneType"),  # type: ignore[arg-type]
        ("p", Policy(fails, filters=fails), "p: filters of the Policy must be a tuple"),  # type: ignore[arg-type]
    ],
)
def test_what_can_be_no_policy_is_refused_when_it_is_registered(name: Any, policy: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        policies.register_policy(name, policy)


@pytest.mark.parametrize(
    "wrong",
    [
        fails,
        lambda leg: None,
        lambda leg: 1.0,
        lambda leg: np.zeros(1),
        lambda leg: leg.num_requests + np.nan,
        lambda leg: leg.num_requests + np.inf,
        lambda leg: leg.num_requests - np.inf,
        Policy(lambda leg: leg.num_requests, pick=lambda leg, costs: 7),
        Policy(lambda leg: leg.num_requests, pick=lambda leg, costs: None),
        Policy(lambda leg: leg.num_requests, filters=(lambda leg: np.zeros(3, bool),)),
        Policy(lambda leg: leg.num_requests, filters=(lambda leg: np.zeros(2, bool),)),
    ],
)
def test_nonsense_of_a_policy_is_counted_and_the_request_goes_where_fewest_are(
    wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "_REGISTERED", {})
    policies.register_policy("wrong", wrong)
    chooser = workers(policy="wrong")
    load(chooser, "w0", 0, 0)
    load(chooser, "w2", 0, 0)
    picked: Pick = chooser.choose(ask(), None, every(chooser), 0.0).decode
    assert picked.holder.worker == "w1"
    assert chooser.num_policy_errors == 1
    assert chooser.policy_error


def test_a_session_stays_with_its_rank_and_only_the_lost_rank_s_sessions_move() -> None:
    chooser = workers(8, policy="session")
    names = [f"conversation {number}" for number in range(400)]
    before = {name: chosen(chooser, ask(session=name)) for name in names}
    assert {name: chosen(chooser, ask([1, 2, 3], session=name)) for name in names} == before
    counts = Counter(before.values())
    assert len(counts) == 8
    assert max(counts.values()) < 100
    chooser.down("w3", 1)
    mask = every(chooser)
    after = {name: chooser.choose(ask(session=name), None, mask, 0.0).decode.holder.worker for name in names}
    assert {name for name in names if after[name] != before[name]} == {n for n in names if before[n] == "w3"}
    assert len({after[name] for name in names if before[name] == "w3"}) > 3, "they spread"
    chooser.up(WorkerFacts("w3", 2, Role.AGGREGATED, 1, SIZE, 1000))
    assert {n: chooser.choose(ask(session=n), None, every(chooser), 0.0).decode.holder.worker for n in names} == before


def test_without_a_session_the_least_loaded_is_taken() -> None:
    for policy in ("session", "least_loaded"):
        chooser = workers(policy=policy)
        load(chooser, "w0", 0, 1)
        load(chooser, "w1", 0, 0)
        load(chooser, "w2", 0, 0)
        load(chooser, "w2", 0, 0)
        assert chosen(chooser) == "w1"


def test_random_is_even_and_the_same_again_for_the_same_seed() -> None:
    runs = [
        [chosen(workers_, None) for _ in range(300)]
        for workers_ in (workers(policy="random", seed=s) for s in (1, 1, 2))
    ]
    assert runs[0] == runs[1] != runs[2]
    assert min(Counter(runs[0]).values()) > 70


def test_a_temperature_draws_the_cheaper_more_often() -> None:
    chooser = workers(policy="blocks", router_temperature=0.5)
    store(chooser, "w1", 8)
    drawn = Counter()
    for _ in range(300):
        choice = chooser.choose(ask(), None, every(chooser), 0.0)
        chooser.book(choice, 0.0).free(0.0)
        drawn[choice.decode.holder.worker] += 1
    assert drawn["w1"] > drawn["w0"] > 0
    assert drawn["w2"] > 0


def test_host_and_disk_blocks_count_for_less_and_a_queue_takes_from_the_credit() -> None:
    leg = workers(policy="blocks").choose(ask(), None, 7, 0.0).decode.leg
    leg = replace(
        leg, device_blocks=np.array([2.0, 2, 0]), host_blocks=np.array([6.0, 2, 0]), disk_blocks=np.array([8.0, 2, 0])
    )
    costs = policies.blocks(leg)
    assert isinstance(costs, dict)
    assert costs["prefill_blocks"].tolist() == [10 - 2 - 0.75 * 4 - 0.25 * 2, 8, 10]
    leg.load[0, 1] = len(PROMPT)
    decayed = policies.blocks(leg, overlap_score_credit_decay=1.0)
    assert isinstance(decayed, dict)
    assert decayed["prefill_blocks"][1] == 20 - 2 / 2


def test_the_documented_ten_lines_are_a_policy() -> None:
    """docs/routing.md, "Write your own"."""
    text = (Path(__file__).parents[2] / "docs" / "routing.md").read_text()
    source = text.split("# my_policies.py\n")[1].split("```")[0]
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    chooser = workers(policy="round_robin")
    store(chooser, "w2", 5)
    load(chooser, "w1", 100, 0)
    leg = chooser.choose(ask(), None, every(chooser), 0.0).decode.leg
    leg = replace(leg, coming_blocks=np.array([0.0, 0, 5]))
    assert namespace["warm_or_idle"](leg, queue_weight=3.0).tolist() == [160, 160 + 300, 160 - 80]
    assert dynamo_ray.Policy is Policy
    assert dynamo_ray.register_policy is policies.register_policy
