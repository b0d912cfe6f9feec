"""One validated, frozen document: what `args:` of a `serve run` file says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from backends import BACKENDS
from backends.engine import Role
from dynamo_ray import secrets

Launcher = Literal["processes", "ray"]
LAUNCHERS: dict[str, tuple[Launcher, ...]] = {
    "simulated": ("processes",),
    "vllm": ("processes",),
    "sglang": ("processes", "ray"),
    "trtllm": ("ray",),
}
"""How each backend can start its ranks; the first, where a role does not say."""
PREFILLS_ON_DECODE = ("simulated", "vllm")
"""Backends whose decode workers also take a whole request."""


HAPROXY_ENVIRONMENT = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
"""Read when Ray and Serve start: it must be set on every node before `ray start`."""


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        allow_inf_nan=False,
        hide_input_in_errors=True,  # it may be a secret, and what is raised ends in logs
    )


class ModelConfig(_Frozen):
    name: str = Field(min_length=1)
    """The name clients send."""
    path: str
    """Folder with config.json, tokenizer.json and, for a real engine, the weights; ~ is expanded."""

    loras: dict[Annotated[str, Field(min_length=1)], str] = {}
    """LoRA adapters: the name clients send as `model`, and the adapter's folder."""

    @model_validator(mode="after")
    def _check_loras(self) -> ModelConfig:
        if self.name in self.loras:
            raise ValueError(f"loras.{self.name}: the model itself has this name; give the adapter another")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.path).expanduser()


class ParallelismConfig(_Frozen):
    """Widths of one worker. attn_tp * attn_dp == moe_ep * moe_tp; times pp = its GPUs (or CPU ranks)."""

    attn_tp: PositiveInt = 1
    attn_dp: PositiveInt = 1
    moe_ep: PositiveInt = 1
    moe_tp: PositiveInt | None = None
    """Left out: attn_tp * attn_dp / moe_ep."""
    pp: PositiveInt = 1
    redundant_experts: Annotated[int, Field(ge=0)] = 0
    """Copies of busy experts, in all; (the model's experts + these) must divide by moe_ep."""

    @model_validator(mode="after")
    def _check_widths(self) -> ParallelismConfig:
        attention = self.attn_tp * self.attn_dp
        if self.moe_tp is None and attention % self.moe_ep:
            raise ValueError(
                f"moe_ep={self.moe_ep} does not divide attn_tp*attn_dp={attention}; use a divisor ({attention} is DEP)"
            )
        if self.moe_tp is not None and attention != self.moe_ep * self.moe_tp:
            raise ValueError(
                f"attn_tp*attn_dp={attention} must equal moe_ep*moe_tp={self.moe_ep * self.moe_tp}; change one of them"
            )
        return self

    @property
    def moe_tp_size(self) -> int:
        return self.moe_tp or self.attn_tp * self.attn_dp // self.moe_ep

    @property
    def num_ranks(self) -> int:
        return self.attn_tp * self.attn_dp * self.pp


class ResourcesConfig(_Frozen):
    """What one node of one worker takes from Ray, besides its GPUs."""

    cpus: PositiveFloat = 1.0
    memory_gib: NonNegativeFloat = 0.0


class RoleConfig(_Frozen):
    replicas: PositiveInt = 1
    nodes: PositiveInt = 1
    """Nodes that one worker spans."""
    one_nvlink_domain: bool = False
    """Keep a worker's nodes inside one NVLink domain (Ray label ray.io/gpu-domain)."""
    parallelism: ParallelismConfig = ParallelismConfig()
    resources: ResourcesConfig = ResourcesConfig()
    env: dict[str, str] = {}
    """Environment of the engine's processes."""
    launcher: Launcher | None = None
    """`processes`: each node starts its own share of the engine. `ray`: the engine starts its ranks as Ray actors.
    None: as DeploymentConfig.launcher says."""
    engine_args: dict[str, Any] = {}
    """Passed to the engine under its own names."""

    @model_validator(mode="after")
    def _check_nodes(self) -> RoleConfig:
        if self.parallelism.num_ranks % self.nodes:
            raise ValueError(
                f"nodes={self.nodes} does not divide the {self.parallelism.num_ranks} ranks of `parallelism`; "
                "every node runs the same number of ranks"
            )
        return self


