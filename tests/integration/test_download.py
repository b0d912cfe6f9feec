"""`dynamo-ray download` as a process of its own: from a hub, an S3 bucket and a folder; killed, cut off, lied to."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from backends import model_folder

COMMIT = "1" * 40
TENSOR_BYTES = 16 * 2**20
TIMEOUT_S = 60.0


def safetensors(num_bytes: int) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    return len(header).to_bytes(8, "little") + header + os.urandom(num_bytes)


def a_model() -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "toy"}',
        "model.safetensors": safetensors(TENSOR_BYTES),
        "original/weights.bin": b"x" * 1000,
    }


@dataclass
class Hub:
    """As much of huggingface.co as huggingface_hub asks for."""

    url: str
    files: dict[str, bytes]
    slow: bool = False
    lies: set[str] = field(default_factory=set)
    """Files of which other bytes of the same size are sent."""
    ranges: list[str] = field(default_factory=list)
    """What parts were asked for, of large files."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/toy/tree/"):
            self._json([entry(name, content) for name, content in self.hub.files.items()])
        elif path.startswith("/api/models/org/toy"):
            siblings = [{"rfilename": name} for name in self.hub.files]
            self._json({"id": "org/toy", "_id": "1", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
        elif path.startswith(f"/org/toy/resolve/{COMMIT}/"):
            self._file(path.removeprefix(f"/org/toy/resolve/{COMMIT}/"))
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, name: str) -> None:
        content = self.hub.files[name]
        if name in self.hub.lies:
            content = b"?" * len(content)
        asked = self.headers.get("Range", "")
        offset = int(asked.removeprefix("bytes=").rstrip("-") or 0) if asked else 0
        if self.command == "GET" and len(content) > 2**20:
            self.hub.ranges.append(asked)
        self.send_response(206 if offset else 200)
        self.send_header("ETag", f'"{hashlib.sha256(self.hub.files[name]).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - offset))
        if offset:
            self.send_header("Content-Range", f"bytes {offset}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self._send(content[offset:])

    def _send(self, body: bytes) -> None:
        if self.hub.slow and len(body) > 2**20:
            for start in range(0, len(body), 2**20):
                self.wfile.write(body[start : start + 2**20])
                self.wfile.flush()
                time.sleep(0.2)  # a slow line: the client is killed meanwhile
        else:
            self.wfile.write(body)


def entry(name: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob}
    if len(content) > 2**20:
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return found


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of a client that was killed
    made = Hub(f"http://127.0.0.1:{server.server_port}", a_model())
    Handler.hub = made
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dynamo_ray", "download", *arguments],
        env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    process = start(*arguments, **environment)
    try:
        _, said = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    return process.returncode, said


def test_from_a_hub_it_goes_on_where_a_killed_one_stopped(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    hub.slow = True
    process = start("org/toy", str(folder), "--exclude", "original/*", HF_ENDPOINT=hub.url)
    deadline_s = time.monotonic() + TIMEOUT_S
    while not any(path.stat().st_size > 2**19 for path in folder.rglob("*.part")):
        assert time.monotonic() < deadline_s, "no part of the weights arrived"
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert "has not ended" in str(model_folder.problem(folder))
    part = (folder / "model.safetensors.part").stat().st_size
    hub.slow = False
    code, said = run("org/toy", str(folder), "--exclude", "original/*", HF_ENDPOINT=hub.url)
    assert code == 0, said
    assert hub.ranges[-1] == f"bytes={part}-", "the second run asked for the rest only"
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert not (folder / "original").exists()
    assert model_folder.problem(folder) is None


def test_what_the_hub_does_not_have_and_what_it_falsifies_is_an_error(hub: Hub, tmp_path: Path) -> None:
    code, said = run("org/none", str(tmp_path / "none"), HF_ENDPOINT=hub.url)
    assert code != 0
    assert "the hub has no model org/none" in said
    code, said = run("org/toy", str(tmp_path / "toy"), HF_ENDPOINT="http://127.0.0.1:1")
    assert code == 4, said
    assert said.startswith("org/toy: the hub did not answer")
    hub.lies = {"model.safetensors"}
    code, said = run("org/toy", str(tmp_path / "toy"), HF_ENDPOINT=hub.url)
    assert code != 0
    assert "model.safetensors: other content than org/toy promises" in said
    assert "has not ended" in str(model_folder.problem(tmp_path / "toy"))


def test_from_s3_it_resumes_verifies_and_brings_only_what_changed(tmp_path: Path) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        environment = {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        client = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="a",
            aws_secret_access_key="b",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="models")
        files = a_model()
        for name, content in files.items():
            client.put_object(Bucket="models", Key=f"toy/{name}", Body=content)
        folder = tmp_path / "toy"
        folder.mkdir()
        (folder / "model.safetensors.part").write_bytes(files["model.safetensors"][:1_000_000])
        code, said = run("s3://models/toy", str(folder), **environment)
        assert code == 0, said
        assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
        before = (folder / "model.safetensors").stat().st_mtime_ns
        client.put_object(Bucket="models", Key="toy/config.json", Body=b'{"model_type": "new"}')
        code, said = run("s3://models/toy", str(folder), **environment)
        assert code == 0, said
        assert "verifying 1 files" in said
        assert (folder / "config.json").read_bytes() == b'{"model_type": "new"}'
        assert (folder / "model.safetensors").stat().st_mtime_ns == before
        code, said = run("s3://nowhere/toy", str(folder), **environment)
        assert code != 0
        assert "s3://nowhere/toy" in said
    finally:
        server.stop()
