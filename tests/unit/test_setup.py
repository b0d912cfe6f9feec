"""What `make` does before there is anything to run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def executable(file: Path, script: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def make_venv(python: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(ROOT / ".ci/make-venv"), python, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_an_environment_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    python = executable(tmp_path / "venv/bin/python", "exit 1")  # as an interrupted venv leaves it: without pip
    done = make_venv(sys.executable, tmp_path / "venv")
    assert done.returncode == 0, done.stderr
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def test_a_failed_environment_leaves_no_folder_and_names_the_package(tmp_path: Path) -> None:
    """As Debian's python3 without python3-venv: a folder with a Python and no pip."""
    without_ensurepip = executable(
        tmp_path / "python", '[ "$1" = -c ] && echo 3.11 && exit; mkdir -p "$3/bin"; touch "$3/bin/python"; exit 1'
    )
    done = make_venv(str(without_ensurepip), tmp_path / "venv")
    assert done.returncode == 1
    assert "apt-get install python3-venv" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_the_time_to_the_first_token_counts_from_make_s_own_start() -> None:
    done = subprocess.run(["make", "-n", "run"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert re.search(r"--first-token --started-at \d{10}", done.stdout), done.stdout + done.stderr
