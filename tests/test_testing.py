"""Test that the checks of `litgpt_whittle.testing` find broken extensions: each rule is broken at least once."""

import numpy as np
import pytest
import torch
from litgpt.config import Config

from litgpt_whittle import SubNet, testing
from litgpt_whittle.contrib.prune import Magnitude, Wanda
from litgpt_whittle.distillation.codecs import Full, Sampled, TopK
from litgpt_whittle.distillation.losses import forward_kl, reverse_kl
from litgpt_whittle.fitness import Perplexity, WindowLosses
from litgpt_whittle.samplers import RandomLinear, Uniform
from litgpt_whittle.strategies import RandomSearch, Scored
from litgpt_whittle.surrogates.args import SurrogateArgs
from litgpt_whittle.surrogates.trees import Trees
from litgpt_whittle.testing import codecs, fitness, losses, pruners, samplers, strategies, surrogates

KINDS = (codecs, fitness, losses, pruners, samplers, strategies, surrogates)
BROKEN = []


def breaks(check, message: str):
    """Note a broken extension, with the check that must find it and what it must say."""

    def note(broken):
        BROKEN.append(
            pytest.param(check, broken, message, id=f"{check.__module__.rpartition('.')[2]}-{broken.__name__}")
        )
        return broken

    return note


# -- strategies


@breaks(strategies.check_candidates, "must not propose a candidate twice, 59 of 60 were")
class AlwaysTheSame(RandomSearch):
    def _propose_new(self):
        return self.space.sample(np.random.default_rng(self.seed))


@breaks(strategies.check_candidates, "must lie in the bin")
class IgnoresTheBin(RandomSearch):
    def propose(self, rng):
        return strategies.Space(self.space.teacher, "fine_layerwise").sample(rng)


@breaks(strategies.check_candidates, "must keep proposing in a large space, it stopped at 50")
class EndsEarly(RandomSearch):
    @property
    def ready(self):
        return 50 - self.n_asked


@breaks(strategies.check_seed, "must depend only on the seed and the scores")
class DrawsFromElsewhere(RandomSearch):
    def propose(self, rng):
        return self.space.sample(np.random.default_rng())


@breaks(strategies.check_other_seed, "another seed must give other candidates")
class IgnoresTheSeed(RandomSearch):
    def propose(self, rng):
        return self.space.sample(np.random.default_rng(self.n_asked))


@breaks(strategies.check_batches, "must not depend on how many are asked for at a time, but 1 and 3 differ")
class DependsOnScoresInABatch(RandomSearch):
    def propose(self, rng):
        return self.space.sample(np.random.default_rng((self.n_asked, len(self.history))))


@breaks(strategies.check_restart, "start must discard all earlier state")
class RemembersEarlierSearches(RandomSearch):
    n_proposed = 0

    def propose(self, rng):
        self.n_proposed += 1
        return self.space.sample(np.random.default_rng((self.seed, self.n_proposed)))


@breaks(strategies.check_replay, "a search must be the same after a replay of 1 scores")
class ComparesByIdentity(RandomSearch):
    def start(self, space, seed):
        self.asked, self.n_known = [], 0
        super().start(space, seed)

    def propose(self, rng):
        self.asked.append(self.space.sample(np.random.default_rng((self.n_asked, self.n_known))))
        return self.asked[-1]

    def tell(self, subnet, score, measures=None):
        self.n_known += any(subnet is asked for asked in self.asked)
        super().tell(subnet, score, measures)


@breaks(strategies.check_best, "best must be the earliest of the lowest scores")
class BestIsTheLast(RandomSearch):
    @property
    def best(self):
        return self.history[-1] if self.history else None


@breaks(strategies.check_failures, "best must be None while all candidates have failed")
class TakesNaNForAScore(RandomSearch):
    def tell(self, subnet, score, measures=None):
        super().tell(subnet, score, measures)
        self.history[-1] = Scored(subnet, 1e9 if np.isnan(score) else score, {})


@breaks(strategies.check_others_first, "best must include reported candidates that were not proposed")
class IgnoresOthers(RandomSearch):
    def tell(self, subnet, score, measures=None):
        if subnet in self._asked:
            super().tell(subnet, score, measures)


@breaks(
    strategies.check_others_any_time, "must continue when candidates that it did not propose are reported in between"
)
class WaitsForItsOwn(RandomSearch):
    @property
    def ready(self):
        return 3 * (len(self.history) < 10)


@breaks(strategies.check_exhaustion, "must be exhausted when all sub-networks of the space have been proposed")
class NeverExhausted(RandomSearch):
    def ask(self, n=1):
        candidates = super().ask(n)
        self.exhausted = False
        return candidates


@breaks(strategies.check_limits, "must keep to the limit of flops")
class IgnoresLimits(RandomSearch):
    def _propose_new(self):
        return self.space.sample(np.random.default_rng((self.seed, self.n_asked)))


