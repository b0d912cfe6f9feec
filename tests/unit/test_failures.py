"""What an engine said last, and the cause and fix that are read from it."""

from __future__ import annotations

import pickle

import pytest

from backends.engine import EngineStartError, Role
from backends.failures import MAX_QUOTED_CHARACTERS, NUM_QUOTED, Failure, explain, start_error

RECORDED: list[tuple[str, str, str, str]] = [
    # backend, line, words of the cause, the field or thing that the fix names
    (
        "sglang",
        "ValueError: Loaded weights leave no GPU memory for the KV cache under --mem-fraction-static=0.01. Raise "
        "--mem-fraction-static above 0.079 (minimum viable = 1 - available/pre = 0.0786). If using speculative "
        "decoding, draft weights are now counted.",
        "no memory for the KV cache, with decode.engine_args.mem_fraction_static at 0.01",
        "raise it above 0.079, or give the worker more GPUs (decode.parallelism)",
    ),
    (
        "sglang",
        "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. Current value: "
        "mem_fraction_static=0.3",
        "no memory for the KV cache",
        "raise decode.engine_args.mem_fraction_static",
    ),
    (
        "vllm",
        "(EngineCore pid=71) ValueError: No available memory for the cache blocks. Try increasing "
        "`gpu_memory_utilization` when initializing the engine.",
        "no memory for the KV cache",
        "raise decode.engine_args.gpu_memory_utilization",
    ),
    (
        "vllm",
        "ValueError: To serve at least one request with the model's max seq len (163840), (10.31 GiB KV cache is "
        "needed, which is larger than the available KV cache memory (4.5 GiB). Based on the available memory, ...",
        "room for 4.5 GiB, and one request of 163840 tokens needs 10.31 GiB",
        "decode.engine_args.max_model_len",
    ),
    (
        "vllm",
        "ValueError: Free memory on device cuda:0 (11.2/79.11 GiB) on startup is less than desired GPU memory "
        "utilization (0.9, 71.2 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        "something else already uses",
        "decode.engine_args.gpu_memory_utilization",
    ),
    (
        "sglang",
        "RuntimeError: The memory capacity is unbalanced. Some GPUs may be occupied by other processes. "
        "pre_model_load_memory=12.1, local_gpu_memory=78.6, local_gpu_memory * 0.9=70.74",
        "some of the GPUs",
        "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK",
    ),
    (
        "sglang",
        "Exception: Capture cuda graph failed: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "CUDA graphs",
        "decode.engine_args.cuda_graph_max_bs_decode",
    ),
    (
        "sglang",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 896.00 MiB. GPU 0 has a total capacity of "
        "79.11 GiB of which 512.00 MiB is free.",
        "does not hold 896.00 MiB more",
        "lower decode.engine_args.mem_fraction_static",
    ),
    (
        "vllm",
        "RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try "
        "lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine.",
        "as many requests at once",
        "decode.engine_args.max_num_seqs",
    ),
    (
        "vllm",
        "Failed to load model - not enough GPU memory. Try lowering --gpu-memory-utilization to free memory",
        "weights do not fit",
        "decode.parallelism",
    ),
    (
        "trtllm",
        "h100-3:812:812 [0] enqueue.cc:1402 NCCL WARN Cuda failure 2 'out of memory'",
        "GPU's memory is full",
        "decode.engine_args.kv_cache_config.free_gpu_memory_fraction",
    ),
    (
        "vllm",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 4000000000000000 bytes. Error code 12 (Cannot allocate memory)",
        "node's memory is full",
        "decode.resources.memory_gib",
    ),
    (
        "vllm",
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. "
        "port: 34531, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
        "port 34531 is taken",
        "end what listens there",
    ),
    (
        "vllm",
        "zmq.error.ZMQError: Address already in use (addr='tcp://10.0.0.7:5557')",
        "port 5557 is taken",
        "end what listens there",
    ),
    (
        "sglang",
        "ValueError: nccl_port at 23417 is not available in 30 seconds. nccl_port is used by a process already.",
        "port 23417 (nccl_port) is taken",
        "end what listens there",
    ),
    (
        "sglang",
        "RuntimeError: engine_info_bootstrap_port 6789 is already in use. Set a different port",
        "port 6789 is taken",
        "end what listens there",
    ),
    (
        "sglang",
        "ERROR: [Errno 98] error while attempting to bind on address ('10.0.0.7', 8998): address already in use",
        "port 8998 is taken",
        "end what listens there",
    ),
    ("sglang", "OSError: [Errno 98] Address already in use", "a port that it needs is taken", "end what listens"),
    (
        "sglang",
        "OSError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/models/nope'. Use `repo_type`",
        "/models/nope is no folder with a model's config.json",
        "model.path",
    ),
    (
        "vllm",
        "ValueError: Invalid repository ID or local directory specified: '/models/nope'.",
        "/models/nope is no folder with a model's config.json",
        "model.path",
    ),
    (
        "sglang",
        "OSError: /models/r1 does not appear to have a file named config.json. Checkout 'https://huggingface.co/...",
        "/models/r1 is no folder with a model's config.json",
        "model.path",
    ),
    (
        "vllm",
        "ValueError: Unrecognized model in /models/r1. Should have a `model_type` key in its config.json.",
        "config.json in /models/r1 is missing",
        "model.path",
    ),
    (
        "sglang",
        "RuntimeError: Cannot find any model weights with `/models/r1`",
        "no weights in /models/r1",
        "model.path",
    ),
    (
        "sglang",
        "RuntimeError: model.safetensors.index.json references 3 shard file(s) missing from /models/r1 (incomplete "
        "download?): ['model-00004-of-000163.safetensors']",
        "3 files of the model's weights are missing in /models/r1",
        "model.path",
    ),
    (
        "vllm",
        "safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, file not fully "
        "covered",
        "damaged or was not copied whole",
        "model.path",
    ),
    (
        "vllm",
        "ValueError: Model architectures ['NopeForCausalLM'] are not supported for now. Supported architectures: "
        "dict_keys(['LlamaForCausalLM'])",
        "architecture, NopeForCausalLM",
        "engine_version",
    ),
    (
        "sglang",
        "ValueError: The checkpoint you are trying to load has model type `nope` but Transformers does not recognize "
        "this architecture.",
        "architecture, nope",
        "engine_version",
    ),
    (
        "vllm",
        "Cannot access gated repo for url https://huggingface.co/api/models/a/b.",
        "granted access",
        "decode.env.HF_TOKEN",
    ),
    (
        "vllm",
        "OfflineModeIsEnabled: Cannot reach https://huggingface.co/a/b: offline mode is enabled.",
        "could not be fetched",
        "model.path",
    ),
    ("sglang", "RuntimeError: No CUDA GPUs are available", "sees no GPU", "accelerator"),
    ("vllm", "ImportError: libcuda.so.1: cannot open shared object file: No such file", "sees no GPU", "accelerator"),
    ("vllm", "AssertionError: Torch not compiled with CUDA enabled", "sees no GPU", "accelerator"),
    (
        "sglang",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12020).",
        "driver does not fit",
        "update the driver",
    ),
    (
        "sglang",
        "torch.AcceleratorError: CUDA error: invalid device ordinal",
        "GPU that it was not given",
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES",
    ),
    (
        "sglang",
        "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device",
        "no code for the node's GPU",
        "accelerator",
    ),
    (
        "sglang",
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
        "NVSwitch is not up",
        "nvidia-fabricmanager",
    ),
    (
        "vllm",
        "RuntimeError: Insufficient space in /dev/shm for shared-memory allocation: 240 MiB required, 64 MiB free.",
        "/dev/shm is too small",
        "--shm-size",
    ),
    (
        "sglang",
        "h100-3:1:90 [0] misc/shmutils.cc:72 NCCL WARN Error: failed to extend /dev/shm/nccl-9a2XyZ to 33030532 "
        "bytes, error: No space left on device (28)",
        "/dev/shm is too small",
        "--shm-size",
    ),
    ("vllm", "RuntimeError: NIXL is not available", "is not installed", "`nixl`"),
    (
        "vllm",
        "E1125 14:43:46.019442   11973 nixl_agent.cpp:334] createBackend: unsupported backend 'GDS_MT'",
        "NIXL cannot use GDS_MT",
        "decode.env",
    ),
    (
        "sglang",
        "E1125 14:43:46.019442   11973 ucx_utils.cpp:531] Failed to create UCX context: No such device",
        "UCX",
        "decode.env.UCX_NET_DEVICES",
    ),
    ("sglang", "nixl_cu13._bindings.nixlBackendError: NIXL_ERR_BACKEND", "UCX", "decode.env.UCX_NET_DEVICES"),
    (
        "sglang",
        "h100-3:1:1 [0] bootstrap.cc:93 NCCL WARN Bootstrap : no socket interface found",
        "no network interface",
        "decode.env.NCCL_SOCKET_IFNAME",
    ),
    (
        "sglang",
        "torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
        "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9",
        "NCCL could not connect",
        "decode.env.NCCL_DEBUG",
    ),
    (
        "vllm",
        "torch.distributed.DistStoreError: Timed out after 601 seconds waiting for clients. 3/4 clients joined.",
        "only 3 of the worker's 4 ranks",
        "all ports",
    ),
    (
        "vllm",
        "torch.distributed.DistNetworkError: The client socket has timed out after 600000ms while trying to connect "
        "to (10.0.0.7, 21001).",
        "first node 10.0.0.7, 21001",
        "all ports",
    ),
    (
        "sglang",
        "[rank2]:[E1125 ProcessGroupNCCL.cpp:685] [Rank 2] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=1, OpType=ALLREDUCE) ran for 600005 milliseconds before timing out.",
        "stopped hearing of each other",
        "decode.env.NCCL_DEBUG",
    ),
    ("sglang", "ModuleNotFoundError: No module named 'deep_ep'", "package deep_ep is not installed", "install it"),
    (
        "sglang",
        "ImportError: libnvshmem_host.so.3: cannot open shared object file: No such file or directory",
        "library libnvshmem_host.so.3",
        "decode.env.LD_LIBRARY_PATH",
    ),
    (
        "sglang",
        "ImportError: /site/sgl_kernel/common_ops.abi3.so: undefined symbol: _ZN3c104cuda9SetDeviceEab",
        "different versions",
        "install the engine afresh",
    ),
    (
        "vllm",
        "PermissionError: [Errno 13] Permission denied: '/models/r1/config.json'",
        "/models/r1/config.json may not be read",
        "the rights",
    ),
    ("vllm", "OSError: [Errno 28] No space left on device", "disk of its node is full", "free some room"),
    ("vllm", "EngineCore_DP0 (pid 71) was killed by SIGKILL", "killed from outside", "decode.resources.memory_gib"),
]


