"""Where tasks run: in this process, in local processes, or on a Ray cluster."""

from __future__ import annotations

import importlib
import ipaddress
import os
import signal
import socket
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from types import TracebackType
from typing import Any, Self

from kvpolicy.errors import KVPolicyError
from kvpolicy.study.extra import library
from kvpolicy.study.work import Outcome, Task, execute

_REACH_SECONDS = 10.0

Outcomes = Future[list[Outcome]]


class Executor(ABC):
    """Runs tasks.

    Leaving its ``with`` block stops it at once; tasks that are under way are lost.

    Attributes:
        slots: tasks that run at the same time.
        ahead: further tasks that may be handed over, so that no worker waits.
        threads: threads of torch for each; None leaves them alone.
        crashed: exceptions that say that a worker died.
    """

    slots: int = 1
    ahead: int = 0
    threads: int | None = None
    crashed: tuple[type[BaseException], ...] = ()

    @abstractmethod
    def submit(self, task: Task) -> Outcomes:
        """Start a task."""

    def restart(self) -> None:  # noqa: B027 - only processes have to be replaced
        """Replace workers after a crash."""

    @abstractmethod
    def close(self) -> None:
        """Stop at once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Inline(Executor):
    """Runs tasks in this process, one after the other, when they are submitted."""

    def submit(self, task: Task) -> Outcomes:
        """Run a task."""
        future: Outcomes = Future()
        try:
            future.set_result(execute(task))
        except Exception as error:  # noqa: BLE001 - the future holds it, as that of another process would
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Do nothing."""


class Processes(Executor):
    """Runs tasks in processes of this machine.

    Args:
        workers: how many.
    """

    ahead = 1
    crashed = (BrokenProcessPool,)

    def __init__(self, workers: int) -> None:
        self.slots = workers
        self.threads = max(1, cores() // workers)
        self._start()

    def _start(self) -> None:
        self._pool = ProcessPoolExecutor(self.slots, mp_context=get_context("spawn"), initializer=_begin_worker)

    def submit(self, task: Task) -> Outcomes:
        """Start a task in a free process."""
        return self._pool.submit(execute, task)

    def restart(self) -> None:
        """Start new processes."""
        self.close()
        self._start()

    def close(self) -> None:
        """Kill the processes."""
        workers = list((self._pool._processes or {}).values())  # noqa: SLF001 - no public way before Python 3.14
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()


class Ray(Executor):
    """Runs tasks on a Ray cluster.

    Args:
        address: of the cluster, as `ray.init` takes it; None starts one on this machine, which listens on 127.0.0.1
            alone.
        workers: tasks at the same time; None means one per CPU of the cluster.
        gpu: each task takes a GPU.

    Raises:
        KVPolicyError: ray is not installed, or the cluster cannot be reached.
    """

    ahead = 1
    threads = 1

    def __init__(self, address: str | None, workers: int | None, *, gpu: bool = False) -> None:
        self._ray: Any = library("ray", "--on ray needs", package="kvpolicy[ray]")
        self._ours = not self._ray.is_initialized()
        if self._ours:
            _check_address(address)
            try:
                if address is None:
                    self._start_here(workers)
                else:
                    self._ray.init(address=address, log_to_driver=False)
            except KVPolicyError:
                raise
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                raise KVPolicyError(f"--address: {address or 'a local Ray'} cannot be used: {reason}") from error
        resources = self._ray.cluster_resources()
        self.slots = workers or max(1, int(resources.get("GPU" if gpu else "CPU", 1)))
        self._execute = self._ray.remote(num_cpus=1, num_gpus=int(gpu))(execute)
        self.crashed = (self._ray.exceptions.RaySystemError, self._ray.exceptions.WorkerCrashedError)

    def _start_here(self, workers: int | None) -> None:
        """Start Ray on this machine so that nobody else can reach it, for it runs whatever it is sent.

        Ray listens on all addresses unless its node has that of the loopback. On Linux it takes another one even where
        that is asked for; the switch that macOS and Windows have turned off by default is the one that it heeds.
        """
        constants: Any = importlib.import_module("ray._private.ray_constants")
        switch = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
        known, cluster = os.environ.get(switch), constants.ENABLE_RAY_CLUSTER
        os.environ[switch], constants.ENABLE_RAY_CLUSTER = "0", False
        try:
            # "local": with None, the variable RAY_ADDRESS would name a cluster.
            self._ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
        finally:
            constants.ENABLE_RAY_CLUSTER = cluster
            if known is None:
                del os.environ[switch]
            else:
                os.environ[switch] = known
        address = self._ray.nodes()[0]["NodeManagerAddress"]
        if not ipaddress.ip_address(address).is_loopback:
            self._ray.shutdown()
            raise KVPolicyError(
                f"--on: this version of Ray would listen on {address}, where others could reach it; start a cluster "
                "that you protect, and name it with --address."
            )

    def submit(self, task: Task) -> Outcomes:
        """Start a task somewhere on the cluster."""
        future: Outcomes = self._execute.remote(task).future()
        return future

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._ours:
            self._ray.shutdown()


def _check_address(address: str | None) -> None:
    """Refuse at once what `ray.init` would try to reach for many minutes."""
    if address in (None, "auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        raise KVPolicyError(f"--address: {address!r} is no address; write HOST:PORT, ray://HOST:PORT or auto.")
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_SECONDS).close()
    except OSError as error:
        reason = error.strerror or error
        raise KVPolicyError(f"--address: {address} cannot be reached ({reason}); start Ray there.") from error


def cores() -> int:
    """Return the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(device: str) -> int:
    """Return how many local processes are sensible: one per core up to 8, or one where a GPU does the work."""
    import torch

    accelerated = device not in ("auto", "cpu") or (device == "auto" and torch.cuda.is_available())
    return 1 if accelerated else min(8, cores())


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: a killed parent cannot tell its workers to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
