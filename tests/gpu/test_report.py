"""The whole report where there is a GPU; every row of it that has a target must hold."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import report
from stacks import Row, num_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(num_gpus() == 0, reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs SGLang"),
    pytest.mark.timeout(1500),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return report.run(tmp_path_factory.mktemp("gpu"), list(report.SECTIONS))


def test_every_row_with_a_target_holds(rows: list[Row]) -> None:
    assert [row for row in rows if row.ok is False] == []
    assert sum(row.ok is True for row in rows) >= 10
