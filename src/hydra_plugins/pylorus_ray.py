"""Hydra's launcher `ray`: run the jobs of a sweep as tasks of a Ray cluster.

It is ours because the package hydra-ray-launcher needs a cloudpickle that a current joblib refuses. Hydra finds a
launcher only in the namespace package `hydra_plugins` and imports it at every start, so Ray is imported late.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class RayLauncher(Launcher):
    """Runs each job as a task of the Ray cluster to which this process is connected.

    Args:
        ray: Arguments of `ray.init` (`init`), with which Pylorus starts or joins the cluster, and of `ray.remote`
            (`remote`), such as num_cpus and num_gpus of each job.
    """

    def __init__(self, ray: DictConfig) -> None:
        self.ray = ray

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Remember what to run; Hydra calls this before `launch`."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run one job for each list of overrides; return their results in this order."""
        import ray

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        resources: Any = OmegaConf.to_container(self.ray.remote, resolve=True)
        run_remotely = (ray.remote(**resources) if resources else ray.remote)(run_ray_job)
        jobs = []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = f"{config.hydra.job.name}_{number}"
                config.hydra.job.num = number
            jobs.append(run_remotely.remote(self.hydra_context, config, self.task_function, Singleton.get_state()))
        results: list[JobReturn] = ray.get(jobs)
        return results


def run_ray_job(
    hydra_context: HydraContext, config: DictConfig, task_function: TaskFunction, singletons: dict[Any, Any]
) -> JobReturn:
    """Run one job in a worker of the cluster, with the state of Hydra in the process that launched it."""
    setup_globals()
    Singleton.set_state(singletons)
    HydraConfig.instance().set_config(config)
    return run_job(
        hydra_context=hydra_context,
        config=config,
        task_function=task_function,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
