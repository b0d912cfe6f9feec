from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dynamo_ray import models
from dynamo_ray.models import KNOWN, KnownModel, ModelError, folder, key_of, prepare


class Builder(ModuleType):
    """A model's module that counts its builds."""

    builds = 0
    fails = False

    def build(self, target: Path) -> None:
        self.builds += 1
        (target / "config.json").write_text("{}")
        if self.fails:
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        (target / "weights").write_bytes(b"12345")


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    made = Builder("a_models_module")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setitem(KNOWN, "toy", KnownModel("a toy", made.__name__))
    monkeypatch.setenv("HOME", str(tmp_path))
    return made


def test_a_model_is_made_once(builder: Builder) -> None:
    lines: list[str] = []
    target = prepare("toy", lines.append)
    assert target == folder("toy")
    assert (target / "weights").read_bytes() == b"12345"
    assert len(lines) == 2
    assert prepare("toy", lines.append) == target
    assert (builder.builds, len(lines)) == (1, 2)


def test_a_damaged_model_is_made_again(builder: Builder) -> None:
    target = prepare("toy")
    (target / "weights").write_bytes(b"123")
    prepare("toy")
    assert (target / "weights").read_bytes() == b"12345"
    (target / models.MANIFEST).write_text("{")
    prepare("toy")
    (target / "config.json").unlink()
    prepare("toy")
    assert builder.builds == 4


def test_a_model_of_an_older_version_is_made_again(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("toy")
    monkeypatch.setitem(KNOWN, "toy", KnownModel("a toy", builder.__name__, version=2))
    target = prepare("toy")
    assert builder.builds == 2
    assert json.loads((target / models.MANIFEST).read_text())["version"] == 2


def test_a_missing_package_names_the_command_that_brings_it_and_leaves_nothing(builder: Builder) -> None:
    builder.fails = True
    with pytest.raises(ModelError, match=r"'torch'.*make setup"):
        prepare("toy")
    assert not folder("toy").exists()
    assert [path.name for path in folder("toy").parent.iterdir()] == ["toy.lock"]


def test_an_unknown_model_is_refused_with_those_there_are() -> None:
    with pytest.raises(ModelError, match="smollm2-135m-instruct"):
        prepare("smollm3")


def test_a_path_leads_back_to_its_key() -> None:
    assert key_of(Path("~/.cache/dynamo-ray/models/byte-tokenizer")) == "byte-tokenizer"
    assert key_of(Path("/models/other")) is None
