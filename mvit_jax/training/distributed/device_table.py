"""Table of the devices of each process, and warnings about unusual assignments."""

import socket
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mvit_jax.common.text import plural

Row = dict[str, Any]
_LONGEST = 16  # processes with a line each; more processes are grouped by kind


def row(environ: Mapping[str, str]) -> Row:
    """Returns this process's row: index, host, devices, and their smallest memory in GiB."""
    devices = jax.local_devices()
    stats = [device.memory_stats() or {} for device in devices]
    return {
        "process": jax.process_index(),
        "host": socket.gethostname(),
        "platform": jax.default_backend(),
        "kind": devices[0].device_kind if devices else "",
        "devices": [device.id for device in devices],
        # Equal entries on one host are the same GPU. Processes cannot share CPU or TPU devices.
        "hardware": [
            f"{environ.get('CUDA_VISIBLE_DEVICES', '')}/{device.local_hardware_id}"
            for device in devices
            if device.platform == "gpu"
        ],
        "allotted": environ.get("SLURM_GPUS_ON_NODE"),
        "slice": getattr(devices[0], "slice_index", None) if devices else None,
        "memory": min((s.get("bytes_limit", 0) for s in stats), default=0) / 2**30,
    }


def describe(rows: Sequence[Row]) -> str:
    """Returns a line per process, or a line per kind of process for more than 16 processes."""
    total = sum(len(row["devices"]) for row in rows)
    hosts = len({row["host"] for row in rows})
    head = f"{len(rows)} processes on {plural(hosts, 'host')}, {plural(total, 'device')}"
    if len(rows) > _LONGEST:
        kinds = Counter((_what(row), row["platform"]) for row in rows)
        return "\n".join(
            [head, *(f"  {n} processes with {what} ({on}) each" for (what, on), n in kinds.items())]
        )
    lines = [
        f"  process {row['process']}  {row['host']}  {_what(row)} ({row['platform']}), "
        f"{_numbers(row['devices'])}" + (f", slice {row['slice']}" if row["slice"] else "")
        for row in rows
    ]
    return "\n".join([head, *lines])


def find_anomalies(rows: Sequence[Row]) -> list[str]:
    """Returns one warning for each unusual assignment of devices."""
    warnings = []
    platforms = {row["platform"] for row in rows}
    if len(platforms) > 1:
        odd = [row for row in rows if row["platform"] == "cpu"]
        warnings.append(
            f"no accelerator in {_names(odd)}, unlike in the other processes: check their hosts "
            "and the scheduler's options"
        )
    counts = Counter(len(row["devices"]) for row in rows)
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        odd = [row for row in rows if len(row["devices"]) != usual]
        warnings.append(
            f"the number of devices differs from the usual {usual} in {_names(odd)}: check the "
            "scheduler's options and --local_device_ids"
        )
    by_host: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_host[row["host"]].append(row)
    for host, local in by_host.items():
        used = Counter(name for row in local for name in row["hardware"])
        shared = sorted(name.rpartition("/")[2] for name, n in used.items() if n > 1)
        if shared:
            warnings.append(
                f"several processes on {host} use the same GPU {', '.join(shared)}: assign "
                "separate GPUs by --local_device_ids, or run one process per node"
            )
        allotted = local[0]["allotted"]
        if used and allotted and allotted.isdigit() and len(used) < int(allotted):
            warnings.append(
                f"{host} has {allotted} GPUs for this job, but its processes use {len(used)}: run "
                "one process per GPU (srun --ntasks-per-node), or list all in --local_device_ids"
            )
    return warnings


def _what(row: Row) -> str:
    memory = f" of {row['memory']:.0f} GiB" if row["memory"] else ""
    return f"{len(row['devices'])} x {row['kind']}{memory}" if row["devices"] else "no devices"


def _numbers(ids: Sequence[int]) -> str:
    if len(ids) > 8:
        return f"devices {ids[0]} to {ids[-1]}"
    return f"device{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids))}"


def _names(rows: Sequence[Row]) -> str:
    named = ", ".join(f"{row['process']} ({row['host']})" for row in rows[:4])
    return f"process{'es' if len(rows) > 1 else ''} {named}" + (
        f" and {len(rows) - 4} more" if len(rows) > 4 else ""
    )
