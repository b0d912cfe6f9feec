"""Whether a folder holds a whole model; the sources and folders of a download."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from backends import model_folder
from dynamo_ray.cli import downloading
from dynamo_ray.errors import StartupError
from dynamo_ray.models import ModelError
from dynamo_ray.models.download import download
from dynamo_ray.models.sources import Digest, source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, as published."""
    import numpy as np

    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    for number in (1, 2):
        save_file({f"w{number}": np.ones((4, number))}, made / f"model-{number}.safetensors", {"format": "np"})
    index = {"weight_map": {"w1": "model-1.safetensors", "w2": "model-2.safetensors"}}
    (made / model_folder.INDEX).write_text(json.dumps(index))
    return made


def test_a_whole_model_has_no_problem(folder: Path) -> None:
    assert model_folder.problem(folder) is None
    (folder / model_folder.INDEX).unlink()
    assert model_folder.problem(folder) is None


def test_each_way_to_be_partial_is_told(folder: Path, tmp_path: Path) -> None:
    shard = folder / "model-2.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    assert f"{shard} has {len(whole) - 3} of {len(whole)} bytes" in str(model_folder.problem(folder))
    shard.write_bytes(whole[:20])
    assert "fewer than its header" in str(model_folder.problem(folder))
    shard.write_bytes(b"<html>not found</html>")
    assert "is no safetensors file" in str(model_folder.problem(folder))
    shard.unlink()
    assert "lacks 1 of 2 files of weights: model-2.safetensors" in str(model_folder.problem(folder))
    (folder / model_folder.INDEX).write_text("[]")
    assert "cannot be read" in str(model_folder.problem(folder))
    (folder / model_folder.INDEX).unlink()
    (folder / "model-1.safetensors").unlink()
    assert model_folder.problem(folder) == f"{folder} holds no weights"
    assert model_folder.problem(folder, weights=False) is None
    (folder / "config.json").unlink()
    assert "holds no config.json" in str(model_folder.problem(folder, weights=False))
    assert "there is no folder" in str(model_folder.problem(tmp_path / "none"))


def test_a_folder_is_copied_and_incomplete_until_then(folder: Path, tmp_path: Path) -> None:
    target, said = tmp_path / "copy", []
    num_bytes = download(source(str(folder)), target, said.append)
    assert num_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert model_folder.problem(target) is None
    assert any("no checksum at the source" in line for line in said)
    (target / model_folder.STATE_FOLDER / model_folder.INCOMPLETE).write_text("somewhere")
    assert "has not ended" in str(model_folder.problem(target))


@pytest.mark.parametrize(
    ("kind", "hexadecimal"),
    [
        ("sha256", "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"),
        ("md5", "5d41402abc4b2a76b9719d911017c592"),
        ("git-sha1", "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"),  # echo -n hello | git hash-object --stdin
    ],
)
def test_digests_are_those_of_the_usual_tools(kind: str, hexadecimal: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"hello")
    assert Digest(kind, hexadecimal).matches(tmp_path / "f")  # type: ignore[arg-type]
    (tmp_path / "f").write_bytes(b"hellO")
    assert not Digest(kind, hexadecimal).matches(tmp_path / "f")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "name", "a/b/c", "/x/", "org/"])
def test_what_is_no_source_is_refused(text: str) -> None:
    if text == "/x/":
        with pytest.raises(ModelError, match="there is no folder"):
            source(text).files()
    else:
        with pytest.raises(ModelError, match="is no source"):
            source(text)


@pytest.mark.parametrize(
    ("what", "folder", "other", "said"),
    [
        ("org/name", None, None, "FOLDER: say where org/name is to be put"),
        ("org/name", "/models/x", "s3://b", "--from"),
        ("configs/deepseek-r1-wideep.yaml", "/models/x", None, "says it"),
        ("configs/local-sim.yaml", None, None, "made here, not downloaded"),
    ],
)
def test_a_download_says_what_is_missing_or_too_much(
    what: str, folder: str | None, other: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(StartupError) as caught:
        downloading.wanted(what, Path(folder) if folder else None, other)
    assert said in str(caught.value)


def test_a_file_names_its_models_and_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    (one,) = downloading.wanted("configs/deepseek-r1-wideep.yaml", None, None)
    assert one == downloading.Wanted("deepseek-ai/DeepSeek-R1", Path("/models/DeepSeek-R1"))
    (one,) = downloading.wanted("configs/deepseek-r1-wideep.yaml", None, "s3://bucket/r1")
    assert one.source == "s3://bucket/r1"
