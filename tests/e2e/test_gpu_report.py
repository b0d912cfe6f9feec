"""The GPU report on a double of SGLang: our stack around it, hand-off and DP ranks included, is the real one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
