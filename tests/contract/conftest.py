"""Engines that live until the session ends, which contract tests do too: a real one takes 20 to 40 s to start."""

from __future__ import annotations

import gc
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio
from engines import Site, running, spec

from backends.engine import Role


@pytest.fixture(autouse=True)
def what_a_failed_start_left_is_collected() -> Iterator[None]:
    """vLLM leaves ZeroMQ contexts of starts that fail to the garbage collector, which would warn in a later test."""
    yield
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unclosed context", ResourceWarning)
        gc.collect()


async def _site(backend: str) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        engines, infos = {}, {}
        for role in (Role.AGGREGATED, Role.PREFILL, Role.DECODE):
            engines[role], infos[role] = await stack.enter_async_context(running(spec(backend, role), backend))
        yield Site(backend, engines[Role.AGGREGATED], engines[Role.PREFILL], engines[Role.DECODE], infos)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def simulated_site() -> AsyncIterator[Site]:
    async for site in _site("simulated"):
        yield site


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vllm_site() -> AsyncIterator[Site]:
    """SmolLM2-135M-Instruct in fp32, in which batching does not change greedy answers."""
    async for site in _site("vllm"):
        yield site


@pytest.fixture(params=["simulated", "vllm"])
def site(request: pytest.FixtureRequest) -> Site:
    made: Site = request.getfixturevalue(f"{request.param}_site")
    return made
