"""The core stands alone: it imports where neither Ray nor torch can be."""

from __future__ import annotations

import subprocess
import sys

CORE = """
import importlib.util, pathlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "torch", "vllm", "transformers", "nixl"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
MAY_IMPORT_RAY = ("placement.reserve", "dynamo_ray.request.ingress", "dynamo_ray.cluster", "dynamo_ray.app",
                  "dynamo_ray.cli", "dynamo_ray.__main__")
imported = 0
for root in ("placement", "backends", "dynamo_ray"):
    folder = pathlib.Path(importlib.util.find_spec(root).origin).parent
    for path in sorted(folder.rglob("*.py")):
        name = ".".join((root, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
        if not name.startswith(MAY_IMPORT_RAY):
            importlib.import_module(name)
            imported += 1
print(imported)
"""


def test_the_core_imports_without_ray_and_without_any_engine_library() -> None:
    done = subprocess.run([sys.executable, "-c", CORE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
