"""What a user's mistakes and a bad machine look like: one message, the field and the fix, nothing left running."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from deployments import BIN, ROOT, free_port

SIM = ROOT / "configs/local-sim.yaml"


def run(*arguments: str, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "dynamo-ray"), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s
    )


def changed(tmp_path: Path, **changes: object) -> str:
    """local-sim.yaml with dotted keys of its args replaced."""
    document = yaml.safe_load(SIM.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = document["applications"][0]["args"]
        for parent in parents:
            place = place[parent]
        place[last] = value
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(config: Path) -> None:
    done = run("validate", str(config))
    assert done.returncode == 0, done.stdout + done.stderr


def test_unknown_keys_at_every_level_are_named_all_at_once(tmp_path: Path) -> None:
    text = SIM.read_text().replace("proxy_location:", "proxy_locaton:").replace("num_replicas:", "num_replcas:")
    text = text.replace("route_prefix:", "route_prefx:").replace("policy:", "polcy:")
    path = tmp_path / "typos.yaml"
    path.write_text(text)
    done = run("validate", str(path))
    output = done.stdout + done.stderr
    assert done.returncode == 2
    for typo, right in (
        ("proxy_locaton", "proxy_location"),
        ("num_replcas", "num_replicas"),
        ("route_prefx", "route_prefix"),
        ("polcy", "policy"),
    ):
        assert typo in output
        assert right in output
    assert "line" in output


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prefill__replicas": 0}, "prefill.replicas"),
        ({"backend": "vlm"}, "backend"),
        ({"decode__engine_args": {"block_sise": 3}}, "engine_args.block_sise"),
        ({"decode__parallelism": {"attn_tp": 2, "attn_dp": 2, "moe_ep": 3}}, "decode.parallelism"),
    ],
)
def test_wrong_values_exit_2_and_name_the_field(tmp_path: Path, changes: dict[str, object], field: str) -> None:
    done = run("up", changed(tmp_path, **changes), "--port", str(free_port()))
    assert done.returncode == 2, done.stdout + done.stderr
    assert field in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_missing_model_folder_exits_3_and_says_how_to_get_it(tmp_path: Path) -> None:
    done = run("up", changed(tmp_path, model__path=str(tmp_path / "nowhere")), "--port", str(free_port()))
    assert done.returncode == 3, done.stdout + done.stderr
    assert "model.path" in done.stdout + done.stderr


def test_too_little_memory_exits_3_before_anything_starts(tmp_path: Path) -> None:
    config = changed(tmp_path, decode__resources={"cpus": 0.1, "memory_gib": 100_000.0})
    done = run("up", config, "--port", str(free_port()))
    assert done.returncode == 3, done.stdout + done.stderr
    assert "memory" in done.stdout + done.stderr


def test_a_busy_port_exits_3_and_names_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("up", str(SIM), "--port", str(port))
    assert done.returncode == 3, done.stdout + done.stderr
    assert str(port) in done.stdout + done.stderr


def test_a_missing_file_exits_2() -> None:
    done = run("up", "configs/nothing.yaml")
    assert done.returncode == 2
    assert "nothing.yaml" in done.stdout + done.stderr


def test_failed_starts_leave_no_process_behind(tmp_path: Path) -> None:
    config = changed(tmp_path, decode__engine_args={"token_low": 10, "token_high": 5})
    process = subprocess.Popen(
        [str(BIN / "dynamo-ray"), "up", config, "--port", str(free_port())],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "token_high" in output
    session = [p for p in psutil.process_iter() if _session(p) == process.pid]
    assert session == []


def _session(process: psutil.Process) -> int:
    try:
        with open(f"/proc/{process.pid}/stat") as stat:
            return int(stat.read().rsplit(")", 1)[1].split()[3])
    except (OSError, psutil.Error):
        return -1


def test_the_python_of_this_test_is_the_project_s_own() -> None:
    assert (BIN / "dynamo-ray").exists(), f"run by make test: {sys.executable} has no dynamo-ray beside it"
