"""Multi-process start: flags, cluster detection, and the devices of each process.

In JAX's multi-controller runtime every process runs the same program, and the devices of all
processes form one mesh. Without flags and outside of a cluster there is one process, and `start`
does nothing. Programs import this module for its flags, call `start` before any other use of JAX,
and work within `failure.fail_together`.
"""

import json
import os
import re
import socket
import threading
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
from absl import flags

from mvit_jax.common.errors import UserError
from mvit_jax.common.text import first_line
from mvit_jax.training.distributed import coordination, device_table, failure

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT on which process 0 listens; detected in clusters.",
    allow_override=True,
)  # fmt: skip
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of processes that run this command; 1 skips cluster detection.",
    allow_override=True,
)  # fmt: skip
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Index of this process, from 0.", allow_override=True
)
_LOCAL_DEVICE_IDS = flags.DEFINE_list(
    "local_device_ids", None, "GPUs of this host that this process uses, like 0,1.",
    allow_override=True,
)  # fmt: skip

_DEVICES = "mvit_jax/devices"  # in the key-value store of process 0


def start() -> None:
    """Joins the processes of the run as the flags or the cluster specify; see `connect`."""
    ids = _LOCAL_DEVICE_IDS.value
    try:
        devices = None if ids is None else [int(i) for i in ids]
    except ValueError:
        raise UserError(
            f"--local_device_ids={','.join(ids or [])} must be numbers like 0,1"
        ) from None
    connect(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, devices)


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: list[int] | None = None,
) -> None:
    """Joins the processes of a run and prints their devices; call before any other use of JAX.

    On Cloud TPUs and under SLURM, Open MPI and Kubernetes, JAX detects the arguments that are None.
    Outside of such a cluster, or as its only process, the program runs in a single process.

    Args:
      coordinator: HOST:PORT on which process 0 listens; all processes must reach it.
      num_processes: number of processes; 1 skips cluster detection.
      process_id: index of this process, from 0.
      local_device_ids: GPUs of this process; None for all visible ones, or for SLURM's assignment.

    Raises:
      UserError: the arguments contradict each other or do not suffice, the coordinator's port
        cannot be opened, or a process cannot use its devices.
    """
    address = (coordinator, num_processes, process_id)
    if num_processes == 1 or (address == (None,) * 3 and is_single_process(os.environ)):
        return
    if jax.distributed.is_initialized():
        return
    _check(*address)
    if local_device_ids is None and address == (None,) * 3:
        local_device_ids = slurm_devices(os.environ)
    # When a start times out, JAX calls abort() and prints a C++ stack. This timer fires earlier and
    # prints one sentence.
    watchdog = threading.Timer(coordination.START_SECONDS, _exit_startup_timeout, (coordinator,))
    watchdog.daemon = True
    watchdog.start()
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, local_device_ids,
            initialization_timeout=coordination.START_SECONDS + 60,
            heartbeat_timeout_seconds=failure.BEAT_SECONDS * failure.SILENT_BEATS + 60,
            shutdown_timeout_seconds=failure.LAST_SECONDS,
        )  # fmt: skip
        watchdog.cancel()
        if not jax.distributed.is_initialized():
            return
        failure.start_watching()
        with failure.fail_together():
            _print_devices()
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        _raise_no_cluster(error, address)
    finally:
        watchdog.cancel()


def _raise_no_cluster(error: Exception, address: tuple[Any, ...]) -> None:
    """Raises a `UserError`; returns if no cluster was detected and no flags were set."""
    message = " ".join(str(error).split())
    undetected = isinstance(error, ValueError) and "should be defined" in message
    if undetected and address == (None,) * 3 and "JOB_COMPLETION_INDEX" not in os.environ:
        return
    if undetected or "must be defined" in message:
        what = (
            "this pod of an indexed job cannot find its peers without the package kubernetes "
            "(pip install 'jax[k8s]')"
            if address == (None,) * 3
            else "no cluster was detected that sets the remaining flags"
        )
        raise UserError(
            f"{what}: give --coordinator=HOST:PORT, --num_processes and --process_id together, or "
            "--num_processes=1 for a single process"
        ) from None
    if "start RPC server" in message or "in use" in message:
        raise UserError(
            f"process 0 cannot listen at {address[0] or 'the detected port'}: another program uses "
            "the port, perhaps an earlier start of this command; end that program, or set a free "
            "port in --coordinator of all processes"
        ) from error
    raise UserError(
        f"the processes of this run could not connect ({message[:300]}): fix the cause; or give "
        "--coordinator=HOST:PORT, --num_processes and --process_id together; or give "
        "--num_processes=1 for a single process"
    ) from error


