"""`litgpt distill`: pretrain a student with its teacher's help. Accepts all options of `litgpt pretrain`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from litgpt.args import EvalArgs, LogArgs
from litgpt.config import Config, name_to_config
from litgpt.data import DataModule
from litgpt.model import GPT
from litgpt.types import LoggerChoice
from litgpt.utils import (
    get_default_supported_precision,
    init_out_dir,
    num_parameters,
)

import litgpt_whittle.data  # noqa: F401  lets the command line find HFText by its bare name
from litgpt_whittle.batches import BatchArgs, check_seed
from litgpt_whittle.checkpoint import check_checkpoint, read_weights
from litgpt_whittle.commands import extract
from litgpt_whittle.data.loading import check_data
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.distillation.cache import Cache
from litgpt_whittle.distillation.head import LossModel
from litgpt_whittle.distillation.hidden import HiddenLoss
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.distillation.quantize import check_quantize, saved_bytes
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import check_writable
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.processes import is_first_started, lock_dir_for_all, own_device, release_memory
from litgpt_whittle.repair.args import RepairArgs
from litgpt_whittle.settings import describe
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import is_tied, tie
from litgpt_whittle.training.args import TrainArgs
from litgpt_whittle.training.checks import (
    check_arguments,
    check_cache,
    check_cache_reaches,
    check_devices,
    check_hidden,
    check_logger,
    check_pair,
    check_tokenizers,
    check_vocabularies,
    default_data,
    make_logger,
    read_optimizer,
    run_settings,
    warn_of_small_teacher,
)
from litgpt_whittle.training.compiler import check_compiler
from litgpt_whittle.training.loop import fit, load_data
from litgpt_whittle.training.memory_plan import Step, show_plan, teacher_dtype
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
from litgpt_whittle.training.run import Job, Schedule, n_iters
from litgpt_whittle.training.teacher import (
    CachedTeacher,
    LiveTeacher,
    Teacher,
)
from litgpt_whittle.windows import vectorize_windows


def setup(
    model_name: str | None = None,
    model_config: Config | None = None,
    out_dir: Path = Path("out/distill"),
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
    teacher_checkpoint_dir: Path | None = None,
    teacher_cache: Path | None = None,
    sub_network: Path | None = None,
    repair: bool | RepairArgs = False,
    random_weights: bool = False,
    distill: DistillArgs = DistillArgs(),
    compile: bool = True,
    strategy: Literal["auto", "fsdp", "ddp"] = "auto",
    teacher_placement: Literal["auto", "replicated", "sharded"] = "auto",
    teacher_quantize: Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8", None] = None,
    activation_checkpointing: bool = False,
    checkpoint_type: Literal["full", "sharded"] = "full",
    dry_run: bool = False,
):
    """Pretrain a student with its teacher's help.

    The student is an extracted checkpoint (``initial_checkpoint_dir``), a sub-network cut from the teacher now
    (``sub_network``), or a model with random weights (``model_name`` or ``model_config``).

    Arguments:
        model_name: A litgpt model to start from random weights, where no student is given. Use "list" to list them.
        model_config: A ``litgpt.Config`` to start from random weights. Overrides ``model_name``.
        out_dir: Directory for checkpoints, logs, ``metrics.jsonl`` and ``training.png``.
        precision: The precision to train in; if it is a bf16 one, the teacher runs in bf16. Determines a compatible
            precision setting by default.
        initial_checkpoint_dir: The student's litgpt checkpoint directory, such as ``litgpt extract`` writes.
        resume: Path to a checkpoint directory of an interrupted run, or ``True`` for the latest checkpoint in
            ``out_dir``, or ``'auto'`` to resume only if there is one. All settings must be those of the run.
        data: Data-related arguments. If not provided, the default is ``litgpt.data.TinyLlama``.
        train: Training-related arguments. Training ends when the first of ``max_tokens``, ``max_steps`` and
            ``max_time`` is reached.
        eval: Evaluation-related arguments. See ``litgpt.args.EvalArgs`` for details.
        log: Arguments for the logger. See ``litgpt.args.LogArgs`` for details.
        optimizer: An optimizer name (such as "AdamW") or config.
        devices: How many devices to use.
        num_nodes: How many nodes the code is being run on.
        tokenizer_dir: Tokenizer for the data module, copied into the checkpoints. By default the student's or the
            teacher's.
        logger_name: The name of the logger to send metrics to.
        seed: The random seed to use for reproducibility.
        teacher_checkpoint_dir: The teacher's litgpt checkpoint directory. Needed unless there is a ``teacher_cache``
            or ``distill.beta`` is 0.
        teacher_cache: Directory that ``litgpt cache_teacher`` wrote for this teacher and the same data. The teacher is
            then not run, except for one validation if ``teacher_checkpoint_dir`` is given too.
        sub_network: A sub-network YAML, as ``litgpt search`` writes it, to cut the student from the teacher with.
        repair: Repair the cut of ``sub_network`` first, as ``litgpt extract`` does, in ``out_dir/start``: ``true``, or
            settings.
        random_weights: Use only the student's architecture and start from random weights, as a baseline.
        distill: Losses, weights and temperature of the distillation.
        compile: If true, compile the student, and the teacher unless it is sharded or quantized. Without it, training
            starts about a minute earlier, which can pay off for small models.
        strategy: Distribution of the student over several devices: ``fsdp`` shards its weights (FSDP2) and is the
            default; ``ddp`` replicates them, which is faster for small models.
        teacher_placement: Distribution of the teacher over several devices: replicated, sharded, or chosen by an
            estimate of the memory that training needs; training does not start if the estimate fails.
        teacher_quantize: Quantize the teacher's blocks, as ``litgpt generate --quantize`` does.
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
    check_arguments(train, eval, initial_checkpoint_dir, sub_network, resume)
    check_seed(seed)
    check_writable(out_dir)
    check_logger(logger_name)
    objectives = distill.objectives()
    devices = check_devices(devices, num_nodes, train)
    device = own_device()
    if compile:
        check_compiler(device)
    check_quantize(teacher_quantize, teacher_placement)
    _check_repair(repair, sub_network, random_weights, devices * num_nodes)
    teacher_dir = checkpoint_dir_of(teacher_checkpoint_dir)
    teacher_config = None if teacher_dir is None else check_checkpoint(teacher_dir)
    if teacher_dir is None and teacher_cache is None and distill.uses_teacher:
        raise UserError(
            f"distill.beta = {distill.beta} needs a teacher; set --teacher_checkpoint_dir or --teacher_cache, or "
            "--distill.beta 0 to train without one"
        )
    cache = Cache(teacher_cache) if teacher_cache is not None and distill.uses_teacher else None
    with nullcontext() if dry_run else lock_dir_for_all(out_dir):
        resume_dir = find_resume(resume, out_dir)
        student_dir = checkpoint_dir_of(resume_dir or initial_checkpoint_dir)
        student = ModelSource.choose(student_dir, sub_network, teacher_dir, model_name, model_config)
        if random_weights and resume_dir is None:
            student = student.with_random_weights()
        student = student.with_tie(train.tie_embeddings)
        used_dir, used_teacher = (teacher_dir, teacher_config) if distill.uses_teacher else (None, None)
        if cache is not None:
            used_teacher = cache.teacher_config
        speaking_dir = used_dir if cache is None else cache.folder
        asked_dir = checkpoint_dir_of(tokenizer_dir)
        tokenizer_dir = check_tokenizers(asked_dir, student_dir, speaking_dir)
        check_vocabularies(student.config, used_teacher, asked_dir or student_dir, speaking_dir)
        seq_length = check_pair(student.config, used_teacher, train.max_seq_length)
        if used_teacher is not None:
            teacher_tied = used_dir is not None and is_tied(read_weights(used_dir))
            warn_of_small_teacher(student.n_params, n_params(used_teacher, SubNet.full(used_teacher), teacher_tied))
        if cache is not None:
            where = f"cache {str(cache.folder)!r}"
            check_cache(cache.contents, where, objectives(0.0).terms, distill, seq_length, used_dir)
        origin = check_hidden(distill.hidden, student.config.n_layer, student.sub_network, teacher_config)
        n_samples = n_iters(train, seq_length, devices, num_nodes) * train.micro_batch_size * devices * num_nodes
        if cache is not None:
            check_cache_reaches(cache, n_samples * seq_length)
        data = default_data() if data is None else data
        configs = [config for config in (student.config, used_teacher) if config is not None]
        check_data(data, tokenizer_dir, min(config.padded_vocab_size for config in configs))
        precision = precision or get_default_supported_precision(training=True)
        settings = run_settings(arguments, student.config, used_dir, precision, None if cache is None else cache.folder)
        state = state_to_resume(resume_dir, settings)
        if repair and resume_dir is None and not dry_run:
            assert teacher_dir is not None and sub_network is not None  # else there is nothing to repair
            start, seen = out_dir / "start", BatchArgs(train.micro_batch_size, seq_length)
            key = extract.key_of(teacher_dir, sub_network, None, repair, data, seen, seed)
            if not (resume and extract.is_finished(start, key)):
                module = copy.deepcopy(data)  # training connects its own copy
                extract.setup(teacher_dir, sub_network, start, None, start.exists(), repair, module, seen, seed=seed)
                release_memory()  # the plan looks how much is free
            student = ModelSource.choose(start, None, None, None, None).with_tie(train.tie_embeddings)
            origin = check_hidden(distill.hidden, student.config.n_layer, student.sub_network, teacher_config)
        is_live = used_dir is not None and cache is None

        def make_teacher() -> GPT:
            model = vectorize_windows(GPT(teacher_config))
            return tie(model) if teacher_tied else model

        def make_hidden(model: GPT) -> HiddenLoss:
            return HiddenLoss(model, teacher_config, distill.hidden, origin, student.basis)

        step = Step.of(
            train,
            student.build,
            optimizer,
            precision,
            device,
            devices * num_nodes,
            strategy,
            seq_length,
            objectives(0.0),
            activation_checkpointing=activation_checkpointing,
            tie_embeddings=student.is_tied,
            build_teacher=make_teacher if is_live else None,
            quantized_bytes=saved_bytes(teacher_config, teacher_quantize, teacher_dtype(precision)) if is_live else 0,
            build_hidden=make_hidden if distill.hidden.is_used else None,
        )
        placement = "replicated" if teacher_quantize else teacher_placement
        is_sharded = show_plan(step, placement, devices, dry_run) if is_first_started() else False
        if dry_run:
            return
        logger = make_logger(logger_name, out_dir, f"distill-{student.config.name}", bool(resume_dir), train, log)
        fabric = launch_training(devices, num_nodes, precision, strategy, logger, arguments)
        main(
            fabric=fabric,
            devices=devices,
            num_nodes=num_nodes,
            seed=seed,
            student=student,
            teacher_dir=used_dir,
            cache=cache,
            data=data,
            out_dir=out_dir,
            tokenizer_dir=tokenizer_dir,
            train=train,
            eval=eval,
            make_optimizer=step.build_optimizer,
            make_hidden=step.build_hidden,
            distill=distill,
            compile=compile,
            teacher_is_sharded=fabric.broadcast(is_sharded),
            teacher_quantize=teacher_quantize,
            activation_checkpointing=activation_checkpointing,
            checkpoint_type=checkpoint_type,
            seq_length=seq_length,
            arguments=arguments,
            settings=settings,
            state=state,
        )


