"""`litgpt pretrain_supernet`: train a model together with its sub-networks. Takes all options of `litgpt pretrain`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import torch
from litgpt.config import Config
from litgpt.utils import num_parameters

from litgpt_whittle.command_config import Result, as_command
from litgpt_whittle.data.loading import check_data
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.errors import UserError
from litgpt_whittle.processes import is_first_started
from litgpt_whittle.results import TrainingResult
from litgpt_whittle.samplers import Sampler
from litgpt_whittle.supergpt import LayerwiseGPT, SuperGPT
from litgpt_whittle.supernet import (
    SuperLossModel,
    SupernetArgs,
    SupernetStep,
    score_of,
)
from litgpt_whittle.training.checks import check_pair, check_tokenizers, default_data
from litgpt_whittle.training.config import TrainingConfig
from litgpt_whittle.training.loop import fit
from litgpt_whittle.training.memory_plan import choose_placement, show_plan
from litgpt_whittle.training.model_source import ModelSource
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
from litgpt_whittle.training.resume import state_to_resume
from litgpt_whittle.training.run import Job, Run


@dataclass
class SupernetConfig(TrainingConfig):
    """Pretrain, or continue to train, a model together with its sub-networks.

    The result is a stock litgpt checkpoint, which search, extract, distill and generate accept like any other. With
    one of litgpt's instruction data modules, training is finetuning. A token of ``train.max_tokens`` counts once,
    however many networks are trained on it.
    """

    out_dir: Path = Path("out/pretrain_supernet")
    """Directory for checkpoints, logs, ``metrics.jsonl`` and ``training.png``."""
    supernet: SupernetArgs = field(default_factory=SupernetArgs)
    """Sampling of the sub-networks to train, and their losses."""

    def validate(self) -> None:
        super().validate()
        self.supernet.distill.objectives()

    def train_model(self, resume_dir: Path | None) -> Result | None:
        start_dir = checkpoint_dir_of(resume_dir or self.initial_checkpoint_dir)
        source = super_network(start_dir, self.model_name, self.model_config)
        source = source.with_tie(self.train.tie_embeddings)
        sampler = self.supernet.make_sampler(source.config, source.is_tied)
        inputs = self._inputs(source, start_dir, resume_dir)
        if self.dry_run:
            if not is_first_started():
                return None
            text = choose_placement(inputs.step, "replicated", self.n_local, is_final=True)[1]
            return Result(self.out_dir, summary=text)
        if is_first_started():
            show_plan(inputs.step, "replicated", self.n_local)
        fabric = launch_training(self, inputs, f"supernet-{source.config.name}")
        fit(build_run(fabric, self, inputs, sampler), self.train, self.eval)
        return TrainingResult(self.out_dir)

    def _inputs(self, source: ModelSource, start_dir: Path | None, resume_dir: Path | None) -> TrainingInputs:
        tokenizer_dir = check_tokenizers(checkpoint_dir_of(self.tokenizer_dir), start_dir, None)
        seq_length = check_pair(source.config, None, self.train.max_seq_length)
        self.n_tokens(seq_length)  # fails if it is less than a step
        data = default_data() if self.data is None else self.data
        check_data(data, tokenizer_dir, source.config.padded_vocab_size, can_reset_attention=True)
        settings = self.run_settings(source.config, tokenizer_dir)
        state = state_to_resume(resume_dir, settings)
        step = self.step(source, seq_length, Objective())
        return TrainingInputs(source, tokenizer_dir, data, self.arguments(), step, settings, state)


setup = as_command(SupernetConfig)


def super_network(start_dir: Path | None, model_name: str | None, model_config: Config | None) -> ModelSource:
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
            f"a super-network's layers must all have the same sizes, but those of {str(start_dir)!r} differ; "
            "choose a uniform model"
        )
    return dataclasses.replace(model, config=config, build=lambda: SuperGPT(config))


def build_run(fabric: L.Fabric, config: SupernetConfig, inputs: TrainingInputs, sampler: Sampler) -> Run:
    """Build model and data, in litgpt's order, and return the run, new or resumed.

    Args:
        fabric: The Fabric.
        config: The command's arguments.
        inputs: The run's inputs.
        sampler: Chooses the networks of each step.
    """
    supernet = config.supernet
    model = build_model(fabric, config, inputs)
    smallest = sampler.space.smallest()
    fabric.print(f"{num_parameters(model):,} parameters, the smallest sub-network {sampler.space.n_params(smallest):,}")
    losses_of = SuperLossModel(model)
    prepared = prepare(fabric, config, inputs, losses_of)
    root, schedule = prepared.root, prepared.schedule
    train_step = SupernetStep(
        root,
        losses_of,
        sampler,
        supernet.distill.objectives(),
        config.seed,
        schedule.max_iters,
        schedule.accumulation,
        differs=supernet.per_rank == "different",
    )
    job = Job(
        module=root,
        optimizer=prepared.optimizer,
        step=train_step,
        score=score_of(root, losses_of, None),
        save=Saver(fabric, model, inputs, config.checkpoint_type),
        more_scores={
            name: score_of(root, losses_of, subnet) for name, subnet in supernet.validated(sampler.space).items()
        },
        flops_per_iter=count_flops(model, config.train.micro_batch_size, inputs.step.seq_length),
    )
    return begin(fabric, job, prepared, inputs, config.out_dir)
