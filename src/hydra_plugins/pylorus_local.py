"""Hydra's launcher `local`: run the jobs of a sweep on this machine, several at once.

It needs no other package than Hydra. Hydra imports this module at every start, so Pylorus is imported late.
"""

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins import basic_launcher
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

log = logging.getLogger(__name__)


class LocalLauncher(basic_launcher.BasicLauncher):
    """Runs the jobs one after the other in this process, or several at once, each started by a fork of it.

    Args:
        n_jobs: Jobs that run at once; Pylorus replaces auto by as many as there are GPUs for, or one without a GPU.
    """

    def __init__(self, n_jobs: int | str = 1) -> None:
        super().__init__()
        self.n_jobs = n_jobs

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run one job for each list of overrides; return their results in this order.

        Raises:
            PylorusError: If `n_jobs` is neither auto nor a positive number.
            KeyboardInterrupt: If this process or a job received a signal; the other jobs are ended as well.
        """
        from pylorus.core.distributed import PARALLEL_JOBS
        from pylorus.core.errors import PylorusError
        from pylorus.launch.sweep import prepare_jobs

        if not isinstance(self.n_jobs, int) or self.n_jobs < 1:
            raise PylorusError(
                f"hydra.launcher.n_jobs: found {self.n_jobs}, expected auto (as many jobs at once as there are GPUs "
                "for) or a number, at least 1."
            )
        limit = min(self.n_jobs, len(job_overrides))
        os.environ[PARALLEL_JOBS] = str(limit)
        if limit <= 1:
            return super().launch(job_overrides, initial_job_idx)
        assert self.config is not None
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        prepare_jobs()  # the forks below need not import anything
        log.info(f"Launching {len(job_overrides)} jobs locally, {limit} at once")
        return self._run_at_once(job_overrides, initial_job_idx, limit)

    def _run_at_once(self, job_overrides: Sequence[Sequence[str]], first: int, limit: int) -> list[JobReturn]:
        running: dict[Connection, tuple[int, BaseProcess]] = {}
        results: dict[int, JobReturn] = {}
        try:
            while len(results) < len(job_overrides):
                while len(running) < limit and len(results) + len(running) < len(job_overrides):
                    index = len(results) + len(running)
                    log.info(f"\t#{first + index} : {' '.join(filter_overrides(job_overrides[index]))}")
                    connection, process = self._start_job(job_overrides[index], first + index)
                    running[connection] = (index, process)
                for ready in wait(list(running)):
                    assert isinstance(ready, Connection)
                    index, process = running[ready]
                    results[index] = _receive_result(ready, process, first + index)
                    del running[ready]
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.join()
        return [results[index] for index in range(len(job_overrides))]

    def _start_job(self, overrides: Sequence[str], number: int) -> tuple[Connection, BaseProcess]:
        assert self.config is not None
        assert self.hydra_context is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = number
            config.hydra.job.num = number
        # Forked: nothing is pickled, and this process has imported torch but not used it.
        context = multiprocessing.get_context("fork")
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_run_forked_job, args=(writer, self.hydra_context, config, self.task_function))
        process.start()
        writer.close()
        return reader, process


def _run_forked_job(writer: Any, context: HydraContext, config: DictConfig, task_function: TaskFunction) -> None:
    """Run one job in a fork of the sweep's process, and send its result; a signal ends the job."""
    from pylorus.core.errors import INTERRUPTED
    from pylorus.core.limited_process import end_with_parent
    from pylorus.runs.process import STOP_SIGNALS

    try:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        end_with_parent(signal.SIGTERM)
        result = run_job(
            hydra_context=context,
            task_function=task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        writer.send(result)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _receive_result(reader: Connection, process: BaseProcess, number: int) -> JobReturn:
    """Return the result of a job that has ended; of a process that was killed, an error that Hydra raises at the end.

    Raises:
        KeyboardInterrupt: If the job was interrupted.
    """
    from pylorus.core.errors import INTERRUPTED, PylorusError

    try:
        result: JobReturn = reader.recv()
    except EOFError:
        process.join()
        if process.exitcode == INTERRUPTED:
            raise KeyboardInterrupt from None
        return JobReturn(
            _return_value=PylorusError(
                f"the process that waits for job {number} ended with exit code {process.exitcode}. Usually memory ran "
                "out (see dmesg). The same command with hydra.sweep.dir=DIR, the sweep's folder, runs what is missing."
            ),
            status=JobStatus.FAILED,
        )
    process.join()
    return result
