"""Test `litgpt extract`: its output opens in stock litgpt; rejected input."""

import shutil

import pytest
import torch
import yaml
from checkpoints import write_random_model
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import CLI
from texts import write_tokenizer

from litgpt_whittle import files
from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.commands import export, prune
from litgpt_whittle.commands import extract as command
from litgpt_whittle.commands.extract import setup
from litgpt_whittle.errors import UserError
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import LayerwiseGPT, SuperGPT, extract_weights

TEACHER = Config.from_name(
    "pythia-14m", n_layer=4, n_embd=32, n_head=4, intermediate_size=48, block_size=64, vocab_size=300
)
CHOICES = {
    "uniform": dict(n_embd="0-9,14-19", n_layer="0,2-3", n_query_groups=2, head_size=4, intermediate_size=20),
    "layerwise": dict(n_embd=16, n_layer="0,2-3", n_query_groups=[2, "1,3", 3], intermediate_size=[20, 7, "1-30"]),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random_model(write_tokenizer(tmp_path_factory.mktemp("extract") / "teacher"), TEACHER)


@pytest.fixture(scope="module", params=CHOICES)
def student(request, checkpoint, tmp_path_factory):
    """Return a student's folder and its sub-network."""
    folder = tmp_path_factory.mktemp(request.param)
    subnet = SubNet(TEACHER, **CHOICES[request.param])
    subnet.save(folder / "best.yaml", perplexity=12.5)
    setup(checkpoint, folder / "best.yaml", folder / "student")
    return folder / "student", subnet


IDX = torch.arange(3, 33)[None]


def test_it_writes_what_runs_in_the_super_network(student, checkpoint):
    folder, subnet = student
    teacher = load_model(checkpoint, "SuperGPT")
    stock = GPT(Config.from_checkpoint(folder))
    stock.load_state_dict(torch.load(folder / "lit_model.pth", weights_only=True))
    with teacher.running(subnet), torch.no_grad():
        expected = teacher(IDX)
        torch.testing.assert_close(stock(IDX), expected, rtol=1e-5, atol=1e-5)
        ours = load_model(folder)
        torch.testing.assert_close(ours(IDX), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(ours, LayerwiseGPT) != subnet.is_uniform
    weights = extract_weights(teacher, subnet)
    assert all(torch.equal(value, weights[name]) for name, value in ours.state_dict().items())


def test_it_says_where_the_student_comes_from(student, checkpoint):
    folder, subnet = student
    assert SubNet.load(folder / "sub_network.yaml", TEACHER) == subnet
    origin = yaml.safe_load((folder / "sub_network.yaml").read_text())["provenance"]
    assert origin["teacher"] == TEACHER.name and origin["checkpoint_dir"] == str(checkpoint)
    assert origin["n_params"] == n_params(TEACHER, subnet) == sum(p.numel() for p in load_model(folder).parameters())
    assert origin["perplexity"] == 12.5  # the entries of the search are kept
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_text() == (checkpoint / name).read_text()


def test_a_dtype_can_be_chosen(checkpoint, tmp_path):
    SubNet(TEACHER, n_embd=16).save(tmp_path / "s.yaml")
    setup(checkpoint, tmp_path / "s.yaml", tmp_path / "half", dtype="bfloat16")
    teacher = load_model(checkpoint, SuperGPT.__name__)
    expected = extract_weights(teacher, SubNet(TEACHER, n_embd=16))
    for name, value in torch.load(tmp_path / "half/lit_model.pth", weights_only=True).items():
        assert torch.equal(value, expected[name].bfloat16())


def test_the_command_line_takes_two_paths(checkpoint, tmp_path, capsys):
    SubNet(TEACHER, n_embd=16).save(tmp_path / "s.yaml")
    CLI(setup, args=[str(checkpoint), str(tmp_path / "s.yaml"), "--out_dir", str(tmp_path / "student")])
    assert "channels    32 -> 16" in capsys.readouterr().out and (tmp_path / "student/lit_model.pth").is_file()


def test_it_says_what_transformers_cannot_open(checkpoint, tmp_path, caplog):
    for choice, is_open in ((dict(n_embd=20), False), (dict(n_embd=16, n_query_groups=[1, 2, 1, 1]), True)):
        SubNet(TEACHER, **choice).save(tmp_path / "s.yaml")
        setup(checkpoint, tmp_path / "s.yaml", tmp_path / "student", overwrite=True)
        note = [message for message in caplog.messages if message.startswith("Note: litgpt evaluate")]
        caplog.clear()
        assert len(note) == int(not is_open) and all("n_embd = 20, n_head = 4 and head_size = 8" in n for n in note)


# -- rejected input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_embd: 33", "n_embd must lie within the teacher's 32, got 33"),
        ("n_embd: 3-40", "got index 40"),
        ("n_embd: 5,3", "must be sorted"),
        ("n_embd: 3,3", "must be distinct"),
        ("n_embd: 0", "at least one unit"),
        ("n_embd: ''", "ranges look like"),
        ("n_layer: 7-3", "a range must ascend"),
        ("n_query_groups: [1, 2]", "2 entries for 4 kept layers"),
        ("heads_per_group: 2", "heads_per_group must lie within the teacher's 1"),
        ("head_size: 1", "head_size"),
        ("n_expert: 2", "has n_expert"),
        ("n_head: 2", "has no 'n_head'"),
        ("[", "is not YAML"),
    ],
)
def test_illegal_sub_networks_are_told_in_one_line(checkpoint, tmp_path, text, message, monkeypatch):
    monkeypatch.setattr(command, "read_weights", lambda *_: pytest.fail("the teacher was read"))
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        setup(checkpoint, tmp_path / "s.yaml", tmp_path / "student")
    assert "\n" not in str(error.value) and not (tmp_path / "student").exists()