class PlacementConfig(_Frozen):
    leaf_label: str | None = Field(default=None, min_length=1)
    """The Ray label that says which leaf switch or rack a node is in; workers are kept in as few as possible."""
    spares: Annotated[int, Field(ge=0)] = 0
    """Whole nodes that `dynamo-ray plan` leaves free and names, to replace lost ones."""


class TransferConfig(_Frozen):
    backend: Literal["nixl"] = "nixl"


class QueueConfig(_Frozen):
    """Where requests wait while the ranks that are best for them are busy: in the ingress."""

    order: Literal["fcfs", "shortest"] = "shortest"
    """Among those of one priority that wait for one rank: who came first, or who has the fewest prompt tokens that the
    rank does not have cached by then."""
    max_waiting: PositiveInt = 1024
    """Per ingress replica; one more is refused with 429."""
    busy_requests: PositiveInt | None = None
    """A rank with as many, running and waiting, is busy; so are all of a worker that has limits.max_queued_requests,
    and a decode rank whose KV blocks do not hold one more, and before which as many tokens as those wait already where
    their prompts are computed meanwhile. None: only these."""
    busy_prompt_tokens: PositiveInt | None = 32_768
    """A rank that has as many uncached prompt tokens still to compute is busy. None: no bound."""
    ageing_tokens_per_s: PositiveFloat = 1000.0
    """Under `shortest`, a second of waiting counts as so many tokens fewer: nobody waits for ever."""
    worker_wait_s: NonNegativeFloat = 60.0
    """For so long after a role has lost its last worker, requests wait for another: those that come and those that the
    worker lost. Then, until there is one, they are 503."""


class PrefillOnDecodeConfig(_Frozen):
    max_uncached_tokens: NonNegativeInt
    """A prompt of which the chosen decode rank has to compute no more than this never goes to a prefill worker."""
    max_uncached_tokens_without_prefill: NonNegativeInt | None = None
    """The same bound while no prefill worker takes requests, for longer prompts to be served too: they slow down the
    answers beside them. None: `max_uncached_tokens`."""

    @model_validator(mode="after")
    def _check_order(self) -> PrefillOnDecodeConfig:
        least, given = self.max_uncached_tokens, self.max_uncached_tokens_without_prefill
        if given is not None and given < least:
            raise ValueError(
                f"max_uncached_tokens_without_prefill: {given} is less than max_uncached_tokens, which holds always; "
                f"give {least} or more, or leave it out"
            )
        return self

    def limit(self, prefill_lives: bool) -> int:
        """The most tokens that a decode rank may have to compute of a prompt it is given whole."""
        gone = self.max_uncached_tokens_without_prefill
        return self.max_uncached_tokens if prefill_lives or gone is None else gone


class ApproximateConfig(_Frozen):
    """What a worker caches is guessed from what was sent there, where it tells no KV events."""

    ttl_s: PositiveFloat = 120.0
    """How long a prompt is taken to be cached after it was sent."""
    max_blocks: PositiveInt = 65_536
    """Per rank; the least recently sent are forgotten first."""


class SloConfig(_Frozen):
    """What `latency` keeps requests within, where it can; None: no limit, only as soon as possible."""

    ttft_s: PositiveFloat | None = None
    """Until the first token."""
    itl_s: PositiveFloat | None = None
    """Between two tokens."""


class RouterConfig(_Frozen):
    policy: str = Field(default="latency", min_length=1)
    """A policy's name (see dynamo_ray.routing.policies), or `module:attribute` of the user's own."""
    policy_args: dict[str, Any] = {}
    """Keyword arguments of a user's own policy."""
    slo: SloConfig = SloConfig()
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Of `random`."""
    overlap_score_credit: NonNegativeFloat = 1.0
    """Of `blocks`, as all below. How much of a cached prompt block counts as already computed."""
    overlap_score_credit_decay: NonNegativeFloat = 0.0
    """Divides that credit by 1 + this * the queue's excess over the shortest one, in prompts like this."""
    host_cache_hit_weight: Annotated[float, Field(ge=0, le=1)] = 0.75
    """How much of a block in host memory counts as already computed."""
    disk_cache_hit_weight: Annotated[float, Field(ge=0, le=1)] = 0.25
    """The same of slower tiers."""
    prefill_load_scale: NonNegativeFloat = 1.0
    """Weight of prompt blocks to compute against blocks being held."""
    decode_active_request_weight: NonNegativeFloat = 0.0
    """Blocks that a request counts for beyond those it holds."""
    router_temperature: NonNegativeFloat = 0.0
    """0: the lowest cost. Above: drawn by softmax of the costs brought to [0, 1]."""
    approximate: ApproximateConfig = ApproximateConfig()
    """For workers that tell no KV events, and for all with `events: none`."""
    queue: QueueConfig | None = QueueConfig()
    """null: nothing waits here; workers queue, and refuse what is over their limit."""
    prefill_on_decode: PrefillOnDecodeConfig | None = None
    """Given: some prompts are computed by the decode worker itself, and nothing of them is handed over."""


