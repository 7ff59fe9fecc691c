"""What can be known before a process is started: layout, devices, addresses, port, log folder."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import IO, Any

from llm_core.errors import EnvironmentFault, UserError
from llm_core.launch.arguments import Job, devices, run_arguments

_PORTS = 100  # tried after the default one


def require_runnable(job: Job, environment: Mapping[str, str]) -> None:
    """Check the run that the command describes, if it is one of ours, and the devices.

    UserError where the layout or the devices do not fit N, and for everything in the configuration that would end each
    of the processes.
    """
    arguments = run_arguments(job.words)
    target = None
    if arguments is not None:
        from llm_core.cli import load_run

        loaded = load_run(arguments)
        _require_layout(job, loaded)
        os.environ["MS_WORKER_NUM"] = str(job.ranks)  # as msrun will tell each of them
        loaded.require_runnable()
        target = loaded.device
    listed = devices(environment)
    if target != "CPU" and listed and job.local > len(listed):
        raise UserError(
            f"{job.local} processes on this machine, but {len(listed)} devices are listed ({', '.join(listed)}); start "
            "fewer, or list more in ASCEND_RT_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES"
        )


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
    """The address of node 0 as numbers. EnvironmentFault where nobody knows the name, or others could not reach it."""
    try:
        found = socket.getaddrinfo(job.address.strip("[]"), job.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise EnvironmentFault(f"ADDR {job.address}: {error.strerror}; give the address of the first node") from None
    address = str(found[0][4][0])
    numeric = ipaddress.ip_address(address.partition("%")[0])
    if job.nodes > 1 and numeric.is_loopback and job.address.strip("[]") != address:  # a host's own name, in /etc/hosts
        raise EnvironmentFault(
            f"ADDR {job.address} is {address} here, which no other machine can reach; give the first node's address in "
            "the network"
        )
    return address


def reserve(job: Job, keep: ExitStack) -> Job:
    """Take the log folder and, on node 0, the port, for as long as `keep` is open.

    Returns the job with the port that it got: a default one that is taken is exchanged for the next free one.
    EnvironmentFault where the port or the folder cannot be had.
    """
    _reserve_folder(job, keep)
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
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    socket.create_server((address, port), family=family).close()
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind(f"\0run_llm-port-{port}")  # an abstract name: gone with the process, one a network namespace
    except OSError:
        holder.close()
        raise
    keep.enter_context(holder)


def _reserve_folder(job: Job, keep: ExitStack) -> None:
    try:
        job.log_dir.mkdir(parents=True, exist_ok=True)
        lock: IO[str] = open(job.log_dir / f".node_{job.node}.lock", "a+", encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"LOG_DIR {job.log_dir}: {error.strerror}") from None
    keep.enter_context(lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise EnvironmentFault(
            f"LOG_DIR {job.log_dir} is in use by a launcher that runs (process {lock.read().strip()}); give another"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
