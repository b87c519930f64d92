"""What a device holds and how fast it learns, with whole weights on each device (ddp) and with divided ones (fsdp).

`python benchmarks/strategies.py --model vit_large_patch16_224 --devices 2` trains the whole network for an epoch on
drawn images, once in each way, and prints a table in Markdown. On a CPU the processes share its cores and its memory:
then memory is what the first process holds resident, the network's first weights and the imports included.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FIGURES = {
    "peak_memory_mib": "peak memory of the first process, MiB",
    "peak_gpu_memory_mib": "peak memory of the first GPU, MiB",
    "images_per_second": "training images a second",
    "fit_seconds": "seconds of the epoch, validation and checkpoint included",
}


def measured(strategy: str, options: argparse.Namespace) -> dict[str, float | None]:
    """The speed.json of the one stage of a run."""
    folder = HERE / "outputs" / f"strategy-{strategy}"
    shutil.rmtree(folder, ignore_errors=True)
    words = [
        "data=synthetic", f"data.drawn.images={options.images}", "model=timm", f"model.name={options.model}",
        "model.weights=none", "stage=finetune", "stages.finetune.epochs=1", "stages.finetune.learn=all", "augment=none",
        f"trainer.batch_size={options.batch_size}",
        f"trainer.devices={options.devices}", f"trainer.strategy={strategy}",
        f"trainer.precision={options.precision}", "trainer.progress=false", "report=false",
        f"cache.folder={folder}/cache", f"hydra.run.dir={folder}/run",
    ]  # fmt: skip
    subprocess.run([sys.executable, str(HERE.parent / "train.py"), *words], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, float | None] = json.loads((folder / "run" / "finetune" / "speed.json").read_text())
    shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_large_patch16_224")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--images", type=int, default=12, help="of each of three classes, validation and test included")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--precision", default="32", choices=("32", "bf16"))
    options = parser.parse_args()
    found = {strategy: measured(strategy, options) for strategy in ("ddp", "fsdp")}
    print(
        f"{options.model}, {options.devices} devices, batches of {options.batch_size}, precision {options.precision}\n"
    )
    print("| | ddp | fsdp | fsdp ÷ ddp |\n| --- | --: | --: | --: |")
    for name, words in FIGURES.items():
        ddp, fsdp = (found[strategy][name] for strategy in ("ddp", "fsdp"))
        if ddp and fsdp:
            print(f"| {words} | {ddp:,.1f} | {fsdp:,.1f} | {fsdp / ddp:.2f} |")


if __name__ == "__main__":
    main()
