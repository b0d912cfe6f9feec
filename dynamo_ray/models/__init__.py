"""Models that local configurations serve: made once from what is installed, without network, into a cache folder."""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

Progress = Callable[[str], None]

MANIFEST = "dynamo_ray_manifest.json"
"""Written last: the format and the size of every other file."""


class ModelError(Exception):
    """A model cannot be made here; the message names what is missing and the command that brings it."""


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One model this package can make. Its module has `build(folder: Path) -> None`."""

    title: str
    module: str
    version: int = 1
    """Raise when `build` would write other files; older folders are then rebuilt."""


KNOWN: dict[str, KnownModel] = {
    "smollm2-135m-instruct": KnownModel("SmolLM2-135M-Instruct, bf16", "dynamo_ray.models.smollm2"),
    "tiny-deepseek-v3": KnownModel("random DeepSeek-V3-shaped model, fp32", "dynamo_ray.models.tiny_deepseek"),
    "byte-tokenizer": KnownModel("one token a byte, for simulated engines", "dynamo_ray.models.byte_tokenizer"),
}


def folder(key: str) -> Path:
    """Where that model is, or will be; ModelError for an unknown key."""
    if key not in KNOWN:
        raise ModelError(f"unknown model {key!r}; there are {', '.join(KNOWN)}")
    return Path.home() / ".cache" / "dynamo-ray" / "models" / key


def key_of(path: Path) -> str | None:
    """The key whose folder that path is, so that a configured path can be prepared; None for any other path."""
    return next((key for key in KNOWN if folder(key) == path.expanduser()), None)


def prepare(key: str, progress: Progress = lambda line: None) -> Path:
    """Return that model's folder, complete; made first where it is missing, incomplete or of an older version.

    Instant when it is there. Processes that prepare the same model wait for the first of them. A folder appears
    under its final name only when all of it is written.

    Raises:
        ModelError: Unknown key, or a package it needs is not installed.
        OSError: The cache folder cannot be written.
    """
    target = folder(key)
    known = KNOWN[key]
    if is_complete(target, known.version):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        if is_complete(target, known.version):
            return target
        progress(f"making {known.title} in {target}")
        _build(known, target)
        progress(f"{known.title} is ready")
    return target


def is_complete(target: Path, version: int) -> bool:
    """Whether every file of the manifest is there in its full size, as this version writes it."""
    try:
        manifest = json.loads((target / MANIFEST).read_text())
        sizes = {name: (target / name).stat().st_size for name in manifest["file_bytes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(manifest.get("version") == version and sizes == manifest["file_bytes"])


def _build(known: KnownModel, target: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        try:
            import_module(known.module).build(scratch)
        except ModuleNotFoundError as error:
            raise ModelError(f"making {known.title} needs the package {error.name!r}; run `make setup`") from error
        sizes = {str(path.relative_to(scratch)): path.stat().st_size for path in scratch.rglob("*") if path.is_file()}
        (scratch / MANIFEST).write_text(json.dumps({"version": known.version, "file_bytes": sizes}, indent=1))
        scratch.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
