"""The two endpoints that generate: body -> prompts -> generations -> answer, streamed or whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import msgspec
from msgspec import to_builtins

from backends.engine import Sampling
from dynamo_ray.errors import InternalError, InvalidRequest
from dynamo_ray.request import openai, structure
from dynamo_ray.request.answer import Answer, ChatShape, Shape, TextShape, Usage
from dynamo_ray.request.choice import Choice, Delta
from dynamo_ray.request.exchange import EVENT_STREAM, ClientGone, Exchange, Header
from dynamo_ray.request.generation import Generation
from dynamo_ray.request.openai import ChatBody, CompletionBody
from dynamo_ray.request.service import Service
from dynamo_ray.request.tokens import Tokeniser
from dynamo_ray.routing.explanation import Route
from dynamo_ray.telemetry import Telemetry

TIMEOUT_HEADER = b"x-request-timeout-s"
SESSION_HEADER = b"x-session-id"
EXPLAIN_HEADER = b"x-dynamo-ray-explain"
ROUTE_HEADER = b"x-dynamo-ray-route"
MAX_EXPLAINED_CHOICES = 8
"""Of one request; a header line each."""
STALLED_CLIENT_S = 5.0
"""After its deadline, how long a request waits for its client to read; then the connection is given up."""
MAX_CONCURRENT_CHOICES = 64
"""Of one request; the others wait here, so that no request fills the workers' queues by itself."""

Show = Callable[[int, Delta], Awaitable[None]]
"""Takes what is new of one choice."""

CHAT, TEXT = ChatShape(), TextShape()


@dataclass(frozen=True, slots=True)
class Settings:
    model: str
    """Its name."""
    max_body_bytes: int = 8 * 1024 * 1024
    api_keys: tuple[str, ...] = ()
    request_timeout_s: float = 600.0
    loras: tuple[str, ...] = ()
    """Names of the model's adapters, which are served like models of their own."""


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request, down to tokens. Choice i belongs to prompt i // n."""

    exchange: Exchange
    body: ChatBody | CompletionBody
    generations: tuple[Generation, ...]
    """One a choice."""
    choices: tuple[Choice, ...]
    answer: Answer
    usage: Usage
    deadline_s: float
    """On the loop's clock."""
    routes: dict[int, Route]
    """Where choices went last; filled only for a client that asks."""

    @property
    def route_headers(self) -> list[Header]:
        """One a choice that has been given a place."""
        known = sorted(self.routes.items())
        return [(ROUTE_HEADER, msgspec.json.encode({"choice": index} | to_builtins(route))) for index, route in known]

    @property
    def n(self) -> int:
        return self.body.n or 1


