"""`litgpt pretrain_supernet`: train a model together with its sub-networks. Takes all options of `litgpt pretrain`."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from litgpt.args import EvalArgs, LogArgs
from litgpt.config import Config, name_to_config
from litgpt.data import DataModule
from litgpt.types import LoggerChoice
from litgpt.utils import (
    get_default_supported_precision,
    init_out_dir,
    num_parameters,
)

import litgpt_whittle.data  # noqa: F401  lets the command line find HFText by its bare name
from litgpt_whittle.batches import check_seed
from litgpt_whittle.data.loading import check_data
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import check_writable
from litgpt_whittle.processes import is_first_started, lock_dir_for_all, own_device
from litgpt_whittle.samplers import Sampler
from litgpt_whittle.settings import describe
from litgpt_whittle.supergpt import LayerwiseGPT, SuperGPT
from litgpt_whittle.supernet import (
    SuperLossModel,
    SupernetArgs,
    SupernetStep,
    score_of,
)
from litgpt_whittle.training.args import TrainArgs
from litgpt_whittle.training.checks import (
    check_arguments,
    check_devices,
    check_logger,
    check_pair,
    check_tokenizers,
    default_data,
    make_logger,
    read_optimizer,
    run_settings,
)
from litgpt_whittle.training.loop import fit, load_data
from litgpt_whittle.training.memory_plan import Step, show_plan
from litgpt_whittle.training.model_source import ModelSource
from litgpt_whittle.training.pretraining import (
    Saver,
    begin,
    build_model,
    checkpoint_dir_of,
    count_flops,
    launch_training,
)
from litgpt_whittle.training.resume import (
    find_resume,
    state_to_resume,
)
from litgpt_whittle.training.run import Job, Schedule


def setup(
    model_name: str | None = None,
    model_config: Config | None = None,
    out_dir: Path = Path("out/pretrain_supernet"),
    precision: Literal["bf16-true", "bf16-mixed", "32-true", None] = None,
    initial_checkpoint_dir: Path | None = None,
    resume: bool | Literal["auto"] | Path = False,
    data: DataModule | None = None,
    train: TrainArgs = TrainArgs(
        save_interval=1000,
        log_interval=1,
        global_batch_size=512,
        micro_batch_size=4,
        max_tokens=int(3e12),
        max_norm=1.0,
        min_lr=4e-5,
        lr_warmup_steps=2000,
    ),
    eval: EvalArgs = EvalArgs(interval=1000, max_iters=100),
    log: LogArgs = LogArgs(),
    optimizer: str | dict = "AdamW",
    devices: int | str = "auto",
    num_nodes: int = 1,
    tokenizer_dir: Path | None = None,
    logger_name: LoggerChoice = "tensorboard",
    seed: int = 42,
    supernet: SupernetArgs = SupernetArgs(),
    strategy: Literal["auto", "fsdp", "ddp"] = "auto",
    activation_checkpointing: bool = False,
    checkpoint_type: Literal["full", "sharded"] = "full",
    dry_run: bool = False,
):
    """Pretrain, or continue to train, a model together with its sub-networks.

    The result is a stock litgpt checkpoint, which search, extract, distill and generate accept like any other. One of
    litgpt's instruction data modules makes it a finetuning.

    Arguments:
        model_name: A litgpt model to start from random weights. Use "list" to list them.
        model_config: A ``litgpt.Config`` to start from random weights. Overrides ``model_name``.
        out_dir: Directory for checkpoints, logs, ``metrics.jsonl`` and ``training.png``.
        precision: The precision to train in. Determines a compatible precision setting by default.
        initial_checkpoint_dir: A pretrained litgpt checkpoint directory to continue from.
        resume: Path to a checkpoint directory of an interrupted run, or ``True`` for the latest checkpoint in
            ``out_dir``, or ``'auto'`` to resume only if there is one. All settings must be those of the run.
        data: Data-related arguments. If not provided, the default is ``litgpt.data.TinyLlama``.
        train: Training-related arguments. Training ends when the first of ``max_tokens``, ``max_steps`` and
            ``max_time`` is reached. A token counts once, however many networks are trained on it.
        eval: Evaluation-related arguments. See ``litgpt.args.EvalArgs`` for details.
        log: Arguments for the logger. See ``litgpt.args.LogArgs`` for details.
        optimizer: An optimizer name (such as "AdamW") or config.
        devices: How many devices to use.
        num_nodes: How many nodes the code is being run on.
        tokenizer_dir: Tokenizer for the data module, copied into the checkpoints. By default the checkpoint's.
        logger_name: The name of the logger to send metrics to.
        seed: The random seed to use for reproducibility.
        supernet: Sampling of the sub-networks to train, and their losses.
        strategy: Distribution of the model over several devices: ``fsdp`` shards its weights (FSDP2) and is the
            default; ``ddp`` replicates them.
        activation_checkpointing: If true, recompute activations in the backward pass: slower, with less memory.
        checkpoint_type: Format of intermediate checkpoints: ``full``, a stock litgpt checkpoint, for which the first
            process gathers all weights and the optimizer state, or ``sharded``, one part per process. The final
            checkpoint is full.
        dry_run: If true, check all settings, print the memory that training needs, and stop.
    """
    if model_name == "list":
        print("Available values:\n" + "\n".join(sorted(name_to_config)))
        return
    optimizer = read_optimizer(optimizer)
    arguments = {name: describe(value) for name, value in locals().items()}
    out_dir = init_out_dir(out_dir)
    check_arguments(train, eval, initial_checkpoint_dir, None, resume)
    check_seed(seed)
    check_writable(out_dir)
    check_logger(logger_name)
    supernet.distill.objectives()
    devices = check_devices(devices, num_nodes, train)
    with nullcontext() if dry_run else lock_dir_for_all(out_dir):
        resume_dir = find_resume(resume, out_dir)
        start_dir = checkpoint_dir_of(resume_dir or initial_checkpoint_dir)
        model = _super_network(start_dir, model_name, model_config).with_tie(train.tie_embeddings)
        sampler = supernet.make_sampler(model.config, model.is_tied)
        tokenizer_dir = check_tokenizers(checkpoint_dir_of(tokenizer_dir), start_dir, None)
        seq_length = check_pair(model.config, None, train.max_seq_length)
        data = default_data() if data is None else data
        check_data(data, tokenizer_dir, model.config.padded_vocab_size)
        precision = precision or get_default_supported_precision(training=True)
        settings = run_settings(arguments, model.config, None, precision)
        state = state_to_resume(resume_dir, settings)
        step = Step.of(
            train,
            model.build,
            optimizer,
            precision,
            own_device(),
            devices * num_nodes,
            strategy,
            seq_length,
            Objective(),
            activation_checkpointing=activation_checkpointing,
            tie_embeddings=model.is_tied,
        )
        if is_first_started():
            show_plan(step, "replicated", devices, dry_run)
        if dry_run:
            return
        logger = make_logger(logger_name, out_dir, f"supernet-{model.config.name}", bool(resume_dir), train, log)
        fabric = launch_training(devices, num_nodes, precision, strategy, logger, arguments)
        main(
            fabric=fabric,
            devices=devices,
            num_nodes=num_nodes,
            seed=seed,
            start=model,
            sampler=sampler,
            supernet=supernet,
            data=data,
            out_dir=out_dir,
            tokenizer_dir=tokenizer_dir,
            train=train,
            eval=eval,
            step=step,
            checkpoint_type=checkpoint_type,
            arguments=arguments,
            settings=settings,
            state=state,
        )


def _super_network(start_dir: Path | None, model_name: str | None, model_config: Config | None) -> ModelSource:
    """Return the source of the model, built as a super-network.

    Raises:
        UserError: If there is no model, or its layers differ in size.
    """
    if start_dir is None and model_name is None and model_config is None:
        raise UserError(
            "no model is given; set --initial_checkpoint_dir to continue from a pretrained one, or --model_name to "
            "start from random weights"
        )
    model = ModelSource.choose(start_dir, None, None, model_name, model_config)
    config = model.config
    with torch.device("meta"):
        built = model.build()
    if isinstance(built, LayerwiseGPT):
        config = built.shape.layer_config(0)
    if isinstance(built, LayerwiseGPT) and len({built.shape.layer(i).sizes for i in range(len(built.shape))}) > 1:
        raise UserError(
            f"a super-network's layers must all have the same sizes, those of {str(start_dir)!r} differ; choose a "
            "uniform one"
        )
    return dataclasses.replace(model, config=config, build=lambda: SuperGPT(config))


def main(
    fabric: L.Fabric,
    devices: int,
    num_nodes: int,
    seed: int,
    start: ModelSource,
    sampler: Sampler,
    supernet: SupernetArgs,
    data: DataModule,
    out_dir: Path,
    tokenizer_dir: Path | None,
    train: TrainArgs,
    eval: EvalArgs,
    step: Step,
    checkpoint_type: str,
    arguments: dict[str, Any],
    settings: dict[str, Any],
    state: dict[str, Any] | None,
) -> None:
    """Build model and data, in litgpt's order, and train."""
    fabric.seed_everything(seed)
    model = build_model(fabric, start, step.seq_length, step.activation_checkpointing)
    smallest = sampler.space.smallest()
    fabric.print(f"{num_parameters(model):,} parameters, the smallest sub-network {sampler.space.n_params(smallest):,}")
    losses_of = SuperLossModel(model)
    root = fabric.setup(losses_of)
    optimizer = cast(torch.optim.Optimizer, fabric.setup_optimizers(step.build_optimizer(root.parameters())))
    train_loader, validation = load_data(
        fabric, data, tokenizer_dir, train.micro_batch_size, step.seq_length, eval.max_iters
    )
    schedule = Schedule.of(train, step.seq_length, optimizer.defaults["lr"], devices, num_nodes, train_loader)
    train_step = SupernetStep(
        root,
        losses_of,
        sampler,
        supernet.distill.objectives(),
        seed,
        schedule.max_iters,
        schedule.accumulation,
        differs=supernet.per_rank == "different",
    )
    save = Saver(fabric, model, start, tokenizer_dir, arguments, checkpoint_type)
    job = Job(root, optimizer, train_step, score_of(root, losses_of, None), save)
    validated = supernet.validated(sampler.space)
    job.more_scores = {name: score_of(root, losses_of, subnet) for name, subnet in validated.items()}
    job.flops_per_iter = count_flops(model, train.micro_batch_size, step.seq_length)
    run = begin(fabric, job, train_loader, validation, schedule, step.seq_length, out_dir, settings, state)
    fit(run, train, eval)
