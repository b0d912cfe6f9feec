"""Where a model's files come from: a Hugging Face hub, an S3 bucket, or a folder. Network and disk are here."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, Protocol

from dynamo_ray.models import ModelError

CHUNK_BYTES = 2**20
PART = ".part"
"""Ends the name of a file that is on its way."""
NUM_AT_ONCE = 8
TIMEOUT_S = 60.0
"""Without a byte."""
S3_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Digest:
    """What a file's content must hash to."""

    kind: Literal["sha256", "git-sha1", "md5"]
    """`git-sha1`: of a Git blob, which the hub gives for files that are not in its large-file storage."""
    hexadecimal: str

    def matches(self, path: Path) -> bool:
        """Read the whole file; whether it is what was promised."""
        hashing = hashlib.new(self.kind.removeprefix("git-"), usedforsecurity=False)
        if self.kind == "git-sha1":
            hashing.update(b"blob %d\0" % path.stat().st_size)
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                hashing.update(chunk)
        return hashing.hexdigest() == self.hexadecimal


@dataclass(frozen=True, slots=True)
class RemoteFile:
    path: str
    """Relative, with slashes."""
    size: int
    digest: Digest | None
    """None where the source tells none: then only the size is checked."""


FromOffset = Callable[[RemoteFile, int], Iterator[bytes]]
"""A file's bytes from there on."""


class Source(Protocol):
    """Where a model is. Both methods raise ModelError, with what to do about it."""

    @property
    def name(self) -> str: ...

    def files(self) -> list[RemoteFile]:
        """All of its files, as they are now."""
        ...

    def fetch(self, files: Sequence[RemoteFile], folder: Path) -> None:
        """Put these into the folder, each under its name only when it is whole; what an earlier one left is used."""
        ...


def source(text: str, revision: str | None = None, exclude: Sequence[str] = ()) -> Source:
    """`org/name` on the hub, `s3://bucket/prefix`, or an existing folder.

    Args:
        exclude: patterns of paths to leave out, as in a shell; * also matches slashes.

    Raises:
        ModelError: It is none of them.
    """
    if text.startswith("s3://"):
        found: Source = S3(text)
    elif text.startswith(("/", "./", "../", "~")):
        found = Folder(Path(text).expanduser())
    elif text.count("/") == 1 and all(text.split("/")):
        found = Hub(text, revision)
    else:
        raise ModelError(
            f"{text!r} is no source: write org/name (Hugging Face), s3://bucket/prefix, or a folder with a /"
        )
    if revision is not None and not isinstance(found, Hub):
        raise ModelError(f"{text} has no revisions; leave --revision out")
    return _Without(found, exclude, found.name)


@dataclass(frozen=True, slots=True)
class _Without:
    """A source without the files that match a pattern."""

    whole: Source
    exclude: Sequence[str]
    name: str

    def files(self) -> list[RemoteFile]:
        return [file for file in self.whole.files() if not any(fnmatch(file.path, pattern) for pattern in self.exclude)]

    def fetch(self, files: Sequence[RemoteFile], folder: Path) -> None:
        self.whole.fetch(files, folder)


class Hub:
    """A repository on huggingface.co or, with HF_ENDPOINT, on a mirror; HF_TOKEN where it asks for one."""

    def __init__(self, repository: str, revision: str | None) -> None:
        self.name = repository if revision is None else f"{repository}@{revision}"
        self._repository, self._revision = repository, revision
        self._commit: str | None = None

    def files(self) -> list[RemoteFile]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with _hub_errors(self.name):
            api = HfApi()
            self._commit = api.model_info(self._repository, revision=self._revision).sha
            tree = api.list_repo_tree(self._repository, recursive=True, revision=self._commit)
            return [
                RemoteFile(
                    entry.path,
                    entry.size,
                    Digest("sha256", entry.lfs.sha256) if entry.lfs else Digest("git-sha1", entry.blob_id),
                )
                for entry in tree
                if isinstance(entry, RepoFile)
            ]

    def fetch(self, files: Sequence[RemoteFile], folder: Path) -> None:
        # Not the library's own download: since 2.0 it begins a file anew that it had not finished.
        with _hub_errors(self.name):
            _resume_all(files, folder, self._from)

    def _from(self, file: RemoteFile, offset: int) -> Iterator[bytes]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it re-exports them without saying so
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        url = hf_hub_url(self._repository, file.path, revision=self._commit)
        headers = build_hf_headers() | ({"Range": f"bytes={offset}-"} if offset else {})
        with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S) as answer:
            hf_raise_for_status(answer)
            yield from answer.iter_bytes(CHUNK_BYTES)


