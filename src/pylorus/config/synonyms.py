"""Words of other frameworks, and what to type here: for keys, for the files of conf/, and for values.

Tables only; `pylorus.config.vocabulary` reads them. A new word is one entry here.
"""

from collections.abc import Mapping

_ON, _OFF = "true|1|yes|on", "false|0|no|off|none|null|"
_NUMBER = r"\d+"
_EPOCHS = "stages.*.epochs={}"
_FOLDS = {
    "5": "-m data.fold=0,1,2,3,4",
    _NUMBER: "-m data.fold={range} data.folds={}",
    _ON: "-m data.fold=0,1,2,3,4",
}
_DASHBOARD = {_OFF: "logger=csv", _ON: "logger={name}", ".*": "logger={name} logger.project={}"}
_LIGHTNING = "trainer.args.{name}={}"
_FOLLOWS_FROM_FOLDERS = "# The number of classes follows from the class folders: leave it out."

SYNONYMS: Mapping[str, str | Mapping[str, str]] = {
    # training
    "lr learning_rate base_lr init_lr lr0 lrate eta max_lr rate": "optimizer.lr={}",
    "epochs epoch max_epochs num_epochs n_epochs num_train_epochs nb_epoch total_epochs n_epoch": _EPOCHS,
    "fine_tune_epochs finetune_epochs unfrozen_epochs": "stages.finetune.epochs={}",
    "head_epochs pretrain_epochs frozen_epochs freeze_epochs warmup_head_epochs": "stages.pretrain.epochs={}",
    "batch_size bs batch batchsize train_batch_size per_device_train_batch_size minibatch": "trainer.batch_size={}",
    "early_stopping early_stop patience early_stopping_patience": {
        _ON: "stages.*.patience=3",
        _OFF: "stages.*.patience=null",
        ".*": "stages.*.patience={}",
    },
    "scheduler lr_scheduler lr_schedule sched schedule_type": {
        "(cosine|plateau|constant)": "stages.*.schedule={}",
        ".*cos.*": "stages.*.schedule=cosine",
        ".*plateau.*": "stages.*.schedule=plateau",
        f"{_OFF}|fixed|const": "stages.*.schedule=constant",
        ".*": "stages.*.schedule=cosine",
    },
    "warmup_ratio warmup_fraction warmup_epochs warmup_steps": {
        r"0?\.\d+|0": "stages.*.warmup={}",
        ".*": "stages.*.warmup=0.1 # It is the fraction of a stage's steps.",
    },
    "weight_decay wd decay l2 weightdecay": "optimizer.weight_decay={}",
    "beta beta1 mom": "optimizer.momentum={}",
    "clip clip_grad grad_clip gradient_clip gradient_clip_val clip_norm max_grad_norm clip_grad_norm": (
        "optimizer.clip={}"
    ),
    "opt optim optimiser optimizer_name solver": "optimizer={}",
    "criterion loss_function loss_fn loss_name objective": "loss={}",
    "smoothing label_smooth ls": "loss.label_smoothing={}",
    "class_weight class_weights weighted balanced pos_weight": {
        _OFF: "loss.class_weights=none",
        ".*": "loss.class_weights=balanced # The weights follow from the frequencies of the classes.",
    },
    "gamma focal_gamma": "loss=focal loss.args.gamma={}",
    "focal focal_loss": "loss=focal",
    "accumulate_grad_batches gradient_accumulation_steps accum_iter accumulation_steps accumulation": (
        "trainer.accumulate={}"
    ),
    "random_state random_seed seeds manual_seed rng seed_everything": "seed={}",
    "layer_wise_lr_decay llrd lr_decay discriminative_lr": "stages.finetune.layer_decay={}",
    "freeze freeze_backbone frozen freeze_encoder linear_probe feature_extraction": {
        f"{_ON}|all|backbone|encoder": "stage=pretrain",
        f"{_OFF}": "stage=finetune",
        ".*": "stages.finetune.learn=layer4 # It names the first block that is trained, or head, or all.",
    },
    "unfreeze finetune fine_tune fine_tuning transfer trainable trainable_layers train_layers": {
        f"{_ON}|all": "stage=both",
        _OFF: "stage=pretrain",
        ".*": "stages.finetune.learn={}",
    },
    "save_best checkpoint_metric best_metric metric_for_best_model": {
        f"{_ON}|{_OFF}": "stages.*.monitor=loss",
        ".*": "stages.*.monitor={}",
    },
    "mixup cutmix ema model_ema swa tta test_time_augmentation distillation teacher": (
        "# Pylorus has nothing of the kind: leave it out."
    ),
    # network
    "arch architecture backbone net network encoder model_name base_model model_type model_arch": {
        "({models})": "model={}",
        ".*": "model=timm model.name={}",
    },
    "pretrained pretrain_weights pretrained_weights imagenet init_weights weights checkpoint_path initial_weights": {
        f"{_ON}|imagenet.*|default|hub": "model.weights=hub",
        f"{_OFF}|random|scratch": "model.weights=none",
        ".*": "model.weights={}",
    },
    "from_scratch scratch": {_OFF: "model.weights=hub", ".*": "model.weights=none"},
    "dropout drop drop_rate dropout_rate p_dropout": "model.args.drop_rate={}",
    "drop_path stochastic_depth drop_path_rate": "model.args.drop_path_rate={}",
    "num_classes n_classes nb_classes nclass classes_num num_labels": _FOLLOWS_FROM_FOLDERS,
    "in_chans channels in_channels num_channels": "# Every image is converted to RGB: leave it out.",
    "normalize_mean img_mean image_mean": "model.mean={}",
    "normalize_std img_std image_std": "model.std={}",
    # images
    "root data_root data_dir data_path dataset datadir dataset_dir dataset_path image_dir images_dir img_dir "
    "image_folder folder input_dir train_dir train_path train_data images input": "data.root={}",
    "manifest csv csv_file csv_path table labels label_file labels_file annotations annotation_file dataframe df "
    "metadata train_csv": "data.manifest={}",
    "shards wds webdataset": "data=shards data.root={}",
    "classes class_names class_list categories names": {_NUMBER: _FOLLOWS_FROM_FOLDERS, ".*": "data.classes={list}"},
    "short_name abbreviations": "data.short_names={list}",
    "ignore_classes skip_classes exclude_classes": "data.exclude={list}",
    "patient patients patient_id patient_regex group_by groups subject case": "data.group={}",
    "img_size imgsz image_size imgsize input_size resize resolution im_size crop_size target_size size": {
        r"\D*(\d+)\D*.*": "data.image_size={1}"
    },
    "workers num_workers n_workers nworkers n_jobs num_cpus dataloader_num_workers": "data.workers={}",
    "test_size test_split test_ratio test_frac test_percent": {
        r"0?\.\d+": "data.test_fraction={}",
        r"(\d\d?)%?": "data.test_fraction={fraction}",
        ".*": "data.test_fraction=0.15",
    },
    "val_size val_split val_ratio valid_pct validation_split valid_size validation_size val_frac val_percent": {
        r"0?\.\d+": "data.val_fraction={}",
        r"(\d\d?)%?": "data.val_fraction={fraction}",
        ".*": "data.val_fraction=0.15",
    },
    "split splits split_csv split_path": {
        r".*\.csv": "data.split_file={}",
        r"0?\.\d+": "data.test_fraction={}",
        r"(\d\d?)%?": "data.test_fraction={fraction}",
        ".*": "data.split_file=RUN/split.csv # Or data.test_fraction=0.15, for a new split.",
    },
    "cv folds n_folds num_folds k kfold k_fold k_folds n_splits cross_validation crossval xval": _FOLDS,
    "val_dir valid_dir val_path test_dir test_path val_data test_data valid": (
        "# data.root names the folder above: DIR/train, DIR/val and DIR/test, each with class folders."
    ),
    "aug augs augmentation augmentations transform transforms data_augmentation augmenter": {
        _OFF: "augment=none",
        "({augment})": "augment={}",
        "heavy|strong|hard|full|medium": "augment=endoscopy",
        ".*": "augment=light",
    },
    "letterbox padding": {_OFF: "data.fit=stretch", ".*": "data.fit=pad"},
    "center_crop centercrop": {_OFF: "data.fit=pad", ".*": "data.fit=crop"},
    # machine
    "gpu cuda use_gpu use_cuda": {
        "true|yes|on|0|": "trainer=gpu",
        "false|no|off|none|-1": "trainer=cpu",
        ".*": "trainer=gpu # To choose among several: CUDA_VISIBLE_DEVICES={} before it.",
    },
    "gpus num_gpus n_gpu n_gpus ngpus ngpu world_size nproc_per_node num_devices": {
        "0|none|false": "trainer=cpu",
        _NUMBER: "trainer.devices={}",
        ".*": "trainer.devices=1 # It is a number. To choose some: CUDA_VISIBLE_DEVICES={} before it.",
    },
    "device dev accelerator_type platform": {
        "cpu|mps|auto": "trainer.accelerator={}",
        r"(?:cuda|gpu)?:?(\d+)": "trainer=gpu # To choose among several: CUDA_VISIBLE_DEVICES={1} before it.",
        "cuda|gpu": "trainer.accelerator=gpu",
        ".*": "trainer.accelerator=auto",
    },
    "fp16 half float16 use_fp16": {_OFF: "trainer.precision=32", ".*": "trainer.precision=16"},
    "bf16 bfloat16": {_OFF: "trainer.precision=32", ".*": "trainer.precision=bf16"},
    "fp32 float32": {_OFF: "trainer.precision=auto", ".*": "trainer.precision=32"},
    "amp mixed_precision use_amp autocast native_amp": {
        _OFF: "trainer.precision=32",
        "16.*|fp16": "trainer.precision=16",
        "bf16.*": "trainer.precision=bf16",
        ".*": "trainer.precision=auto",
    },
    "num_nodes nnodes n_nodes": "trainer.nodes={}",
    "ddp distributed parallel multi_gpu": {_OFF: "trainer.devices=1", ".*": "trainer.devices=2"},
    "fsdp": {_OFF: "trainer.strategy=ddp", ".*": "trainer.strategy=fsdp"},
    "torch_compile compile_model": "trainer.compile={}",
    "num_threads n_threads cpu_threads omp_threads": "trainer.threads={}",
    "progress_bar enable_progress_bar tqdm verbose": {
        "0|false|no|off": "trainer.progress=false",
        ".*": "trainer.progress=true",
    },
    "cache_dir cachedir": "cache.folder={}",
    "limit_train_batches limit_val_batches log_every_n_steps fast_dev_run detect_anomaly deterministic profiler "
    "benchmark": _LIGHTNING,
    "val_check_interval check_val_every_n_epoch overfit_batches num_sanity_val_steps eval_every save_every": (
        "# Each epoch ends with one validation, after which it is saved: leave it out."
    ),
    "max_time": "# A stage ends after its epochs: leave it out.",
    "sync_batchnorm sync_bn": "# With several devices, Pylorus synchronizes batch norm itself: leave it out.",
    "max_steps num_steps max_iter iterations n_iter": "stages.*.epochs=1 # A stage counts epochs, not steps.",
    # results
    "out output output_dir outdir out_dir outputs save_dir savedir save_path log_dir logdir run_dir workdir work_dir "
    "result_dir results results_dir default_root_dir": "hydra.run.dir={}",
    "name run_name exp_name experiment_name exp job_name title tag": "hydra.run.dir=outputs/{}",
    "resume_from resume_from_checkpoint ckpt ckpt_path checkpoint load_from restore continue last": {
        f"{_ON}|{_OFF}|last|best": "resume=RUN",
        ".*": "resume={}",
    },
    "wandb use_wandb": {**_DASHBOARD},
    "tensorboard tb use_tensorboard": {_OFF: "logger=csv", ".*": "logger=tensorboard"},
    "mlflow use_mlflow": {**_DASHBOARD},
    "log loggers tracker report_to logging": {
        "({logger})": "logger={}",
        _OFF: "logger=csv",
        ".*": "logger=tensorboard",
    },
    "project project_name wandb_project": "logger=wandb logger.project={}",
    "positive_class pos_label target_class class_of_interest": "deploy.class_name={}",
    "recall min_sensitivity target_sensitivity": "deploy.sensitivity={}",
    "debug demo smoke_test dry_run test_run quick": {_OFF: "", ".*": "experiment=debug"},
    "sweep multirun grid grid_search": "-m",
    "search hpo tune hyperparameter_search optuna": "-m experiment=search",
    "config config_file cfg config_path yaml": "--config-dir=DIR # With your files in DIR/GROUP/FILE.yaml.",
}
"""Words of other frameworks → what to type here.

A value is what takes the place of KEY=VALUE, or patterns of the value (whole, in any case, first match) with it. There
`{}` is the value as typed, `{1}` a group of the pattern, `{list}` the value in brackets, `{range}` 0 to value - 1,
`{fraction}` the value in percent as a fraction, `{name}` the key, `*` each stage; after `#` stands a sentence.
"""


