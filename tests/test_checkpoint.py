"""Test checkpoint directories: faults are reported before anything is loaded; writes are all or nothing."""

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
from litgpt_whittle.model_config import read_model_config
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import LayerwiseGPT, SuperGPT, extract_weights, student_model

LLAMA = ARCHITECTURES["Llama-3.1-8B"]


@pytest.fixture
def checkpoint(tmp_path):
    """Write a tiny checkpoint as litgpt itself does."""
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


@pytest.mark.parametrize("model_class", [None, "SuperGPT"])
def test_positions_of_a_bf16_model_are_exact_at_every_length(tmp_path, model_class):
    """The oracle is a model for longer sequences, whose rotary cache litgpt recomputes for a shorter one."""
    short = dataclasses.replace(LLAMA, block_size=64)
    weights = GPT(short).state_dict()
    found = []
    for config in (short, dataclasses.replace(short, block_size=128)):
        folder = tmp_path / str(config.block_size)
        save_checkpoint(folder, config, weights)
        model = load_model(folder, model_class, dtype=torch.bfloat16)
        model.max_seq_length = 64
        assert torch.equal(model.cos, GPT(short).cos) and torch.equal(model.sin, GPT(short).sin)
        found.append(model(torch.arange(64)[None] % short.vocab_size))
    assert torch.equal(*found)


def test_tied_weights_stay_tied(checkpoint):
    weights = torch.load(checkpoint / "lit_model.pth", weights_only=True)
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()  # in the form of litgpt's converter
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
    problem(r"has transformer\.h\.3\.\S+, which its model_config.yaml does not have")
    save_config(dataclasses.replace(LLAMA, intermediate_size=25), checkpoint)
    problem(r"of shape \(24, 32\), its model_config.yaml requires \(25, 32\)")
    for text, message in (("a: [", "not YAML"), ("unknown_field: 1", "is refused by litgpt"), ("", "not a mapping")):
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


EDITED = {"norm_eps": "1e-5", "rope_base": "1e4", "n_embd": '"32"', "bias": '"false"', "padded_vocab_size": "64.0"}
"""Values as users write them into a `model_config.yaml`, all equivalent to those of `LLAMA`"""


def edited(folder, **changes):
    """Change lines of a checkpoint's model_config.yaml."""
    path = folder / "model_config.yaml"
    others = {name: value for name, value in yaml.safe_load(path.read_text()).items() if name not in changes}
    path.write_text(yaml.safe_dump(others) + "".join(f"{name}: {text}\n" for name, text in changes.items()))
    return folder


def test_numbers_that_yaml_reads_as_text_are_numbers(checkpoint, tmp_path):
    """The oracle is the config that litgpt itself wrote, before and after a save that stock litgpt reads."""
    plain = dataclasses.replace(LLAMA, rope_base=10000, norm_eps=1e-5)
    save_config(plain, checkpoint)
    config = check_checkpoint(edited(checkpoint, **EDITED))
    assert config == plain
    assert [type(getattr(config, name)) for name in EDITED] == [float, int, int, bool, int]
    save_checkpoint(tmp_path / "saved", config, read_weights(checkpoint), checkpoint)
    assert Config.from_checkpoint(tmp_path / "saved") == plain


def test_numbers_within_rope_settings_are_numbers(checkpoint):
    adjustments = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
    text = '{factor: "8.0", low_freq_factor: 1e0, high_freq_factor: 4.0, original_max_seq_len: "8192"}'
    assert check_checkpoint(edited(checkpoint, rope_adjustments=text)).rope_adjustments == adjustments


def test_a_fraction_of_a_rope_base_stays(checkpoint):
    """A student's shorter heads have such a base."""
    save_config(dataclasses.replace(LLAMA, rope_base=1234.5), checkpoint)
    assert check_checkpoint(checkpoint).rope_base == 1234.5


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("n_embd", "many", "n_embd in .* must be a whole number, got 'many'"),
        ("n_layer", "1.5", "n_layer in .* must be a whole number, got 1.5"),
        ("n_head", "true", "n_head in .* must be a whole number, got True"),
        ("n_embd", "null", "n_embd in .* must be a whole number, got None"),
        ("norm_eps", "tiny", "norm_eps in .* must be a number, got 'tiny'"),
        ("rope_base", ".nan", "rope_base in .* must be a number, got nan"),
        ("bias", "never", "bias in .* must be one of True, False, got 'never'"),
        ("mlp_class_name", "LLamaMLP", "mlp_class_name in .* must be one of GptNeoxMLP, .*, got 'LLamaMLP'"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_name(checkpoint, name, text, message):
    for read in (check_checkpoint, read_weights, load_model):
        with pytest.raises(UserError, match=message) as error:
            read(edited(checkpoint, **{name: text}))
        assert "\n" not in str(error.value)


def test_every_config_of_litgpt_is_read_as_litgpt_reads_it(tmp_path):
    for config in ARCHITECTURES.values():
        save_config(config, tmp_path)
        assert read_model_config(tmp_path / "model_config.yaml") == Config.from_file(tmp_path / "model_config.yaml")


def test_numbers_in_other_files_of_a_checkpoint_may_be_text(checkpoint, tmp_path):
    plain, shape = SubNet(LLAMA, n_embd=16, intermediate_size=10), {"intermediate_size": 10}
    (tmp_path / "sub_network.yaml").write_text('n_embd: "16"\nintermediate_size: 1e1\n')
    assert SubNet.load(tmp_path / "sub_network.yaml", LLAMA) == plain
    (tmp_path / "sub_network.yaml").write_text("n_embd: 16.0\nintermediate_size: 10\n")
    assert SubNet.load(tmp_path / "sub_network.yaml", LLAMA) == plain
    (checkpoint / "model_class.yaml").write_text("model_class: LayerwiseGPT\nshape: {intermediate_size: 1e1}\n")
    assert load_model(checkpoint).shape.to_dict() == SubNet(LLAMA, **shape).to_dict()
    (checkpoint / "model_class.yaml").write_text("model_class: LayerwiseGPT\nshape: 5\n")
    with pytest.raises(UserError, match="model_class.yaml' is not a YAML mapping"):
        load_model(checkpoint)


def test_a_damaged_hugging_face_config_is_reported_before_the_work(checkpoint):
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not a Hugging Face config"):
        check_checkpoint(checkpoint)