class Completions:
    """Answers POST /v1/chat/completions and /v1/completions."""

    def __init__(self, service: Service, tokeniser: Tokeniser, settings: Settings, telemetry: Telemetry) -> None:
        self._service, self._tokeniser = service, tokeniser
        self._settings, self._telemetry = settings, telemetry

    async def chat(self, exchange: Exchange) -> None:
        """Raises RequestError, ClientGone."""
        raw = await exchange.json_body(self._settings.max_body_bytes)
        body = openai.parse_chat(raw, self._settings.model, self._settings.loras)
        prompt = await self._tokeniser.encode_chat(openai.template_messages(body))
        await self._answer(self._job(exchange, body, CHAT, [prompt]))

    async def complete(self, exchange: Exchange) -> None:
        """Raises RequestError, ClientGone."""
        raw = await exchange.json_body(self._settings.max_body_bytes)
        body = openai.parse_completion(raw, self._settings.model, self._settings.loras)
        await self._answer(self._job(exchange, body, TEXT, await self._prompts(body)))

    async def route(self, exchange: Exchange) -> None:
        """Say where a request with this body would go, and why; it goes nowhere. Raises RequestError, ClientGone."""
        raw = await exchange.json_body(self._settings.max_body_bytes)
        body = openai.parse_either(raw, self._settings.model, self._settings.loras)
        if isinstance(body, ChatBody):
            prompts = [await self._tokeniser.encode_chat(openai.template_messages(body))]
        else:
            prompts = await self._prompts(body)
        if len(prompts) > 1:
            raise InvalidRequest(f"{len(prompts)} prompts; send one", "prompt")
        job = self._job(exchange, body, TEXT, prompts)
        await exchange.reply(200, msgspec.json.encode(self._service.explain(job.generations[0])))

    async def _prompts(self, body: CompletionBody) -> list[list[int]]:
        return [p if isinstance(p, list) else await self._tokeniser.encode(p) for p in openai.prompts(body)]

    def _job(self, exchange: Exchange, body: ChatBody | CompletionBody, shape: Shape, prompts: list[list[int]]) -> Job:
        self._check(body, prompts)
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s(exchange)
        limit, eos = self._service.max_model_len, self._tokeniser.eos_token_ids
        answer_id = shape.id_prefix + exchange.unique_id
        asked = structure.wanted(body)
        lora = None if body.model == self._settings.model else body.model
        session = exchange.name(SESSION_HEADER) or openai.session(body)
        explained = MAX_EXPLAINED_CHOICES if exchange.flag(EXPLAIN_HEADER) else 0
        routes: dict[int, Route] = {}
        generations: list[Generation] = []
        for prompt in prompts:
            sampling = openai.sampling(body, len(prompt), limit, eos, None if asked is None else asked.structure)
            generations += [
                Generation(
                    request_id=f"{answer_id}-{number}",
                    token_ids=prompt,
                    sampling=_with_seed(sampling, index),
                    cache_salt=body.cache_salt,
                    lora=lora,
                    priority=body.priority or 0,
                    session=session,
                    told=partial(routes.__setitem__, number) if number < explained else None,
                    deadline_s=deadline_s,
                )
                for index, number in enumerate(range(len(generations), len(generations) + (body.n or 1)))
            ]
        stops = openai.stops(body)
        choices = tuple(
            Choice(index, generation.sampling, self._tokeniser.detokeniser(generation.token_ids), stops)
            for index, generation in enumerate(generations)
        )
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        answer = Answer(shape, answer_id, body.model, len(choices), include_usage, self._tokeniser.token_bytes)
        usage = Usage(sum(map(len, prompts)))
        return Job(exchange, body, tuple(generations), choices, answer, usage, deadline_s, routes)

    def _check(self, body: ChatBody | CompletionBody, prompts: list[list[int]]) -> None:
        """What needs the model's own limits."""
        field, vocab_size = openai.prompt_field(body), self._tokeniser.vocab_size
        for prompt in prompts:
            if not prompt:
                raise InvalidRequest("the prompt has no tokens; send some text", field)
            openai.check_token_ids(prompt, vocab_size, field)
        if any(not 0 <= token_id < vocab_size for token_id in body.stop_token_ids or ()):
            raise InvalidRequest(f"token ids must be in 0..{vocab_size - 1}", "stop_token_ids")
        asked, most = openai.num_logprobs(body), self._service.max_logprobs
        if asked is not None and asked > most:
            field = "top_logprobs" if isinstance(body, ChatBody) else "logprobs"
            raise InvalidRequest(f"{field}={asked} is too much; at most {most} here", field)

    def _timeout_s(self, exchange: Exchange) -> float:
        limit_s = self._settings.request_timeout_s
        asked_s = exchange.number(TIMEOUT_HEADER)
        if asked_s is not None and asked_s > limit_s:
            name = TIMEOUT_HEADER.decode()
            raise InvalidRequest(f"{name}: {asked_s:g} is above this server's {limit_s:g}", name)
        return limit_s if asked_s is None else asked_s

    async def _answer(self, job: Job) -> None:
        self._telemetry.prompt_tokens.inc(job.usage.prompt_tokens)
        try:
            async with asyncio.timeout_at(job.deadline_s + STALLED_CLIENT_S):
                await job.exchange.while_connected(self._stream(job) if job.body.stream else self._whole(job))
        except TimeoutError:
            # Before that the request fails by its own deadline; this one is for a client that does not even read that.
            raise ClientGone from None
        self._telemetry.e2e_s.observe(time.perf_counter() - job.exchange.arrived_s)

    async def _whole(self, job: Job) -> None:
        deltas: list[list[Delta]] = [[] for _ in job.choices]

        async def show(index: int, delta: Delta) -> None:
            deltas[index].append(delta)

        await self._generate_all(job, show)
        with_logprobs = openai.num_logprobs(job.body) is not None
        answer = job.answer.whole(deltas, job.usage, with_logprobs)
        await job.exchange.reply(200, answer, headers=job.route_headers)

    async def _stream(self, job: Job) -> None:
        exchange, answer = job.exchange, job.answer
        opened: set[int] = set()
        turn = asyncio.Lock()

        async def show(index: int, delta: Delta) -> None:
            data = answer.events(index, delta)
            async with turn:  # choices take turns: ASGI's send is not made for several tasks at once
                if index not in opened:
                    if not opened:
                        # Only now, so that what fails before the first token still has a status of its own.
                        headers = [(b"cache-control", b"no-cache"), *job.route_headers]
                        await exchange.start(200, EVENT_STREAM, headers)
                    opened.add(index)
                    data = answer.opening(index) + data
                await exchange.write(data)

        await self._generate_all(job, show)
        await exchange.write(answer.ending(job.usage), last=True)

    async def _generate_all(self, job: Job, show: Show) -> None:
        """Run all choices to their end; if one fails, the others are aborted and its error is raised."""
        if len(job.choices) == 1:
            await self._generate(job, 0, show)
            return
        turns = asyncio.Semaphore(MAX_CONCURRENT_CHOICES)

        async def generate(index: int) -> None:
            async with turns:
                await self._generate(job, index, show)

        tasks = [asyncio.ensure_future(generate(index)) for index in range(len(job.choices))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _generate(self, job: Job, index: int, show: Show) -> None:
        choice, usage = job.choices[index], job.usage
        progress = self._telemetry.generation(job.exchange.arrived_s)
        try:
            # Closing the generator is what aborts: after a stop string, an error, or when the client has left.
            async with aclosing(self._service.generate(job.generations[index])) as chunks:
                async for chunk in chunks:
                    if progress.tokens_came(chunk) and index % job.n == 0:
                        usage.cached_tokens += chunk.cached_tokens or 0
                    delta = choice.take(chunk)
                    if delta is None:
                        continue
                    if delta.finish_reason is not None:
                        usage.completion_tokens += choice.num_tokens
                    await show(index, delta)
                    if delta.finish_reason is not None:
                        return
            raise InternalError("the answer ended without a finish reason")
        except InvalidRequest as error:  # refused by an engine, which has names of its own for what a client sends
            raise InvalidRequest(error.message, openai.field_of(job.body, error.field)) from error
        finally:
            progress.ended(choice.num_tokens)


def _with_seed(sampling: Sampling, index: int) -> Sampling:
    """Choices of one prompt must differ, and be the same every time."""
    if sampling.seed is None:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + index) % openai.SEED_RANGE)