Secret = Annotated[str, Field(min_length=1), AfterValidator(secrets.check)]
"""A literal, `${NAME}`: an environment variable, or `${file:/path}`: a file's content; read where it is used."""


SECRETS = ("api_keys", "password", "token")
"""Fields whose values are never shown."""


class NatsConfig(_Frozen):
    """Where the NATS servers are, and how much their stream keeps. Read where `events: nats`."""

    urls: tuple[Annotated[str, Field(pattern=r"^(nats|tls)://[^@\s]+$")], ...] = ()
    """nats:// or tls://host:port, of one cluster; who we are stands below, not here. Empty: `dynamo-ray up` starts a
    private server on this machine."""
    user: str | None = Field(default=None, min_length=1)
    password: Secret | None = Field(default=None, repr=False)
    token: Secret | None = Field(default=None, repr=False)
    creds_file: str | None = Field(default=None, min_length=1)
    """A credentials file, as `nsc` makes them."""
    ca_file: str | None = Field(default=None, min_length=1)
    """PEM of the authority that signed the servers' certificates; None: the system's. Only with tls://."""
    prefix: str = Field(default="dynamo_ray", pattern=r"^[A-Za-z0-9_-]+$")
    """First part of every subject, and of the stream's name; the application's name follows."""
    max_age_s: PositiveFloat = 3600.0
    max_bytes: Annotated[int, Field(ge=2**20)] = 2**30
    """Of the application's stream. Whoever starts after something was discarded asks for what it was."""
    replicas: Annotated[int, Field(ge=1, le=5)] = 1
    """Servers that keep a copy of the stream."""

    @model_validator(mode="after")
    def _check_identity(self) -> NatsConfig:
        if (self.user is None) != (self.password is None):
            missing = "user" if self.user is None else "password"
            raise ValueError(f"{missing}: missing beside the other of user and password")
        ways = {"user": self.user, "token": self.token, "creds_file": self.creds_file}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: given beside {given[0]}; a client is one of them")
        if given and not self.urls:
            raise ValueError(f"{given[0]}: of no use without `urls`; name the servers, or leave it out")
        if self.ca_file is not None and not any(url.startswith("tls://") for url in self.urls):
            raise ValueError("ca_file: no URL begins with tls://; write tls:// in `urls`, or leave it out")
        return self


QUEUED_REQUESTS_PER_RANK = 256
"""A batch of decode and those that come next, where nothing says how many an engine runs at once."""


class LimitsConfig(_Frozen):
    """Bounds, each of which answers instead of queueing without end."""

    max_queued_requests: PositiveInt | None = None
    """Per worker, running and waiting, or per node of one whose nodes take requests; one more is refused with 429.
    None: 256 for each of its DP ranks."""
    max_body_bytes: PositiveInt = 8 * 1024 * 1024
    request_timeout_s: PositiveFloat = 600.0
    heartbeat_timeout_s: PositiveFloat = 5.0
    """A worker silent for this long is treated as dead."""
    max_retries: Annotated[int, Field(ge=0)] = 3
    """How often one request may move to another pair of workers."""
    start_timeout_s: PositiveFloat = 1800.0
    """A worker that is not ready after this is ended and started again; it loads its model within it."""
    drain_timeout_s: NonNegativeFloat = 30.0

    def queued_requests(self, num_ranks: int) -> int:
        """`max_queued_requests` of a worker, or a node, with so many DP ranks."""
        return self.max_queued_requests or QUEUED_REQUESTS_PER_RANK * num_ranks