def _check_repair(repair: bool | RepairArgs, sub_network: Path | None, random_weights: bool, n: int) -> None:
    if repair and random_weights:
        raise UserError("random_weights leaves nothing to repair; leave --repair or --random_weights out")
    if repair and sub_network is None:
        raise UserError("repair needs a sub-network to repair; set --sub_network, or remove --repair")
    if repair and n > 1:
        raise UserError(
            f"repair needs one device here, got {n}; run 'litgpt extract --repair true --devices {n}' first and give "
            "its student as --initial_checkpoint_dir"
        )


def main(
    fabric: L.Fabric,
    devices: int,
    num_nodes: int,
    seed: int,
    student: ModelSource,
    teacher_dir: Path | None,
    cache: Cache | None,
    data: DataModule,
    out_dir: Path,
    tokenizer_dir: Path | None,
    train: TrainArgs,
    eval: EvalArgs,
    make_optimizer: Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer],
    make_hidden: Callable[[GPT], HiddenLoss] | None,
    distill: DistillArgs,
    compile: bool,
    teacher_is_sharded: bool,
    teacher_quantize: str | None,
    activation_checkpointing: bool,
    checkpoint_type: str,
    seq_length: int,
    arguments: dict[str, Any],
    settings: dict[str, Any],
    state: dict[str, Any] | None,
) -> None:
    """Build student, teacher and data, in litgpt's order, and train."""
    fabric.seed_everything(seed)
    model = build_model(fabric, student, seq_length, activation_checkpointing)
    fabric.print(f"Student: {num_parameters(model):,} parameters")
    hidden = None if make_hidden is None else make_hidden(model).to(fabric.device)
    losses_of = LossModel(model, hidden)
    losses_of.compiles_scores = compile and fabric.device.type == "cuda"  # a CPU gains little, and waits 25 s for it
    root = fabric.setup(cast(LossModel, torch.compile(losses_of)) if compile else losses_of)
    optimizer = cast(torch.optim.Optimizer, fabric.setup_optimizers(make_optimizer(root.parameters())))
    train_loader, validation = load_data(
        fabric, data, tokenizer_dir, train.micro_batch_size, seq_length, eval.max_iters
    )
    schedule = Schedule.of(train, seq_length, optimizer.defaults["lr"], devices, num_nodes, train_loader)
    dtype = teacher_dtype(fabric._precision.precision)
    live = None
    # a cached teacher runs only for its validation, before training
    if teacher_dir is not None and (cache is None or state is None):
        live = LiveTeacher(teacher_dir, seq_length, dtype, fabric.device, teacher_is_sharded, teacher_quantize)
    teacher = live if cache is None else CachedTeacher(cache, fabric.device)
    if hidden is not None:
        assert live is not None, "hidden states come from a live teacher"
        live.watch(hidden.pairs.values())
    if compile and live is not None and cache is None:
        live.compile(train.micro_batch_size, seq_length)

    save = Saver(fabric, model, student, tokenizer_dir, arguments, checkpoint_type)
    job = make_job(root, losses_of, optimizer, teacher, live, distill.objectives(), save)
    job.helper = hidden
    frozen = [live.model.config] if live is not None and cache is None else []
    job.flops_per_iter = count_flops(model, train.micro_batch_size, seq_length, frozen)
    del live  # frees a cached teacher after its validation
    run = begin(fabric, job, train_loader, validation, schedule, seq_length, out_dir, settings, state)
    fit(run, train, eval)


