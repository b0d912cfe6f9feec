"""What an engine's processes said last, and what that means: the likely cause of a failed start, and its fix.

The sentences looked for are those of SGLang 0.5.16 and 0.5.23, vLLM 0.32 and 0.33, and of the libraries below them:
torch (CUDA, c10d), NCCL, NIXL and UCX, transformers, huggingface_hub, safetensors and ZeroMQ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from backends.engine import EngineStartError, Role

NUM_QUOTED = 6
MAX_QUOTED_CHARACTERS = 400
"""Of one line."""

_ENGINES = {"simulated": "The simulated engine", "vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM"}
_MEMORY_FIELDS = {
    "vllm": "engine_args.gpu_memory_utilization",
    "sglang": "engine_args.mem_fraction_static",
    "trtllm": "engine_args.kv_cache_config.free_gpu_memory_fraction",
}
"""How much of a GPU's memory the engine takes for weights and KV, in its own words."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an engine did not start, or has ended."""

    cause: str
    """One clause; empty where the lines tell none that is known."""
    fix: str
    """One clause that names the configuration's field, where one can mend it; empty with `cause`."""
    lines: tuple[str, ...]
    """The line that told the cause, where it is not among the last, and the last ones."""

    def message(self, event: str) -> str:
        """`<event>: <cause>; <fix>. Its last lines: ...`, with what of it there is."""
        known = f": {self.cause}; {self.fix}" if self.cause else ""
        quoted = f" Its last lines: {' | '.join(self.lines)}" if self.lines else " It said nothing."
        return f"{event}{known}.{quoted}"


@dataclass(frozen=True, slots=True)
class _Sign:
    """A line that tells a cause. In `cause` and `fix`, {name} is a group of the pattern, {role} the configuration's
    section, {memory} the field for the engine's share of a GPU."""

    pattern: re.Pattern[str]
    cause: str
    fix: str


def explain(lines: Sequence[str], backend: str, role: Role) -> Failure:
    """The likely cause of a start that ended after these lines: the most specific one that any of them tells.

    Args:
        lines: what the engine said, oldest first; what its own error says belongs at the end.
        backend: chooses the field names of the fix.
        role: the configuration's section that the fix names.
    """
    lines = [line for line in lines if line.strip()]
    names = {"role": role.value, "memory": f"{role.value}.{_MEMORY_FIELDS.get(backend, 'engine_args')}"}
    for sign in _SIGNS:
        for line in reversed(lines):
            if found := sign.pattern.search(line):
                told = {name: value or "" for name, value in found.groupdict().items()} | names
                return Failure(sign.cause.format(**told), sign.fix.format(**told), _quoted(lines, line))
    return Failure("", "", _quoted(lines, None))


def start_error(lines: Sequence[str], backend: str, role: Role) -> EngineStartError:
    """The one error in which a failed start of that backend ends."""
    return EngineStartError(explain(lines, backend, role).message(f"{engine_name(backend)} did not start"))


def engine_name(backend: str) -> str:
    """As a person calls it."""
    return _ENGINES.get(backend, backend)


def _quoted(lines: Sequence[str], telling: str | None) -> tuple[str, ...]:
    last = _without_frames(lines)[-NUM_QUOTED:]
    if telling is not None and telling not in last:
        last = [telling, *last[1:]]
    return tuple(_shortened(line.strip()) for line in last)


def _without_frames(lines: Sequence[str]) -> list[str]:
    """Without where in somebody's code, which does not help who reads the configuration; all, if that is all."""
    told, code_follows = [], False
    for line in lines:
        is_frame = _FRAME.search(line) is not None
        if not is_frame and not code_follows:
            told.append(line)
        code_follows = _PYTHON_FRAME.search(line) is not None
    return told or list(lines)


def _shortened(line: str) -> str:
    return line if len(line) <= MAX_QUOTED_CHARACTERS else f"{line[: MAX_QUOTED_CHARACTERS - 3]}..."


_FRAME = re.compile(
    r'frame #\d+:|^\s*<omitting python frames>|\bFile ".*", line \d+|[\^~]{3,}\s*$|Traceback \(most recent call last\)'
)
_PYTHON_FRAME = re.compile(r'\bFile ".*", line \d+')
"""Its line of code follows."""