class DeploymentConfig(_Frozen):
    """The whole deployment. Either `aggregated`, or `prefill` and `decode`."""

    model: ModelConfig
    backend: Literal["simulated", "vllm", "sglang", "trtllm"]
    engine_version: str | None = None
    """Engine flags are checked against this version, and no other may be installed; None: the newest supported."""
    accelerator: str = "cpu"
    """`cpu`, or a GPU type as Ray labels it (H100, H200, B200, GB200, ...)."""
    prefill: RoleConfig | None = None
    decode: RoleConfig | None = None
    aggregated: RoleConfig | None = None
    placement: PlacementConfig = PlacementConfig()
    transfer: TransferConfig = TransferConfig()
    router: RouterConfig = RouterConfig()
    limits: LimitsConfig = LimitsConfig()
    events: Literal["zmq", "nats", "none"] = "zmq"
    """How KV events reach the router: straight from every rank, or by NATS, where others can listen too. `none`: it
    routes by what it routed before."""
    nats: NatsConfig | None = None
    """Left out with `events: nats`: a private server, as NatsConfig.urls says."""
    api_keys: tuple[Secret, ...] = Field(default=(), repr=False)
    """Any of these must come as `Authorization: Bearer`; empty: open."""

    @model_validator(mode="after")
    def _check_roles(self) -> DeploymentConfig:
        split = self.prefill is not None and self.decode is not None
        if self.aggregated is not None and (self.prefill is not None or self.decode is not None):
            raise ValueError("give either `aggregated`, or `prefill` and `decode`, not both")
        if self.aggregated is None and not split:
            missing = "prefill" if self.decode is not None else "decode" if self.prefill is not None else None
            raise ValueError(
                f"`{missing}` is missing beside the other role"
                if missing
                else "no workers: give `aggregated`, or `prefill` and `decode`"
            )
        return self

    @model_validator(mode="after")
    def _check_prefill_on_decode(self) -> DeploymentConfig:
        if self.router.prefill_on_decode is None:
            return self
        if self.aggregated is not None:
            raise ValueError("router.prefill_on_decode: an `aggregated` worker computes every prompt; leave it out")
        if self.backend not in PREFILLS_ON_DECODE:
            raise ValueError(
                f"router.prefill_on_decode: a decode worker of {self.backend} computes no prompt, it only takes what "
                f"prefill has computed; leave it out, or use {' or '.join(PREFILLS_ON_DECODE)}"
            )
        return self

    @model_validator(mode="after")
    def _check_events(self) -> DeploymentConfig:
        if self.nats is not None and self.events != "nats":
            raise ValueError(
                f"nats: is read with `events: nats` alone, and events is {self.events}; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_launchers(self) -> DeploymentConfig:
        possible = LAUNCHERS[self.backend]
        for role in self.roles:
            launcher = self.launcher(role)
            if launcher not in possible:
                raise ValueError(
                    f"{role.value}.launcher: {self.backend} starts by {' or '.join(possible)}; leave it out"
                )
            if role is Role.PREFILL and self.backend == "sglang" and launcher == "ray":
                raise ValueError(
                    "prefill.launcher: SGLang's Ray engine makes its bootstrap server too late for its own ranks to "
                    "register there; use processes"
                )
            ranks = self.roles[role].parallelism.num_ranks // self.roles[role].nodes
            if self.backend == "trtllm" and self.roles[role].resources.cpus < ranks:
                # Ray's default for an actor that asks for a GPU; too few, and Ray waits for ever.
                raise ValueError(
                    f"{role.value}.resources.cpus: each of TensorRT-LLM's Ray actors takes one, and a node has "
                    f"{ranks}; at least {ranks}"
                )
        return self

    @property
    def roles(self) -> dict[Role, RoleConfig]:
        """The roles that exist, in the order workers are started."""
        given = {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.AGGREGATED: self.aggregated}
        return {role: config for role, config in given.items() if config is not None}

    @property
    def nats_events(self) -> NatsConfig | None:
        """Of a deployment whose events go by NATS."""
        return (self.nats or NatsConfig()) if self.events == "nats" else None

    @property
    def given_secrets(self) -> dict[tuple[str | int, ...], str]:
        """Every secret, by its place, as it is written here."""
        nats = self.nats or NatsConfig()
        given: dict[tuple[str | int, ...], str] = {("api_keys", index): key for index, key in enumerate(self.api_keys)}
        return given | {("nats", name): value for name in ("password", "token") if (value := getattr(nats, name))}

    def launcher(self, role: Role) -> Launcher:
        """How that role's ranks are started."""
        return self.roles[role].launcher or LAUNCHERS[self.backend][0]


assert set(BACKENDS) == LAUNCHERS.keys() == set(get_args(DeploymentConfig.model_fields["backend"].annotation))
