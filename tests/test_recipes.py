"""Test the recipes in config_hub: parsed by their commands, consistent with their models, bins and stated costs."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import set_parsing_settings

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from recipes import HUB, Recipe, open_recipe, recipes

from litgpt_whittle.fitness.perplexity import Perplexity
from litgpt_whittle.pipeline.kinds import STAGE_OF
from litgpt_whittle.pipeline.sections import Section
from litgpt_whittle.searching.loop import Search
from litgpt_whittle.searching.racing_loop import check_can_race
from litgpt_whittle.spaces.bins import parse_bins
from litgpt_whittle.supergpt import student_model
from litgpt_whittle.training.checks import check_pair


@pytest.fixture(autouse=True, scope="module")
def no_help():
    set_parsing_settings(docstring_parse_attribute_docstrings=False)  # this takes longer than everything else
    yield
    set_parsing_settings(docstring_parse_attribute_docstrings=True)


def each(*commands: str):
    return pytest.mark.parametrize("path", recipes(*commands), ids=lambda path: str(path.relative_to(HUB)))


def number(text: str) -> float:
    """Parse a header's number, such as 10B or 5,050."""
    digits, unit = re.fullmatch(r"([\d.,]+)([KMB]?)", text).groups()
    return float(digits.replace(",", "")) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[unit]


@pytest.mark.parametrize("path", sorted(HUB.rglob("*.yaml")), ids=lambda path: str(path.relative_to(HUB)))
def test_its_command_reads_it_and_its_header_says_what_it_takes(path):
    recipe = open_recipe(path)
    assert recipe.args.data is not None or recipe.command == "whittle"  # the pipeline's sections hold it
    for word in ("Hardware:", "Memory:", "Tokens:", "Cost:"):
        assert word in recipe.header
    if path.stem != "demo":
        assert f"litgpt {recipe.command} " in recipe.header and str(path.relative_to(HUB.parent)) in recipe.header
        assert all(len(line) <= 120 for line in path.read_text().splitlines())


@each("search")
def test_a_sub_network_lies_in_the_bin(path):
    recipe = open_recipe(path)
    args, space, student = recipe.args, recipe.space, recipe.student
    (bin,) = parse_bins(args.bin)
    with torch.device("meta"):
        model = student_model(student)
    counts = {name: weight.numel() for name, weight in model.named_parameters()}
    if space.tied:
        del counts["transformer.wte.weight"]
    assert sum(counts.values()) == space.n_params(student) and sum(counts.values()) in bin
    assert model.config.padded_vocab_size == recipe.teacher.padded_vocab_size
    assert args.train.max_seq_length <= recipe.teacher.block_size
    if args.racing:
        check_can_race(Perplexity, args.fitness, Search.begin(space, args.strategy, "perplexity", 0).strategy)


@each("search")
def test_a_search_scores_as_many_candidates_on_as_much_text_as_its_header_says(path):
    recipe = open_recipe(path)
    candidates, tokens = re.search(r"Tokens: ([\d,]+) × ([\d,]+)", recipe.header).groups()
    assert (number(candidates), number(tokens)) == (recipe.args.iterations, recipe.tokens)
    strategy = recipe.args.strategy
    if recipe.name.startswith("pythia"):  # 50 random candidates, then 100 generations of 50
        assert recipe.args.iterations == strategy.population_size + 100 * strategy.n_offspring == 5050


@each("search", "rank", "extract", "whittle")
def test_the_header_says_what_it_costs(path):
    recipe = open_recipe(path)
    # a pipeline states the memory of its largest stage
    memory = _memory(recipe.twin("distill").header) if recipe.command == "whittle" else recipe.memory()
    assert _memory(recipe.header) == memory and recipe.cost() in recipe.header


@each("distill", "pretrain_supernet")
def test_the_batch_is_shared_evenly_and_the_models_fit_each_other(path):
    recipe = open_recipe(path)
    train, n = recipe.args.train, recipe.n_devices
    assert train.global_batch_size % (n * train.micro_batch_size) == 0
    assert train.gradient_accumulation_iters(n) * n * train.micro_batch_size == train.global_batch_size
    steps = train.max_tokens // (train.global_batch_size * train.max_seq_length)
    assert train.lr_warmup_steps < steps / 10 and recipe.args.eval.interval < steps
    assert recipe.args.data.max_tokens > train.max_tokens
    if recipe.command == "distill":
        assert check_pair(recipe.student.config, recipe.teacher, train.max_seq_length) == train.max_seq_length
        distill = recipe.args.distill
        assert (distill.alpha, distill.beta, distill.temperature) == (0.2, 0.8, 0.9)
        assert recipe.args.initial_checkpoint_dir == Path(f"out/{recipe.name}/student")
    else:
        space = recipe.supernet_space()
        assert space.n_params(space.smallest()) < space.sizes.largest / 2
    assert number(re.search(r"Tokens: (\w+)", recipe.header)[1]) == train.max_tokens
    assert recipe.cost() in recipe.header


@each("search")
def test_a_pipeline_hands_on_what_the_next_command_expects(path):
    recipe = open_recipe(path)
    extract = open_recipe(HUB / "extract" / f"{recipe.name.split('/')[0]}.yaml")
    assert recipe.args.out_dir == Path(f"out/{recipe.name}/search")
    assert recipe.twin("distill").args.teacher_checkpoint_dir.name in recipe.header + extract.header
    if recipe.args.order == "importance":
        rank = open_recipe(HUB / "rank" / extract.path.name)
        assert recipe.args.importance == rank.args.out_dir / "importance.pt"
    # a repair needs more tokens than a projection has inputs
    assert extract.args.repair.tokens > 8 * max(recipe.teacher.intermediate_size, recipe.teacher.n_embd)


PROVIDED = {
    "search": {"bin", "out_dir", "importance"},
    "distill": {"initial_checkpoint_dir", "teacher_checkpoint_dir", "out_dir", "resume", "devices"},
}
"""Flags that the pipeline itself passes to its stages"""


@each("whittle")
def test_a_pipelines_sections_are_the_commands_own_recipes(path):
    name, content = path.relative_to(HUB / "whittle").with_suffix("").as_posix(), yaml.safe_load(path.read_text())
    assert open_recipe(path).args.target == content["target"]
    for command, section in content.items():
        if command in STAGE_OF and section and name != "demo":
            file = f"{name if command in PROVIDED else name.split('/')[0]}.yaml"
            own = yaml.safe_load((HUB / command / file).read_text())
            assert section == {key: own[key] for key in own.keys() - PROVIDED.get(command, {"out_dir"})}
            if command == "search":
                assert content["target"] == own["bin"]
        elif command in STAGE_OF and section:
            inputs = {"checkpoint_dir": "teacher", "sub_network": "best.yaml"} if command == "extract" else {}
            Section(command, STAGE_OF[command].config, section).parse(**inputs)


@pytest.mark.slow
@each("distill", "pretrain_supernet")
def test_the_header_gives_the_memory_of_the_plan(path):
    recipe = Recipe(path)
    assert _gigabytes(recipe.header) == pytest.approx(_gigabytes(recipe.memory()), rel=0.05)
    assert _gigabytes(recipe.header) < 0.9 * 80  # the driver, the interpreter and fragmentation need some memory, too


def _memory(header: str) -> str:
    return re.search(r"Memory: [^.]*\.[^.]*\.", header)[0]


def _gigabytes(text: str) -> float:
    return float(re.search(r"Memory: ([\d.]+) GB per GPU", text)[1])
