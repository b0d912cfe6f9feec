"""SGLang on real GPUs through the whole stack, and what the stack costs: one run, one table.

python tests/gpu/report.py --out FOLDER [--sections aggregated,split,wide,ray,cost]
python tests/gpu/report.py --out FOLDER --pretend 2 --sections aggregated,split,wide

Needs one GPU (two for what its name says), for `cost` 16 cores, SGLang, and the tokenizer that `make models` makes.
Each section deploys with `dynamo_ray.up` on a Ray of its own and ends it again. FOLDER gets table.md, results.json and
the logs. `--pretend` shows on a machine without a GPU that the report itself works: Ray is told of that many, and
SGLang is its double.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model
import stacks
from cost import cost
from deployments import wait_until
from stacks import Report, Row, Stack, deployed, leave, loaded, num_gpus, prompt, role

GREEDY_TOKENS = 16
LENGTHS = (1, 63, 64, 65, 200, 512, 700, 1024)


def greedy_answers(stack: Stack) -> list[str]:
    return [stack.complete(prompt(length, 7), max_tokens=GREEDY_TOKENS)["choices"][0]["text"] for length in LENGTHS]


def cached(answer: dict[str, Any]) -> int:
    found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


# Sections


def aggregated(report: Report) -> None:
    """One GPU: an aggregated worker, and its answers as the reference for the split ones."""
    with deployed("aggregated", {"aggregated": role(0.5)}, ["0"], report) as stack:
        answers = greedy_answers(stack)
        (report.out / "aggregated.json").write_text(json.dumps(answers))
        distinct = len(set(answers))
        report.row(
            "1 GPU, aggregated", "greedy answers of 8 prompts, distinct", f"{distinct} of 8", ">= 6", distinct >= 6
        )
        ids = prompt(1024, 1)
        first, second = (stack.complete(ids, max_tokens=4) for _ in range(2))
        values = (cached(first), cached(second))
        report.row(
            "1 GPU, aggregated",
            "cached tokens of a 1,024-token prompt, first and again",
            f"{values[0]} and {values[1]}",
            "0 and >= 960",
            values[0] == 0 and values[1] >= 960,
        )
        wait_until(lambda: stack.metric("dynamo_ray_index_blocks") >= 16, 10, "the router's index has the blocks")
        blocks = stack.metric("dynamo_ray_index_blocks")
        report.row(
            "1 GPU, aggregated", "blocks in the router's index by KV events", f"{blocks:.0f}", ">= 16", blocks >= 16
        )
        leave(report, stack, "1 GPU, aggregated")


def split(report: Report) -> None:
    """Prefill and decode over NIXL: on one GPU, and where there are two, one each."""
    expected = json.loads((report.out / "aggregated.json").read_text())
    layouts = [("prefill and decode on one GPU", "0,0", 0.35)]
    if num_gpus() > 1 and not stacks.pretence.gpus:  # to a double a GPU is as good as another
        layouts.append(("prefill on GPU 0, decode on GPU 1", "0,1", 0.6))
    for title, visible, fraction in layouts:
        args = {"prefill": role(fraction, enable_request_time_stats_logging=True), "decode": role(fraction)}
        name = f"split-{visible.replace(',', '-')}"
        with deployed(name, args, [visible], report) as stack:
            first_s = _timed(lambda: stack.complete(prompt(1024, 50), max_tokens=1))
            later_s = statistics.median(
                _timed(lambda seed=seed: stack.complete(prompt(1024, seed), max_tokens=1)) for seed in range(51, 56)
            )
            before = stack.metric("dynamo_ray_transferred_tokens_total")
            answers = greedy_answers(stack)
            moved = stack.metric("dynamo_ray_transferred_tokens_total") - before
            same = sum(a == b for a, b in zip(answers, expected, strict=True))
            report.row(
                title, "greedy answers equal to aggregated", f"{same} of {len(expected)}", "all", same == len(expected)
            )
            report.row(title, "prompt tokens handed over", f"{moved:.0f}", f"{sum(LENGTHS)}", moved == sum(LENGTHS))
            again = [stack.complete(prompt(1024, 60), max_tokens=4) for _ in range(2)]
            report.row(
                title, "cached tokens at prefill, again", f"{cached(again[1])}", ">= 960", cached(again[1]) >= 960
            )
            report.row(title, "1,024-token prompt to the answer's end, first", f"{1000 * first_s:.0f} ms")
            report.row(title, "the same, later (median of 5)", f"{1000 * later_s:.0f} ms")
            leave(report, stack, title)
        prefilled, computed = _computed(report, name, "prefill"), _computed(report, name, "decode")
        if not stacks.pretence.gpus:  # a double writes no such log
            report.row(title, "prompt tokens computed by prefill, by its log", str(prefilled), "> 0", prefilled > 0)
            _transfer_rows(report, title, name)
        report.row(title, "prompt tokens computed by decode, by its log", str(computed), "0", computed == 0)


def wide(report: Report) -> None:
    """Two GPUs: DP attention and expert parallelism, aggregated and behind a prefill worker."""
    if num_gpus() < 2:
        report.say("wide: needs two GPUs")
        return
    title = "2 GPUs, aggregated DEP2"
    with deployed("wide", {"aggregated": role(0.6, wide=True)}, ["0,1"], report) as stack:
        hits, used = _second_turns(stack)
        report.row(title, "second turns that found their first turn's blocks", f"{hits} of 16", "16", hits == 16)
        report.row(title, "DP ranks that served them", str(used), "2", used == 2)
        leave(report, stack, title)
    title = "2 GPUs, prefill and decode DEP2"
    # Prefill takes memory of one of decode's two GPUs, which SGLang would refuse as an imbalance.
    unbalanced = {"env": {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "false"}}
    args = {"prefill": role(0.3), "decode": {**role(0.3, wide=True), **unbalanced}}
    with deployed("split-wide", args, ["0,1,0"], report) as stack:
        before = stack.metric("dynamo_ray_transferred_tokens_total")
        answers = greedy_answers(stack)
        moved = stack.metric("dynamo_ray_transferred_tokens_total") - before
        report.row(title, "answers over both decode ranks", f"{len(answers)} of 8", "8", len(answers) == 8)
        report.row(title, "prompt tokens handed over", f"{moved:.0f}", f"{sum(LENGTHS)}", moved == sum(LENGTHS))
        leave(report, stack, title)


def ray_launcher(report: Report) -> None:
    """Two GPUs: the same engine with its ranks as Ray actors."""
    if num_gpus() < 2:
        report.say("ray: needs two GPUs")
        return
    title = "2 GPUs, aggregated DEP2, launcher: ray"
    with deployed(
        "ray", {"aggregated": {**role(0.6, wide=True, disable_cuda_graph=True), "launcher": "ray"}}, ["0,1"], report
    ) as stack:
        hits, used = _second_turns(stack)
        report.row(title, "second turns that found their first turn's blocks", f"{hits} of 16", "16", hits == 16)
        report.row(title, "DP ranks that served them", str(used), "2", used == 2)
        leave(report, stack, title)


def _second_turns(stack: Stack) -> tuple[int, int]:
    """Of 16 conversations: how many second turns found the first's blocks, and how many ranks held blocks at once."""
    firsts = [prompt(640, 900 + number) for number in range(16)]
    for ids in firsts:
        stack.complete(ids, max_tokens=8)
    wait_until(lambda: stack.metric("dynamo_ray_index_blocks") >= 160, 20, "the index has every block")
    hits = sum(cached(stack.complete([*ids, *prompt(40, 5)], max_tokens=4)) >= 640 for ids in firsts)
    asyncio.run(loaded(stack.url, 32, 1, seed=77))
    used = sum(stack.metric("dynamo_ray_routed_legs", dp_rank=str(rank)) > 0 for rank in (0, 1))
    return hits, used


