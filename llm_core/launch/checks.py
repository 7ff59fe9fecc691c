"""What can be known before a process is started: layout, devices, addresses, port, log folder."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from llm_core.errors import EnvironmentFault, UserError
from llm_core.launch.arguments import Job, devices, run_arguments
from llm_core.launch.saves import record_of

_PORTS = 100  # tried after the default one


def require_runnable(job: Job, environment: Mapping[str, str]) -> Path | None:
    """Check the run that the command describes, if it is one of ours, and the devices.

    Returns the file that a save of the run writes anew (`saves.Saves` takes it); None for any other command.
    UserError where the layout or the devices do not fit N, and for everything in the configuration that would end each
    of the processes.
    """
    arguments = run_arguments(job.words)
    target = record = None
    if arguments is not None:
        from llm_core.cli import load_run

        loaded = load_run(arguments)
        _require_layout(job, loaded)
        os.environ["MS_WORKER_NUM"] = str(job.ranks)  # as msrun will tell each of them
        loaded.require_runnable()
        target, record = loaded.device, record_of(loaded.config)
    listed = devices(environment)
    if target != "CPU" and listed and job.local > len(listed):
        raise UserError(
            f"{job.local} processes on this machine, but {len(listed)} devices are listed ({', '.join(listed)}); start "
            "fewer, or list more in ASCEND_RT_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES"
        )
    return record


def _require_layout(job: Job, loaded: Any) -> None:
    config = loaded.config
    if not config.use_parallel:
        if job.ranks > 1:
            raise UserError(
                f"{loaded.path}: use_parallel is False, so each of {job.ranks} processes would make the whole run; add "
                "--use_parallel True, or start one process without the launcher"
            )
        return
    names = ("data_parallel", "model_parallel", "pipeline_stage")
    sizes = [getattr(config.parallel_config, name) for name in names]
    if sizes[0] * sizes[1] * sizes[2] != job.ranks:
        layout = " x ".join(
            f"{name} {size} ({loaded.origins[f'parallel_config.{name}']})"
            for name, size in zip(names, sizes, strict=True)
        )
        product = sizes[0] * sizes[1] * sizes[2]
        raise UserError(
            f"{loaded.path}: {layout} = {product} ranks, but N is {job.ranks}; start {product} processes, or change "
            "the layout with --dp, --mp and --pp"
        )


def resolve(job: Job) -> str:
    """The IPv4 address of node 0 as numbers, which is what ranks and launchers meet at.

    EnvironmentFault where nobody knows the name, it has no such address, or others could not reach it.
    """
    try:
        found = socket.getaddrinfo(job.address.strip("[]"), job.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise EnvironmentFault(f"ADDR {job.address}: {error.strerror}; give the address of the first node") from None
    addresses = [str(place[0]) for family, _, _, _, place in found if family == socket.AF_INET]
    if not addresses:
        raise EnvironmentFault(
            f"ADDR {job.address} is {found[0][4][0]}, of IPv6 alone; the ranks need an IPv4 address of the first node"
        )
    address = addresses[0]
    if job.nodes > 1 and ipaddress.ip_address(address).is_loopback and job.address != address:  # named so in /etc/hosts
        raise EnvironmentFault(
            f"ADDR {job.address} is {address} here, which no other machine can reach; give the first node's address in "
            "the network, under Slurm as MASTER_ADDR"
        )
    return address


def reserve(job: Job, keep: ExitStack) -> Job:
    """Take the log folder and, on node 0, the port, for as long as `keep` is open.

    Returns the job with the port that it got: a default one that is taken is exchanged for the next free one.
    EnvironmentFault where the port or the folder cannot be had.
    """
    if note := _reserve_folder(job, keep):
        job = replace(job, notes=(*job.notes, note))
    if job.node != 0:
        return job
    address = resolve(job)
    choice = [job.port] if job.port_given or job.nodes > 1 else range(job.port, job.port + _PORTS)
    reason = ""
    for port in choice:
        try:
            _reserve_port(address, port, keep)
        except OSError as error:
            reason = reason or str(error.strerror)
            continue
        if port == job.port:
            return job
        return replace(job, port=port, notes=(*job.notes, f"port {job.port}: {reason}; taking {port}"))
    raise EnvironmentFault(f"port {job.port} of {job.address}: {reason}; give another PORT, or end what holds this one")


def _reserve_port(address: str, port: int, keep: ExitStack) -> None:
    """OSError if somebody listens there, or another launcher has it reserved for its scheduler, which comes later."""
    socket.create_server((address, port)).close()
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind(f"\0run_llm-port-{port}")  # an abstract name: gone with the process, one a network namespace
    except OSError:
        holder.close()
        raise
    keep.enter_context(holder)


def _reserve_folder(job: Job, keep: ExitStack) -> str:
    """Returns a note if the folder's file system has no locks (some of a network), so that nobody can be kept out."""
    try:
        job.log_dir.mkdir(parents=True, exist_ok=True)
        lock: IO[str] = open(job.log_dir / f".node_{job.node}.lock", "a+", encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"LOG_DIR {job.log_dir}: {error.strerror}") from None
    keep.enter_context(lock)
    note = ""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise EnvironmentFault(
            f"LOG_DIR {job.log_dir} is in use by a launcher that runs (process {lock.read().strip()}); give another"
        ) from None
    except OSError as error:
        note = f"LOG_DIR {job.log_dir} cannot be locked ({error.strerror}); see that no other launcher uses it"
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return note
