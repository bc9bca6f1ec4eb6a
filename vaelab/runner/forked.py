"""Kernels forked from one process that has imported the libraries: the runs of ``vaelab all`` share the imports.

Torch, diffusers and the other libraries take about ten seconds of CPU to import. The standard library's fork server
imports them once, before any thread of theirs starts, and every kernel begins as its copy.
"""

import gc
import logging
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

LIBRARIES = [
    "ipykernel.kernelapp",
    "matplotlib.pyplot",
    "pandas",
    "seaborn",
    "sklearn.decomposition",
    "sklearn.linear_model",
    "torch.distributed.checkpoint.state_dict",
    "torchmetrics",
    "accelerate",
    "datasets",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.dit.pipeline_dit",
]
"""What notebooks import, torch and transformers included; one that is not installed is left out."""
VERBOSITY = "TRANSFORMERS_VERBOSITY"
"""The environment variable that transformers reads when it is imported."""


class ForkedKernelManager(AsyncKernelManager):
    """Starts its kernel by a fork; everything else is as with the manager that it replaces."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.provisioner = _ForkedProvisioner(kernel_spec=self.kernel_spec, parent=self)


class _ForkedProvisioner(LocalProvisioner):
    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        self.process = _Process(cmd[cmd.index("-f") :], kwargs["env"], kwargs.get("cwd") or Path.cwd())
        self.pid = self.pgid = self.process.pid
        return self.connection_info


class _Process:
    """A forked kernel with the methods of :class:`subprocess.Popen` that a provisioner calls."""

    stdin = stdout = stderr = None

    def __init__(self, arguments: list[str], environment: dict[str, str], folder: str | Path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
        self._process = context.Process(target=_serve, args=(arguments, environment, str(folder)))
        # the first start imports the libraries, of which transformers warns of image processors that are not used here
        before = os.environ.get(VERBOSITY)
        os.environ[VERBOSITY] = "error"
        try:
            self._process.start()
        finally:
            if before is None:
                del os.environ[VERBOSITY]
            else:
                os.environ[VERBOSITY] = before
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _serve(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Be a kernel, in the forked process."""
    import matplotlib
    import torch
    from ipykernel.kernelapp import IPKernelApp

    gc.freeze()  # the imports stay: the garbage collector would look through them, and so copy their memory
    os.setsid()  # as other kernels: signals reach it with the processes that it starts
    threading.Thread(target=_end_with_parent, daemon=True).start()
    multiprocessing.set_start_method(None, force=True)  # the fork server has set its own
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # these were read when the libraries were imported
    if VERBOSITY not in environment:
        logging.getLogger("transformers").setLevel(logging.WARNING)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    matplotlib.use(environment.get("MPLBACKEND", "module://matplotlib_inline.backend_inline"))
    IPKernelApp.launch_instance(argv=arguments)


def _end_with_parent() -> None:
    """The fork server outlives a parent that is killed; a kernel must not."""
    multiprocessing.parent_process().join()
    os._exit(1)