def _sign(pattern: str, cause: str, fix: str) -> _Sign:
    return _Sign(re.compile(pattern), cause, fix)


_MORE_GPUS = "or give the worker more GPUs ({role}.parallelism)"
_LESS_MEMORY = f"lower {{memory}}, {_MORE_GPUS}"

_MEMORY_OF_THE_CACHE = [
    _sign(
        r"max seq len \((?P<length>\d+)\).*?(?P<needed>[\d.]+) GiB KV cache is needed.*memory \((?P<room>[\d.]+) GiB\)",
        "the KV cache has room for {room} GiB, and one request of {length} tokens needs {needed} GiB",
        f"lower {{role}}.engine_args.max_model_len, raise {{memory}}, {_MORE_GPUS}",
    ),
    _sign(
        r"Loaded weights leave no GPU memory for the KV cache under --mem-fraction-static=(?P<given>[\d.]+)\. "
        r"Raise --mem-fraction-static above (?P<needed>[\d.]+)",
        "the model leaves no memory for the KV cache, with {memory} at {given}",
        f"raise it above {{needed}}, {_MORE_GPUS}",
    ),
    _sign(
        r"Not enough memory\. Please try to increase --mem-fraction-static|No available memory for the cache blocks",
        "the model leaves no memory for the KV cache",
        f"raise {{memory}}, {_MORE_GPUS}",
    ),
    _sign(
        r"Free memory on device .* less than (desired|the engine's budget)",
        "something else already uses memory of the GPU",
        "end it, or lower {memory}",
    ),
    _sign(
        r"Error: The memory capacity is unbalanced",
        "something else already uses memory of some of the GPUs",
        "end it, or set {role}.env.SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK to false",
    ),
    _sign(
        r"Capture (cuda|prefill CUDA) graph failed",
        "there was no memory left, or no support, for recording CUDA graphs",
        "lower {memory}, or {role}.engine_args.cuda_graph_max_bs_decode",
    ),
    _sign(
        r"CUDA out of memory occurred when warming up",
        "the GPU's memory does not hold as many requests at once as are allowed",
        "lower {role}.engine_args.max_num_seqs or {memory}",
    ),
    _sign(
        r"Failed to load model - not enough GPU memory",
        "the model's weights do not fit into the GPU's memory",
        "give the worker more GPUs ({role}.parallelism), or use a quantised model (model.path)",
    ),
]

_MEMORY = [
    _sign(
        r"Insufficient space in /dev/shm|creating shared memory segment /dev/shm|allocate shared memory\(shm\)"
        r"|posix_fallocate failed : No space left|/dev/shm/\S+.*No space left|insufficient shared memory \(shm\)",
        "/dev/shm is too small",
        "give the node's container a larger one (--shm-size, or in Kubernetes an emptyDir with `medium: Memory`)",
    ),
    _sign(
        r"CUDA out of memory\. Tried to allocate (?P<asked>[\d.]+ \w+)",
        "the GPU's memory does not hold {asked} more",
        _LESS_MEMORY,
    ),
    _sign(
        r"CUDA out of memory|CUDA error: out of memory|Cuda failure.* 'out of memory'|\[CUDA\]: out of memory"
        r"|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation",
        "the GPU's memory is full",
        _LESS_MEMORY,
    ),
    _sign(
        r"DefaultCPUAllocator: can't allocate memory|Cannot allocate memory|^MemoryError|\bMemoryError: "
        r"|less than desired CPU memory utilization|running low on memory|std::bad_alloc",
        "the node's memory is full",
        "raise {role}.resources.memory_gib so that it gets a node with more, or lower {memory} where it runs on CPU",
    ),
]