def test_a_missing_sub_network_and_one_of_another_teacher_are_told(checkpoint, tmp_path):
    with pytest.raises(UserError, match="cannot read the sub-network"):
        setup(checkpoint, tmp_path / "none.yaml", tmp_path / "student")
    other = Config.from_name("pythia-14m", n_layer=5, n_embd=32, n_head=4, vocab_size=300)
    SubNet(other, n_embd=16).save(tmp_path / "s.yaml")
    with pytest.raises(UserError, match="is a sub-network of 'pythia-14m'"):
        setup(checkpoint, tmp_path / "s.yaml", tmp_path / "student")
    with pytest.raises(UserError, match="there is no checkpoint directory"):
        setup(tmp_path / "nowhere", tmp_path / "s.yaml", tmp_path / "student")


def test_nothing_is_overwritten_unasked(checkpoint, tmp_path):
    SubNet(TEACHER, n_embd=16).save(tmp_path / "s.yaml")
    out = tmp_path / "student"
    setup(checkpoint, tmp_path / "s.yaml", out)
    before = (out / "lit_model.pth").read_bytes()
    with pytest.raises(UserError, match="--overwrite true"):
        setup(checkpoint, tmp_path / "s.yaml", out)
    assert (out / "lit_model.pth").read_bytes() == before
    SubNet(TEACHER, n_embd=8).save(tmp_path / "s.yaml")
    setup(checkpoint, tmp_path / "s.yaml", out, overwrite=True)
    assert Config.from_checkpoint(out).n_embd == 8
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="--overwrite only replaces checkpoints"):
        setup(checkpoint, tmp_path / "s.yaml", tmp_path / "notes", overwrite=True)
    with pytest.raises(UserError, match="must not contain input files"):
        setup(checkpoint, tmp_path / "s.yaml", checkpoint, overwrite=True)


def test_a_full_disk_is_told_before_anything_is_cut(checkpoint, tmp_path, monkeypatch):
    SubNet(TEACHER, n_embd=16).save(tmp_path / "s.yaml")
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda *_: usage)
    with pytest.raises(UserError, match="free some"):
        setup(checkpoint, tmp_path / "s.yaml", tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_the_best_of_all_bins_of_a_search_are_cut_out_with_a_table(checkpoint, tmp_path, capsys, caplog):
    (tmp_path / "search").mkdir()
    counts = {}
    for name, perplexity in (("best-1M", 12.5), ("best-2M", 8.25), ("best-1M-by-score", 1.0)):
        subnet = SubNet(TEACHER, n_embd=16 if name.startswith("best-1M") else 24)
        subnet.save(tmp_path / "search" / f"{name}.yaml", perplexity=perplexity)
        counts[name] = n_params(TEACHER, subnet)
    setup(checkpoint, tmp_path / "search", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["best-1M", "best-2M"]
    rows = [line.split()[1:] for line in capsys.readouterr().out.splitlines()[-2:]]
    assert rows == [[f"{counts['best-1M']:,}", "12.50"], [f"{counts['best-2M']:,}", "8.25"]]
    for name in ("best-1M", "best-2M"):
        assert sum(weight.numel() for weight in load_model(tmp_path / "out" / name).parameters()) == counts[name]
    # the same command resumes; other settings or another search are rejected before anything is cut
    shutil.rmtree(tmp_path / "out" / "best-2M")
    setup(checkpoint, tmp_path / "search", tmp_path / "out")
    assert f"{tmp_path / 'out' / 'best-1M'} is finished already" in caplog.text
    assert (tmp_path / "out" / "best-2M" / "lit_model.pth").is_file()
    shutil.rmtree(tmp_path / "out" / "best-1M")
    with pytest.raises(UserError, match="out_dir must be empty or new, got .*best-2M"):
        setup(checkpoint, tmp_path / "search", tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out" / "best-1M").exists()
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="has no best.*yaml of a search"):
        setup(checkpoint, tmp_path / "nothing", tmp_path / "more")


@pytest.mark.parametrize("writer", [command, prune, export])
def test_one_process_at_a_time_writes_a_folder(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0)
    folder = tmp_path / "new/a"
    inputs = [tmp_path / "teacher", tmp_path / "student.yaml"][: 2 if writer is command else 1]
    with files.lock_dir(folder.with_name(".a.lock")):
        with pytest.raises(UserError, match="another process is at work in out_dir .*new/a'; wait for it"):
            writer.setup(*inputs, out_dir=folder)
    # the lock is gone, so the command fails at its missing teacher, and leaves nothing
    with pytest.raises(UserError, match="teacher"):
        writer.setup(*inputs, out_dir=folder, **({"method": "magnitude"} if writer is prune else {}))
    assert not folder.parent.exists()
