"""Test calibration data: all unmasked tokens of the training data, and none of the validation data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from litgpt.data import DataModule

from litgpt_whittle.batches import calibration_windows, held_out_windows
from litgpt_whittle.calibration import Calibration
from litgpt_whittle.errors import UserError


class Given(DataModule):
    """A data module that serves the given batches."""

    def __init__(self, train: list, validation: list = ()) -> None:
        self.train, self.validation = train, list(validation)

    def connect(self, *_, **__) -> None: ...

    def train_dataloader(self) -> list:
        return self.train

    def val_dataloader(self) -> list:
        return self.validation


def text(n: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 1000, (n,), generator=torch.Generator().manual_seed(seed))


def padded(*samples: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a batch as in litgpt's instruction data: padded, with labels that ignore the padding and the prompts."""
    length = max(map(len, samples))
    ids = torch.stack([torch.nn.functional.pad(sample, (0, length - len(sample))) for sample in samples])
    labels = torch.stack([torch.nn.functional.pad(sample, (0, length - len(sample)), value=-100) for sample in samples])
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def test_windows_of_one_length_are_taken_as_they_are():
    batches = [text(4 * 33, seed).view(4, 33) for seed in range(3)]
    windows = calibration_windows(Given(batches), 32, 8 * 32).input_ids
    assert torch.equal(windows, torch.cat(batches)[:8, :-1])


