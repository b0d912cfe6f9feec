"""Whether a folder holds a whole model, told from names, sizes and headers alone: quick, however large it is."""

from __future__ import annotations

import json
from pathlib import Path

STATE_FOLDER = ".dynamo-ray"
"""In a model's folder: what `dynamo-ray download` keeps there."""
INCOMPLETE = "incomplete"
"""In STATE_FOLDER while a download is under way or has broken off."""
INDEX = "model.safetensors.index.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
MAX_HEADER_BYTES = 100_000_000
"""As safetensors itself limits it."""


def problem(folder: Path, weights: bool = True) -> str | None:
    """What keeps an engine from loading the model there; None where nothing is seen.

    Args:
        weights: False where the engine makes them up (`load_format: dummy`).
    """
    if not folder.is_dir():
        return f"there is no folder {folder}"
    if (folder / STATE_FOLDER / INCOMPLETE).exists():
        return f"the download into {folder} has not ended; run `dynamo-ray download` again"
    if not (folder / "config.json").is_file():
        return f"{folder} holds no config.json"
    return _weights_problem(folder) if weights else None


def _weights_problem(folder: Path) -> str | None:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{index} cannot be read: {error!r}"
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            return f"{folder} lacks {len(missing)} of {len(names)} files of weights: {', '.join(missing[:3])}"
        shards = [folder / name for name in names]
    else:
        shards = sorted(folder.glob("*.safetensors"))
        if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
            return f"{folder} holds no weights"
    return next((found for path in shards if (found := _shard_problem(path)) is not None), None)


def _shard_problem(path: Path) -> str | None:
    """By the safetensors format: 8 bytes of header length, a JSON header, and the tensors' bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            return f"{path} is no safetensors file"
        try:
            header = json.loads(file.read(length))
            end = max(
                (tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return f"{path} has {size} bytes, fewer than its header"
    expected = 8 + length + end
    return None if size == expected else f"{path} has {size} of {expected} bytes"