class Folder:
    """A folder on this machine, or on what is mounted here."""

    def __init__(self, folder: Path) -> None:
        self.name, self._folder = str(folder), folder

    def files(self) -> list[RemoteFile]:
        if not self._folder.is_dir():
            raise ModelError(f"there is no folder {self._folder}")
        found = sorted(path for path in self._folder.rglob("*") if path.is_file())
        return [
            RemoteFile(path.relative_to(self._folder).as_posix(), path.stat().st_size, None)
            for path in found
            if not path.relative_to(self._folder).parts[0].startswith(".")
        ]

    def fetch(self, files: Sequence[RemoteFile], folder: Path) -> None:
        _resume_all(files, folder, self._from)

    def _from(self, file: RemoteFile, offset: int) -> Iterator[bytes]:
        with (self._folder / file.path).open("rb") as opened:
            opened.seek(offset)
            while chunk := opened.read(CHUNK_BYTES):
                yield chunk


class S3:
    """Objects under a prefix, by boto3's own credentials, region and AWS_ENDPOINT_URL."""

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        self._bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""

    def files(self) -> list[RemoteFile]:
        client = self._client()
        with _s3_errors(self.name):
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
            listed = [entry for page in pages for entry in page.get("Contents", ()) if not entry["Key"].endswith("/")]
            if not listed:
                raise ModelError(f"{self.name} holds nothing")
            return [
                RemoteFile(entry["Key"].removeprefix(self._prefix), entry["Size"], self._digest(client, entry))
                for entry in listed
            ]

    def fetch(self, files: Sequence[RemoteFile], folder: Path) -> None:
        client = self._client()
        with _s3_errors(self.name):
            _resume_all(files, folder, lambda file, offset: self._from(client, file, offset))

    def _from(self, client: Any, file: RemoteFile, offset: int) -> Iterator[bytes]:
        answer = client.get_object(Bucket=self._bucket, Key=self._prefix + file.path, Range=f"bytes={offset}-")
        yield from answer["Body"].iter_chunks(CHUNK_BYTES)

    def _digest(self, client: Any, entry: dict[str, Any]) -> Digest | None:
        """A SHA-256 of the whole object where it was stored with one, or the MD5 of one that came in one part."""
        if "SHA256" in entry.get("ChecksumAlgorithm", ()):
            head = client.head_object(Bucket=self._bucket, Key=entry["Key"], ChecksumMode="ENABLED")
            checksum = head.get("ChecksumSHA256", "")
            if checksum and "-" not in checksum:
                return Digest("sha256", base64.b64decode(checksum).hex())
        etag = entry["ETag"].strip('"')
        return Digest("md5", etag) if len(etag) == 32 else None

    def _client(self) -> Any:
        try:
            import boto3
            from botocore.config import Config
        except ModuleNotFoundError as error:
            raise ModelError(f"{self.name} needs the package {error.name!r}: pip install 'dynamo-ray[s3]'") from error
        return boto3.client("s3", config=Config(retries={"max_attempts": S3_ATTEMPTS, "mode": "standard"}))


def _resume_all(files: Sequence[RemoteFile], folder: Path, from_offset: FromOffset) -> None:
    """Several at once; the first that fails ends it, and those that have not begun are not begun."""
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        started = [pool.submit(_resume, file, folder, from_offset) for file in files]
        try:
            for one in as_completed(started):
                one.result()
        finally:
            for one in started:
                one.cancel()


def _resume(file: RemoteFile, folder: Path, from_offset: FromOffset) -> None:
    """Append to what an earlier fetch left of it, and give it its name when all is there."""
    target = folder / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + PART)
    offset = part.stat().st_size if part.exists() else 0
    if offset > file.size:
        part.unlink()
        offset = 0
    with part.open("ab") as out:
        if offset < file.size:
            for chunk in from_offset(file, offset):
                out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    if part.stat().st_size != file.size:
        raise ModelError(f"{file.path} broke off after {part.stat().st_size} of {file.size} bytes; run it again")
    part.rename(target)


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """The hub's errors in our words."""
    import httpx2  # the hub library's own; it lets its errors through
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms on the hub, and set HF_TOKEN to a token of yours"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name}: there is no such revision") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no model {name}, or shows it only with HF_TOKEN") from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as error:
        raise ModelError(f"{name}: the hub did not answer as it should ({error}); run it again") from error


@contextmanager
def _s3_errors(name: str) -> Iterator[None]:
    """boto's errors in our words."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        fix = "; check the credentials and the bucket's policy" if code in ("AccessDenied", "403") else ""
        raise ModelError(f"{name}: {error}{fix}") from error
    except (BotoCoreError, OSError) as error:
        raise ModelError(f"{name}: {error}; run it again") from error