GROUP_VALUES: Mapping[str, Mapping[str, str]] = {
    "data": {
        "folder|dir|directory|images?|image_?folders?|real|own|local": "data=folders",
        "csv|table|tables|dataframe|parquet|list|file": "data=manifest",
        "tars?|wds|webdataset|shard": "data=shards",
        "fake|demo|drawn|toy|dummy|random|synth|generated": "data=synthetic",
    },
    "stage": {
        r"all|full|two|2|two.?stages?|pretrain.{1,3}fine.?tune": "stage=both",
        "head|frozen|freeze|linear|linear.?prob(e|ing)|pre.?train(ed|ing)?|first|1": "stage=pretrain",
        "fine.?tun(e|ed|ing)|unfrozen|tune|whole|second|train": "stage=finetune",
    },
    "augment": {
        "strong|heavy|hard|full|medium|endoscop.*|gastroscop.*": "augment=endoscopy",
        "default|basic|weak|simple|auto.*|rand.*|trivial.*|true|yes|on|small|flip": "augment=light",
        "false|no|off|null|0": "augment=none",
    },
    "optimizer": {r"adam\s?w": "optimizer=adamw", "momentum|nesterov": "optimizer=sgd", ".*": "optimizer.name={}"},
    "loss": {"ce|bce|nll|cross.?entropy.*|crossentropyloss|softmax": "loss=cross_entropy", "focal.*": "loss=focal"},
    "trainer": {
        r"cuda.*|gpus?|nvidia|true|\d": "trainer=gpu",
        "false|none|off": "trainer=cpu",
        "auto": "trainer=default",
    },
    "logger": {
        "tb|tensor.?board.*": "logger=tensorboard",
        "w.?(and)?.?b|weights.*": "logger=wandb",
        "ml.?flow.*": "logger=mlflow",
        "none|false|off|null|no|file": "logger=csv",
    },
    "model": {
        "res.?net.?50.*": "model=resnet50",
        "vgg.?19.*": "model=vgg19",
        "inception.*": "model=inception_v3",
        r"[a-z]\w*\d[\w.]*": "model=timm model.name={}",
    },
    "experiment": {
        "demo|test|quick|smoke.*|dry.?run": "experiment=debug",
        "study|article|publication": "experiment=paper",
        "optuna|hpo|tune": "experiment=search",
    },
}
"""Words for a file of a group of conf/ → what to type, by patterns of the value as in `SYNONYMS`."""