def test_samples_of_different_lengths_follow_each_other_without_padding():
    samples = [text(n, seed) for seed, n in enumerate((40, 12, 7, 65, 30, 51))]
    windows = calibration_windows(Given([padded(*samples[:3]), padded(*samples[3:])]), 32, 10**6).input_ids
    # a sample's last token is only a target, and tokens beyond the window are dropped
    expected = torch.cat([sample[:-1][:32] for sample in samples])
    assert windows.shape == (len(expected) // 32, 32)
    assert torch.equal(windows.flatten(), expected[: windows.numel()])


def test_samples_without_a_token_that_counts_are_left_out():
    empty = {"input_ids": text(66, 0).view(2, 33), "labels": torch.full((2, 33), -100)}
    with pytest.raises(UserError, match="the training data has no unmasked labels"):
        calibration_windows(Given([empty]), 32, 100)


@pytest.mark.parametrize("length", [8, 32, 128])
def test_a_validation_split_within_the_training_data_is_found(length):
    train, validation = text(40 * (length + 1), 0).view(40, -1), text(2 * (length + 1), 1).view(2, -1)
    mixed = torch.cat([train[:20], validation, train[20:]])
    with pytest.raises(UserError, match="must not overlap, but 100% of one is in the other"):
        calibration_windows(Given([mixed], [validation]), length, 10**6)
    assert calibration_windows(Given([train], [validation]), length, 10**6).input_ids.shape == (40, length)


def test_calibrating_on_a_part_of_the_validation_split_is_found():
    validation = text(40 * 65, 0).view(40, -1)
    with pytest.raises(UserError, match="must not overlap"):
        calibration_windows(Given([validation[:3]], [validation]), 64, 10**6)


def test_short_windows_of_few_tokens_are_not_taken_for_the_same_text():
    few = [torch.randint(0, 20, (60, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    assert calibration_windows(Given(few[:1], few[1:]), 8, 10**6).input_ids.shape == (60, 8)


def instructions(seeds, template: torch.Tensor, masked: bool, answer: int) -> dict[str, torch.Tensor]:
    """Return instruction data as in litgpt: a shared template, with a question and an answer per sample."""
    samples = [torch.cat([template, text(12, 2 * seed), text(answer, 2 * seed + 1)]) for seed in seeds]
    batch = padded(*samples)
    batch["labels"][:, : (len(template) + 12) * masked] = -100
    return batch


SETTINGS = {
    "n_template": st.sampled_from([0, 5, 40, 300]),
    "masked": st.booleans(),
    "answer": st.sampled_from([2, 20, 90]),
    "seed": st.integers(0, 10**6),
}


@settings(max_examples=25, deadline=None)
@given(**SETTINGS, n=st.integers(3, 20))
def test_a_template_that_samples_share_is_no_overlap(n_template, masked, answer, seed, n):
    template = text(n_template, 10**9)
    train, validation = (instructions(range(first, first + n), template, masked, answer) for first in (seed, seed + n))
    calibration_windows(Given([train], [validation]), 2048, 10**6)


@settings(max_examples=25, deadline=None)
@given(**SETTINGS, n=st.integers(3, 20), share=st.sampled_from([0.2, 1.0]))
def test_samples_that_both_sides_have_are_found_whatever_the_template(n_template, masked, answer, seed, n, share):
    """A fifth of the validation samples, or all of them, among many more training samples."""
    template, shared = text(n_template, 10**9), max(1, round(share * n))
    train = instructions(range(seed, seed + 3 * n), template, masked, answer)
    validation = instructions(range(seed + 3 * n - shared, seed + 4 * n - shared), template, masked, answer)
    with pytest.raises(UserError, match="calibration and validation data must not overlap"):
        calibration_windows(Given([train], [validation]), 2048, 10**6)


def packed(seeds, template: torch.Tensor, length: int) -> torch.Tensor:
    """Return windows of documents that begin with a template, like a chat as plain text."""
    stream = torch.cat([torch.cat([template, text(100, seed), torch.tensor([0])]) for seed in seeds])
    return stream[: len(stream) // length * length].view(-1, length)


@pytest.mark.parametrize("n_template", [60, 100, 400])
def test_templates_in_packed_text_are_no_overlap_and_documents_are(n_template):
    """The two sides cut their windows at different places."""
    several = [text(n_template, 10**9 + i) for i in range(2)]
    train, validation = packed(range(80), several[0], 65), packed(range(200, 230), several[0], 65)
    assert len(calibration_windows(Given([train], [validation]), 64, 10**6).input_ids) == len(train)
    with pytest.raises(UserError, match="must not overlap"):
        calibration_windows(Given([train], [packed(range(70, 90), several[0], 65)]), 64, 10**6)
    # a different template does not hide them
    with pytest.raises(UserError, match="must not overlap"):
        calibration_windows(Given([train], [packed(range(70, 80), several[1], 65)]), 64, 10**6)


def test_text_that_repeats_itself_is_found_too():
    text_ = text(50, 0).repeat(40)[: 20 * 65].view(20, 65)
    with pytest.raises(UserError, match="must not overlap"):
        calibration_windows(Given([text_], [text_[:5]]), 64, 10**6)


def test_answers_of_few_kinds_are_no_overlap():
    """A classification task: the same few answers to different questions."""

    def classified(seeds):
        rows = [torch.cat([text(40, seed), text(60, 10**6 + seed % 3)]) for seed in seeds]
        batch = padded(*rows)
        batch["labels"][:, :40] = -100
        return batch

    calibration_windows(Given([classified(range(30))], [classified(range(30, 45))]), 2048, 10**6)


def test_a_repair_is_judged_by_the_validation_text():
    """Other windows of the calibration text may continue documents that were fitted to."""
    train, validation = [padded(text(33, i)) for i in range(40)], [padded(text(33, i)) for i in range(50, 60)]
    windows = calibration_windows(Given(train, validation), 32, 32 * 32).input_ids
    held_out = held_out_windows(Given(train, validation), 32, windows.shape[1], 3).input_ids
    assert torch.equal(held_out.flatten(), torch.cat([text(33, i)[:32] for i in (50, 51, 52)]))
    calibration = Calibration(windows, 4, n_closed_form=20, held_out=held_out)
    assert calibration.is_validated and not Calibration(windows).is_validated
    in_ = {name: {i for batch in getattr(calibration, name) for i in range(batch.start, batch.stop)} for name in (
        "fitted_batches", "tuning_batches", "held_out_batches", "further_batches", "teacher_batches",
    )}  # fmt: skip
    of = {name: calibration.windows[sorted(rows)] for name, rows in in_.items()}
    assert torch.equal(of["fitted_batches"], windows[:20]) and torch.equal(of["further_batches"], windows[20:])
    assert torch.equal(of["held_out_batches"], held_out) and in_["tuning_batches"] < in_["fitted_batches"]
    assert torch.equal(calibration.windows[calibration.training_windows], windows)
    assert torch.equal(calibration.windows[list(calibration.held_out_windows)], held_out)
    assert calibration.n_fitted == 20 * 32 and len(in_["teacher_batches"]) == len(windows) + 3


@pytest.mark.parametrize("validation", [[], [padded(text(9, 1))]])
def test_without_enough_validation_text_the_last_of_the_calibration_text_is_held_out(validation):
    assert held_out_windows(Given([], validation), 32, 32, 3) is None


def test_positions_that_count_stay_with_their_tokens():
    """A sample's last token is only a target, so the window's other tokens keep their sample's next tokens."""
    samples = [text(n, seed) for seed, n in enumerate((40, 12, 30, 33, 25))]
    windows = calibration_windows(Given([padded(*samples)]), 16, 10**6)
    ids = torch.cat([sample[:-1][:16] for sample in samples])
    targets = torch.cat([torch.cat([torch.full((2,), -100), sample[3:]])[:16][: len(sample) - 1] for sample in samples])
    assert torch.equal(windows.input_ids.flatten(), ids[: windows.input_ids.numel()])
    assert torch.equal(windows.targets.flatten(), targets[: windows.targets.numel()])
    assert torch.equal(windows.counts, windows.targets >= 0)
    assert calibration_windows(Given([torch.stack([text(17, 1)] * 3)]), 16, 10**6).counts is None


@given(st.integers(3, 20), st.integers(3, 20), st.integers(0, 4), st.integers(0, 10**6))
def test_trained_and_judged_positions_are_those_that_count(n, n_closed_form, n_held_out, seed):
    draw = torch.Generator().manual_seed(seed)
    ids, theirs = torch.arange(n * 4).view(n, 4), -1 - torch.arange(n_held_out * 4).view(n_held_out, 4)
    counts, their_counts = (torch.rand(x.shape, generator=draw) < 0.6 for x in (ids, theirs))
    counts[:, 0] = their_counts[:, 0] = True
    held_out = (theirs, their_counts) if n_held_out else (None, None)
    found = Calibration(ids, 4, "cpu", n_closed_form, held_out[0], counts, held_out[1])
    expected = set(ids[counts].tolist()) | set(theirs[their_counts].tolist())
    everything = range(len(found.windows))
    assert set(found.windows.flatten()[found.counted(everything)].tolist()) == expected
    assert torch.equal(found.counts(slice(None)).flatten().nonzero().flatten(), found.counted(everything))
    fitted, judged = (found.windows.flatten()[found.counted(w)] for w in (found.fitted_windows, found.held_out_windows))
    assert not n_held_out or (set(judged.tolist()) == set(theirs[their_counts].tolist()) and (fitted >= 0).all())


def test_calibration_text_without_a_position_that_counts_is_refused():
    ids, counts = torch.zeros(8, 4, dtype=torch.long), torch.zeros(8, 4, dtype=torch.bool)
    counts[:5] = True
    with pytest.raises(UserError, match="the calibration text to evaluate on must hold a token that counts, and its "):
        Calibration(ids, counts=counts)
    with pytest.raises(UserError, match="the calibration text to fit on must hold a token that counts"):
        Calibration(ids, counts=~counts & False, held_out=ids[:2])
