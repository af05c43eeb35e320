"""`litgpt distill`: pretrain a student with its teacher's help. Accepts all options of `litgpt pretrain`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import lightning as L
import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import num_parameters

from litgpt_whittle.batches import BatchArgs
from litgpt_whittle.checkpoint import check_checkpoint, read_weights, weights_fingerprint
from litgpt_whittle.command_config import Result, as_command
from litgpt_whittle.commands.extract import ExtractConfig
from litgpt_whittle.data.loading import check_data, packing_of, resets_attention
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.distillation.cache import INDEX, Cache
from litgpt_whittle.distillation.head import LossModel
from litgpt_whittle.distillation.hidden import HiddenLoss
from litgpt_whittle.distillation.liger import check_liger, check_liger_models, liger_loss
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.distillation.quantize import check_quantize, saved_bytes
from litgpt_whittle.document_masks import reset_attention
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import file_fingerprint
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.processes import is_first_started, own_device, release_memory
from litgpt_whittle.repair.args import RepairArgs
from litgpt_whittle.results import TrainingResult
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import is_tied, tie
from litgpt_whittle.training.checks import (
    check_cache,
    check_cache_reaches,
    check_hidden,
    check_pair,
    check_resets,
    check_tokenizers,
    check_vocabularies,
    default_data,
    warn_of_small_teacher,
)
from litgpt_whittle.training.compiler import check_compiler, uncompiled
from litgpt_whittle.training.config import TrainingConfig
from litgpt_whittle.training.loop import fit
from litgpt_whittle.training.memory_plan import choose_placement, show_plan
from litgpt_whittle.training.model_source import ModelSource
from litgpt_whittle.training.planned_step import Step, teacher_dtype
from litgpt_whittle.training.pretraining import (
    Saver,
    TrainingInputs,
    begin,
    build_model,
    checkpoint_dir_of,
    count_flops,
    launch_training,
    prepare,
)
from litgpt_whittle.training.resume import find_resume, state_to_resume
from litgpt_whittle.training.run import Backward, Job, Run
from litgpt_whittle.training.teacher import CachedTeacher, LiveTeacher, Teacher
from litgpt_whittle.vocabulary.text_bytes import MeanBytes
from litgpt_whittle.windows import vectorize_windows

logger = logging.getLogger(__name__)


@dataclass
class DistillConfig(TrainingConfig):
    """Pretrain a student with its teacher's help.

    The student is an extracted checkpoint (``initial_checkpoint_dir``), a sub-network to extract from the teacher
    (``sub_network``), or a model with random weights (``model_name`` or ``model_config``).
    """

    FREE: ClassVar[frozenset[str]] = TrainingConfig.FREE | {"compile", "teacher_placement", "distill.head"}
    # `TeacherSource.settings` has fingerprints of the teacher's weights or of the cache's index
    RESOLVED: ClassVar[frozenset[str]] = TrainingConfig.RESOLVED | {
        *("teacher_checkpoint_dir", "teacher_cache", "random_weights"),
    }

    model_name: str | None = None
    """Name of a litgpt model to train from random weights, if no student is given. Use "list" to list them."""
    out_dir: Path = Path("out/distill")
    """Directory for checkpoints, logs, ``metrics.jsonl`` and ``training.png``."""
    precision: Literal["bf16-true", "bf16-mixed", "32-true", None] = None
    """The precision to train in. With ``bf16-true`` or ``bf16-mixed``, the teacher runs in bf16. Determines a
    compatible precision setting by default."""
    initial_checkpoint_dir: Path | None = None
    """The student's litgpt checkpoint directory, such as ``litgpt extract`` writes."""
    tokenizer_dir: Path | None = None
    """Tokenizer for the data module, copied into the checkpoints. By default the student's or the teacher's."""
    teacher_checkpoint_dir: Path | None = None
    """The teacher's litgpt checkpoint directory. Needed unless there is a ``teacher_cache`` or ``distill.beta`` is
    0."""
    teacher_cache: Path | None = None
    """Directory that ``litgpt cache_teacher`` wrote for this teacher and the same data. The teacher is then not run,
    except for one validation if ``teacher_checkpoint_dir`` is given too."""
    sub_network: Path | None = None
    """YAML of a sub-network, such as ``litgpt search`` writes, to extract from the teacher as the student."""
    repair: bool | RepairArgs = False
    """Repair the student of ``sub_network`` first, as ``litgpt extract`` does, and save it in ``out_dir/start``:
    ``true``, or settings."""
    random_weights: bool = False
    """Use only the student's architecture and start from random weights, as a baseline."""
    distill: DistillArgs = field(default_factory=DistillArgs)
    """Losses, weights and temperature of the distillation."""
    compile: bool = True
    """If true, compile the student, and the teacher unless it is sharded or quantized. Without it, training starts
    about a minute earlier, which can save time for small models."""
    teacher_placement: Literal["auto", "replicated", "sharded"] = "auto"
    """Placement of the teacher on several devices. ``auto`` shards the teacher only if a whole one would not fit on
    each device, according to the memory plan. If the memory cannot be planned, training does not start."""
    teacher_quantize: Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8", None] = None
    """Quantize the teacher's blocks, as ``litgpt generate --quantize`` does."""

    def validate(self) -> None:
        super().validate()
        if self.initial_checkpoint_dir is not None and self.sub_network is not None:
            raise UserError("initial_checkpoint_dir and sub_network both name the student; set only one")
        objective = self.distill.first_objective
        if self.distill.head == "liger":
            check_liger(objective, self.teacher_cache is not None, own_device())
        if self.compile:
            check_compiler(own_device())
        check_quantize(self.teacher_quantize, self.teacher_placement)
        self._check_repair()
        if self.teacher_dir is not None:
            check_checkpoint(self.teacher_dir)
        elif self.teacher_cache is None and self.distill.uses_teacher:
            raise UserError(
                f"distill.beta = {self.distill.beta} needs a teacher; set --teacher_checkpoint_dir or --teacher_cache, "
                "or --distill.beta 0 to train without one"
            )

    def _check_repair(self) -> None:
        if self.repair and self.random_weights:
            raise UserError("random weights cannot be repaired; remove --repair or --random_weights")
        if self.repair and self.sub_network is None:
            raise UserError("repair needs a sub-network to repair; set --sub_network, or remove --repair")
        if self.repair and resets_attention(self.data):
            raise UserError(
                "repair cannot read data with data.reset_attention; leave one of them out, or repair by litgpt extract"
            )
        if self.repair and self.world_size > 1:
            raise UserError(
                f"repair needs one device in litgpt distill, got {self.world_size}; run 'litgpt extract --repair true "
                f"--devices {self.world_size}' first and pass its student as --initial_checkpoint_dir"
            )

    @property
    def teacher_dir(self) -> Path | None:
        """The teacher's checkpoint directory, given by its path or its name under `checkpoints/`."""
        return checkpoint_dir_of(self.teacher_checkpoint_dir)

    def train_model(self, resume_dir: Path | None) -> Result | None:
        teacher = TeacherSource.of(self)
        inputs = self._inputs(teacher, resume_dir)
        if self.repair and resume_dir is None and not self.dry_run:
            student, seq_length = self._repaired_student(inputs), inputs.step.seq_length
            inputs = replace(inputs, source=student, step=self._step(student, teacher, seq_length))
        if self.dry_run:
            return Result(self.out_dir, summary=self._describe_memory(inputs.step)) if is_first_started() else None
        is_sharded = is_first_started() and show_plan(inputs.step, self._placement, self.n_local)
        fabric = launch_training(self, inputs, f"distill-{inputs.source.config.name}")
        run = build_run(fabric, self, inputs, teacher, is_sharded=fabric.broadcast(is_sharded))
        fit(run, self.train, self.eval)
        return TrainingResult(self.out_dir)

    def memory_plan(self) -> str:
        """Run all checks, and return a description of the memory that training needs.

        Raises:
            UserError: For the first invalid argument.
            NoPlan: If the memory cannot be planned.
        """
        self.validate()
        inputs = self._inputs(TeacherSource.of(self), find_resume(self.resume, self.out_dir))
        return self._describe_memory(inputs.step)

    def _describe_memory(self, step: Step) -> str:
        return choose_placement(step, self._placement, self.n_local, is_final=True)[1]

    @property
    def _placement(self) -> str:
        return "replicated" if self.teacher_quantize else self.teacher_placement

    def _inputs(self, teacher: TeacherSource, resume_dir: Path | None) -> TrainingInputs:
        """Check that student, teacher and data fit together, and return the inputs of the run, before any repair."""
        student_dir = checkpoint_dir_of(resume_dir or self.initial_checkpoint_dir)
        student = self._student(student_dir, resume_dir)
        asked_dir = checkpoint_dir_of(self.tokenizer_dir)
        tokenizer_dir = check_tokenizers(asked_dir, student_dir, teacher.tokenizer_dir)
        check_vocabularies(student.config, teacher.config, asked_dir or student_dir, teacher.tokenizer_dir)
        seq_length = check_pair(student.config, teacher.config, self.train.max_seq_length)
        if teacher.config is not None:
            whole = SubNet.full(teacher.config)
            warn_of_small_teacher(student.n_params, n_params(teacher.config, whole, teacher.is_tied))
        n_tokens = self.n_tokens(seq_length)
        if teacher.cache is not None:
            self._check_cache(teacher.cache, seq_length, n_tokens)
        step = self._step(student, teacher, seq_length)
        data = default_data() if self.data is None else self.data
        configs = [config for config in (student.config, teacher.config) if config is not None]
        if self.distill.head == "liger":
            check_liger_models(configs)
        check_data(data, tokenizer_dir, min(config.padded_vocab_size for config in configs), can_reset_attention=True)
        settings = self.run_settings(student.config, tokenizer_dir) | teacher.settings
        state = state_to_resume(resume_dir, settings)
        return TrainingInputs(student, tokenizer_dir, data, self.arguments(), step, settings, state)

    def _step(self, student: ModelSource, teacher: TeacherSource, seq_length: int) -> Step:
        """Return the training step of the memory plan, after checking the hidden states to match."""
        config = None if self.teacher_dir is None else check_checkpoint(self.teacher_dir)
        origin = check_hidden(self.distill.hidden, student.config.n_layer, student.sub_network, config)

        def make_hidden(model: GPT) -> HiddenLoss:
            return HiddenLoss(model, teacher.config, self.distill.hidden, origin, student.basis)

        return self.step(
            student,
            seq_length,
            self.distill.first_objective,
            build_teacher=teacher.build if teacher.is_live else None,
            quantized_bytes=teacher.saved_bytes(self.teacher_quantize, self.used_precision),
            build_hidden=make_hidden if self.distill.hidden.is_used else None,
            is_compiled=self.compile,
        )

    def _student(self, student_dir: Path | None, resume_dir: Path | None) -> ModelSource:
        student = ModelSource.choose(
            student_dir, self.sub_network, self.teacher_dir, self.model_name, self.model_config
        )
        if self.random_weights and resume_dir is None:
            student = student.with_random_weights()
        return student.with_tie(self.train.tie_embeddings)

    def _check_cache(self, cache: Cache, seq_length: int, n_tokens: int) -> None:
        where, teacher_dir = f"cache {str(cache.folder)!r}", self.teacher_dir
        check_cache(cache.contents, where, self.distill.first_objective.terms, self.distill, seq_length, teacher_dir)
        check_cache_reaches(cache, n_tokens)
        check_resets(cache.contents, where, resets_attention(self.data))

    def _repaired_student(self, inputs: TrainingInputs) -> ModelSource:
        """Repair the student in `out_dir/start`, unless an interrupted run has done so, and return its source."""
        assert self.teacher_dir is not None and self.sub_network is not None  # else there is nothing to repair
        seen, folder = BatchArgs(self.train.micro_batch_size, inputs.step.seq_length), self.out_dir / "start"
        data = inputs.data
        cut = ExtractConfig(
            self.teacher_dir, self.sub_network, folder, repair=self.repair, data=data, train=seen, seed=self.seed
        )
        if not (self.resume and cut.is_finished()):
            # training connects its own copy of the data
            result = replace(cut, overwrite=folder.exists(), data=copy.deepcopy(data)).run()
            assert isinstance(result, Result)  # one device has repaired it
            logger.info(result.summary)
            release_memory()  # the memory plan measures free memory
        return ModelSource.choose(folder, None, None, None, None).with_tie(self.train.tie_embeddings)


