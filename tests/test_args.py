"""Test the distillation arguments on the command line."""

import math

import pytest
from jsonargparse import ArgumentParser

from litgpt_whittle.distillation import losses
from litgpt_whittle.distillation.args import (
    DistillArgs,
    RampArgs,
)
from litgpt_whittle.distillation.objective import Objective, Term
from litgpt_whittle.errors import UserError


def test_the_defaults_are_the_papers_best():
    at = DistillArgs().objectives()
    assert at(0.0) == at(1.0) == Objective(0.2, 0.8, 0.9, (Term(losses.forward_kl),))


def test_without_a_teacher_cross_entropy_is_not_scaled():
    args = DistillArgs(alpha=0.2, beta=0)
    assert not args.uses_teacher and args.objectives()(0.5) == Objective()


def test_ramps():
    linear, cosine = RampArgs(1.0, 0.2), RampArgs(1.0, 0.2, "cosine", until=0.5)
    assert [linear.at(done) for done in (0, 0.25, 1)] == pytest.approx([1.0, 0.8, 0.2])
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * done / 0.5)) / 2 for done in (0, 0.1, 0.25, 0.5)]
    assert [cosine.at(done) for done in (0, 0.1, 0.25, 0.5, 0.8)] == pytest.approx([*expected, 0.2])
    at = DistillArgs(alpha=linear, beta=RampArgs(0.0, 1.0), temperature=RampArgs(2.0, 1.0)).objectives()
    assert at(0.0) == Objective(1.0, 0.0, 2.0)
    assert at(1.0) == Objective(pytest.approx(0.2), 1.0, 1.0)


def test_several_losses_with_weights_and_settings():
    args = DistillArgs(loss={"forward_kl": 0.7, "jensen_shannon": {"weight": 0.3, "beta": 0.1}, "mse": {}})
    first, second, third = args.objectives()(0.0).terms
    assert first == Term(losses.forward_kl, 0.7) and third == Term(losses.mse, 1.0)
    assert second.weight == 0.3 and second.loss.func is losses.jensen_shannon and second.loss.keywords == {"beta": 0.1}


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--distill.loss=cosine"], {"loss": "cosine"}),
        (["--distill.loss={forward_kl: 0.5, l1: {weight: 2}}"], {"loss": {"forward_kl": 0.5, "l1": {"weight": 2.0}}}),
        (["--distill.alpha.start=1", "--distill.alpha.end=0"], {"alpha": RampArgs(1.0, 0.0)}),
        (["--distill.beta={start: 0, end: 1, shape: cosine}"], {"beta": RampArgs(0.0, 1.0, "cosine")}),
        (["--distill.temperature=2"], {"temperature": 2.0}),
    ],
)
def test_the_command_line(flags, expected):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DistillArgs, "distill")
    parsed = parser.instantiate_classes(parser.parse_args(flags)).distill
    for name, value in expected.items():
        assert getattr(parsed, name) == value


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss": "no_such_loss"}, "there is no 'no_such_loss' in litgpt_whittle.losses; choose from cosine, "),
        ({"loss": {"mse": {"slope": 2}}}, "distill.loss.mse has no setting 'slope'; it takes weight$"),
        ({"loss": {"jensen_shannon": {"b": 2}}}, "it takes weight, beta$"),
        ({"loss": {"mse": -1.0}}, "distill.loss.mse must have a weight of 0 or more, got -1.0"),
        ({"loss": {"mse": 0.0}}, "distill.loss must have a loss with a weight above 0"),
        ({"loss": {}}, "distill.loss must have a loss with a weight above 0"),
        ({"alpha": -1}, "distill.alpha must be 0 or more, got -1"),
        ({"alpha": RampArgs(0.0, 1.0), "beta": RampArgs(0.0, 1.0)}, "must not both be 0"),
        ({"temperature": RampArgs(1.0, 0.0)}, "distill.temperature must be above 0, got 0.0"),
    ],
)
def test_bad_values(settings, message):
    with pytest.raises(UserError, match=message):
        DistillArgs(**settings).objectives()


def test_a_ramp_must_end_within_the_training():
    with pytest.raises(UserError, match="above 0 and at most 1, got 1.5"):
        RampArgs(1.0, 0.0, until=1.5)
