"""Reads from SGLang's source, without importing it, what its double must look like.

    python tests/support/record_sglang.py SITE_PACKAGES... > tests/contract/recorded/sglang_signatures.json

Each SITE_PACKAGES is a folder in which one version of the wheel was unpacked (`pip install --no-deps --target`).
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CALLED: dict[str, tuple[str, ...]] = {
    "srt/entrypoints/engine.py": (
        "init_tokenizer_manager",
        "Engine.__init__",
        "Engine.get_all_child_pids",
        "Engine.shutdown",
    ),
    "srt/disaggregation/kv_events.py": ("ZmqEventPublisher.publish",),
    "srt/managers/scheduler.py": ("run_scheduler_process",),
    "srt/managers/detokenizer_manager.py": ("run_detokenizer_process",),
    "srt/managers/data_parallel_controller.py": ("run_data_parallel_controller_process",),
    "srt/managers/tokenizer_manager.py": (
        "TokenizerManager.__init__",
        "TokenizerManager.generate_request",
        "TokenizerManager.abort_request",
        "TokenizerManager.auto_create_handle_loop",
        "TokenizerManager.freeze_gc",
        "TokenizerManager.pause_generation",
        "TokenizerManager.continue_generation",
        "TokenizerManager.update_weights_from_disk",
    ),
    "srt/managers/tokenizer_control_mixin.py": (
        "TokenizerControlMixin.release_memory_occupation",
        "TokenizerControlMixin.resume_memory_occupation",
    ),
}
"""Functions, by the file that defines them."""
FIELDS: dict[str, tuple[str, ...]] = {
    "srt/managers/io_struct.py": (
        "GenerateReqInput",
        "PauseGenerationReqInput",
        "ContinueGenerationReqInput",
        "FlushCacheReqInput",
        "UpdateWeightFromDiskReqInput",
        "ReleaseMemoryOccupationReqInput",
        "ResumeMemoryOccupationReqInput",
    ),
    "srt/managers/load_snapshot.py": ("LoadSnapshot", "DisaggregationMetrics"),
    "srt/sampling/sampling_params.py": ("SamplingParams",),
    "srt/disaggregation/kv_events.py": (
        "EventBatch",
        "KVCacheEvent",
        "BlockStored",
        "BlockRemoved",
        "AllBlocksCleared",
        "KVEventsConfig",
    ),
    "srt/server_args.py": ("ServerArgs", "PortArgs"),
}
"""Classes whose fields are data."""


def record(package: Path) -> dict[str, Any]:
    """Of one unpacked version; `package` is its folder `sglang`."""
    functions, fields, options, defaults = {}, {}, {}, {}
    for path, names in CALLED.items():
        tree = _parse(package / path)
        functions |= {name: _signature(_find(tree, name)) for name in names if _find(tree, name) is not None}
    for path, names in FIELDS.items():
        tree = _parse(package / path)
        for name in names:
            node = _find(tree, name)
            assert isinstance(node, ast.ClassDef), name
            fields[name] = _fields(node)
            defaults[name] = [each.target.id for each in _declared(node) if each.value is not None]
            options[name] = sorted(k.arg for k in node.keywords if k.arg and getattr(k.value, "value", None) is True)
    for group in sorted((package / "srt/arg_groups/fields").glob("*.py")):
        fields["ServerArgs"] += [each for node in _classes(_parse(group)) for each in _fields(node)]
    fields["ServerArgs"] = sorted({name for name in fields["ServerArgs"] if not name.startswith("_")})
    manager = _parse(package / "srt/managers/tokenizer_manager.py")
    mixin = _parse(package / "srt/managers/tokenizer_control_mixin.py")
    filling = ("_handle_batch_output", "convert_logprob_style", "add_logprob_to_meta_info")
    return {
        "functions": functions,
        "fields": fields,
        "class_options": {name: given for name, given in options.items() if given},
        "event_defaults": {name: defaults[name] for name in ("EventBatch", "BlockStored", "BlockRemoved")},
        "manager": sorted(
            {
                *_names(_find(manager, "TokenizerManager")),
                *_names(_find(mixin, "TokenizerControlMixin")),
                *_communicators(mixin),
            }
        ),
        "engine": sorted(_names(_find(_parse(package / "srt/entrypoints/engine.py"), "Engine"))),
        "finish_reasons": _finish_reasons(_parse(package / "srt/managers/schedule_batch.py")),
        "request_state": _fields(_find(manager, "ReqState")),
        "meta_info": sorted({k for n in filling for k in _keys_of_meta_info(_find(manager, f"TokenizerManager.{n}"))}),
        "fake_bootstrap_host": _constant(_parse(package / "srt/disaggregation/utils.py"), "FAKE_BOOTSTRAP_HOST"),
    }


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _classes(tree: ast.AST) -> list[ast.ClassDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def _find(tree: ast.AST, name: str) -> Any:
    """A function, a class, or a class's function."""
    head, _, rest = name.partition(".")
    for node in ast.iter_child_nodes(tree):
        if getattr(node, "name", None) == head:
            return _find(node, rest) if rest else node
    return None


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[list[Any]]:
    """[name, kind, whether it has a default] each."""
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    first_default = len(positional) - len(args.defaults)
    made: list[list[Any]] = [[arg.arg, "positional", i >= first_default] for i, arg in enumerate(positional)]
    made += [
        [arg.arg, "keyword", default is not None]
        for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    return made + ([[args.kwarg.arg, "rest", True]] if args.kwarg else [])


def _declared(node: ast.ClassDef) -> list[Any]:
    return [each for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)]