setup = as_command(DistillConfig)


@dataclass(frozen=True)
class TeacherSource:
    """Source of the teacher's outputs: its checkpoint, a cache, both, or neither if the losses need no teacher."""

    folder: Path | None
    """The teacher's checkpoint directory"""
    cache: Cache | None
    config: Config | None
    is_tied: bool
    """True if the LM head and the embedding of the teacher in `folder` share weights"""

    @classmethod
    def of(cls, config: DistillConfig) -> TeacherSource:
        """Return the source for a command's arguments."""
        if not config.distill.uses_teacher:
            return cls(None, None, None, False)
        folder = config.teacher_dir
        cache = None if config.teacher_cache is None else Cache(config.teacher_cache)
        tied = folder is not None and is_tied(read_weights(folder))
        own = None if folder is None else check_checkpoint(folder)
        return cls(folder, cache, own if cache is None else cache.teacher_config, tied)

    @property
    def is_live(self) -> bool:
        """True if the teacher runs on every batch."""
        return self.folder is not None and self.cache is None

    @property
    def tokenizer_dir(self) -> Path | None:
        """Directory of the teacher's tokenizer."""
        return self.folder if self.cache is None else self.cache.folder

    @property
    def settings(self) -> dict[str, str]:
        """Fingerprints that must not change when the run is resumed."""
        if self.cache is not None:
            # the checksums in the index identify the cache's contents
            return {"teacher_cache's index": file_fingerprint(self.cache.folder / INDEX)}
        if self.folder is not None:
            return {"teacher_checkpoint_dir's weights": weights_fingerprint(self.folder)}
        return {}

    def build(self) -> GPT:
        """Build the teacher's model with arbitrary weights."""
        model = vectorize_windows(GPT(self.config))
        return tie(model) if self.is_tied else model

    def saved_bytes(self, mode: str | None, precision: str) -> int:
        """Return the bytes that quantization saves; 0 if the teacher does not run on every batch."""
        return saved_bytes(self.config, mode, teacher_dtype(precision)) if self.is_live else 0


