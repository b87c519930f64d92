"""Batches are the same for any number of workers, in an order that depends on seed and epoch."""

import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading

import numpy as np
import psutil
import pytest
import torch
import yaml

from pylorus.config.schema import CONF, AugmentConfig, CacheConfig, DataConfig
from pylorus.core.errors import UnreadableImageError
from pylorus.data.catalog import read_folders
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.dataset import EpochBatchSampler, EpochSampler, LoadingProcesses
from pylorus.data.input_format import InputFormat
from pylorus.data.split import split_catalog

POLICY = AugmentConfig(**yaml.safe_load((CONF / "augment" / "light.yaml").read_text()))


@pytest.fixture(scope="module")
def serve(synthetic_root, tmp_path_factory):
    kept = str(tmp_path_factory.mktemp("kept"))
    catalog = read_folders(synthetic_root, group=r"patient_\d+")
    table = split_catalog(catalog, DataConfig(val_fraction=0.2, test_fraction=0.2)).table

    def make(*, workers=0, seed=0, policy=POLICY, batch_size=4, views=None, images=False, loading=None):
        return ImageDataModule.from_table(
            table,
            catalog.root,
            InputFormat(32, "pad", "bilinear"),
            batch_size=batch_size,
            workers=workers,
            policy=policy,
            seed=seed,
            cache=CacheConfig(folder=kept, images=images),
            views=views,
            loading=loading,
        )

    return make


def epochs(module, count=2):
    """Everything that training sees: rows and pixels of each epoch, as Lightning asks for them."""
    loader = module.train_dataloader()
    seen = []
    for epoch in range(count):
        loader.batch_sampler.sampler.set_epoch(epoch)
        batches = list(loader)
        seen.append((torch.cat([batch.row for batch in batches]), torch.cat([batch.image for batch in batches])))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_neither_order_nor_augmentation(serve, workers):
    for (rows, pixels), (same_rows, same_pixels) in zip(epochs(serve()), epochs(serve(workers=workers)), strict=True):
        assert torch.equal(rows, same_rows)
        assert torch.equal(pixels, same_pixels)


def test_an_image_is_augmented_differently_in_every_epoch(serve):
    (first_rows, first), (second_rows, second) = epochs(serve())
    same = [torch.equal(first[first_rows == row], second[second_rows == row]) for row in range(len(first_rows))]
    assert sum(same) <= 1


def test_views_repeat(serve):
    first, second, third = epochs(serve(views=2), count=3)
    in_order = [pixels[rows.argsort()] for rows, pixels in (first, second, third)]
    assert not torch.equal(in_order[0], in_order[1])
    assert torch.equal(in_order[0], in_order[2])
    assert not torch.equal(first[0], third[0])  # the order is a new one all the same


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_cached_images_equal_decoded_files(serve, workers):
    for (rows, pixels), (same_rows, same_pixels) in zip(
        epochs(serve()), epochs(serve(images=True, workers=workers)), strict=True
    ):
        assert torch.equal(rows, same_rows)
        assert torch.equal(pixels, same_pixels)


def test_a_cached_image_is_not_decoded_again(serve, monkeypatch):
    list(serve(images=True).build_loader("test"))
    monkeypatch.setattr("pylorus.data.input_format.read_image", lambda path: pytest.fail(f"{path} was read again"))
    assert len(list(serve(images=True).build_loader("test")))


@pytest.mark.parametrize("images", [True, False])
def test_an_image_that_was_exchanged_after_it_was_listed_is_named_and_not_cached(synthetic_root, tmp_path, images):
    root = shutil.copytree(synthetic_root, tmp_path / "images")
    catalog = read_folders(root, group=r"patient_\d+")
    table = split_catalog(catalog, DataConfig(val_fraction=0.2, test_fraction=0.2)).table
    rows = table[table["split"] == "test"]["path"].tolist()
    shutil.copy(root / rows[0], root / rows[-1])
    cache = CacheConfig(folder=str(tmp_path / "cache"), images=images)
    form = InputFormat(32, "pad", "bilinear")
    module = ImageDataModule.from_table(
        table, root, form, batch_size=4, workers=0, policy=POLICY, seed=0, cache=cache, views=None
    )
    with pytest.raises(UnreadableImageError, match=f"{re.escape(rows[-1])}: it has another content"):
        list(module.build_loader("test"))


@pytest.mark.parametrize(("side", "kept"), [(44, True), (48, False)])
def test_only_large_frames_are_cached_by_default(serve, side, kept, monkeypatch):
    """The drawn frames are 48 pixels wide: 1.19 or 1.0 times the input's pixels, against a limit of 1.1."""
    monkeypatch.setattr("pylorus.data.input_format.LARGE_FRAME_RATIO", 1.1)
    module = serve(images=None)
    module.form = InputFormat(side, "pad", "bilinear")
    assert (module.get_dataset("test")._cached is not None) == kept


@pytest.mark.slow
def test_images_of_one_epoch_are_augmented_differently(serve, synthetic_root):
    """Two workers with the same random stream would transform all images in the same way."""
    module = serve(workers=2)
    for column in ("path", "sha256"):
        module.parts["train"].loc[:, column] = module.parts["train"][column][0]
    _, pixels = epochs(module, count=1)[0]
    assert len({image.numpy().tobytes() for image in pixels}) > 0.8 * len(pixels)


def test_another_seed_gives_another_order_and_other_augmentations(serve):
    (rows, pixels), *_ = epochs(serve(), count=1)
    (other_rows, other_pixels), *_ = epochs(serve(seed=1), count=1)
    assert not torch.equal(rows, other_rows)
    assert not torch.equal(pixels[rows.argsort()], other_pixels[other_rows.argsort()])