def _fields(node: ast.ClassDef) -> list[str]:
    return [each.target.id for each in _declared(node)]


def _names(node: ast.ClassDef) -> set[str]:
    """Its functions, and the attributes that they give it."""
    given = {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute)
        and isinstance(each.ctx, ast.Store)
        and getattr(each.value, "id", "") == "self"
    }
    return given | {each.name for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}


def _communicators(tree: ast.AST) -> set[str]:
    """The attributes that it makes of a list of (name, class of the answers)."""
    pairs = [each.elts for each in ast.walk(tree) if isinstance(each, ast.Tuple) and len(each.elts) >= 2]
    return {
        f"{name.value}_communicator"
        for name, answer, *_ in pairs
        if isinstance(getattr(name, "value", None), str) and isinstance(answer, ast.Name)
    }


def _finish_reasons(tree: ast.Module) -> dict[str, list[str]]:
    """The keys of each kind, by its type; a type that several give has those of the first."""
    found: dict[str, list[str]] = {}
    for node in _classes(tree):
        method = _find(node, "to_json")
        for each in ast.walk(method) if method is not None else ():
            if isinstance(each, ast.Return) and isinstance(each.value, ast.Dict):
                keys = [key.value for key in each.value.keys]
                found.setdefault(each.value.values[keys.index("type")].value, keys)
    return found


def _keys_of_meta_info(node: ast.AST) -> Iterator[str]:
    """Keys of the dictionaries that are meta_info or are merged into it."""
    for each in ast.walk(node):
        target = getattr(each, "targets", [None])[0]
        if isinstance(target, ast.Name) and target.id == "meta_info" and isinstance(each.value, ast.Dict):
            yield from (key.value for key in each.value.keys)
        is_item = isinstance(target, ast.Subscript) and getattr(target.value, "id", "") == "meta_info"
        if is_item and isinstance(target.slice, ast.Constant):
            yield target.slice.value
        if isinstance(each, ast.Call) and ast.unparse(each.func) == "meta_info.update":
            yield from (key.value for arg in each.args if isinstance(arg, ast.Dict) for key in arg.keys)


def _constant(tree: ast.Module, name: str) -> Any:
    return next(
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name
    )


def _version(site: Path) -> str:
    (metadata,) = site.glob("sglang-*.dist-info")
    return metadata.name.removeprefix("sglang-").removesuffix(".dist-info")


if __name__ == "__main__":
    recorded = {_version(Path(site)): record(Path(site) / "sglang") for site in sys.argv[1:]}
    print(json.dumps(recorded, indent=None, separators=(",", ":"), sort_keys=True))
