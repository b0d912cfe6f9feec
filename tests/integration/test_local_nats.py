"""The private server of `dynamo-ray up`: there, named, there again after it died, and gone."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil
import pytest
import yaml
from deployments import wait_until
from kv_ranks import MODEL, Engine, Index, until

from dynamo_ray.cli import local_nats, processes
from dynamo_ray.cli.checked import CheckedFile, check_file
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.events.nats.link import options
from dynamo_ray.events.nats.publisher import Publisher
from dynamo_ray.events.nats.server import PrivateServer
from dynamo_ray.events.nats.subscriber import NatsSubscriber
from dynamo_ray.routing.ranks import Holder

CONFIG = Path(__file__).parents[2] / "configs/local-sim.yaml"


@pytest.fixture
def checked(tmp_path: Path) -> CheckedFile:
    document = yaml.safe_load(CONFIG.read_text())
    document["applications"][0]["args"]["events"] = "nats"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(document))
    return check_file(file)


def test_a_private_server_is_named_in_the_file_its_token_is_not_and_it_ends_with_its_up(
    checked: CheckedFile, tmp_path: Path
) -> None:
    with local_nats.provided(checked, tmp_path, private=True) as provided:
        args = provided.checked.value["applications"][0]["args"]
        nats = DeploymentConfig.model_validate(args).nats_events
        assert nats == provided.checked.applications[0].config.nats_events
        assert nats is not None
        assert nats.urls[0].startswith("nats://127.0.0.1:")
        assert nats.token == "${DYNAMO_RAY_NATS_TOKEN}"
        token = options(nats)["token"]
        assert token == os.environ[local_nats.TOKEN_VARIABLE]
        (process,) = processes.started_by(str(tmp_path))  # so that `down` ends it, should `up` be killed
        assert token not in " ".join(process.cmdline())
    assert not psutil.pid_exists(process.pid)
    assert local_nats.TOKEN_VARIABLE not in os.environ


def servers(folder: Path, *before: psutil.Process) -> list[psutil.Process]:
    return [process for process in processes.started_by(str(folder)) if process not in before]


async def is_back(folder: Path, died: psutil.Process) -> None:
    await until(lambda: len(servers(folder, died)) == 1, 5.0)


async def test_a_server_that_is_killed_is_back_and_whole_while_its_up_runs(
    checked: CheckedFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rank = Holder("w", 1, 0)
    with local_nats.provided(checked, tmp_path, private=True) as provided:
        provided.keeper.keep()
        config = provided.checked.applications[0].config.nats_events
        assert config is not None
        engine, index = Engine(rank), Index([rank])
        publisher = Publisher(config, "kept", MODEL, rank.worker, rank.epoch, lambda: ())
        subscriber = NatsSubscriber(config, "kept", index)
        try:
            publisher.start([engine.source])
            subscriber.subscribe(rank.worker, rank.epoch, [engine.source])
            for again in range(2):
                engine.store(*range(100 * again, 100 * again + 50))
                await until(lambda: index.blocks(rank) == engine.truth.blocks(rank))
                (process,) = servers(tmp_path)
                process.kill()
                engine.store(*range(100 * again + 50, 100 * again + 100))
                assert index.blocks(rank) > set(range(100 * again))  # routing goes on by what is known
                await is_back(tmp_path, process)
                await until(lambda: index.blocks(rank) == engine.truth.blocks(rank), 5.0)
            assert subscriber.link.num_connections >= 3
        finally:
            await subscriber.close()
            await publisher.close()
            await engine.close()
    assert servers(tmp_path) == []
    assert caplog.text.count("the private nats-server died and was started again at nats://127.0.0.1:") == 2


def test_a_server_that_does_not_start_again_is_tried_and_said_once(
    checked: CheckedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local_nats, "LAST_PAUSE_S", 0.2)
    start, failures = PrivateServer.start, [OSError("no file is left")] * 3

    def start_at_last(server: PrivateServer) -> None:
        if failures:
            raise failures.pop()
        start(server)

    with local_nats.provided(checked, tmp_path, private=True) as provided:
        monkeypatch.setattr(PrivateServer, "start", start_at_last)
        provided.keeper.keep()
        (process,) = servers(tmp_path)
        process.kill()
        wait_until(lambda: len(servers(tmp_path, process)) == 1, 5, "it is back")
    assert caplog.text.count("tried again and again: no file is left") == 1


def test_once_let_go_a_server_that_dies_stays_dead(checked: CheckedFile, tmp_path: Path) -> None:
    threads = threading.active_count()
    with local_nats.provided(checked, tmp_path, private=True) as provided:
        provided.keeper.keep()
        provided.keeper.let_go()
        assert threading.active_count() == threads
        assert processes.end(str(tmp_path)) == 1
    assert servers(tmp_path) == []


def test_an_end_while_it_is_being_started_leaves_nothing(checked: CheckedFile, tmp_path: Path) -> None:
    with local_nats.provided(checked, tmp_path, private=True) as provided:
        provided.keeper.keep()
        (process,) = servers(tmp_path)
        process.kill()
        wait_until(lambda: servers(tmp_path, process), 5, "it is started", every_s=0.001)
    assert servers(tmp_path) == []