@pytest.mark.parametrize(("backend", "line", "cause", "fix"), RECORDED, ids=[line[:50] for _, line, _, _ in RECORDED])
def test_a_recorded_line_tells_its_cause_and_the_fix(backend: str, line: str, cause: str, fix: str) -> None:
    before = ["Loading safetensors checkpoint shards:  50% Completed | 2/4", "INFO Init torch distributed begin."]
    after = ["RuntimeError: Engine core initialization failed. See root cause above."]
    failure = explain([*before, line, *after], backend, Role.DECODE)
    assert cause in failure.cause
    assert fix in failure.fix
    assert "{" not in failure.cause + failure.fix


def test_what_is_no_failure_tells_no_cause() -> None:
    harmless = [
        "[2026-11-25 14:00:00] Port 30000 is already in use, trying port 30001",
        "WARNING The memory capacity is unbalanced. Some GPUs may be occupied by other processes.",
        'INFO Failed to import from vllm._C with ModuleNotFoundError("No module named vllm._C")',
        "INFO NIXL KVManager initialized with backend: UCX",
        "INFO KV cache size: 1,024 tokens",
    ]
    assert explain(harmless, "sglang", Role.PREFILL) == Failure("", "", tuple(harmless))


def test_a_full_gpu_is_told_before_what_follows_from_it() -> None:
    lines = [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "torch.distributed.DistBackendError: NCCL error in: ncclRemoteError",
        "EngineCore_DP1 (pid 71) was killed by SIGKILL",
    ]
    assert "does not hold 2.00 GiB more" in explain(lines, "vllm", Role.AGGREGATED).cause


