"""What an orchestrator's successor must know: the data plane's secret and the last epochs, in Ray's GCS."""

from __future__ import annotations

import secrets

from ray.experimental import internal_kv

NAMESPACE = b"dynamo_ray"
SECRET_BYTES = 32


class Memory:
    """Of one application. Every call blocks for about a millisecond."""

    def __init__(self, app: str) -> None:
        self._prefix = f"{app}/"

    def secret(self) -> bytes:
        """Made by the first that asks."""
        key = self._key("secret")
        internal_kv._internal_kv_put(key, secrets.token_bytes(SECRET_BYTES), overwrite=False, namespace=NAMESPACE)
        found: bytes = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
        return found

    def epochs(self) -> dict[str, int]:
        """The last epoch of every worker that ever had one."""
        prefix = self._key("epoch/")
        keys: list[bytes] = internal_kv._internal_kv_list(prefix, namespace=NAMESPACE)
        found = {}
        for key in keys:
            value: bytes | None = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
            if value is not None:
                found[key.removeprefix(prefix).decode()] = int(value)
        return found

    def remember_epoch(self, worker: str, epoch: int) -> None:
        internal_kv._internal_kv_put(self._key(f"epoch/{worker}"), str(epoch).encode(), namespace=NAMESPACE)

    def forget(self) -> None:
        internal_kv._internal_kv_del(self._prefix.encode(), del_by_prefix=True, namespace=NAMESPACE)

    def _key(self, name: str) -> bytes:
        return (self._prefix + name).encode()
