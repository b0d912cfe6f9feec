"""Every error a user or a client can see, and what each one means.

While serving (`RequestError`), as an HTTP status before the first byte and as an SSE `error` event after it:

| error | status | OpenAI type / code | retry? |
|---|---|---|---|
| InvalidRequest | 400 | invalid_request_error / the given code | no: mend the named field |
| Unauthorized | 401 | authentication_error / invalid_api_key | no |
| UnknownModel | 404 | invalid_request_error / model_not_found | no |
| NotFound | 404 | invalid_request_error / not_found | no |
| MethodNotAllowed | 405 | invalid_request_error / method_not_allowed | no |
| ClientTooSlow | 408 | invalid_request_error / client_too_slow | read faster: too much of the answer was left unread |
| PayloadTooLarge | 413 | invalid_request_error / payload_too_large | no |
| Overloaded | 429 | overloaded_error / overloaded | after `retry_after_s`: queue or workers are full |
| WorkerLost | 502 | server_error / worker_lost | yes; we had already tried every pair we may |
| NotReady | 503 | server_error / not_ready | after `retry_after_s` |
| DeadlineExceeded | 504 | server_error / deadline_exceeded | with a longer deadline |
| InternalError | 500 | server_error / internal_error | a bug of ours; the log has the request id |

What cannot be replayed after its worker died mid-stream, and so ends in WorkerLost: sampling without a seed under a
presence or frequency penalty (it counts generated tokens, which a continuation would count as prompt) or to a structure
(a continuation would begin it anew).

While starting or controlling, as an exit code of `dynamo-ray`:

| error | exit code | meaning |
|---|---|---|
| ConfigError | 2 | the file or an argument is wrong; lists every field and its fix |
| PreflightError | 3 | the machine is not ready: busy port, no memory, missing model, Ray in the way |
| StartError | 4 | something died while starting; nothing is left running |
| ControlError | 5 | a worker did not do as it was told; says which and why |
"""

from __future__ import annotations

from dataclasses import dataclass


class RequestError(Exception):
    """A request that failed, with what its client is told. Subclasses say which of the table's rows it is."""

    status: int = 500
    type: str = "server_error"
    code: str = "internal_error"

    def __init__(self, message: str, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, field, retry_after_s)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class InternalError(RequestError):
    pass


class InvalidRequest(RequestError):
    status, type, code = 400, "invalid_request_error", "invalid_value"


class PromptTooLong(InvalidRequest):
    code = "context_length_exceeded"


class Unauthorized(RequestError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class UnknownModel(RequestError):
    status, type, code = 404, "invalid_request_error", "model_not_found"


class NotFound(RequestError):
    status, type, code = 404, "invalid_request_error", "not_found"


class MethodNotAllowed(RequestError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class ClientTooSlow(RequestError):
    status, type, code = 408, "invalid_request_error", "client_too_slow"


class PayloadTooLarge(RequestError):
    status, type, code = 413, "invalid_request_error", "payload_too_large"


class Overloaded(RequestError):
    status, type, code = 429, "overloaded_error", "overloaded"


class WorkerLost(RequestError):
    status, code = 502, "worker_lost"


class NotReady(RequestError):
    status, code = 503, "not_ready"


class DeadlineExceeded(RequestError):
    status, code = 504, "deadline_exceeded"


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a configuration."""

    field: str
    """Dotted path with list indexes, as in applications[0].args.prefill.replicas."""
    message: str
    """What is wrong and what to write instead."""
    line: int | None = None

    def __str__(self) -> str:
        where = f"{self.field} (line {self.line})" if self.line is not None else self.field
        return f"{where}: {self.message}"


class StartupError(Exception):
    """Base of what ends a command early; `exit_code` is the command's."""

    exit_code = 1


class ConfigError(StartupError):
    """The configuration is wrong; carries every mistake at once."""

    exit_code = 2

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class PreflightError(StartupError):
    exit_code = 3

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class StartError(StartupError):
    exit_code = 4


class ControlError(StartupError):
    exit_code = 5

    def __init__(self, failures: dict[str, str]) -> None:
        super().__init__(failures)
        self.failures = failures

    def __str__(self) -> str:
        return "\n".join(f"{name}: {reason}" for name, reason in self.failures.items())
