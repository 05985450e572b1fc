"""Start of many processes that train or test as one: flags, clusters, the devices of each.

JAX's multi-controller runtime runs the same program in every process, with the devices of all as
one mesh. Without flags and outside of a cluster there is one process, and nothing here does
anything. Programs import this module for its flags, call `start` before anything else that touches
JAX, and do their work within `failure.together`.
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
    "coordinator", None, "HOST:PORT on which process 0 listens; found in clusters.",
    allow_override=True,
)  # fmt: skip
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes run this command; 1 looks for no others.",
    allow_override=True,
)  # fmt: skip
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this one is, from 0.", allow_override=True
)
_LOCAL_DEVICE_IDS = flags.DEFINE_list(
    "local_device_ids", None, "The GPUs of this machine that this process uses, like 0,1.",
    allow_override=True,
)  # fmt: skip

_DEVICES = "mvit_jax/devices"  # in the key-value store of process 0


def start() -> None:
    """Joins the other processes of this command, as its flags or the cluster say; see `connect`."""
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
    """Joins the processes of a run, before anything else uses JAX; prints which devices they have.

    What is not given is found by JAX on Cloud TPUs and under SLURM, Open MPI and Kubernetes. A
    process that belongs to no such cluster, or is alone in it, starts as the only one.

    Args:
      coordinator: HOST:PORT on which process 0 listens, and all others reach it.
      num_processes: how many there are; 1 looks for no others.
      process_id: which of them this one is, from 0.
      local_device_ids: GPUs that this one uses; None for all it sees, or as SLURM deals them.

    Raises:
      UserError: what is given contradicts itself, or does not suffice.
    """
    given = (coordinator, num_processes, process_id)
    if num_processes == 1 or (given == (None,) * 3 and alone(os.environ)):
        return
    if jax.distributed.is_initialized():
        return
    _check(*given)
    if local_device_ids is None and given == (None,) * 3:
        local_device_ids = slurm_devices(os.environ)
    # JAX ends a process that waits for others in vain by abort() and a C++ stack dump: this ends
    # it before, with a sentence.
    watchdog = threading.Timer(coordination.START_SECONDS, _nobody_came, (given,))
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
        with failure.together():
            _introduce()
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        _no_cluster(error, given)
    finally:
        watchdog.cancel()


def _no_cluster(error: Exception, given: tuple[Any, ...]) -> None:
    """Returns where no cluster was found and nobody asked for one."""
    message = " ".join(str(error).split())
    found_none = isinstance(error, ValueError) and "should be defined" in message
    if found_none and given == (None,) * 3 and "JOB_COMPLETION_INDEX" not in os.environ:
        return
    if found_none or "must be defined" in message:
        what = (
            "this pod of an indexed job cannot find the others without the package kubernetes "
            "(pip install 'jax[k8s]')"
            if given == (None,) * 3
            else "this machine is in no cluster that tells the rest"
        )
        raise UserError(
            f"{what}: give --coordinator=HOST:PORT, --num_processes and --process_id together, or "
            "--num_processes=1 for one process alone"
        ) from None
    if "start RPC server" in message or "in use" in message:
        raise UserError(
            f"process 0 cannot listen at {given[0] or 'the port that was found'}: another program "
            "does, perhaps an earlier start of this one; end that, or name a free port in "
            "--coordinator of all processes"
        ) from error
    raise UserError(
        f"the processes of this run could not be brought together ({message[:300]}): mend that, "
        "give --coordinator=HOST:PORT, --num_processes and --process_id, or --num_processes=1 for "
        "one process alone"
    ) from error


def _nobody_came(given: tuple[Any, ...]) -> NoReturn:
    """Ends this process, which has waited for the others in vain."""
    from jax._src.distributed import global_state  # what was detected is nowhere else

    coordinator = global_state.coordinator_address or given[0]
    _, mine, count = coordination.service()
    seconds = coordination.START_SECONDS
    what = (
        f"process {mine} of {count} has waited {seconds} s for the others at {coordinator}"
        if coordinator
        else f"the cluster has not told within {seconds} s who the other processes are"
    )
    failure.end_alone(
        f"{what}: start the same command on all of them, with the address of process 0 and a port "
        "that it may open in --coordinator (--num_processes=1 is for one process alone)"
    )


def _introduce() -> None:
    """Prints the devices of all processes."""
    client, mine, count = coordination.service()
    try:
        row = device_table.row(os.environ)
    except RuntimeError as error:
        raise UserError(
            f"process {mine} on {socket.gethostname()} cannot use its devices, or some process "
            f"sees none ({first_line(error)}): check what the scheduler gives "
            "each, and --local_device_ids"
        ) from error
    client.key_value_set(f"{_DEVICES}/{mine}", json.dumps(row))
    if mine > 0:
        return
    rows = [_devices_of(i, client) for i in range(count)]
    print(device_table.describe(rows), flush=True)
    for sentence in device_table.suspicions(rows):
        print(f"warning: {sentence}", flush=True)


def _devices_of(process: int, client: Any) -> dict[str, Any]:
    try:
        key = f"{_DEVICES}/{process}"
        return json.loads(client.blocking_key_value_get(key, coordination.START_SECONDS * 1000))
    except jax.errors.JaxRuntimeError:
        reason = (
            f"process {process} has not started its devices within {coordination.START_SECONDS} s: "
            f"see whether something else holds them; {failure.AGAIN}"
        )
        failure.end_with(reason, status=failure.LOST)


def alone(environ: Mapping[str, str]) -> bool:
    """Whether what looks like a cluster is one process of its own: a notebook in Kubernetes, a
    single task in an allocation of SLURM. (In a shell there JAX finds none itself.)

    JAX would ask Kubernetes for the job of a pod that has none, and takes the number of tasks of an
    allocation for that of the processes, though only srun starts so many.
    """
    # One host is called localhost, on a GPU machine too (`absent_tpu`).
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "localhost")
    tpu = hosts != "localhost" or "TPU_PROCESS_ADDRESSES" in environ
    if "KUBERNETES_SERVICE_HOST" in environ and not tpu:
        return "JOB_COMPLETION_INDEX" not in environ
    if "SLURM_JOB_ID" in environ:
        tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
        return tasks == "1"
    return False


def slurm_devices(environ: Mapping[str, str]) -> list[int] | None:
    """The GPUs of this task where SLURM gives it all that it sees; None leaves them to JAX.

    JAX gives the task i of a node the GPU i alone (jax issues 16788, 23452, 28194). That leaves
    all but one idle if there is one task a node, and is no GPU at all if each task sees only its
    own, by --gpus-per-task.
    """
    if "SLURM_JOB_ID" not in environ or "CUDA_VISIBLE_DEVICES" not in environ:
        return None
    visible = [word for word in environ["CUDA_VISIBLE_DEVICES"].split(",") if word]
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
        raise UserError(
            f"--process_id={process_id} must be from 0 to {(num_processes or 1) - 1}, below "
            f"--num_processes={num_processes}"
        )
