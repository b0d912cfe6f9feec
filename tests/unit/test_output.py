"""What processes write is passed on, and the last of it kept."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.output import MAX_LINE_BYTES, NUM_KEPT, VARIABLE, OutputCapture, redirect_output


@pytest.fixture
def log(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def capture(log: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[OutputCapture]:
    made = OutputCapture(log)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()


def say(text: str, then_killed: bool = False) -> None:
    redirect_output()
    print(text)
    subprocess.run([sys.executable, "-c", "import sys; print('of its child', file=sys.stderr)"], check=True)
    if then_killed:
        print("last words")
        os.kill(os.getpid(), signal.SIGKILL)


def run(*args: object) -> None:
    process = multiprocessing.get_context("spawn").Process(target=say, args=args)
    process.start()
    process.join()


def logged(log: int) -> str:
    return os.pread(log, 1 << 22, 0).decode()


def test_what_a_process_and_its_children_write_is_kept_and_passed_on(capture: OutputCapture, log: int) -> None:
    run("hello")
    assert capture.last_lines() == ("hello", "of its child")
    assert logged(log) == "hello\nof its child\n"


def test_a_killed_process_leaves_its_last_words(capture: OutputCapture) -> None:
    run("hello", True)
    assert capture.last_lines(1) == ("last words",)


def test_only_the_newest_lines_are_kept_and_all_are_passed_on(capture: OutputCapture, log: int) -> None:
    count = 20 * NUM_KEPT
    run("\n".join(f"line {i} {'x' * 300}" for i in range(count)))
    lines = capture.last_lines()
    assert len(lines) == NUM_KEPT
    assert lines[-2].startswith(f"line {count - 1} ")
    assert logged(log).count("\n") == count + 1


def test_a_line_without_end_does_not_fill_memory(capture: OutputCapture) -> None:
    run("x" * (3 * MAX_LINE_BYTES * NUM_KEPT))
    lines = capture.last_lines()
    assert len(lines) <= NUM_KEPT
    assert max(len(line) for line in lines) <= MAX_LINE_BYTES


def test_colours_go_and_of_a_progress_bar_the_last_state_stays(capture: OutputCapture) -> None:
    run("\x1b[31mred\x1b[0m\n 10%\r 50%\r100%\r\n")
    assert capture.last_lines() == ("red", "100%", "of its child")


def test_lines_can_be_read_after_the_end(log: int, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = OutputCapture(log)
    folder = Path(capture.environment[VARIABLE]).parent
    monkeypatch.setenv(VARIABLE, capture.environment[VARIABLE])
    run("hello")
    capture.close()
    capture.close()
    assert capture.last_lines(2) == ("hello", "of its child")
    assert not folder.exists()


def test_without_a_reader_a_process_writes_where_it_did(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "nowhere", tmp_path / "pipe"):
        monkeypatch.setenv(VARIABLE, str(path))
        code = "from backends.output import redirect_output; redirect_output(); print('here')"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"here\n"