def _exit_startup_timeout(coordinator: str | None) -> NoReturn:
    """Exits with `failure.LOST`: not all processes have connected in time."""
    from jax._src.distributed import global_state  # no public module has the detected address

    detected = global_state.coordinator_address or coordinator
    _, process, count = coordination.service()
    seconds = coordination.START_SECONDS
    what = (
        f"process {process} of {count} timed out after {seconds} s: not all processes have "
        f"connected to {detected}"
        if detected
        else f"the other processes were not detected within {seconds} s"
    )
    failure.exit_alone(
        f"{what}; start the same command on all hosts, and set --coordinator to the address of "
        "process 0 with a port that it may open (--num_processes=1 is for a single process)"
    )


def _print_devices() -> None:
    """Prints the devices of all processes, in process 0."""
    client, process, count = coordination.service()
    try:
        row = device_table.row(os.environ)
    except RuntimeError as error:
        raise UserError(
            f"process {process} on {socket.gethostname()} cannot use its devices, or some process "
            f"has none ({first_line(error)}): check the scheduler's assignment of devices, and "
            "--local_device_ids"
        ) from error
    client.key_value_set(f"{_DEVICES}/{process}", json.dumps(row))
    if process > 0:
        return
    rows = [_devices_of(i, client) for i in range(count)]
    print(device_table.describe(rows), flush=True)
    for warning in device_table.find_anomalies(rows):
        print(f"warning: {warning}", flush=True)


def _devices_of(process: int, client: Any) -> dict[str, Any]:
    try:
        key = f"{_DEVICES}/{process}"
        return json.loads(client.blocking_key_value_get(key, coordination.START_SECONDS * 1000))
    except jax.errors.JaxRuntimeError:
        reason = (
            f"process {process} has not started its devices within {coordination.START_SECONDS} s: "
            f"check for another program that uses them; {failure.AGAIN}"
        )
        failure.exit_all(reason, status=failure.LOST)


def is_single_process(environ: Mapping[str, str]) -> bool:
    """Returns True for a single process inside of a cluster, where JAX's detection must not run.

    Examples are a notebook in Kubernetes and a single task of a SLURM allocation. In Kubernetes,
    JAX would look for the job of a pod that belongs to no job. Under SLURM, JAX would expect a
    process for each task of the allocation, though only srun starts that many.
    """
    # "localhost" is the value on a single host, on a GPU machine too (`absent_tpu`).
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "localhost")
    tpu = hosts != "localhost" or "TPU_PROCESS_ADDRESSES" in environ
    if "KUBERNETES_SERVICE_HOST" in environ and not tpu:
        return "JOB_COMPLETION_INDEX" not in environ
    if "SLURM_JOB_ID" in environ:
        tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
        return tasks == "1"
    return False


def slurm_devices(environ: Mapping[str, str]) -> list[int] | None:
    """Returns all visible GPUs if only this task uses them; None leaves the choice to JAX.

    JAX uses only GPU i for task i of a node (jax issues 16788, 23452, 28194). With one task per
    node, all other GPUs would be idle. With --gpus-per-task each task sees only its own GPUs, so
    GPU i may not exist.
    """
    if "SLURM_JOB_ID" not in environ or "CUDA_VISIBLE_DEVICES" not in environ:
        return None
    visible = [gpu for gpu in environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if visible and ("SLURM_GPUS_PER_TASK" in environ or re.fullmatch(r"1(\(x\d+\))?", tasks)):
        return list(range(len(visible)))
    return None


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT, like node1:1234")
    if num_processes is not None and num_processes < 1:
        raise UserError(f"--num_processes={num_processes} must be at least 1")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        limit = f"from 0 to {num_processes - 1}" if num_processes else "at least 0"
        raise UserError(f"--process_id={process_id} must be {limit}")
