"""Read the images as a run of Pylorus does before it trains: catalog, audit, leaks and split, without imports.

The first pass also caches the images at the network's size. A second pass, in another process, finds all files known.
"""

import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))

from hydra import compose, initialize_config_dir
from job import Answer, Job

from pylorus.config.checks import build_config
from pylorus.config.schema import CONF
from pylorus.data.input_format import resolve_input_format
from pylorus.data.prepare import prepare_images
from pylorus.launch.main import register


def main() -> None:
    job, answer = Job.of_command_line(), Answer()
    register()
    words = ["data=folders", f"data.root={job.data}", f"data.image_size={job.size}", f"cache.folder={job.cache}"]
    if job.group:
        words.append(f"data.group='{job.group}'")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = build_config(compose("config", overrides=words))
    data = config.data
    form = resolve_input_format(job.model, image_size=data.image_size, fit=data.fit, crop=data.crop, mask=data.mask)
    start = perf_counter()
    images, _ = prepare_images(config, Path(job.folder), form)
    seconds = perf_counter() - start
    answer.phases["read"] = seconds
    count = len(images.table)
    answer.note = f"{count} images, {1000 * seconds / max(1, count):.3f} ms each"
    answer.say()


if __name__ == "__main__":
    main()