def make_job(
    root: Any,
    losses_of: LossModel,
    optimizer: Any,
    teacher: Teacher | None,
    live: LiveTeacher | None,
    objectives: Callable[[float], Objective],
    save: Callable,
) -> Job:
    """Return the training loop's job: the steps for training and validation batches.

    Args:
        root: The module that Fabric set up.
        losses_of: The loss model inside `root`.
        optimizer: The optimizer of `root`.
        teacher: Source of the teacher's outputs; None without one.
        live: The teacher to validate, if any.
        objectives: The objective for a given fraction of training done.
        save: Writes a checkpoint.
    """

    def step(input_ids, targets, backward, done):
        losses_of.objective = objectives(done)
        is_taught = losses_of.objective.beta or losses_of.hidden is not None
        losses = root(input_ids, targets, teacher(input_ids) if is_taught else None)
        backward(losses.loss)
        if teacher is None:
            return {"loss": losses.loss}
        return {name: value for name, value in losses._asdict().items() if value is not None}

    def score(input_ids, targets):
        return root(input_ids, targets).ce

    teacher_score = None if live is None else lambda input_ids, targets: live.losses(input_ids, targets).ce
    look_up = teacher.look_up if isinstance(teacher, CachedTeacher) else None
    return Job(root, optimizer, step, score, save, look_up, teacher_score)