VALUES: Mapping[str, Mapping[str, str]] = {
    "trainer.accelerator": {r"cuda.*|nvidia|gpus|\d|true": "gpu", "metal|apple": "mps", "false|none|null": "cpu"},
    "trainer.precision": {
        "fp16|half|float16|16.?mixed|16.?true": "16",
        "bf16.*|bfloat16|mixed|amp": "bf16",
        "fp32|full|float32|32.?true|single|high|highest": "32",
        "true|default|none|null": "auto",
    },
    "trainer.strategy": {"dp|ddp.*|auto|single.*|horovod": "ddp", "fsdp.*|deepspeed.*|zero.*|sharded": "fsdp"},
    "model.weights": {"imagenet.*|pretrained|true|yes|default|timm": "hub", "false|no|random|scratch|null": "none"},
    "stages.*.schedule": {".*cos.*": "cosine", ".*plateau.*": "plateau", "none|null|fixed|const|off": "constant"},
    "loss.class_weights": {"true|yes|on|auto|inverse.*|weighted": "balanced", "false|no|off|null|equal": "none"},
    "data.crop": {"true|yes|on|fov|field.*": "auto", "false|no|off|null": "none"},
    "data.mask": {"true|yes|on|text|auto": "overlays", "false|no|off": "none"},
    "data.fit": {"resize|squash|scale": "stretch", "letterbox|padding": "pad", "center.?crop": "crop"},
    "data.validation": {"train|true|split|fraction|none": "cut"},
    "data.on_error": {"skip|ignore|drop|continue|warn": "quarantine", "stop|raise|error|abort": "fail"},
    "data.patients": {"path|folder|folders|group|regex|manifest": "paths", "dcm|patientid": "dicom"},
    "data.kind": {"folder|image_?folder": "folders", "csv|table": "manifest", "tar|wds": "shards"},
}
"""Words for the values of keys that take one of a few → the value here, by patterns as in `SYNONYMS`."""
TRUE, FALSE = "true|yes|on|y|1|ja|oui|si|t", "false|no|off|n|0|nein|non|f"
