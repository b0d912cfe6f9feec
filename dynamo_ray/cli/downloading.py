"""`dynamo-ray download`: what is to come from where, and its errors with the option at fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from backends import model_folder
from dynamo_ray import models
from dynamo_ray.cli.checked import check_file
from dynamo_ray.errors import ConfigError, Problem, StartError
from dynamo_ray.models.download import GIB, download
from dynamo_ray.models.sources import Source, source


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model, and the folder it belongs in."""

    source: str
    folder: Path


def wanted(what: str, folder: Path | None, other: str | None) -> list[Wanted]:
    """A source into a folder, or every model of a `serve run` file into its `model.path`.

    Args:
        other: the source, in place of the file's `model.name`.

    Raises:
        ConfigError: The file is wrong, or the folder is missing or given twice.
    """
    if not what.endswith((".yaml", ".yml")):
        if folder is None:
            raise ConfigError((Problem("FOLDER", f"say where {what} is to be put"),))
        if other is not None:
            raise ConfigError((Problem("--from", "only beside a file; here the source is given already"),))
        return [Wanted(what, folder)]
    if folder is not None:
        raise ConfigError((Problem("FOLDER", f"{what} says it (model.path); leave it out"),))
    found = [
        Wanted(other or application.config.model.name, application.config.model.folder)
        for application in check_file(Path(what)).applications
        if models.key_of(application.config.model.folder) is None
    ]
    if not found:
        raise ConfigError((Problem(what, "its models are made here, not downloaded (`dynamo-ray model`)"),))
    return found


def run(one: Wanted, revision: str | None, exclude: Sequence[str], say: Callable[[str], None]) -> None:
    """Download it, then look at it as an engine's start would.

    Raises:
        ConfigError: It is no source.
        StartError: It cannot be had; says what to do.
    """
    try:
        where: Source = source(one.source, revision, exclude)
    except models.ModelError as error:
        raise ConfigError((Problem("SOURCE", str(error)),)) from error
    try:
        num_bytes = download(where, one.folder, say)
    except (models.ModelError, OSError) as error:
        raise StartError(str(error)) from error
    say(f"{one.folder}: {num_bytes / GIB:.2f} GiB of {where.name}, complete")
    lacks = model_folder.problem(one.folder)
    if lacks is not None:
        raise StartError(f"all that {where.name} has is there, but no engine could load it: {lacks}")