@breaks(strategies.check_settings, r"must store each argument under its own name, \['size'\] are not stored")
class StoresNothing(RandomSearch):
    def __init__(self, size=3):
        self._size = size


@breaks(strategies.check_settings, "stored settings must be those given")
class ChangesASetting(RandomSearch):
    def __init__(self, size=3):
        self.size = size + 1

    def propose(self, rng):
        return self.space.sample(np.random.default_rng((self.size, self.n_asked)))


# -- losses


@breaks(losses.check_shape, r"must have one number per token, shape \(7,\), got \(\)")
def mean_over_tokens(student, teacher):
    return forward_kl(student, teacher).mean()


@breaks(losses.check_shape, "must keep the precision of its inputs, torch.float64, got torch.float32")
def single_precision(student, teacher):
    return forward_kl(student, teacher).float()


@breaks(losses.check_rows, "must not depend on the other tokens of its chunk")
def standardised(student, teacher):
    found = forward_kl(student, teacher)
    return found / found.sum()


@breaks(losses.check_lowest, "must be lowest where the student equals the teacher")
def wrong_sign(student, teacher):
    return -forward_kl(student, teacher)


@breaks(losses.check_lowest, "the gradient must be 0 where the student equals the teacher")
def slanted(student, teacher):
    found = forward_kl(student, teacher)
    return found + student.exp().square().sum(-1) - student.detach().exp().square().sum(-1)


@breaks(losses.check_gradient, "the gradient must be that of the loss")
def doubled_gradient(student, teacher):
    found = forward_kl(student, teacher)
    return 2 * found - found.detach()


@breaks(losses.check_gradient, "the gradient must be that of the loss")
def no_gradient(student, teacher):
    return forward_kl(student.detach(), teacher)


@breaks(losses.check_impossible_tokens, "tokens whose logits are -inf must not change the loss")
def without_a_mask(student, teacher):
    return (teacher.exp() * (teacher - student)).sum(-1)


@breaks(losses.check_known_tokens, "must not depend on the order of the tokens")
def weighted_by_id(student, teacher):
    return (teacher.exp() * (teacher - student) * torch.arange(student.size(1))).sum(-1)


@breaks(losses.check_linear, "is_linear promises a gradient that is linear")
def not_linear(student, teacher):
    return reverse_kl(student, teacher)


not_linear.is_linear = True


@breaks(losses.check_linear, "samples with a probability of 0 must not change the gradient")
def with_a_penalty(student, teacher):
    return forward_kl(student, teacher) + student.exp().sum(-1)


with_a_penalty.is_linear = True


# -- codecs


@breaks(codecs.check_storage, "encode must return the declared type <f4, got <f8")
class DoublePrecision(Full):
    def encode(self, logits, uniform):
        return logits.double()


@breaks(codecs.check_storage, "a second call differs")
class RandomNoise(Full):
    def encode(self, logits, uniform):
        return logits.float() + 1e-6 * torch.rand(logits.shape)


@breaks(codecs.check_storage, "must not depend on the other tokens")
class Centred(Full):
    def encode(self, logits, uniform):
        return (logits - logits.mean()).float()


@breaks(codecs.check_decoded, "decode must return new tensors")
class ReturnsTheStored(Full):
    def decode(self, stored):
        return stored


@breaks(codecs.check_decoded, "decoded probabilities must add up to 1")
class WithoutATail(TopK):
    def decode(self, stored):
        found = super().decode(stored)
        return found._replace(log_tail=torch.full_like(found.log_tail, -torch.inf))


@breaks(codecs.check_predictions, "must equal the teacher's at the temperature")
class IgnoresTheTemperature(TopK):
    def encode(self, logits, uniform):
        return super().encode(logits * self.temperature, uniform)


@breaks(codecs.check_predictions, "must equal the teacher's at the temperature")
class FewIds(TopK):
    def decode(self, stored):
        found = super().decode(stored)
        return found._replace(ids=found.ids % 2**16)


@breaks(codecs.check_unbiased, "samples must have the teacher's mean: the mean logit is")
class Biased(Sampled):
    def encode(self, logits, uniform):
        return super().encode(1.05 * logits, uniform)


@breaks(codecs.check_impossible_tokens, "must have no probability after decoding")
class Clamped(Full):
    def encode(self, logits, uniform):
        return logits.float().clamp(min=-20)


@breaks(codecs.check_impossible_tokens, "must have no probability after decoding")
class DrawsAtTheEdge(Sampled):
    def encode(self, logits, uniform):
        p = torch.softmax(logits.double() / self.temperature, dim=-1)
        ids = torch.searchsorted(p.cumsum(-1), uniform.contiguous()).clamp(max=self.vocab_size - 1)
        # a draw of 0 is on the left side of token 0, also if that has no probability
        return super().encode(torch.nn.functional.one_hot(ids[:, 0], self.vocab_size).double().log(), uniform)