def _transfer_rows(report: Report, title: str, name: str) -> None:
    """What SGLang's prefill scheduler logs of its hand-offs (req_time_stats.py): those of 1,024 tokens, in order."""
    num_bytes = 1024 * model.KV_BYTES_PER_TOKEN
    report.row(title, "bytes of a 1,024-token hand-off, by the model's shape", f"{num_bytes:,}")
    told = re.findall(r"transfer_speed=([0-9.]+) GB/s, transfer_total=([0-9.]+) MB", _log_of(report, name, "prefill"))
    whole = [(float(speed), float(size)) for speed, size in told if float(size) * 2**20 > 0.99 * num_bytes]
    if not whole:
        report.row(title, "hand-offs in SGLang's log", "none", "some", False)
        return

    def words(speed_gb_s: float, size_mb: float) -> str:
        time_ms = 1000 * size_mb / 1024 / speed_gb_s if speed_gb_s else float("nan")
        return f"{size_mb:.2f} MiB in {time_ms:.1f} ms = {speed_gb_s:.2f} GiB/s"

    report.row(title, "the first, by SGLang's log", words(*whole[0]))
    later = sorted(whole[1:])
    if later:
        report.row(title, f"later ones (median of {len(later)})", words(*later[len(later) // 2]))


def _log_of(report: Report, name: str, role_name: str) -> str:
    """What the engine of that role wrote, through its actor's log."""
    logs = [log.read_text(errors="replace") for log in (report.out / "ray" / name).glob("worker-*")]
    return "\n".join(text for text in logs if f"disaggregation_mode='{role_name}'" in text)


def _computed(report: Report, name: str, role_name: str) -> int:
    """Prompt tokens in the log lines that a role's schedulers write of their prefill batches."""
    lines = [line for line in _log_of(report, name, role_name).splitlines() if "Prefill batch" in line]
    return sum(int(line.split("#new-token: ")[1].split(",")[0]) for line in lines if "#new-token: " in line)


def _timed(call: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


SECTIONS: dict[str, Callable[[Report], None]] = {
    "aggregated": aggregated,
    "split": split,
    "wide": wide,
    "ray": ray_launcher,
    "cost": cost,
}


def run(out: Path, sections: list[str]) -> list[Row]:
    """Run the sections; one that fails is a row, and the others go on."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # read when Ray is imported
    report = Report(out)
    model.make(out / "model")
    for name in sections:
        try:
            SECTIONS[name](report)
        except Exception as error:  # noqa: BLE001 - the others are worth having
            traceback.print_exc()
            report.row(name, "failed", f"{type(error).__name__}: {error}"[:600].replace("\n", " "), "", False)
    return report.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--pretend", type=int, default=0, metavar="GPUS")
    given = parser.parse_args()
    stacks.pretence = stacks.Pretence(given.pretend)
    rows = run(given.out, given.sections.split(","))
    print((given.out / "table.md").read_text())
    sys.exit(any(row.ok is False for row in rows))


if __name__ == "__main__":
    main()
