"""Start Pylorus as its users do, with `python train.py …`, and read the results from the run's folder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from job import Answer, Job, list_python_paths

FINISHED = "finished"


def command(job: Job, checkout: Path) -> list[str]:
    """Return the command line. The options of the job are:

    stages: The value of `stage=`; each phase has the epochs of the job, or `epochs` if the option is given.
    late: Whether fine-tuning trains from the late block of the job on instead of the whole network.
    prefix: The value of cache.prefix.
    sweep: Whether to run a sweep of two jobs that differ only in the learning rate.
    overrides: Further arguments of the command line.
    """
    chosen = job.options
    words = [
        "data=folders",
        f"data.root={job.data}",
        f"data.image_size={job.size}",
        "model=timm",
        f"model.name={job.model}",
        f"model.weights={job.weights}",
        *(f"model.args.{name}={value}" for name, value in job.model_args.items()),
        f"stage={chosen['stages']}",
        "augment=none",
        "stages.finetune.augment=none",
        f"stages.finetune.learn={job.late if chosen.get('late') else 'all'}",
        *(f"stages.{stage}.epochs={chosen.get('epochs', job.epochs)}" for stage in ("pretrain", "finetune")),
        f"stages.finetune.lr={job.network_lr}",
        f"trainer.batch_size={job.batch_size}",
        f"trainer.accelerator={'gpu' if job.device == 'cuda' else 'cpu'}",
        "trainer.precision=auto",
        "trainer.progress=false",
        "report=false",
        *([f"data.group='{job.group}'"] if job.group else []),
        *(_cache(job) if knows_cache(checkout) else []),
        *chosen.get("overrides", []),
    ]
    if chosen.get("sweep"):
        rates = f"optimizer.lr={job.head_lr},{job.head_lr / 2}"
        words = ["-m", *words, rates, f"hydra.sweep.dir={job.folder}/run"]
    else:
        words = [*words, f"optimizer.lr={job.head_lr}", f"hydra.run.dir={job.folder}/run"]
    return [sys.executable, str(checkout / "train.py"), *words]


def read(job: Job) -> Answer:
    """Read the results of a finished run, or of each job of a finished sweep.

    Raises:
        RuntimeError: If a run did not finish.
    """
    root = Path(job.folder) / "run"
    answer = Answer()
    if job.options.get("sweep"):
        for name, number in (("first", "0"), ("second", "1")):
            found = _stage(root / number, "pretrain")
            answer.phases[name] = found["seconds"]
            _take_memory(answer, name, found)
        root = root / "1"
    else:
        for stage in stages(job):
            found = _stage(root, stage)
            answer.phases[stage] = found["seconds"]
            _take_memory(answer, stage, found)
            if "images_per_second" in found:
                answer.images_per_second[stage] = found["images_per_second"]
            if "features_seconds" in found:
                answer.note += (
                    f"{stage}: features {found['features_seconds']:.1f} s, fit {found['fit_seconds']:.1f} s. "
                )
    if (root / "speed.json").is_file():
        answer.timeline = json.loads((root / "speed.json").read_text(encoding="utf-8"))["timeline"]
    answer.accuracy = _accuracy(root / (stages(job)[-1]))
    answer.note += f"precision {json.loads((root / 'environment.json').read_text())['precision']}"
    return answer


def stages(job: Job) -> list[str]:
    return ["pretrain", "finetune"] if job.options["stages"] == "both" else [job.options["stages"]]


def knows_cache(checkout: Path) -> bool:
    """Return whether this version of Pylorus caches features; older versions can be measured, too."""
    ask = "from pylorus.config.schema import Config; print(hasattr(Config(), 'cache'))"
    found = {**os.environ, "PYTHONPATH": list_python_paths(checkout)}
    said = subprocess.run([sys.executable, "-c", ask], env=found, capture_output=True, text=True, check=True)
    return said.stdout.strip() == "True"


def _cache(job: Job) -> list[str]:
    prefix = str(bool(job.options.get("prefix", True))).lower()
    return [f"cache.prefix={prefix}", f"cache.folder={job.cache or job.folder + '/cache'}"]


def _stage(run: Path, stage: str) -> dict[str, Any]:
    """Read the seconds of a stage from speed.json, or, in versions without it, from the times of its files."""
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    if status["state"] != FINISHED:
        raise RuntimeError(f"the run is {status['state']}: {status.get('error', '')}")
    speed = run / stage / "speed.json"
    if speed.is_file():
        return json.loads(speed.read_text(encoding="utf-8"))
    before = run / "pretrain" / "predictions-test.parquet"
    begin = before if stage == "finetune" and before.is_file() else run / "network.json"
    end = run / stage / "predictions-test.parquet"
    return {"seconds": end.stat().st_mtime - begin.stat().st_mtime}


def _take_memory(answer: Answer, name: str, found: dict[str, Any]) -> None:
    if found.get("peak_memory_mib"):
        answer.phase_memory_mib[name] = found["peak_memory_mib"]
    if found.get("peak_gpu_memory_mib"):
        answer.memory_mib = max(answer.memory_mib or 0, found["peak_gpu_memory_mib"])


def _accuracy(stage: Path) -> float:
    import pandas as pd

    table = pd.read_parquet(stage / "predictions-test.parquet", columns=["true", "predicted"])
    return float((table["true"].astype(str) == table["predicted"].astype(str)).mean())
