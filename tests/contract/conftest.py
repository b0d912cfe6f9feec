"""Engines that live until the session ends, which contract tests do too: a real one takes 20 to 40 s to start."""

from __future__ import annotations

import gc
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio
from engines import KINDS, ROLES, Site, running, spec

from backends.engine import Role


@pytest.fixture(autouse=True)
def what_a_failed_start_left_is_collected() -> Iterator[None]:
    """vLLM leaves ZeroMQ contexts of starts that fail to the garbage collector, which would warn in a later test.

    What survives a test is set aside: to look through all of vLLM and torch takes half a second each time.
    """
    yield
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unclosed context", ResourceWarning)
        gc.collect()
    gc.freeze()


async def _site(backend: str, **fields: Any) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        engines: dict[Role, Any] = dict.fromkeys(Role)
        infos = {}
        for role in ROLES:
            engines[role], infos[role] = await stack.enter_async_context(
                running(spec(backend, role, **fields), backend)
            )
        yield Site(backend, engines[Role.AGGREGATED], engines[Role.PREFILL], engines[Role.DECODE], infos)


def _site_of(backend: str) -> Any:
    @pytest_asyncio.fixture(scope="session", loop_scope="session", name=f"{backend}_site")
    async def site_of_kind() -> AsyncIterator[Site]:
        async for site in _site(backend):
            yield site

    return site_of_kind


for _backend in KINDS:
    globals()[f"{_backend}_site"] = _site_of(_backend)


@pytest.fixture(params=KINDS)
def site(request: pytest.FixtureRequest) -> Site:
    """Every kind of engine in turn."""
    made: Site = request.getfixturevalue(f"{request.param}_site")
    return made


@pytest.fixture
def pair(site: Site) -> Site:
    """The same, where there are engines that hand over."""
    return _with_pair(site)


@pytest_asyncio.fixture(
    params=[name for name, kind in KINDS.items() if kind.several_ranks], scope="session", loop_scope="session"
)
async def wide_site(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    """Engines of two attention DP ranks each."""
    async for made in _site(request.param, attn_dp=2, moe_ep=2):
        yield made


@pytest.fixture
def wide_pair(wide_site: Site) -> Site:
    """The same, where there are engines that hand over."""
    return _with_pair(wide_site)


def _with_pair(site: Site) -> Site:
    if Role.PREFILL not in site.infos:
        pytest.skip("only aggregated engines are started here")
    return site