_PORTS = [
    _sign(
        r"(?P<what>\w+) at (?P<port>\d+) is not available in \d+ seconds",
        "port {port} ({what}) is taken on its node",
        "end what listens there; a port that {role}.engine_args gives had better be left out",
    ),
    _sign(
        r"Address already in use \(addr='tcp://\S+:(?P<port>\d+)'"
        r"|failed to listen on .* port: (?P<other>\d+).*EADDRINUSE"
        r"|_port (?P<third>\d+) is already in use|bind on address \('[^']+', (?P<fourth>\d+)",
        "port {port}{other}{third}{fourth} is taken on its node",
        "end what listens there; a port that {role}.engine_args gives had better be left out",
    ),
    _sign(
        r"EADDRINUSE|[Aa]ddress already in use|Port is already in use\.",
        "a port that it needs is taken on its node",
        "end what listens there; a port that {role}.engine_args gives had better be left out",
    ),
]

_MODEL = [
    _sign(
        r"gated repo|Access to model .* is restricted|401 Client Error",
        "the model is not on the node, and Hugging Face gives it only to those who were granted access",
        "set model.path to a folder that every node can read, or {role}.env.HF_TOKEN",
    ),
    _sign(
        r"offline mode is enabled|couldn't connect to '?https?://|LocalEntryNotFoundError"
        r"|is not a local folder and is not a valid model identifier|Cannot reach https?://",
        "the model is not on the node, and could not be fetched from Hugging Face",
        "set model.path to a folder that every node can read",
    ),
    _sign(
        r"references (?P<count>\d+) shard file\(s\) missing from (?P<folder>\S+)",
        "{count} files of the model's weights are missing in {folder}",
        "copy the whole model there, on every node (model.path)",
    ),
    _sign(
        r"SafetensorError|Error while deserializing header|PytorchStreamReader failed|invalid load key",
        "a file of the model's weights is damaged or was not copied whole",
        "copy the model again, on every node (model.path)",
    ),
    _sign(
        r"Cannot find any (?:safetensors )?model weights with [`'](?P<folder>[^`']+)"
        r"|No model weights found in: [`'](?P<other>[^`']+)",
        "there are no weights in {folder}{other}",
        "copy them there, on every node (model.path)",
    ),
    _sign(
        r"weights were not initialized from checkpoint",
        "the model's weights do not hold all that its config.json promises",
        "copy the model again, on every node (model.path)",
    ),
    _sign(
        r"Invalid repository ID or local directory specified: '(?P<folder>[^']+)"
        r"|Repo id must be in the form .*: '(?P<other>[^']+)"
        r"|(?P<third>\S+) does not appear to have a file named config\.json"
        r"|No such file or directory: '(?P<fourth>[^']*)/config\.json",
        "{folder}{other}{third}{fourth} is no folder with a model's config.json on its node",
        "set model.path to one that every node can read",
    ),
    _sign(
        r"Model architectures? \[?'?(?P<name>\w+).* (?:not supported|failed to be inspected)"
        r"|model type `(?P<other>[^`]+)` but Transformers does not recognize",
        "this version of the engine does not know the model's architecture, {name}{other}",
        "use a newer one (engine_version), another `backend`, or another model.path",
    ),
    _sign(
        r"Unrecognized model in (?P<folder>.+?)\. Should have a `model_type`",
        "config.json in {folder} is missing or does not say what model it is",
        "set model.path to a folder with the model's own config.json",
    ),
]

_DEVICES = [
    _sign(
        r"driver version is insufficient|driver on your system is too old|forward compatibility was attempted"
        r"|Driver/library version mismatch|cudaErrorSystemDriverMismatch",
        "the node's NVIDIA driver does not fit the CUDA that the engine was built for",
        "update the driver, or install a build of the engine for this one",
    ),
    _sign(
        r"no kernel image is available for execution",
        "this build of the engine has no code for the node's GPU",
        "install a build that has, or choose other GPUs (accelerator)",
    ),
    _sign(
        r"system not yet initialized|Error 802",
        "the node's NVSwitch is not up",
        "start nvidia-fabricmanager on it",
    ),
    _sign(
        r"invalid device ordinal",
        "the engine wants a GPU that it was not given",
        "give each node as many GPUs as it has ranks; with `launcher: ray` set "
        "{role}.env.RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES to 1",
    ),
    _sign(
        r"No CUDA GPUs are available|Found no NVIDIA driver|no CUDA-capable device|Failed to infer device type"
        r"|libcuda\.so\S*: cannot open|not compiled with CUDA|NVML Shared Library Not Found",
        "the engine sees no GPU on its node",
        "set `accelerator` to a type that the cluster has, and install the driver and a GPU build of the engine there",
    ),
]

