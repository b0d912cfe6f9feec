"""A model's files in a folder: resumed where an earlier run ended, verified, and by one process at a time."""

from __future__ import annotations

import fcntl
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from backends.model_folder import INCOMPLETE, STATE_FOLDER
from dynamo_ray.models import ModelError
from dynamo_ray.models.sources import RemoteFile, Source

VERIFIED = "verified.json"
LOCK = "lock"
NUM_HASHING = 4
PROGRESS_S = 5.0
GIB = 2**30

Progress = Callable[[str], None]


def download(source: Source, folder: Path, progress: Progress) -> int:
    """Bring all of the source's files into the folder; how many bytes that is.

    Returns when each has its size and, where the source tells one, its digest. Run again, it brings only what is
    missing or has changed. Until then the folder is marked as incomplete (`backends.model_folder`).

    Raises:
        ModelError: It cannot be had, does not fit, or is not what the source promises; says what to do.
    """
    state = folder / STATE_FOLDER
    state.mkdir(parents=True, exist_ok=True)
    with _alone(state / LOCK, progress):
        files = source.files()
        (state / INCOMPLETE).write_text(source.name)
        missing = [file for file in files if _size(folder / file.path) != file.size]
        _bring(source, missing, files, folder, progress)
        wrong = _verify(files, folder, progress)
        if wrong:
            progress(f"{len(wrong)} files are not what {source.name} promises, and come again")
            _bring(source, wrong, files, folder, progress)
            wrong = _verify(files, folder, progress)
        if wrong:
            names = ", ".join(file.path for file in wrong[:3])
            raise ModelError(f"{names}: other content than {source.name} promises, twice; is its storage in order?")
        (state / INCOMPLETE).unlink()
    return sum(file.size for file in files)


def _bring(
    source: Source, wanted: Sequence[RemoteFile], files: Sequence[RemoteFile], folder: Path, progress: Progress
) -> None:
    if not wanted:
        return
    needed, free = sum(file.size for file in wanted), shutil.disk_usage(folder).free
    already = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".json")
    if needed - already > free:
        raise ModelError(f"{folder} has {free / GIB:.1f} GiB free; {needed / GIB:.1f} GiB are to come")
    for file in wanted:
        (folder / file.path).unlink(missing_ok=True)
    with _shown(folder, sum(file.size for file in files), progress):
        source.fetch(wanted, folder)


def _verify(files: Sequence[RemoteFile], folder: Path, progress: Progress) -> list[RemoteFile]:
    """Those whose size or digest is another; what was right before, and has not been touched, is not read again."""
    ledger = folder / STATE_FOLDER / VERIFIED
    known = _read(ledger)
    wrong = [file for file in files if _size(folder / file.path) != file.size]
    unread = [file for file in files if file not in wrong and known.get(file.path) != _mark(file, folder)]
    promised = [file for file in unread if file.digest is not None]
    if promised:
        progress(f"verifying {len(promised)} files, {sum(file.size for file in promised) / GIB:.1f} GiB")
    if len(unread) > len(promised):
        progress(f"{len(unread) - len(promised)} files have no checksum at the source: only their sizes are compared")
    with ThreadPoolExecutor(NUM_HASHING) as pool:
        right = list(pool.map(lambda file: file.digest is None or file.digest.matches(folder / file.path), unread))
    wrong += [file for file, is_right in zip(unread, right, strict=True) if not is_right]
    ledger.write_text(json.dumps({file.path: _mark(file, folder) for file in files if file not in wrong}, indent=1))
    return wrong


def _mark(file: RemoteFile, folder: Path) -> str:
    """Another one as soon as the file on disk or the promise has changed."""
    digest = "" if file.digest is None else file.digest.hexadecimal
    return f"{file.size} {digest} {(folder / file.path).stat().st_mtime_ns}"


def _read(ledger: Path) -> dict[str, str]:
    try:
        return dict(json.loads(ledger.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


@contextmanager
def _alone(lock: Path, progress: Progress) -> Iterator[None]:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            progress("another process downloads into this folder; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _shown(folder: Path, total: int, progress: Progress) -> Iterator[None]:
    """A line every few seconds of how much of it is on disk."""
    done = threading.Event()
    first, began_s = _on_disk(folder), time.monotonic()

    def show() -> None:
        while not done.wait(PROGRESS_S):
            found = _on_disk(folder)
            speed = (found - first) / (time.monotonic() - began_s)
            progress(
                f"{found / GIB:.1f} of {total / GIB:.1f} GiB ({found / max(1, total):.1%}), {speed / 2**20:.0f} MiB/s"
            )

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _on_disk(folder: Path) -> int:
    return sum(size for path in folder.rglob("*") if (size := _size(path)) is not None and path.is_file())
