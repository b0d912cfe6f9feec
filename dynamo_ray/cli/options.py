"""Errors of the Python API in the words of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from dynamo_ray.errors import ConfigError


@contextmanager
def naming(**options: str) -> Iterator[None]:
    """What is wrong with an argument is so with the option that it came from."""
    try:
        yield
    except ConfigError as error:
        named = (replace(problem, field=options.get(problem.field, problem.field)) for problem in error.problems)
        raise ConfigError(tuple(named)) from error
