"""Images held on the device that trains: the same batches as from files, without processes and without waiting."""

import pytest
import torch

from pylorus.config.schema import AugmentConfig, CacheConfig, DataConfig
from pylorus.data.augmentation import load_policy
from pylorus.data.catalog import read_folders
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.dataset import DeviceMemory
from pylorus.data.input_format import InputFormat
from pylorus.data.split import split_catalog
from tests.waiting import WaitCounter

CPU = DeviceMemory(torch.device("cpu"), 1.0)


@pytest.fixture
def build(synthetic_root, tmp_path):
    catalog = read_folders(synthetic_root, group=r"patient_\d+")
    table = split_catalog(catalog, DataConfig(val_fraction=0.2, test_fraction=0.2)).table

    def build_module(*, memory=None, policy="light", views=None, images=None, workers=0):
        module = ImageDataModule.from_table(
            table,
            catalog.root,
            InputFormat(32, "pad", "bilinear"),
            batch_size=4,
            workers=workers,
            policy=load_policy(policy) if isinstance(policy, str) else policy,
            seed=5,
            cache=CacheConfig(folder=str(tmp_path / "cache"), images=images),
            views=views,
            memory=memory,
        )
        module._processes = module.processes  # a run's own, so that its loaders start at once
        return module

    return build_module


def read_batches(module, split, epochs=(0, 1)):
    loader, batches = module.build_loader(split), []
    for epoch in epochs:
        loader.batch_sampler.sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


def assert_same_batches(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.row, other.row)
        assert torch.equal(one.label, other.label)
        assert one.image.shape == other.image.shape
        assert (one.image.int() - other.image.int()).abs().max() <= 1


@pytest.mark.parametrize("images", [None, False])
@pytest.mark.parametrize("policy", ["none", "light", "endoscopy"])
def test_the_batches_of_every_split_and_epoch_are_those_of_the_files(build, policy, images):
    for split in ("train", "val", "test"):
        on_device = read_batches(build(memory=CPU, policy=policy, images=images), split)
        assert_same_batches(on_device, read_batches(build(policy=policy), split))


def test_views_repeat_on_the_device_too(build):
    batches = read_batches(build(memory=CPU, views=1), "train", epochs=(0, 2))
    assert_same_batches(batches, read_batches(build(views=1), "train", epochs=(0, 2)))


def test_a_resumed_epoch_starts_at_its_next_batch(build):
    module, whole = build(memory=CPU), build(memory=CPU)
    module.begun = (1, 2)
    assert_same_batches(list(module.build_loader("train")), read_batches(whole, "train", epochs=(1,))[2:])


def test_no_process_loads_images_that_lie_on_the_device(build):
    module = build(memory=CPU, workers=3)
    assert [module.build_loader(split).num_workers for split in ("train", "val", "test")] == [0, 0, 0]


def test_training_images_stay_on_the_cpu_where_the_device_can_not_augment_them(build, caplog):
    policy = AugmentConfig("mine", _target_="numpy.rot90")
    with caplog.at_level("INFO", logger="pylorus"):
        module = build(memory=CPU, policy=policy, workers=2)
    workers = {split: module.build_loader(split).num_workers for split in ("train", "val")}
    assert workers == {"train": 2, "val": 0}


def test_images_that_do_not_fit_stay_in_the_main_memory(build, monkeypatch):
    monkeypatch.setattr(DeviceMemory, "has_space", lambda self, size: size < 30 * 3 * 32 * 32)
    module = build(memory=CPU)
    assert not module.get_dataset("train").is_on_device
    assert_same_batches(read_batches(module, "train"), read_batches(build(), "train"))


def test_a_gpu_holds_what_takes_its_share_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 150)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    memory = DeviceMemory(torch.device("cuda"), 0.25)  # 700 free, and 100 that torch holds but does not use
    assert memory.has_space(200)
    assert not memory.has_space(201)


def test_selecting_and_augmenting_a_batch_does_not_wait_for_the_device(build):
    module = build(memory=CPU, policy="endoscopy")
    dataset, batches = module.get_dataset("train"), list(module.build_batches("train"))
    with WaitCounter() as counter:
        for batch in batches:
            dataset.__getitems__(batch)
    assert not counter.found