def test_stack_frames_are_not_quoted_but_the_telling_line_is() -> None:
    telling = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    frames = [
        f"frame #{i}: <unknown function> + 0x163b752 (0x7fa0eac3b752 in libtorch_cpu.so)" for i in range(NUM_QUOTED)
    ]
    frames += [
        "(EngineCore pid=71) ERROR 11-25 Traceback (most recent call last):",
        '(EngineCore pid=71) ERROR 11-25   File "/site/sglang/srt/managers/scheduler.py", line 2913, in run',
        "(EngineCore pid=71) ERROR 11-25     self.step()",
        "(EngineCore pid=71) ERROR 11-25     ~~~~~~~~~^^",
        "",
    ]
    ends = [f"rank {i} ended" for i in range(NUM_QUOTED)]
    failure = explain([telling, *frames, *ends], "sglang", Role.DECODE)
    assert failure.lines == (telling, *ends[1:])


def test_a_long_line_is_cut() -> None:
    (line,) = explain(["x" * 5000], "vllm", Role.DECODE).lines
    assert len(line) == MAX_QUOTED_CHARACTERS
    assert line.endswith("...")


def test_the_error_reads_as_one_sentence_and_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(start_error(["RuntimeError: No CUDA GPUs are available"], "sglang", Role.DECODE)))
    assert isinstance(error, EngineStartError)
    assert str(error) == (
        "SGLang did not start: the engine sees no GPU on its node; set `accelerator` to a type that the cluster has, "
        "and install the driver and a GPU build of the engine there. Its last lines: RuntimeError: No CUDA GPUs are "
        "available"
    )
    assert str(start_error(["nothing known", "at all"], "vllm", Role.DECODE)) == (
        "vLLM did not start. Its last lines: nothing known | at all"
    )
    assert str(start_error([], "trtllm", Role.DECODE)) == "TensorRT-LLM did not start. It said nothing."
