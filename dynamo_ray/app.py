"""What `serve run` imports: build(args) -> the application of one deployment.

No postponed annotations here: Serve validates `args` against what `build` is annotated with, and takes only a class.
"""

import logging
import os

from ray import serve

from dynamo_ray import config_file, models
from dynamo_ray.cluster import orchestrator
from dynamo_ray.config import HAPROXY_ENVIRONMENT, DeploymentConfig
from dynamo_ray.errors import ConfigError, Problem
from dynamo_ray.request import ingress

log = logging.getLogger("ray.serve")


def build(args: DeploymentConfig) -> serve.Application:
    """The ingress in front of an orchestrator that starts the workers; `args` is what stands under `args:`.

    Raises:
        ConfigError: Its engines would not take the arguments they are given, or it names no NATS server.
        ModelError: The model is one that a command makes, and is not there; names the command.
    """
    config_file.check_engines(args)
    if args.nats_events is not None and not args.nats_events.urls:
        raise ConfigError((Problem("nats.urls", "missing: only `dynamo-ray up` starts a server; name yours here"),))
    key = models.key_of(args.model.folder)
    if key is not None and not args.model.folder.is_dir():
        raise models.ModelError(f"{args.model.folder} is missing; make it with `dynamo-ray model {key}`")
    if any(os.environ.get(name) != value for name, value in HAPROXY_ENVIRONMENT.items()):
        wanted = " ".join(f"{name}={value}" for name, value in HAPROXY_ENVIRONMENT.items())
        log.warning(
            "Serve's default proxy costs about 5 ms of CPU a request, HAProxy mode 0.3 ms; "
            f"to have it, set {wanted} on every node before Ray starts. `dynamo-ray up` does."
        )
    return ingress.application(args, orchestrator.application(args))