def build_run(
    fabric: L.Fabric, config: DistillConfig, inputs: TrainingInputs, teacher: TeacherSource, is_sharded: bool
) -> Run:
    """Build student, teacher and data, in litgpt's order, and return the run, new or resumed.

    Args:
        fabric: The Fabric.
        config: The command's arguments.
        inputs: The run's inputs.
        teacher: Source of the teacher's outputs.
        is_sharded: If true, shard the teacher over the devices.
    """
    train, step = config.train, inputs.step
    model = build_model(fabric, config, inputs)
    fabric.print(f"Student: {num_parameters(model):,} parameters")
    hidden = None if step.build_hidden is None else step.build_hidden(model).to(fabric.device)
    losses_of = LossModel(model, hidden)
    # on a CPU, compiling takes 25 s and gains little
    losses_of.compiles_scores = config.compile and fabric.device.type == "cuda"
    losses_of.fused_loss = liger_loss if config.distill.head == "liger" else None
    module = cast(LossModel, torch.compile(losses_of)) if config.compile else losses_of
    prepared = prepare(fabric, config, inputs, module)
    root = prepared.root
    live = None
    # a cached teacher runs only for its validation, before training
    if teacher.folder is not None and (teacher.cache is None or inputs.state is None):
        dtype = teacher_dtype(fabric._precision.precision)
        live = LiveTeacher(teacher.folder, step.seq_length, dtype, fabric.device, is_sharded, config.teacher_quantize)
        reset_attention(live.model, packing_of(inputs.data, inputs.tokenizer_dir))
    if hidden is not None:
        assert live is not None, "hidden states come from a live teacher"
        live.watch(hidden.pairs.values())
    if config.compile and live is not None and teacher.is_live:
        live.compile(train.micro_batch_size, step.seq_length)

    outputs = live if teacher.cache is None else CachedTeacher(teacher.cache, fabric.device)
    job = Job(
        module=root,
        optimizer=prepared.optimizer,
        step=DistillStep(root, losses_of, outputs, config.distill.objectives()),
        score=StudentScore(root, torch.Size((train.micro_batch_size, step.seq_length)) if config.compile else None),
        save=Saver(fabric, model, inputs, config.checkpoint_type),
        look_up=outputs.look_up if isinstance(outputs, CachedTeacher) else None,
        teacher_score=None if live is None else lambda input_ids, targets: live.losses(input_ids, targets).ce,
        helper=hidden,
        text_bytes=None if inputs.tokenizer_dir is None else MeanBytes.of(inputs.tokenizer_dir, fabric.device),
    )
    frozen = [live.model.config] if live is not None and teacher.is_live else []
    job.flops_per_iter = count_flops(model, train.micro_batch_size, step.seq_length, frozen)
    return begin(fabric, job, prepared, inputs, config.out_dir)


