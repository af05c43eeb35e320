"""Test features of sub-networks against counting every unit of every layer."""

from statistics import mean, pstdev

import numpy as np
import pytest
from architectures import ARCHITECTURES, KINDS, subnets
from hypothesis import given, settings
from hypothesis import strategies as st
from litgpt.config import Config

from litgpt_whittle.index_plan import plan
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.subnet import SubNet, experts_of
from litgpt_whittle.surrogates.features import N_PARTS, Features
from litgpt_whittle.testing.inputs import random_ranking
from litgpt_whittle.unit_index import UnitIndex, ranges

EACH = pytest.mark.parametrize("teacher", KINDS.values(), ids=KINDS)


def params(teacher: Config, subnet: SubNet, part: str) -> int:
    slices = plan(teacher, subnet).items()
    return sum(take.numel() for name, take in slices if name.split(".")[3:4] == [part] and not take.is_buffer)


def shares(subnet: SubNet) -> dict[str, list[float]]:
    """Return each kept layer's shares of its teacher layer."""
    full, found = SubNet.full(subnet.teacher), {"heads": [], "neurons": [], "groups": [], "experts": []}
    for i, layer in enumerate(subnet.layers):
        kept, of = subnet.layer(i).sizes, full.layer(layer).sizes
        found["groups"].append(kept[0] / of[0])
        found["heads"].append(found["groups"][-1] * kept[1] / of[1])
        found["neurons"].append(kept[2] / of[2])
        if of[3]:
            found["experts"].append(kept[3] / of[3])
    return found


def masses(subnet: SubNet, ranking: Ranking) -> dict[str, float]:
    """Return the kept shares of the scores, unit by unit."""
    own: dict[str, dict[int, float]] = {}
    teacher, scores = subnet.teacher, ranking.scores.units["activation"]
    for layer, units in enumerate(scores.layers):
        for name, tensor in units.items():
            worth = tensor.numpy()
            own.setdefault(name, {})[layer] = 0.0
            if layer in subnet.layers:
                keep = subnet.layer(subnet.layers.index(layer))
                keep = keep.intermediate_size if name.endswith("intermediate_size") else getattr(keep, name)
                if keep is None:
                    continue
                indices = experts_of(teacher, keep) if name == "n_expert" else keep.indices
                own[name][layer] = float(worth[indices].sum() / worth.sum())
    found = {f"activation_{name}": mean(values.values()) for name, values in own.items()}
    channels, layers = scores.n_embd.sum(0).numpy(), ranking.scores.layers["block_influence"].numpy()
    found["activation_n_embd"] = float(channels[subnet.n_embd.indices].sum() / channels.sum())
    found["block_influence_layers"] = float(layers[list(subnet.layers)].sum() / layers.sum())
    return found


def brute_force(subnet: SubNet) -> dict[str, float]:
    teacher, layers = subnet.teacher, subnet.layers
    full, n = SubNet.full(teacher), teacher.n_layer
    found = {
        "depth": len(layers) / n,
        "n_embd": len(subnet.n_embd) / teacher.n_embd,
        "head_size": len(subnet.head_size) / teacher.head_size,
        "before_first": layers[0] / n,
        "behind_last": (n - 1 - layers[-1]) / n,
    }
    gaps = [b - a - 1 for a, b in zip(layers, layers[1:])]
    found |= {"longest_gap": max(gaps, default=0) / n, "n_gaps": sum(gap > 0 for gap in gaps) / n}
    found["gap_deviation"] = pstdev(gaps) / n if gaps else 0
    own = shares(subnet)
    for name in ("heads", "neurons"):
        of = own[name]
        found |= {f"{name}_mean": mean(of), f"{name}_deviation": pstdev(of), f"{name}_least": min(of)}
        found |= {f"{name}_most": max(of), f"{name}_of_teacher": sum(of) / n}
        found[f"{name}_slope"] = np.polyfit(np.array(layers) / n, of, 1)[0] if len(layers) > 1 else 0
    found["groups"] = mean(own["groups"])
    found["experts"] = max(own["experts"], default=0) if teacher.n_expert else 1
    for name, values in {**own, "layers": [1.0] * len(layers)}.items():
        if name in ("layers", "heads", "neurons"):
            # many points of the depth, each within one layer
            n_points = 1000
            sums = np.zeros(N_PARTS * n_points)
            for point in range(len(sums)):
                layer = int((point + 0.5) / len(sums) * n)
                sums[point] = values[layers.index(layer)] if layer in layers else 0
            for i, part in enumerate(sums.reshape(N_PARTS, n_points).mean(1)):
                found[f"{name}_at_{i}"] = part
    attention, mlp = params(teacher, subnet, "attn"), params(teacher, subnet, "mlp")
    found["attention_params"] = attention / params(teacher, full, "attn")
    found["mlp_params"] = mlp / params(teacher, full, "mlp")
    found["attention_of_layers"] = attention / (attention + mlp)
    embedding = plan(teacher, subnet)["transformer.wte.weight"].numel()
    found["layers_of_params"] = (attention + mlp) / (attention + mlp + embedding)
    return found


