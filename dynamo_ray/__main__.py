from __future__ import annotations

from dynamo_ray.cli import main

main()