@dataclass(frozen=True)
class StudentScore:
    """Cross-entropy of the student on a validation batch."""

    root: Any
    """The module that Fabric set up"""
    compiled_shape: torch.Size | None
    """Shape of the training batches if the student is compiled, else None. Other shapes, such as the last batch of a
    validation, run uncompiled, because each shape would be compiled separately"""

    def __call__(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of one batch of shape (B, T), in nats per token."""
        is_odd = self.compiled_shape is not None and input_ids.shape != self.compiled_shape
        with uncompiled() if is_odd else nullcontext():
            return self.root(input_ids, targets).ce


@dataclass(frozen=True)
class DistillStep:
    """One micro-batch of distillation: teacher, student, losses and backward pass."""

    root: Any
    """The module that Fabric set up"""
    losses_of: LossModel
    """The loss model inside `root`"""
    teacher: Teacher | None
    objectives: Callable[[float], Objective]
    """Returns the objective at a fraction of training, from 0 to 1"""

    def __call__(
        self, input_ids: torch.Tensor, targets: torch.Tensor, backward: Backward, done: float
    ) -> dict[str, torch.Tensor]:
        """Accumulate the gradients of one batch of shape (B, T), and return the losses by name."""
        self.losses_of.objective = self.objectives(done)
        teacher = None
        if self.teacher is not None and (self.losses_of.objective.beta or self.losses_of.hidden is not None):
            teacher = self.teacher(input_ids)
        losses = self.root(input_ids, targets, teacher)
        backward(losses.loss)
        if self.teacher is None:
            return {"loss": losses.loss}
        return {name: value for name, value in losses._asdict().items() if value is not None}