@EACH
@settings(max_examples=5)
@given(data=st.data())
def test_features_are_those_found_by_brute_force(teacher, data):
    ranking = random_ranking(teacher)
    chosen = [data.draw(subnets(teacher, sublayers=True)) for _ in range(2)]
    found = Features(teacher, ranking)(chosen)
    for row, subnet in enumerate(chosen):
        of = {name: values[row] for name, values in found.items()}
        expected = brute_force(subnet)
        kept = masses(subnet, ranking)
        assert {name: of[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-9)
        left = {name: value for name, value in of.items() if name not in expected}
        assert left == pytest.approx({name: kept[name] for name in left})
        # if each head is a group, there is nothing to rank within groups
        assert set(kept) - set(left) <= {"activation_heads_per_group", "activation_n_query_groups"}


@EACH
@settings(max_examples=5)
@given(data=st.data())
def test_a_journals_record_reads_like_the_sub_network(teacher, data):
    chosen = [data.draw(subnets(teacher, sublayers=True)) for _ in range(3)]
    features = Features(teacher, random_ranking(teacher))
    ours, theirs = features(chosen), features([subnet.to_dict() for subnet in chosen])
    assert list(ours) == list(theirs) and all((ours[name] == theirs[name]).all() for name in ours)


def test_equal_shares_give_equal_features_in_a_larger_teacher():
    sizes = dict(vocab_size=61, padded_vocab_size=64, block_size=16)
    small = Config.from_name("pythia-14m", n_layer=8, n_embd=32, n_head=4, intermediate_size=64, **sizes)
    large = Config.from_name("pythia-14m", n_layer=16, n_embd=64, n_head=8, intermediate_size=128, **sizes)
    ours = Features(small)([SubNet(small, n_embd=16, n_layer="0-3,6", n_query_groups=2, intermediate_size=48)])
    theirs = Features(large)([SubNet(large, n_embd=32, n_layer="0-7,12-13", n_query_groups=4, intermediate_size=96)])
    assert list(ours) == list(theirs)
    alike = [name for name in ours if name.endswith(("_mean", "_of_teacher")) or "_at_" in name]
    assert len(alike) > 20 and all(ours[name] == pytest.approx(theirs[name]) for name in alike)


def test_only_a_ranking_adds_names():
    teacher = ARCHITECTURES["Llama-3.1-8B"]
    plain, ranked = (Features(teacher, r)([SubNet.full(teacher)]) for r in (None, random_ranking(teacher)))
    assert set(ranked) - set(plain) == {
        "activation_n_embd", "activation_n_query_groups", "activation_heads_per_group", "activation_intermediate_size",
        "block_influence_layers",
    }  # fmt: skip


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_are_runs_of_the_kept_indices(indices):
    keep = UnitIndex(sorted(indices))
    for runs in (keep.ranges, ranges(keep), ranges(keep.to_yaml())):
        assert [i for start, end in runs for i in range(start, end)] == sorted(indices)
        assert all(end < start for (_, end), (start, _) in zip(runs, runs[1:]))