# -- samplers


@breaks(samplers.check_networks, "every step must have at least one network")
class SkipsAStep(Uniform):
    def networks(self, rng, step, done):
        return super().networks(rng, step, done) if step else []


@breaks(samplers.check_networks, "must be sub-networks of the space's teacher")
class AnothersNetworks(Uniform):
    def networks(self, rng, step, done):
        return [SubNet.full(Config.from_name("pythia-14m"))]


@breaks(samplers.check_networks, "must lie in the space's bin")
class TooSmall(Uniform):
    def networks(self, rng, step, done):
        return [SubNet(self.space.teacher, n_layer=1, n_embd=1, intermediate_size=1)]


@breaks(samplers.check_resume, "must depend on its arguments only")
class Counts(RandomLinear):
    n_done = 0

    def networks(self, rng, step, done):
        self.n_done += 1
        return super().networks(np.random.default_rng(self.n_done), step, done)


@breaks(samplers.check_resume, "must depend on its arguments only")
class GlobalRandomness(Uniform):
    def networks(self, rng, step, done):
        return [self.space.sample(np.random.default_rng(np.random.randint(2**31)))]


@breaks(samplers.check_teacher, "a sampler with teaches must begin with the full network")
class TeachesWithout(Uniform):
    teaches = True


# -- pruners


@breaks(pruners.check_patterns, "weights of an output must stay")
class IgnoresThePattern(Magnitude):
    def prune(self, weight, moments):
        return Magnitude(pruners.Sparsity(self.sparsity.share)).prune(weight, moments)


@breaks(pruners.check_patterns, "must not modify the weight")
class InPlace(Magnitude):
    def prune(self, weight, moments):
        return weight.copy_(super().prune(weight, moments))


@breaks(pruners.check_patterns, "must keep shape and type")
class InDoublePrecision(Magnitude):
    def prune(self, weight, moments):
        return super().prune(weight, moments).double()


@breaks(pruners.check_shares, "weights must be 0, of the layer or of each output")
class OneTooMany(Magnitude):
    def prune(self, weight, moments):
        pruned = super().prune(weight, moments)
        pruned.flatten()[pruned.flatten().abs().argmax()] = 0
        return pruned


@breaks(pruners.check_ties, "a quarter of 32 equal weights must be 0, 32 are")
class DropsAllTies(Magnitude):
    def prune(self, weight, moments):
        sizes = weight.abs()
        n = round(self.sparsity.share * weight.numel())
        return weight.masked_fill(sizes <= sizes.flatten().sort().values[n - 1], 0.0)


@breaks(pruners.check_inputs, "pruned weights must be finite")
class DividesByZero(Wanda):
    def prune(self, weight, moments):
        pruned, scale = super().prune(weight, moments), moments.zz.diagonal().float()
        return pruned * scale / scale


@breaks(pruners.check_inputs, "without reads_data must not depend on the inputs")
class ReadsSecretly(Wanda):
    reads_data = False

    def prune(self, weight, moments):
        return Magnitude(self.sparsity).prune(weight, None) if moments is None else super().prune(weight, moments)


# -- surrogates


class Plain(Trees):
    """Trees without arguments."""

    def __init__(self):
        super().__init__(SurrogateArgs(mode="filter"))


@breaks(surrogates.check_encodings, "must consist of plain numbers or text")
class Objects(Plain):
    def read(self, teacher, choices, ranking=None):
        return [SubNet.from_dict(teacher, c) if isinstance(c, dict) else c for c in choices]


@breaks(surrogates.check_encodings, "must not depend on other sub-networks")
class ByPosition(Plain):
    def read(self, teacher, choices, ranking=None):
        return [features | {"i": float(i)} for i, features in enumerate(super().read(teacher, choices, ranking))]


@breaks(surrogates.check_predictions, "a prediction must not depend on the call's other sub-networks")
class CentredPredictions(Plain):
    def predict(self, unknown):
        found = super().predict(unknown)
        return found - found.mean()


@breaks(surrogates.check_predictions, "predict must return one finite number per encoding")
class OnePerTree(Plain):
    def predict(self, unknown):
        return self._by_tree(unknown)


@breaks(surrogates.check_determinism, "must depend only on the seed and the examples")
class UnseededFit(Plain):
    def fit(self, known, targets, seed):
        super().fit(known, targets, np.random.randint(2**31))


@breaks(surrogates.check_determinism, "fit must leave PyTorch's random state as it was")
class SeedsPyTorch(Plain):
    def fit(self, known, targets, seed):
        torch.manual_seed(seed)
        super().fit(known, targets, seed)