def test_an_epoch_can_be_repeated_without_earlier_ones(serve):
    loader = serve().train_dataloader()
    loader.batch_sampler.sampler.set_epoch(1)
    rows = torch.cat([batch.row for batch in loader])
    assert torch.equal(rows, epochs(serve())[1][0])


def test_every_training_image_is_served_once_an_epoch(serve):
    module = serve()
    for rows, _ in epochs(module):
        assert sorted(rows.tolist()) == list(range(len(module.parts["train"])))


def test_validation_and_test_images_come_unaugmented_in_the_order_of_the_table(serve):
    for part in ("val", "test"):
        with_policy, without = (
            torch.cat([batch.image for batch in serve(policy=policy).build_loader(part)])
            for policy in (POLICY, AugmentConfig())
        )
        assert torch.equal(with_policy, without)
    rows = torch.cat([batch.row for batch in serve().val_dataloader()])
    assert rows.tolist() == list(range(len(rows)))


def test_batches_hold_bytes_and_labels_of_the_table(serve):
    module = serve()
    batch = next(iter(module.build_loader("test")))
    assert batch.image.dtype == torch.uint8
    assert batch.image.shape[1:] == (3, 32, 32)
    assert batch.label.tolist() == module.parts["test"]["label"].tolist()[: len(batch.label)]


@pytest.mark.parametrize(("images", "sizes"), [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (1, [1]), (3, [3])])
def test_there_is_no_last_batch_of_a_single_image(images, sizes):
    """Batch norm can learn nothing from one image, and refuses where its maps are one pixel."""
    batches = EpochBatchSampler(EpochSampler(images, seed=0), 4)
    found = [len(batch) for batch in batches]
    assert found == sizes
    assert len(batches) == len(sizes)


def test_batches_of_one_image_are_used_if_requested():
    assert [len(batch) for batch in EpochBatchSampler(EpochSampler(3, seed=0), 1)] == [1, 1, 1]


def test_the_order_depends_only_on_seed_and_epoch():
    order = EpochSampler(50, seed=7)
    first = [draw.row for draw in order]
    order.set_epoch(1)
    assert [draw.row for draw in order] != first
    order.set_epoch(0)
    assert [draw.row for draw in order] == first
    assert np.array_equal(sorted(first), np.arange(50))


@pytest.mark.slow
def test_one_set_of_processes_serves_all_splits_and_stages_with_the_same_batches(serve):
    def load(module):
        loaders = [module.build_loader(split) for split in ("train", "val", "test")]
        return [(batch.row.tolist(), batch.image.numpy().tobytes()) for loader in loaders for batch in loader]

    stages = [{"seed": 0}, {"seed": 1, "policy": AugmentConfig()}]
    expected = [load(serve(**stage)) for stage in stages]
    with LoadingProcesses(2, pin_memory=False) as loading:
        assert [load(serve(workers=2, loading=loading, **stage)) for stage in stages] == expected
        processes = multiprocessing.active_children()
        assert len(processes) == 2
    assert not any(process.is_alive() for process in processes)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_run_leaves_it_its_batches(serve, number):
    with LoadingProcesses(2, pin_memory=False) as loading:
        batches = iter(serve(workers=2, loading=loading).build_loader("train"))
        rows = next(batches).row.tolist()
        processes = multiprocessing.active_children()
        for process in processes:
            os.kill(process.pid, number)
        rows += [row for batch in batches for row in batch.row.tolist()]
        assert len(rows) == len(set(rows)) == len(serve().parts["train"])
    for process in processes:
        process.join(timeout=10)
        assert not process.is_alive()


@pytest.mark.slow
def test_a_signal_to_a_loading_process_that_has_just_started_leaves_the_run_its_batches(serve):
    interrupting = threading.Event()

    def interrupt():
        if interrupting.is_set():
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)

    os.register_at_fork(after_in_child=interrupt)
    interrupting.set()
    with LoadingProcesses(2, pin_memory=False) as loading:
        module = serve(workers=2, loading=loading)
        rows = [row for batch in module.build_loader("train") for row in batch.row.tolist()]
    interrupting.clear()
    assert sorted(rows) == list(range(len(module.parts["train"])))


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_the_processes_of_an_earlier_loader(serve):
    with LoadingProcesses(2, pin_memory=False) as loading:
        module = serve(workers=2, loading=loading)
        list(module.build_loader("val"))
        held = []

        def iter_batches():
            for batch in module.build_batches("test"):
                held.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
                yield batch

        assert list(module.build_batch_loader("test", iter_batches()))
        assert held
        assert not any(held)


@pytest.mark.slow
def test_a_loader_that_was_left_unfinished_does_not_disturb_the_next_one(serve):
    with LoadingProcesses(2, pin_memory=False) as loading:
        module = serve(workers=2, loading=loading)
        unfinished = iter(module.build_loader("train"))
        next(unfinished)
        rows = [row for batch in module.build_loader("test") for row in batch.row.tolist()]
        assert rows == list(range(len(module.parts["test"])))
        with pytest.raises(RuntimeError, match="serve another loader"):
            next(unfinished)


def _load_a_batch_and_be_killed(serve, connection):
    with LoadingProcesses(2, pin_memory=False) as loading:
        next(iter(serve(workers=2, loading=loading).build_loader("train")))
        connection.send([process.pid for process in multiprocessing.active_children()])
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can end a process with its parent")
def test_the_processes_that_load_images_end_with_a_run_that_is_killed(serve):
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    run = context.Process(target=_load_a_batch_and_be_killed, args=(serve, sender))
    run.start()
    assert receiver.poll(60)
    processes = [psutil.Process(pid) for pid in receiver.recv()]
    run.join()
    _, alive = psutil.wait_procs(processes, timeout=2)  # torch would leave them for five seconds
    assert len(processes) == 2
    assert not alive