_TRANSFER = [
    _sign(
        r"NIXL is not available|Please install NIXL|No module named '?nixl",
        "NIXL, which hands over the KV, is not installed on its node",
        "install `nixl` there, in the version the engine names",
    ),
    _sign(
        r"NIXL backend '(?P<name>\w+)' not found|createBackend: unsupported backend '(?P<other>\w+)'"
        r"|backend (?:creation failed|initialization error) for '(?P<third>\w+)",
        "NIXL cannot use {name}{other}{third} on its node",
        "install that plugin's libraries there, or choose another backend in {role}.env",
    ),
    _sign(
        r"Failed to create UCX|nixlBackendError|NIXL_ERR_BACKEND|NIXL create_backend\(",
        "UCX, over which NIXL hands over the KV, found no usable network on its node",
        "name the devices in {role}.env.UCX_NET_DEVICES, or the transports in {role}.env.UCX_TLS",
    ),
]

_NETWORK = [
    _sign(
        r"no socket interface found",
        "NCCL found no network interface on its node",
        "name it in {role}.env.NCCL_SOCKET_IFNAME",
    ),
    _sign(
        r"Timed out after \d+ seconds waiting for clients\. (?P<here>\d+)/(?P<all>\d+) clients joined",
        "only {here} of the worker's {all} ranks found each other",
        "see what the other nodes said, and let the nodes reach each other on all ports",
    ),
    _sign(
        r"client socket has timed out after .* connect to \((?P<address>[^)]+)\)|Gloo connectFullMesh failed",
        "a rank did not reach the worker's first node {address}",
        "let the nodes reach each other on all ports; an interface is named in {role}.env.GLOO_SOCKET_IFNAME",
    ),
    _sign(
        r"Watchdog caught collective operation timeout|ncclRemoteError|NCCL.*timed? ?out",
        "the worker's ranks stopped hearing of each other",
        "see what the other nodes said; {role}.env.NCCL_DEBUG=INFO tells more",
    ),
    _sign(
        r"unhandled system error|ncclSystemError|unhandled cuda error|ncclUnhandledCudaError|ncclInternalError"
        r"|NCCL error",
        "NCCL could not connect the worker's ranks",
        "set {role}.env.NCCL_DEBUG to INFO to see why; often NCCL_SOCKET_IFNAME or NCCL_IB_HCA must be named there",
    ),
]

_NODE = [
    _sign(
        r"ModuleNotFoundError: No module named '(?P<name>[^']+)'",
        "the Python package {name} is not installed on its node",
        "install it there, in the version the engine asks for",
    ),
    _sign(
        r"(?:ImportError|OSError): (?P<name>lib\S+): cannot open shared object file",
        "the library {name} is not installed on its node",
        "install it there, or put its folder into {role}.env.LD_LIBRARY_PATH",
    ),
    _sign(
        r"(?:ImportError|OSError): .*(?:undefined symbol|version `?\w+_[\d.]+'? not found)",
        "libraries of different versions are mixed on its node",
        "install the engine afresh there, with the torch and CUDA that it names",
    ),
    _sign(
        r"Permission denied: '(?P<path>[^']+)'",
        "{path} may not be read or written on its node",
        "give the user that Ray runs as the rights, or name another folder",
    ),
    _sign(
        r"No space left on device",
        "a disk of its node is full",
        "free some room there; caches of compiled kernels may be moved with {role}.env",
    ),
    _sign(
        r"was killed by SIGKILL",
        "one of its processes was killed from outside, most likely by the kernel for want of memory",
        "raise {role}.resources.memory_gib so that it gets a node with more",
    ),
]

_SIGNS = [*_MEMORY_OF_THE_CACHE, *_MEMORY, *_PORTS, *_MODEL, *_DEVICES, *_TRANSFER, *_NETWORK, *_NODE]
"""The most specific first: a full GPU makes NCCL fail too, and a missing libcuda is no library to install."""