@breaks(surrogates.check_determinism, "fit must discard the earlier fit")
class KeepsExamples(Plain):
    known, targets = (), ()

    def fit(self, known, targets, seed):
        self.known, self.targets = [*self.known, *known], [*self.targets, *targets]
        super().fit(self.known, np.array(self.targets), seed)


# -- fitness


@breaks(fitness.check_scores, "scores must have the fitness's name, 'perplexity'")
class OnlyTheLogarithm(Perplexity):
    def scores(self, loss):
        return {"nll": loss}


@breaks(fitness.check_scores, "scores must be finite and of type float")
class TensorScores(Perplexity):
    def __call__(self, subnet):
        return {self.name: torch.tensor(1.0)}


@breaks(fitness.check_repeatable, "a score must not depend on earlier candidates")
class CountsCandidates(Perplexity):
    n_scored = 0

    def __call__(self, subnet):
        self.n_scored += 1
        return {self.name: super().__call__(subnet)[self.name] + self.n_scored}


@breaks(fitness.check_repeatable, "scoring must leave the teacher's weights as they were")
class ChangesTheTeacher(Perplexity):
    def __call__(self, subnet):
        found = super().__call__(subnet)
        with torch.no_grad():
            self.model.transformer.ln_f.weight[0] = 7.0  # the second time changes nothing
        return {self.name: 1.0 + 0 * found[self.name]}


@breaks(fitness.check_repeatable, "scoring must not leave gradients in the teacher")
class LeavesGradients(Perplexity):
    def __call__(self, subnet):
        self.model.lm_head.weight.grad = torch.zeros_like(self.model.lm_head.weight)
        return super().__call__(subnet)


@breaks(fitness.check_ignored_tokens, "n_tokens must count the targets that are not ignored")
class CountsAllTokens(Perplexity):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.n_tokens = sum(batch.targets.numel() for batch in self.batches)


@breaks(fitness.check_ignored_tokens, "tokens whose targets are ignored must not count")
class ScoresIgnoredTokens(Perplexity):
    def __init__(self, model, batches, autocast):
        super().__init__(model, batches, autocast)
        self.all = Perplexity(model, [type(b)(b.input_ids, b.targets.clamp(min=0)) for b in batches], autocast)

    def __call__(self, subnet):
        return self.all(subnet)


@breaks(fitness.check_windows, "sums must be float64 on the CPU")
class SinglePrecisionSums(Perplexity):
    def losses(self, subnet, which=slice(None)):
        found = super().losses(subnet, which)
        return WindowLosses(found.sums.float(), found.n_tokens)


@breaks(fitness.check_windows, "must not depend on the batches that are scored with it")
class RelativeSums(Perplexity):
    def losses(self, subnet, which=slice(None)):
        found = super().losses(subnet, which)
        return WindowLosses(found.sums - found.sums.mean(), found.n_tokens)


@breaks(fitness.check_windows, "scores of the mean loss must be the scores of the sub-network")
class OtherMean(Perplexity):
    def __call__(self, subnet):
        sums, n_tokens = self.losses(subnet)
        return self.scores(float((sums / n_tokens).mean()))


@breaks(fitness.check_halved, "scores within halved must be the same")
class HalvedScores(Perplexity):
    def scores(self, loss):
        return super().scores(loss / 2 if self.is_halved else loss)


@breaks(fitness.check_autocast, "within the context that autocast returns")
class IgnoresAutocast(Perplexity):
    def __init__(self, model, batches, autocast):
        super().__init__(model, batches)


@pytest.mark.parametrize("check, broken, message", BROKEN)
def test_what_breaks_a_rule_is_found_in_one_line(check, broken, message):
    with pytest.raises(AssertionError, match=message) as error:
        check(broken)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.rpartition(".")[2])
def test_every_rule_is_broken_once(kind):
    assert set(kind.CHECKS) <= {each.values[0] for each in BROKEN}
    assert set(kind.CHECKS) <= {getattr(kind, name) for name in dir(kind) if name.startswith("check_")}


def test_a_formula_that_differs_is_found():
    with pytest.raises(AssertionError, match="nll must equal the formula's on the extracted student, 3.2, it is "):
        fitness.check_formula(Perplexity, lambda student, teacher, batches: {"nll": 3.2})


def test_what_does_not_learn_is_found():
    with pytest.raises(AssertionError, match="must get closer than random search"):
        strategies.check_learns(RandomSearch)


def test_one_call_runs_all_checks_of_a_kind(monkeypatch):
    for name in testing.__all__:
        if name.startswith("check_"):
            kind = next(kind for kind in KINDS if hasattr(kind, name))
            seen = []
            monkeypatch.setattr(kind, "CHECKS", (seen.append, seen.append))
            getattr(testing, name)(str)
            assert seen == [str, str]
