"""A CustomResourceDefinition -> a strict JSON schema: what an API server would silently drop is an error in it.

    python -m dynamo_ray.kubernetes.derive FOLDER SOURCE CRD.yaml VERSION ...

writes FOLDER/<kind>-<version>.json for each CRD and API version named. SOURCE says where the CRDs are from, e.g.
"KubeRay v1.7.0". Descriptions are left out and equal parts are written once, so that a megabyte becomes kilobytes.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]

_KEPT = ("enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "minProperties")
_SHARED_LENGTH = 80
"""JSON characters from which an equal part is worth a definition of its own."""


def strict(crd: Schema, version: str) -> Schema:
    """The schema of that version's objects; `metadata` is left to core Kubernetes, `status` is not for users.

    A field with a default is not required: the API server fills it in before it validates.

    Raises:
        KeyError: The CRD has no such version.
    """
    found = {entry["name"]: entry for entry in crd["spec"]["versions"]}[version]
    converted = _converted(found["schema"]["openAPIV3Schema"])
    properties = converted["properties"]
    properties["apiVersion"] = {"const": f"{crd['spec']['group']}/{version}"}
    properties["kind"] = {"const": crd["spec"]["names"]["kind"]}
    properties["metadata"] = {"type": "object"}
    properties.pop("status", None)
    converted["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return shared(converted)


def _converted(node: Schema) -> Schema:
    if node.get("x-kubernetes-int-or-string"):
        pattern = {"pattern": node["pattern"]} if "pattern" in node else {}
        return {"type": ["integer", "string"], **pattern}
    if node.get("x-kubernetes-preserve-unknown-fields"):
        return {"type": node["type"]} if "type" in node else {}
    made: Schema = {key: node[key] for key in _KEPT if key in node}
    if "type" in node:
        made["type"] = [node["type"], "null"] if node.get("nullable") else node["type"]
    if "items" in node:
        made["items"] = _converted(node["items"])
    if isinstance(node.get("additionalProperties"), dict):
        made["additionalProperties"] = _converted(node["additionalProperties"])
    if "properties" in node:
        made["properties"] = {name: _converted(inner) for name, inner in node["properties"].items()}
        made["additionalProperties"] = False
        required = [name for name in node.get("required", ()) if "default" not in node["properties"].get(name, {})]
        if required:
            made["required"] = required
    return made


def shared(schema: Schema) -> Schema:
    """The same schema with equal parts under `$defs`."""
    seen: Counter[str] = Counter()
    _count(schema, seen)
    names: dict[str, str] = {}
    definitions: dict[str, Schema] = {}

    def replaced(node: Any, top: bool = False) -> Any:
        if isinstance(node, list):
            return [replaced(item) for item in node]
        if not isinstance(node, dict):
            return node
        key = _key(node)
        # A property may itself be called `type`; then what it holds is a schema.
        if not top and isinstance(node.get("type"), str | list) and seen[key] > 1 and len(key) >= _SHARED_LENGTH:
            if key not in names:
                names[key] = str(len(names))
                definitions[names[key]] = replaced(node, top=True)
            return {"$ref": f"#/$defs/{names[key]}"}
        return {name: replaced(inner) for name, inner in node.items()}

    made: Schema = replaced(schema, top=True)
    return {**made, "$defs": definitions}


def _count(node: Any, seen: Counter[str]) -> None:
    if isinstance(node, dict):
        key = _key(node)
        seen[key] += 1
        if seen[key] > 1:
            return  # what is inside is written once, with it
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _count(inner, seen)


def _key(node: Schema) -> str:
    return json.dumps(node, sort_keys=True)


def main(folder: Path, source: str, *files_and_versions: str) -> None:
    for file, version in zip(files_and_versions[::2], files_and_versions[1::2], strict=True):
        crd = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        schema = {"$comment": f"derived from {source}, {Path(file).name}", **strict(crd, version)}
        kind = crd["spec"]["names"]["kind"].lower()
        written = json.dumps(schema, sort_keys=True, separators=(",", ":"))
        (folder / f"{kind}-{version}.json").write_text(written + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
