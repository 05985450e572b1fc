"""What the environment and the flags say of other processes, before JAX looks for them."""

import re
from collections.abc import Mapping

from mvit_jax.common.errors import UserError


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


def check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT, like node1:1234")
    if num_processes is not None and num_processes < 1:
        raise UserError(f"--num_processes={num_processes} must be at least 1")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        raise UserError(
            f"--process_id={process_id} must be from 0 to {(num_processes or 1) - 1}, below "
            f"--num_processes={num_processes}"
        )
