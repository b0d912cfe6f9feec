"""What Ray put behind everything else computes at the usual priority again, or says what to set."""

from __future__ import annotations

import os
import subprocess
import sys
from textwrap import dedent

import pytest

LOWERED = """
    import logging, os, subprocess, sys, threading
    import psutil
    from dynamo_ray.priority import restore_priority

    logging.basicConfig(format="%(message)s")
    os.setpriority(os.PRIO_PROCESS, 0, 7)
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    {before}
    restore_priority()
    print(sorted(os.getpriority(os.PRIO_PROCESS, thread.id) for thread in psutil.Process().threads()))
    print(subprocess.run(["nice"], capture_output=True, text=True).stdout.strip())
"""


def _run(before: str = "") -> subprocess.CompletedProcess[str]:
    code = dedent(LOWERED).format(before=before)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may raise a priority")
def test_every_thread_and_what_starts_later_is_at_the_usual_priority() -> None:
    done = _run()
    assert done.stdout.splitlines() == ["[0, 0]", "0"]
    assert done.stderr == ""


def test_where_it_may_not_a_warning_says_what_to_set() -> None:
    done = _run("os.geteuid() or os.setresuid(65534, 65534, 65534)")
    assert done.stdout.splitlines() == ["[7, 7]", "7"]
    assert done.stderr == "this process runs behind all others (nice 7): start Ray with RAY_worker_niceness=0\n"


def test_at_the_usual_priority_nothing_is_said_or_done() -> None:
    code = "from dynamo_ray.priority import restore_priority; restore_priority()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
