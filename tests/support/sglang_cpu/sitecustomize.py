"""Lets SGLang run where there is no GPU: in place of libraries that have no build for CPUs, modules whose every name
can be imported and none called; and its hand-over of KV between engines finds it in the host's memory.

Python loads this by itself where its folder is on PYTHONPATH, in every process that SGLang starts too.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType
from typing import Any

ABSENT = ("torchvision", "sgl_kernel")
DISAGGREGATION = "sglang.srt.disaggregation"
REPAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    f"{DISAGGREGATION}.decode": (('["VRAM"]', '["DRAM"]'),),
    f"{DISAGGREGATION}.nixl.conn": (
        ('["VRAM"]', '["DRAM"]'),
        (', "VRAM")', ', "DRAM")'),
        ('_runs), "VRAM"', '_runs), "DRAM"'),
        ('mem_kind: str = "VRAM"', 'mem_kind: str = "DRAM"'),
        ('mem_kind != "VRAM"', 'mem_kind != "DRAM"'),
    ),
    "sglang.srt.mem_cache.pool_host.common": (
        (
            "    cudart = torch.cuda.cudart()\n    base =",
            "    if not torch.cuda.is_available():\n        return\n    cudart = torch.cuda.cudart()\n    base =",
        ),
    ),
}
"""What to replace in the source of these modules of SGLang 0.5.23, where it is found."""


class _Absent:
    """Something of such a library."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self._name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{self._name}: there is no build of it for CPUs")


class _Module(ModuleType):
    __version__ = "0.0"
    """Older than whatever is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name in REPAIRS:
            found = importlib.machinery.PathFinder.find_spec(name, path)
            if found is not None and found.origin is not None:
                found.loader = _Repaired(name, found.origin)
            return found
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Repaired(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        text = self.get_data(self.path).decode()
        for old, new in REPAIRS[fullname]:
            if old not in text:
                raise ImportError(f"{self.path}: no {old!r} to repair; is it another version?")
            text = text.replace(old, new)
        return compile(text, self.path, "exec", dont_inherit=True)


sys.meta_path.insert(0, _Finder())
