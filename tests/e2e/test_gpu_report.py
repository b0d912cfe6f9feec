"""The GPU report on a double of SGLang: our stack around it, hand-off and DP ranks included, is the real one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from deployments import ROOT

pytestmark = pytest.mark.e2e


def test_workers_of_every_shape_and_both_launchers_pass_on_a_double(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests/gpu/report.py"),
            *("--out", str(tmp_path), "--pretend", "2", "--sections", "aggregated,split,ray"),
        ],
        capture_output=True,
        text=True,
        timeout=280,
    )
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row for row in rows if row["ok"] is False] == [], done.stdout[-4000:] + done.stderr[-4000:]
    assert done.returncode == 0, done.stderr[-4000:]
    assert {row["section"] for row in rows} == {
        "1 GPU, aggregated",
        "prefill and decode on one GPU",
        "2 GPUs, aggregated DEP2, launcher: ray",
    }


def test_two_peers_are_loaded_by_turns_on_each_other_s_cores_and_judged_by_two_turns_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests/gpu"))
    stacks, cost = (importlib.import_module(name) for name in ("stacks", "cost"))
    cores: dict[int, list[int]] = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, given: cores.update({thread: given}))
    ours, theirs = (
        cost.Peer(name, SimpleNamespace(pid=pid, threads=lambda pid=pid: [SimpleNamespace(id=pid + n) for n in (0, 1)]))
        for name, pid in (("ours", 10), ("theirs", 20))
    )
    seen = []

    def run(url: str, turn: int) -> float:
        seen.append((turn, url, cores[10], cores[20]))
        slower = 0.05 if {"ours": cores[10], "theirs": cores[20]}[url] == [2] else 0.0
        return 0.1 * turn + {"ours": 0.104, "theirs": 0.1}[url] + slower

    found = cost.Duel(ours, theirs).each(4, run)
    assert [url for _, url, *_ in seen] == ["theirs", "ours"] * 2 + ["ours", "theirs"] * 2
    assert [pinned for turn, url, *pinned in seen if url == "ours"] == [[[18], [2]], [[2], [18]]] * 2
    report = stacks.Report(tmp_path)
    cost._difference_row(report, "cost", "TTFT", found)
    assert [(row.ok, row.value) for row in report.rows] == [(False, "+4.00 ms (+4.0 to +4.0); medians 279.0 and 275.0")]
