"""What a user's mistakes and a bad machine look like: one message, the field and the fix, nothing left running."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from deployments import BIN, ROOT, free_port, http

SIM = ROOT / "configs/local-sim.yaml"


def run(*arguments: str, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "dynamo-ray"), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s
    )


def changed(tmp_path: Path, prefix: str = "/", name: str = "local-sim", **changes: object) -> str:
    """local-sim.yaml with dotted keys of its args replaced."""
    document = yaml.safe_load(SIM.read_text())
    document["applications"][0] |= {"route_prefix": prefix, "name": name}
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = document["applications"][0]["args"]
        for parent in parents:
            place = place[parent]
        place[last] = value
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


@pytest.fixture
def small(tmp_path: Path) -> str:
    """One worker of each role: what is tested is the start and the end of whatever there is."""
    return changed(tmp_path, prefill__replicas=1, decode__replicas=1)


def test_a_shipped_configuration_is_valid_and_listed() -> None:
    """One through the command; tests/unit/test_shipped_configs.py has all of them in one process."""
    done = run("validate", "configs/deepseek-r1-wideep.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 prefill, 1 decode" in done.stdout
    listed = run("recipes", "--json")
    assert "deepseek-r1-wideep" in [entry["name"] for entry in json.loads(listed.stdout)], listed.stderr


def test_a_plan_says_who_runs_where_whether_it_fits_and_draws_it(tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    command = ("plan", "configs/deepseek-r1-wideep.yaml", "--topology", "13x8xH100", "--kv-dtype", "fp8")
    done = run(*command, "--out", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    for said in (
        "prefill-0",
        "decode-0",
        "node-12",
        "EP72+32 fp8 fits H100: 27.5 GiB",
        "EP32+32 fp8 fits H100: 39.4 GiB",
    ):
        assert said in done.stdout
    assert picture.read_text().count('class="gpu"') == 104
    layout = json.loads(run(*command, "--json").stdout)
    assert sum(len(node["ranks"]) for worker in layout["workers"] for node in worker["nodes"]) == 104


def test_a_plan_that_cannot_be_exits_2_with_everything_in_its_way(tmp_path: Path) -> None:
    document = yaml.safe_load((ROOT / "configs/deepseek-r1-wideep.yaml").read_text())
    document["applications"][0]["args"]["decode"] = {"nodes": 3, "parallelism": {"attn_dp": 24, "moe_ep": 24}}
    file = tmp_path / "wide.yaml"
    file.write_text(yaml.safe_dump(document))
    done = run("plan", str(file), "--topology", "6x8xH100")
    assert done.returncode == 2
    assert "decode.parallelism" in done.stderr
    assert "moe_ep" in done.stderr
    assert "decode-0 needs 3 nodes" in done.stderr
    assert run("plan", str(SIM)).returncode == 2


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
    ("changes", "fields"),
    [
        (
            {
                "prefill__replicas": 0,
                "backend": "vlm",
                "decode__parallelism": {"attn_tp": 2, "attn_dp": 2, "moe_ep": 3},
            },
            ["prefill.replicas", "args.backend", "decode.parallelism"],
        ),
        ({"decode__engine_args": {"block_sise": 3}}, ["engine_args.block_sise"]),
    ],
    ids=["ours", "an engine's"],
)
def test_wrong_values_exit_2_and_name_each_field(tmp_path: Path, changes: dict[str, object], fields: list[str]) -> None:
    done = run("up", changed(tmp_path, **changes), "--port", str(free_port()))
    assert done.returncode == 2, done.stdout + done.stderr
    for field in fields:
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
    assert session_of(process) == [], output


def session_of(leader: subprocess.Popen[str]) -> list[psutil.Process]:
    """What still runs in that session."""
    return [process for process in psutil.process_iter() if _session(process) == leader.pid]


def _session(process: psutil.Process) -> int | None:
    try:
        state, _, _, session, *_ = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if state == "Z" else int(session)


def test_the_python_of_this_test_is_the_project_s_own() -> None:
    assert (BIN / "dynamo-ray").exists(), f"run by make test: {sys.executable} has no dynamo-ray beside it"


def await_line(process: subprocess.Popen[str], text: str) -> None:
    """Read on until it has said that."""
    assert process.stdout is not None
    said = ""
    while text not in said:
        line = process.stdout.readline()
        assert line, said
        said += line


@contextlib.contextmanager
def started(*arguments: str, until: str = " s: http://") -> Iterator[subprocess.Popen[str]]:
    """`dynamo-ray up` in its own session, as soon as it has said that (its URL, when it is ready); killed at the end if
    it still runs."""
    process = subprocess.Popen(
        [str(BIN / "dynamo-ray"), "up", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        await_line(process, until)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("step", ["starting Ray", "deploying", "starting its processes"])
def test_ctrl_c_at_any_step_of_the_start_is_no_traceback_and_leaves_nothing(small: str, step: str) -> None:
    with started(small, "--port", str(free_port()), until=step) as process:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert session_of(process) == [], output


def listens(process: subprocess.Popen[str]) -> set[int]:
    """The ports that its processes listen on."""
    found = [connection for one in session_of(process) for connection in one.net_connections("inet")]
    return {connection.laddr.port for connection in found if connection.status == psutil.CONN_LISTEN}


def test_two_at_once_share_no_port_and_sigterm_ends_all_of_one_in_order(small: str) -> None:
    with started(small, "--port", str(free_port())) as other, started(small, "--port", str(free_port())) as one:
        # Serve's proxies listen in a way that lets another's do so too; each would answer some of its requests.
        assert listens(one), "no process of it was found"
        assert not listens(one) & listens(other)
        one.terminate()
        output, _ = one.communicate(timeout=60)
        assert one.returncode == 0, output
        assert "nothing is left running" in output
        assert session_of(one) == [], output
        second_ctrl_c_ends_all_of_it_at_once(other)


def second_ctrl_c_ends_all_of_it_at_once(process: subprocess.Popen[str]) -> None:
    entries = json.loads(run("status", "--json").stdout)["deployments"]
    (mark,) = (entry["mark"] for entry in entries if entry["pid"] == process.pid)
    assert Path(mark).is_dir()
    process.send_signal(signal.SIGINT)
    await_line(process, "ending")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert not Path(mark).exists()
    assert session_of(process) == [], output


def test_what_a_killed_up_leaves_is_ended_by_the_next_command(small: str) -> None:
    port = free_port()
    with started(small, "--port", str(port), until="starting its processes") as process:
        process.kill()
        process.wait()
        assert "nothing runs" in run("down", "--port", str(port)).stdout
        assert session_of(process) == []


@pytest.fixture
def shared_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Somebody's Ray, by its address."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from dynamo_ray.cli import local_ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster()
    try:
        with local_ray.bare_nodes():
            cluster.add_node(num_cpus=2, include_dashboard=False)
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.filterwarnings("ignore")
def test_on_someone_s_ray_it_ends_no_application_but_its_own(shared_ray: str, tmp_path: Path) -> None:
    port = str(free_port())
    config = changed(tmp_path, prefix="/llm", prefill__replicas=1, decode__replicas=1)
    with started(config, "--address", shared_ray, "--port", port) as process:
        url = f"http://127.0.0.1:{port}/llm"
        assert http("GET", f"{url}/ready")[0] == 200
        for other in (changed(tmp_path, name="other"), config):  # which Serve would take in its place
            done = run("up", other, "--address", shared_ray)
            assert done.returncode == 3, done.stdout + done.stderr
            assert "local-sim" in done.stderr
        (found,) = json.loads(run("status", "--address", shared_ray, "--json").stdout)["deployments"]
        assert (found["url"], len(found["workers"])) == (url, 2)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    assert "nothing of ours runs there" in run("down", "--address", shared_ray).stdout


def test_on_a_ray_that_is_not_there_it_exits_3_and_says_so() -> None:
    done = run("status", "--address", f"127.0.0.1:{free_port()}")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "no Ray answers" in done.stderr
