"""A checked file: where its applications will be, and whether anybody can reach them; and a checked command line."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dynamo_ray import secrets, up
from dynamo_ray.cli.checked import CheckedFile, check_file, check_reachable, check_secrets
from dynamo_ray.cli.commands import app
from dynamo_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
WIDEEP, LOCAL_SIM = "configs/deepseek-r1-wideep.yaml", "configs/local-sim.yaml"
FILE = """\
PROXY
applications:
  - name: a
    route_prefix: PREFIX
    import_path: dynamo_ray.app:build
    args: {model: {name: m, path: /m}, backend: simulated, aggregated: {}, limits: {drain_timeout_s: 90}}
"""


def checked(tmp_path: Path, prefix: str = "/", proxy: str = "") -> CheckedFile:
    file = tmp_path / "config.yaml"
    file.write_text(FILE.replace("PREFIX", prefix).replace("PROXY", proxy))
    return check_file(file)


def test_a_secret_that_is_not_where_the_file_says_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = checked(tmp_path)
    monkeypatch.setenv("API_KEY", "k1")
    (tmp_path / "key").write_text("k2\n")
    keys = ("${API_KEY}", f"${{file:{tmp_path / 'key'}}}", "${NO_KEY}", "${file:/nowhere}")
    assert secrets.read_each("api_keys", keys[:2]) == ("k1", "k2")
    config = made.applications[0].config.model_copy(update={"api_keys": keys})
    with pytest.raises(ConfigError) as refused:
        check_secrets(replace(made, applications=(replace(made.applications[0], config=config),)))
    assert str(refused.value).splitlines() == [
        "applications[0].args.api_keys[2]: the environment variable NO_KEY is not set; set it on every node before Ray "
        "starts",
        "applications[0].args.api_keys[3]: there is no readable file /nowhere on this node",
    ]


@pytest.mark.parametrize(("prefix", "url"), [("/", "http://h:1"), ("/llm", "http://h:1/llm")])
def test_an_application_is_under_its_prefix(tmp_path: Path, prefix: str, url: str) -> None:
    made = checked(tmp_path, prefix)
    check_reachable(made)
    assert made.urls("http://h:1") == (url,)
    assert made.drain_timeout_s == 90.0


@pytest.mark.parametrize(
    ("prefix", "proxy", "field"),
    [("null", "", "applications[0].route_prefix"), ("/", "proxy_location: Disabled", "proxy_location")],
)
def test_what_nobody_could_reach_is_refused(tmp_path: Path, prefix: str, proxy: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_reachable(checked(tmp_path, prefix, proxy))
    assert [problem.field for problem in caught.value.problems] == [field]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"plan {WIDEEP} --topology 13x8", "--topology: '13x8': there is no such file"),
        (f"plan {WIDEEP} --topology 13x8xH100 --model-config /nowhere.json", "--model-config: /nowhere.json: "),
        (f"flags {WIDEEP} --topology 13x8", "--topology: '13x8': there is no such file"),
        (f"manifest {WIDEEP} --image i --anonymous --topology 13x8", "--topology: '13x8': there is no such file"),
        (f"manifest {WIDEEP} --image '' --anonymous", "--image: '' is no image"),
        ("bench --url 127.0.0.1:8000 --model m", "--url: '127.0.0.1:8000' is no URL"),
        ("bench --url http://127.0.0.1:99999 --model m", "write http://host:port"),
        (f"route {LOCAL_SIM} --prompt p --url localhost:8000", "--url: 'localhost:8000' is no URL"),
        (f"simulate {LOCAL_SIM} --workload agents --policy latencyy", "--policy: no policy is called 'latencyy'"),
        (f"simulate {LOCAL_SIM} --workload agents --rank step_s", "--rank: step_s: '' is no number"),
        (f"simulate {LOCAL_SIM} --workload agents --rank block_size=1.5", "--rank: block_size: '1.5' is no whole"),
        (f"simulate {LOCAL_SIM} --workload documents --rank kv_total_blocks=1", "--rank: none of the trace's "),
        (f"plan {WIDEEP} --topology ''", "--topology: '': there is no such file"),
        (f"up {WIDEEP} --topology 13x8xH100", "--topology: is of faked nodes only"),
        ("download org/name", "FOLDER: say where org/name is to be put"),
        ("download name /nowhere", "SOURCE: 'name' is no source"),
        ("validate configs/catalog.yaml", "has no key of a `serve run` file"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_names_the_argument(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    run = CliRunner().invoke(app, shlex.split(words))
    assert isinstance(run.exception, ConfigError), run.output
    assert said in str(run.exception)


def test_a_wrong_argument_of_up_is_named_before_anything_is_started() -> None:
    with pytest.raises(ConfigError, match="config: is a dict; give a file's path, or what `load_config` returns"):
        up({"model": "m"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="port: 70000 is no port; write 1 to 65535"):
        up(ROOT / LOCAL_SIM, port=70_000)


def test_faked_nodes_are_for_a_private_ray_and_only_they_have_a_topology() -> None:
    with pytest.raises(ConfigError, match=r"^topology: is of faked nodes only"):
        up(ROOT / WIDEEP, topology="13x8xH100")
    with pytest.raises(ConfigError, match=r"^address: a fake cluster is a private one"):
        up(ROOT / WIDEEP, fake_nodes=True, address="127.0.0.1:6379")


def test_one_who_needs_a_key_reads_the_first_wherever_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRST_KEY", "one")
    monkeypatch.delenv("SECOND_KEY", raising=False)
    assert secrets.read_first("api_keys", ("${FIRST_KEY}", "${SECOND_KEY}")) == "one"
    assert secrets.read_first("api_keys", ()) is None
    with pytest.raises(ConfigError, match=r"api_keys\[0\].*SECOND_KEY is not set"):
        secrets.read_first("api_keys", ("${SECOND_KEY}",))
