"""The table of vLLM's arguments, held against the vLLM that is installed."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from backends import arguments
from backends.engine import LaunchSpec, Role
from backends.vllm_args import engine_args
from dynamo_ray import recipes
from dynamo_ray.cluster.launches import first_launches

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def installed() -> arguments.Table:
    return arguments.table("vllm", arguments.check_installed("vllm", None, vllm.__version__))


def test_it_has_every_argument_that_the_engine_has_and_no_other(installed: arguments.Table) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    has = {field.name for field in dataclasses.fields(AsyncEngineArgs) if not field.name.startswith("_")}
    assert installed.fields.keys() == has


def test_what_the_adapter_starts_comes_back_from_the_engines_own_command_line(installed: arguments.Table) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    user = {"max_model_len": 512, "enforce_eager": False, "cudagraph_capture_sizes": [1, 2], "dtype": "float32"}
    spec = LaunchSpec("d", Role.DECODE, "m", "/m", attn_dp=2, moe_ep=2, engine_args=user)
    args: dict[str, Any] = engine_args(spec, on_cpu=True)
    version = arguments.check_installed("vllm", None, vllm.__version__)
    words = arguments.command_line("vllm", version, args)
    assert words[:3] == ["vllm", "serve", "/m"]
    parsed = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words[3:])
    for name, value in args.items():
        if isinstance(value, dict):
            found = dataclasses.asdict(getattr(parsed, name))
            assert {key: found[key] for key in value} == value
        elif name != "model":
            assert getattr(parsed, name) == value, name


def test_the_engines_own_parser_takes_every_recipes_command_line(installed: arguments.Table) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("--headless", action="store_true")
    taken = 0
    for recipe in recipes.read():
        config = recipe.config
        if config.backend != "vllm" or arguments.table("vllm", str(config.engine_version)) is not installed:
            continue
        for launch in (launch for role in config.roles for launch in first_launches(config, role)):
            words = [re.sub(r"<port(\+\d+)?>", "1", word) for word in launch.plan.command[3:]]
            made = AsyncEngineArgs.from_cli_args(parser.parse_args(words))
            assert made.data_parallel_size == config.roles[launch.role].parallelism.attn_dp
            taken += 1
    assert taken > 12
