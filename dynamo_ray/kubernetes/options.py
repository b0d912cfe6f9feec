"""What a user says of the Kubernetes cluster beside the configuration, checked as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

from dynamo_ray.errors import ConfigError, Problem
from dynamo_ray.kubernetes import rules

Kind = Literal["rayservice", "raycluster"]
Cloud = Literal["bare", "eks-efa", "aks-infiniband", "gke-roce"]
Scheduler = Literal["none", "kai", "volcano", "kueue", "yunikorn"]

QUEUED: tuple[Scheduler, ...] = ("kai", "kueue", "yunikorn")
"""Schedulers that leave a workload pending for ever unless it names a queue."""


@dataclass(frozen=True, slots=True)
class Options:
    """What `dynamo-ray manifest` is told. Pods of engines are sized by GPU: `cpus_per_gpu`, `memory_gib_per_gpu`."""

    image: str
    name: str
    """Of the RayService or RayCluster; what belongs to it is named after it."""
    namespace: str = "dynamo-ray"
    kind: Kind = "rayservice"
    cloud: Cloud = "bare"
    scheduler: Scheduler = "none"
    queue: str | None = None
    hf_secret: str | None = None
    """An existing Secret; its key `token` is a Hugging Face token. Never a token itself."""
    anonymous: bool = False
    """The model is public: it is downloaded without a token."""
    model_pvc: str | None = None
    """An existing claim that holds the weights: nothing is downloaded."""
    model_source: str | None = None
    """Where weights come from; None: the model's name, a Hugging Face id."""
    storage_class: str | None = None
    cache_gib: int | None = None
    """Of the claim that is made for the weights."""
    redis: str | None = None
    """host:port where Ray's control store survives its head."""
    redis_secret: str | None = None
    """An existing Secret; its key `password` is Redis'."""
    env_secret: str | None = None
    """An existing Secret with the environment variables that the file names as ${NAME}: keys of the same names."""
    nats: bool = False
    monitoring: bool = False
    gateway: str | None = None
    """An existing Gateway, in the same namespace."""
    aiperf: bool = False
    cpus_per_gpu: int = 10
    memory_gib_per_gpu: int = 160

    @property
    def service(self) -> str:
        """The Service that clients reach. KubeRay makes it for a RayService; for a RayCluster we do."""
        return f"{self.name}{rules.SERVE_SERVICE}"


def choice(option: str, value: str, allowed: tuple[str, ...]) -> str:
    """One of a closed set. Raises ConfigError naming the nearest for anything else."""
    if value in allowed:
        return value
    near = get_close_matches(value, allowed, n=1, cutoff=0.4)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError((Problem(option, f"{value!r} is none of {', '.join(allowed)}{meant}"),))


def kind(value: str) -> Kind:
    return next(one for one in get_args(Kind) if one == choice("--kind", value, get_args(Kind)))


def cloud(value: str) -> Cloud:
    return next(one for one in get_args(Cloud) if one == choice("--cloud", value, get_args(Cloud)))


def scheduler(value: str) -> Scheduler:
    return next(one for one in get_args(Scheduler) if one == choice("--scheduler", value, get_args(Scheduler)))


def problems(options: Options, downloads: bool) -> Iterator[Problem]:
    """What is wrong with them.

    Args:
        options: to check.
        downloads: whether the models must come from somewhere; those that a command makes need not.
    """
    ray_kind = "RayService" if options.kind == "rayservice" else "RayCluster"
    wrong = rules.name_problem(ray_kind, options.name)
    if wrong is not None:
        yield Problem("--name", wrong)
    if not options.image or any(map(str.isspace, options.image)):
        yield Problem("--image", f"{options.image!r} is no image; write one such as registry/dynamo-ray:0.1.0")
    yield from _names(options)
    yield from _weights(options, downloads)
    if options.scheduler in QUEUED and options.queue is None:
        yield Problem("--queue", f"missing: {options.scheduler} schedules nothing that names no queue; give one")
    if options.scheduler == "none" and options.queue is not None:
        yield Problem("--queue", "no --scheduler reads it; leave it out, or name the scheduler")
    if options.redis_secret is not None and options.redis is None:
        yield Problem("--redis-secret", "there is no --redis that it is for; give its host:port")
    if options.redis is not None and not options.redis.rpartition(":")[2].isdigit():
        yield Problem("--redis", f"{options.redis!r} is not host:port")
    for option, number in (("--cpus-per-gpu", options.cpus_per_gpu), ("--memory-per-gpu", options.memory_gib_per_gpu)):
        if number < 1:
            yield Problem(option, f"must be at least 1; it is {number}")


def _names(options: Options) -> Iterator[Problem]:
    named = {
        "--namespace": options.namespace,
        "--hf-secret": options.hf_secret,
        "--model-pvc": options.model_pvc,
        "--redis-secret": options.redis_secret,
        "--env-secret": options.env_secret,
        "--gateway": options.gateway,
    }
    for option, name in named.items():
        if name is not None and not all(rules.DNS_LABEL.fullmatch(part) for part in name.split(".")):
            token = " That looks like the token itself: put it in a Secret and name that." if "_" in name else ""
            yield Problem(option, f"is no name of an object: lower-case letters, digits and -.{token}")


def _weights(options: Options, downloads: bool) -> Iterator[Problem]:
    given = {
        "--hf-secret": options.hf_secret is not None,
        "--anonymous": options.anonymous,
        "--model-pvc": options.model_pvc is not None,
    }
    chosen = [option for option, is_given in given.items() if is_given]
    if downloads and not chosen:
        yield Problem(
            "--hf-secret",
            "say where the weights come from: --hf-secret NAME (an existing Secret with a Hugging Face token under "
            "`token`), --anonymous (a public model), or --model-pvc NAME (a claim that holds them)",
        )
    if len(chosen) > 1:
        yield Problem(chosen[1], f"{chosen[0]} already says where the weights come from; keep one")
    if options.model_pvc is not None:
        for option, value in (("--storage-class", options.storage_class), ("--cache-gib", options.cache_gib)):
            if value is not None:
                yield Problem(option, "is for a claim that is made; --model-pvc names one that exists")
    if not downloads:
        yield from (Problem(option, "no model here is downloaded; leave it out") for option in chosen)
