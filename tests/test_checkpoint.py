"""Checkpoint directories: what is wrong with one is told before anything is loaded; writing is all or nothing."""

import dataclasses

import pytest
import torch
import yaml
from architectures import ARCHITECTURES
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import save_config

from litgpt_whittle.checkpoint import check_checkpoint, load_model, read_weights, save_checkpoint
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import check_writable, new_folder, write_text
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import LayerwiseGPT, SuperGPT, extract_weights, student_model

LLAMA = ARCHITECTURES["Llama-3.1-8B"]


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny checkpoint as litgpt itself writes it."""
    torch.manual_seed(0)
    folder = tmp_path / "teacher"
    folder.mkdir()
    torch.save(GPT(LLAMA).state_dict(), folder / "lit_model.pth")
    save_config(LLAMA, folder)
    return folder


def test_load_model_opens_what_litgpt_wrote(checkpoint):
    idx = torch.arange(12)[None]
    stock = GPT(LLAMA)
    stock.load_state_dict(torch.load(checkpoint / "lit_model.pth", weights_only=True))
    for name, cls in ((None, GPT), ("SuperGPT", SuperGPT)):
        model = load_model(checkpoint, name)
        assert type(model) is cls and not model.training
        assert torch.equal(model(idx), stock(idx))
    assert load_model(checkpoint, dtype=torch.float64).lm_head.weight.dtype == torch.float64


def test_tied_weights_stay_tied(checkpoint):
    weights = torch.load(checkpoint / "lit_model.pth", weights_only=True)
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()  # as litgpt's converter stores them
    torch.save(weights, checkpoint / "lit_model.pth")
    model = load_model(checkpoint, "SuperGPT")
    assert model.tied and model.lm_head.weight is model.transformer.wte.weight
    subnet = SubNet(LLAMA, n_embd=8)
    save_checkpoint(checkpoint.parent / "student", subnet, extract_weights(model, subnet))
    student = load_model(checkpoint.parent / "student")
    assert student.lm_head.weight is student.transformer.wte.weight


def test_layerwise_student_opens_in_its_true_shape_and_in_stock_litgpt(checkpoint):
    teacher = load_model(checkpoint)
    subnet = SubNet(LLAMA, n_layer="0,2-3", intermediate_size=[4, 10, 7], n_query_groups=[1, 2, 2])
    save_checkpoint(checkpoint.parent / "student", subnet, extract_weights(teacher, subnet), checkpoint)
    student = load_model(checkpoint.parent / "student")
    assert isinstance(student, LayerwiseGPT) and student.transformer.h[0].mlp.fc_1.out_features == 4
    stock = GPT(Config.from_checkpoint(checkpoint.parent / "student"))
    stock.load_state_dict(torch.load(checkpoint.parent / "student/lit_model.pth", weights_only=True))
    idx = torch.arange(12)[None]
    torch.testing.assert_close(student(idx), stock(idx))
    expected = student_model(subnet)
    expected.load_state_dict(extract_weights(teacher, subnet))
    assert torch.equal(student(idx), expected(idx))


def test_what_is_wrong_with_a_checkpoint_is_told_in_one_line(checkpoint):
    def problem(text, read=read_weights):
        with pytest.raises(UserError, match=text) as error:
            read(checkpoint)
        assert "\n" not in str(error.value)

    path, config = checkpoint / "lit_model.pth", checkpoint / "model_config.yaml"
    good, good_config = path.read_bytes(), config.read_text()
    with pytest.raises(UserError, match="there is no checkpoint directory"):
        check_checkpoint(checkpoint / "none")
    path.write_bytes(good[: len(good) // 2])
    problem("truncated or damaged")
    path.write_bytes(b"not a zip file at all" * 100)
    problem("truncated or damaged|more than weights")
    path.write_bytes(b"")
    problem("truncated or damaged")
    torch.save([1], path)
    problem("holds no weights")
    path.write_bytes(good)
    save_config(dataclasses.replace(LLAMA, n_layer=5), checkpoint)
    problem(r"lacks transformer\.h\.4")
    save_config(dataclasses.replace(LLAMA, n_layer=3), checkpoint)
    problem(r"has transformer\.h\.3\.\S+, which its model_config.yaml does not know")
    save_config(dataclasses.replace(LLAMA, intermediate_size=25), checkpoint)
    problem(r"of shape \(24, 32\), its model_config.yaml says \(25, 32\)")
    for text, message in (("a: [", "not YAML"), ("unknown_field: 1", "litgpt refuses"), ("", "litgpt refuses")):
        config.write_text(text)
        problem(message, check_checkpoint)
    config.unlink()
    problem("no model_config.yaml", check_checkpoint)
    config.write_text(good_config)
    (checkpoint / "model_class.yaml").write_text("model_class: Nothing")
    problem("there is no 'Nothing' in litgpt.models", load_model)
    path.unlink()
    problem("no lit_model.pth", check_checkpoint)


def test_a_checkpoint_of_litgpt_pretrain_opens_without_its_pickled_dataloader(checkpoint):
    weights = torch.load(checkpoint / "lit_model.pth", weights_only=True)
    loader = torch.utils.data.DataLoader([1, 2, 3], generator=torch.Generator())
    state = {"model": weights, "optimizer": {"state": {0: torch.ones(2)}}, "train_dataloader": loader, "iter_num": 7}
    torch.save(state, checkpoint / "lit_model.pth")
    for name, tensor in read_weights(checkpoint).items():
        assert torch.equal(tensor, weights[name])


def test_malicious_pickles_do_not_run(checkpoint, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"model": Evil()}, checkpoint / "lit_model.pth")
    with pytest.raises(UserError):
        load_model(checkpoint)
    (checkpoint / "model_config.yaml").write_text(f"!!python/object/apply:os.mknod ['{tmp_path / 'ran'}']")
    with pytest.raises(UserError):
        check_checkpoint(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    with new_folder(target) as folder:
        (folder / "b").write_text("2")
    assert [path.name for path in target.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == ["out"]
    write_text(target / "b", "3")
    assert (target / "b").read_text() == "3" and len(list(target.iterdir())) == 1


def test_places_that_cannot_be_written_to_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        with pytest.raises(UserError, match="out_dir must be"):
            check_writable(place)
    check_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_copied_hugging_face_config_has_the_students_sizes(checkpoint):
    (checkpoint / "config.json").write_text('{"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 61}')
    subnet = SubNet(LLAMA, n_embd=8, n_layer=2)
    save_checkpoint(checkpoint.parent / "student", subnet, extract_weights(load_model(checkpoint), subnet), checkpoint)
    written = yaml.safe_load((checkpoint.parent / "student/config.json").read_text())
    assert written["hidden_size"] == 8 and written["num_hidden_layers"] == 2 and written["vocab_size"] == 61
