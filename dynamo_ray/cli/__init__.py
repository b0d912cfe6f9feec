"""The `dynamo-ray` commands: one module each, and what they share."""

from __future__ import annotations


def main() -> None:
    """The console script; see `dynamo_ray.cli.commands.main`."""
    from dynamo_ray.cli import commands

    commands.main()
