"""`dynamo-ray`: validate, plan, flags, up, status, control, down, model."""

from __future__ import annotations


def main() -> None:
    """The console script; see `dynamo_ray.cli.commands.main`."""
    from dynamo_ray.cli import commands

    commands.main()
