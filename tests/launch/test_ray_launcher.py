"""hydra/launcher=ray runs each job of a sweep as a task of Ray, and needs only Ray's public functions."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from pylorus.config.schema import CONF

APP = """
import sys, types
sys.path.insert(0, {tests!r})
from tests.launch.test_ray_launcher import SyncRay
sys.modules["ray"] = SyncRay()
import hydra

@hydra.main(version_base="1.3", config_path=None)
def main(config):
    from hydra.core.hydra_config import HydraConfig
    job = HydraConfig.get().job
    print("job", job.num, job.id, config.a, flush=True)
    if config.a == 2:
        raise ValueError("a job fails")
    return config.a

main()
"""


class SyncRay(types.ModuleType):
    """Runs each task at once, in this process."""

    def __init__(self):
        super().__init__("ray")

    def remote(self, function=None, **resources):
        if function is None:
            print("resources", resources)
            return self.remote
        return types.SimpleNamespace(remote=function)

    def get(self, results):
        return results


@pytest.mark.parametrize(("name", "remote"), [("ray", {}), ("ray_local", {"num_cpus": 1})])
def test_ray_and_ray_local_choose_our_launcher(name, remote):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(Path(CONF)), version_base="1.3"):
        config = compose("config", overrides=[f"hydra/launcher={name}"], return_hydra_config=True)
    launcher = config.hydra.launcher
    assert launcher._target_ == "hydra_plugins.pylorus_ray.RayLauncher"
    assert (launcher.ray.init.address, launcher.ray.remote) == (None, remote)


def test_each_job_runs_with_its_number_and_a_failed_one_leaves_the_others_alone(tmp_path):
    script = tmp_path / "app.py"
    script.write_text(APP.format(tests=str(Path(__file__).parents[2])))
    words = [
        "-m",
        f"hydra.searchpath=[file://{CONF}]",
        "hydra/launcher=ray_local",
        "+a=1,2,3",
        f"hydra.sweep.dir={tmp_path}/sweep",
    ]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, cwd=tmp_path)
    assert [line for line in done.stdout.splitlines() if line.startswith("job")] == [
        "job 0 app_0 1",
        "job 1 app_1 2",
        "job 2 app_2 3",
    ], done.stderr
    assert "resources {'num_cpus': 1}" in done.stdout
    assert "a job fails" in done.stderr
    assert {path.name for path in (tmp_path / "sweep").iterdir()} >= {"0", "1", "2"}
