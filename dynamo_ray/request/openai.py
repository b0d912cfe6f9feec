"""OpenAI's request bodies: what is accepted, what each value may be, and what it becomes for the engines."""

from __future__ import annotations

import re
from array import array
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct

from backends.engine import Sampling, Structure
from dynamo_ray.errors import InvalidRequest, PromptTooLong, UnknownModel
from dynamo_ray.request import structure as structures
from dynamo_ray.request.structure import ResponseFormat, StructuredOutputs

T = TypeVar("T")

MAX_CHOICES = 128
"""Of one prompt."""
MAX_TOTAL_CHOICES = 1024
"""Of all prompts of one request."""
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 4096
"""Of all stop strings together; each character of the answer is held against all of them."""
SEED_RANGE = 1 << 63
MIN_TEMPERATURE = 0.01
"""Above 0: less overflows a logit's exponent in half precision, and vLLM 0.32 raises it to this without a word."""

Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
TokenLimit = Annotated[int, Meta(ge=1)]


class TextPart(Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    # What the assistant's messages carry when a client sends our own answers back.
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Padding against traffic analysis; we send none, which never changes the answer."""


class Body(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take. Fields of type `Any` are those of `UNSUPPORTED`."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: TokenLimit | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None
    """0 and -1 keep every token."""
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=2.0)] | None = None
    seed: Annotated[int, Meta(ge=-SEED_RANGE, le=SEED_RANGE - 1)] | None = None
    """Choice i of a prompt uses (seed + i) mod 2**63."""
    stop: str | Annotated[list[str], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=128)] | None = None
    ignore_eos: bool | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    """Prompts share cached KV only with prompts of the same salt."""
    priority: Annotated[int, Meta(ge=-(1 << 31), lt=1 << 31)] | None = None
    """Greater runs earlier inside a worker, whichever engine it is; 0 where it is left out."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    """vLLM's name for what response_format, regex and grammar say."""
    regex: str | None = None
    """The whole answer matches it."""
    grammar: str | None = None
    """In EBNF; the answer is a sentence of it."""
    ebnf: str | None = None
    """SGLang's name for grammar."""
    # These cannot change the answer; some say which requests belong together, see `session`.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # Refused unless they say what is done anyway.
    logit_bias: Any = None
    skip_special_tokens: Any = None
    include_stop_str_in_output: Any = None


class ChatBody(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: TokenLimit | None = None
    """OpenAI's newer name for max_tokens."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    prediction: dict[str, Any] | None = None
    """A hint for speed; the answer is the same without."""
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionBody(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions"""

    prompt: str | list[str | int | list[int]]
    """A text, several texts, token ids, or several lists of token ids."""
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: Any = None
    suffix: Any = None
    best_of: Any = None


UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "logit_bias": (({},), "token biases are not supported"),
    "skip_special_tokens": ((True,), "special tokens are never part of the text"),
    "include_stop_str_in_output": ((False,), "the stop string is never part of the text"),
    "tools": (([],), "tool calls are not supported"),
    "tool_choice": (("none", "auto"), "tool calls are not supported"),
    "parallel_tool_calls": ((True, False), "tool calls are not supported"),
    "functions": (([],), "function calls are not supported"),
    "function_call": (("none", "auto"), "function calls are not supported"),
    "tool_calls": (([],), "tool calls are not supported"),
    "modalities": ((["text"],), "only text is supported"),
    "audio": ((), "only text is supported"),
    "annotations": (([],), "annotations are not supported"),
    "refusal": (("",), "refusals are not supported; send them as content"),
    "reasoning_effort": ((), "the effort cannot be chosen"),
    "verbosity": (("medium",), "the verbosity cannot be chosen; ask for it in a message"),
    "web_search_options": ((), "web search is not supported"),
    "echo": ((False,), "the prompt is never repeated in the answer"),
    "suffix": (("",), "insertion is not supported"),
    "best_of": ((1,), "every generated choice is returned; use n"),
}
"""Field -> the values that ask for nothing, which many clients always send, and why any other is refused."""


class _Kind(Struct):
    messages: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_kind = msgspec.json.Decoder(_Kind)
_chat = msgspec.json.Decoder(ChatBody)
_completion = msgspec.json.Decoder(CompletionBody)


def parse_chat(raw: bytes, served: str, loras: tuple[str, ...] = ()) -> ChatBody:
    """Decode and check a body; what depends on the prompt's length is left to `sampling`.

    Raises:
        InvalidRequest: Not JSON, or a field is unknown, unsupported, of the wrong type or out of range; names it.
        UnknownModel: Neither the model served nor one of its adapters.
    """
    body = _decode(_chat, raw)
    _check(body, served, loras)
    for index, message in enumerate(body.messages):
        _refuse_unsupported(message, f"messages[{index}].")
        if message.content is None:
            raise InvalidRequest(f"`messages[{index}].content` is missing", f"messages[{index}].content")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
    older, newer = body.max_tokens, body.max_completion_tokens
    if older is not None and newer is not None and older != newer:
        raise InvalidRequest(
            f"max_tokens={older} and max_completion_tokens={newer} contradict each other; send one of them",
            "max_completion_tokens",
        )
    return body


def parse_completion(raw: bytes, served: str, loras: tuple[str, ...] = ()) -> CompletionBody:
    """As `parse_chat`, for the other endpoint."""
    body = _decode(_completion, raw)
    _check(body, served, loras)
    num_choices = len(prompts(body)) * (body.n or 1)
    if num_choices > MAX_TOTAL_CHOICES:
        raise InvalidRequest(f"{num_choices} choices in one request; at most {MAX_TOTAL_CHOICES}", "prompt")
    return body


def template_messages(body: ChatBody) -> list[dict[str, str]]:
    """The messages as chat templates expect them: with text as content. Text parts become lines, as in vLLM."""
    messages = []
    for message in body.messages:
        content = message.content or ""
        text = content if isinstance(content, str) else "\n".join([part.text for part in content])
        entry = {"role": message.role, "content": text}
        if message.name is not None:
            entry["name"] = message.name
        if message.tool_call_id is not None:
            entry["tool_call_id"] = message.tool_call_id
        messages.append(entry)
    return messages


def prompts(body: CompletionBody) -> list[str] | list[list[int]]:
    """The prompts, each text or token ids, at least one and none without content.

    What stands in a list of token ids is left to `check_token_ids`.

    Raises:
        InvalidRequest: `prompt` is empty or mixes kinds.
    """
    prompt: Any = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not prompt or not all(prompt):
        raise InvalidRequest("the prompt is empty; send at least one character or token", "prompt")
    if len({type(item) for item in prompt}) > 1:
        raise _mixed()
    found: list[str] | list[list[int]] = prompt
    return found


def _mixed() -> InvalidRequest:
    return InvalidRequest("prompt mixes kinds; send a text, texts, token ids, or lists of token ids", "prompt")


def check_token_ids(token_ids: list[int], vocab_size: int, field: str) -> None:
    """Read a prompt once: all of it integers that the model knows.

    Raises:
        InvalidRequest: It is not; names the field.
    """
    outside = InvalidRequest(f"token ids must be in 0..{vocab_size - 1}", field)
    try:
        # As unsigned numbers of 32 bits, among which there is nothing negative left to look for.
        largest = int(np.frombuffer(array("I", token_ids), np.uint32).max())
    except TypeError:
        raise _mixed() from None
    except OverflowError:
        raise outside from None
    if largest >= vocab_size:
        raise outside


def stops(body: Body) -> tuple[str, ...]:
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def num_logprobs(body: ChatBody | CompletionBody) -> int | None:
    """How many alternatives a token; None: no logprobs at all."""
    if isinstance(body, CompletionBody):
        return body.logprobs
    return (body.top_logprobs or 0) if body.logprobs else None


def prompt_field(body: ChatBody | CompletionBody) -> str:
    return "messages" if isinstance(body, ChatBody) else "prompt"


def session(body: ChatBody | CompletionBody) -> str | None:
    """What the client says its requests of one conversation or user have in common; None: nothing."""
    return body.prompt_cache_key or body.user or None


def parse_either(raw: bytes, served: str, loras: tuple[str, ...] = ()) -> ChatBody | CompletionBody:
    """A body of whichever endpoint it is for: one with `messages` is a chat's. Raises as `parse_chat` does."""
    is_chat = _decode(_kind, raw).messages is not msgspec.UNSET
    return parse_chat(raw, served, loras) if is_chat else parse_completion(raw, served, loras)


def field_of(body: ChatBody | CompletionBody, field: str | None) -> str | None:
    """What the client calls what an engine found fault with."""
    if field == "prompt":
        return prompt_field(body)
    if field == "lora":
        return "model"
    asked = structures.wanted(body) if field == "structure" else None
    return field if asked is None else asked.field


def sampling(
    body: ChatBody | CompletionBody,
    num_prompt_tokens: int,
    max_model_len: int,
    eos_token_ids: tuple[int, ...],
    structure: Structure | None = None,
) -> Sampling:
    """The engine's sampling for a prompt of that length; EOS is among the stop tokens unless it is to be ignored.

    Raises:
        PromptTooLong: The prompt, or prompt and asked tokens together, exceed the context.
        InvalidRequest: min_tokens is more than can come.
    """
    max_tokens = _max_tokens(body, num_prompt_tokens, max_model_len)
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens={min_tokens} is above the limit of {max_tokens} tokens", "min_tokens")
    ignore_eos = bool(body.ignore_eos)
    return Sampling(
        max_tokens=max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(0, _or(body.top_k, 0)),
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        seed=body.seed,
        min_tokens=min_tokens,
        stop_token_ids=(*(body.stop_token_ids or ()), *(() if ignore_eos else eos_token_ids)),
        ignore_eos=ignore_eos,
        logprobs=num_logprobs(body),
        structure=structure,
    )


def _max_tokens(body: ChatBody | CompletionBody, num_prompt_tokens: int, max_model_len: int) -> int:
    """What was asked for, or else the rest of the context."""
    room = max_model_len - num_prompt_tokens
    context = f"this model's maximum context length is {max_model_len} tokens, and the prompt has {num_prompt_tokens}"
    if room < 1:
        raise PromptTooLong(f"{context}; shorten it so that one token of answer fits", prompt_field(body))
    field, given = "max_tokens", body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        field, given = "max_completion_tokens", body.max_completion_tokens
    if given is None:
        return room
    if given > room:
        raise PromptTooLong(f"{context}, so {field}={given} is too much; send at most {room}", field)
    return given


def unknown_model(asked: str, served: str, loras: tuple[str, ...]) -> UnknownModel:
    adapters = f" and its adapters {', '.join(f'`{name}`' for name in loras)}" if loras else ""
    return UnknownModel(f"the model `{asked}` does not exist here; this server has `{served}`{adapters}", "model")


def _check(body: ChatBody | CompletionBody, served: str, loras: tuple[str, ...]) -> None:
    if body.model != served and body.model not in loras:
        raise unknown_model(body.model, served, loras)
    _refuse_unsupported(body)
    if structures.wanted(body) is not None:
        _check_structured(body)
    if body.temperature is not None and 0 < body.temperature < MIN_TEMPERATURE:
        advice = f"send 0 for the most likely tokens, or at least {MIN_TEMPERATURE:g}"
        raise InvalidRequest(f"temperature={body.temperature:g} is too small; {advice}", "temperature")
    if "" in stops(body):
        raise InvalidRequest("a stop string must not be empty", "stop")
    if sum(map(len, stops(body))) > MAX_STOP_CHARACTERS:
        raise InvalidRequest(f"the stop strings are longer than {MAX_STOP_CHARACTERS} characters together", "stop")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", "stream_options")


def _check_structured(body: Body) -> None:
    """A structure ends the answer: from there on, an engine that must not end it has no token left to choose."""
    ends = "an answer with a structure ends where its structure does; leave it out"
    if body.ignore_eos:
        raise InvalidRequest(f"ignore_eos: {ends}", "ignore_eos")
    if body.min_tokens:
        raise InvalidRequest(f"min_tokens: {ends}", "min_tokens")


def _refuse_unsupported(body: Struct, path: str = "") -> None:
    for field in body.__struct_fields__:
        value = getattr(body, field)
        if value is None or field not in UNSUPPORTED:
            continue
        harmless, reason = UNSUPPORTED[field]
        if value not in harmless:
            raise InvalidRequest(f"{path}{field}: {reason} here; leave it out", f"{path}{field}")


def _decode(decoder: msgspec.json.Decoder[T], raw: bytes) -> T:
    if not raw.strip():
        raise InvalidRequest("the body is empty; send a JSON object")
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from error
    except msgspec.DecodeError as error:
        number = re.search(rb'"(\w+)"\s*:\s*[-+]?(?:NaN|Infinity)', raw)
        if number is not None:
            field = number[1].decode()
            raise InvalidRequest(f"{field}: NaN and Infinity are not JSON; send a finite number", field) from error
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8: {error.reason}") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error


def _explained(message: str) -> InvalidRequest:
    """msgspec's message, with the field it is about taken out of it."""
    path = re.search(r" - at `(?:key in )?\$\.?(.*)`$", message)
    place = path[1] if path else ""
    text = message[: path.start()] if path else message
    named = re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", text, re.DOTALL)
    if named is None:
        return InvalidRequest(f"{place or 'the body'}: {text[0].lower()}{text[1:]}", place or None)
    field = f"{place}.{named[2]}" if place else named[2]
    advice = "is not known here; leave it out" if "unknown" in named[1] else "is missing"
    return InvalidRequest(f"`{field}` {advice}", field)


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
