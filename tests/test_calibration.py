"""What repairs and rankings are calibrated on: all that counts of the training data, and nothing of the validation."""

import pytest
import torch
from litgpt.data import DataModule

from litgpt_whittle.batches import calibration_windows
from litgpt_whittle.errors import UserError


class Given(DataModule):
    """Serves these batches."""

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
    """A batch as litgpt's instruction data have it: padded, with labels that ignore the padding and the prompts."""
    length = max(map(len, samples))
    ids = torch.stack([torch.nn.functional.pad(sample, (0, length - len(sample))) for sample in samples])
    labels = torch.stack([torch.nn.functional.pad(sample, (0, length - len(sample)), value=-100) for sample in samples])
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def test_windows_of_one_length_are_taken_as_they_are():
    batches = [text(4 * 33, seed).view(4, 33) for seed in range(3)]
    windows = calibration_windows(Given(batches), 32, 8 * 32)
    assert torch.equal(windows, torch.cat(batches)[:8, :-1])


def test_samples_of_different_lengths_follow_each_other_without_padding():
    samples = [text(n, seed) for seed, n in enumerate((40, 12, 7, 65, 30, 51))]
    windows = calibration_windows(Given([padded(*samples[:3]), padded(*samples[3:])]), 32, 10**6)
    # a sample's last token is only predicted, and what is longer than a window is left out
    expected = torch.cat([sample[:-1][:32] for sample in samples])
    assert windows.shape == (len(expected) // 32, 32)
    assert torch.equal(windows.flatten(), expected[: windows.numel()])


def test_samples_without_a_token_that_counts_are_left_out():
    empty = {"input_ids": text(66, 0).view(2, 33), "labels": torch.full((2, 33), -100)}
    with pytest.raises(UserError, match="the training data is empty"):
        calibration_windows(Given([empty]), 32, 100)


@pytest.mark.parametrize("length", [8, 32, 128])
def test_a_validation_split_within_the_training_data_is_found(length):
    train, validation = text(40 * (length + 1), 0).view(40, -1), text(2 * (length + 1), 1).view(2, -1)
    mixed = torch.cat([train[:20], validation, train[20:]])
    with pytest.raises(UserError, match="must not be validation data, and 100% of the text of one is in the other"):
        calibration_windows(Given([mixed], [validation]), length, 10**6)
    assert calibration_windows(Given([train], [validation]), length, 10**6).shape == (40, length)


def test_calibrating_on_a_part_of_the_validation_split_is_found():
    validation = text(40 * 65, 0).view(40, -1)
    with pytest.raises(UserError, match="must not be validation data"):
        calibration_windows(Given([validation[:3]], [validation]), 64, 10**6)


def test_short_windows_of_few_tokens_are_not_taken_for_the_same_text():
    few = [torch.randint(0, 20, (60, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    assert calibration_windows(Given(few[:1], few[1:]), 8, 10**6).shape == (60, 8)
