"""Numeric features of a sub-network, for regressors that predict its score.

As in GRAF (arXiv 2404.16551), features are properties of the architecture, cheap and interpretable. They are shares and
relative depths instead of counts and indices, so that a regressor transfers between teachers. With a ranking of the
teacher's units (`litgpt rank`), the kept shares of their scores are added as zero-cost proxies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from litgpt.config import Config

from litgpt_whittle.index_plan import layer_takes
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.spaces.args import SpaceArgs
from litgpt_whittle.spaces.sizes import SizeSpace, multi_affine
from litgpt_whittle.subnet import ATTENTION, FIELDS, PER_LAYER, SubNet, experts_of, layer_sizes
from litgpt_whittle.unit_index import UnitIndex, ranges

N_PARTS = 8
"""Number of parts of equal depth that any teacher is divided into, for features by depth"""

Choice = SubNet | Mapping[str, Any]
"""A sub-network, or the output of `SubNet.to_dict`, which is read faster than a `SubNet` is built from it"""

Units = int | np.ndarray
"""Kept units: the first n, or ranges as returned by `litgpt_whittle.unit_index.ranges`"""


@dataclass
class Read:
    """Sizes of n sub-networks in every layer of the teacher; 0 in dropped layers."""

    n_embd: np.ndarray
    """Channels, shape (n,)"""
    head_size: np.ndarray
    """Dimensions of a head, shape (n,)"""
    is_kept: np.ndarray
    """Mask of kept layers, bool, shape (n, n_layer)"""
    sizes: dict[str, np.ndarray]
    """Sizes of the other fields, each of shape (n, n_layer)"""
    masses: dict[str, np.ndarray]
    """Kept shares of importance scores, by metric and field, each of shape (n,)"""


class Features:
    """Numeric features of a teacher's sub-networks.

    Args:
        teacher: The teacher's config.
        ranking: The teacher's ranking; adds the kept shares of its scores as features.
    """

    def __init__(self, teacher: Config, ranking: Ranking | None = None) -> None:
        self.teacher = teacher
        self._limits = [layer_sizes(teacher, layer) for layer in range(teacher.n_layer)]
        # each layer has only one of the two widths
        widths = [own.get("moe_intermediate_size", own.get("intermediate_size")) for own in self._limits]
        self._widths = np.array(widths, dtype=np.float64)
        self._masses = None if ranking is None else _Masses(ranking)
        self._costs = _part_costs(teacher)
        self._whole = self._params(self.read([SubNet.full(teacher)]))
        parts, layers = np.arange(N_PARTS + 1) / N_PARTS, np.arange(teacher.n_layer + 1) / teacher.n_layer
        overlap = np.minimum.outer(parts[1:], layers[1:]) - np.maximum.outer(parts[:-1], layers[:-1])
        # share of each layer in each part, shape (N_PARTS, n_layer)
        self._parts = overlap.clip(0) * N_PARTS

    def __call__(self, choices: Sequence[Choice]) -> dict[str, np.ndarray]:
        """Return the features of n sub-networks, each of shape (n,), by name; the names do not depend on `choices`."""
        teacher, read = self.teacher, self.read(choices)
        found = {
            "depth": read.is_kept.mean(1),
            "n_embd": read.n_embd / teacher.n_embd,
            "head_size": read.head_size / teacher.head_size,
            **_gaps(read.is_kept),
            **self._profile("layers", read.is_kept),
        }
        shares = self.shares(read)
        for name in ("heads", "neurons"):
            found |= _spread(name, shares[name], read.is_kept) | self._profile(name, shares[name])
        found["groups"] = _moments(shares["groups"], read.is_kept)[0]
        found["experts"] = shares["experts"].max(1)  # the same in all layers that have them
        return found | self._param_shares(read) | read.masses

    def shares(self, read: Read) -> dict[str, np.ndarray]:
        """Return the kept share of each layer's units by kind, each of shape (n, n_layer)."""
        teacher, groups = self.teacher, read.sizes["n_query_groups"]
        return {
            "heads": groups * read.sizes["heads_per_group"] / teacher.n_head,
            "groups": groups / teacher.n_query_groups,
            "neurons": read.sizes["neurons"] / self._widths,
            # a dense MLP counts as a single expert
            "experts": read.sizes["n_expert"] / teacher.n_expert if teacher.n_expert else read.is_kept * 1.0,
        }

    def read(self, choices: Sequence[Choice]) -> Read:
        """Read the sizes of n sub-networks."""
        shape = len(choices), self.teacher.n_layer
        n_embd, head_size = np.zeros(shape[0]), np.zeros(shape[0])
        is_kept = np.zeros(shape, dtype=bool)
        sizes = {name: np.zeros(shape) for name in PER_LAYER}
        masses: dict[str, np.ndarray] = {}
        for row, choice in enumerate(choices):
            if isinstance(choice, SubNet):
                choice = {name: value for name in FIELDS if (value := getattr(choice, name)) is not None}
            kept = {name: [_units(choice[name])] for name in ("n_embd", "head_size")}
            n_embd[row], head_size[row] = (_size(*units) for units in kept.values())
            layers = [layer for start, end in ranges(choice["n_layer"]).tolist() for layer in range(start, end)]
            is_kept[row, layers] = True
            for name in PER_LAYER:
                kept[name] = self._own(choice, name, layers)
                sizes[name][row, layers] = [_size(units) for units in kept[name]]
            if self._masses is not None:
                for name, mass in self._masses(layers, kept).items():
                    masses.setdefault(name, np.zeros(shape[0]))[row] = mass
        sizes["neurons"] = sizes.pop("intermediate_size") + sizes.pop("moe_intermediate_size")
        return Read(n_embd, head_size, is_kept, sizes, masses)

    def _own(self, choice: Mapping[str, Any], name: str, layers: list[int]) -> list[Units]:
        """Return the kept units of one kind in each kept layer; 0 if a layer has no such units, or dropped them."""
        # `to_dict` omits heads per group if each head is a group, and other units if no kept layer has them
        value = choice.get(name, 1 if name == "heads_per_group" else 0)
        values = (
            [_units(units) for units in value] if isinstance(value, list | tuple) else [_units(value)] * len(layers)
        )
        if name == "n_expert" and self.teacher.n_expert_groups:
            values = [self._in_groups(units) for units in values]
        dropped = choice.get("drop_attention" if name in ATTENTION else "drop_mlp")
        without: set[int] = set() if dropped is None else set(UnitIndex.parse(dropped).indices.tolist())
        return [
            units if name in self._limits[layer] and layer not in without else 0 for layer, units in zip(layers, values)
        ]

    def _in_groups(self, experts: Units) -> Units:
        """Convert the first n experts to the first experts of each group; return other choices unchanged."""
        is_prefix = isinstance(experts, int) and experts > 0
        return _units(UnitIndex(experts_of(self.teacher, UnitIndex(experts)))) if is_prefix else experts

    def _profile(self, name: str, kept: np.ndarray) -> dict[str, np.ndarray]:
        """Return the mean kept share in each of the `N_PARTS` parts of the teacher's depth."""
        return {f"{name}_at_{i}": part for i, part in enumerate(self._parts @ kept.T.astype(np.float64))}

    def _param_shares(self, read: Read) -> dict[str, np.ndarray]:
        """Return the parameters of attention and MLPs relative to the teacher's, and shares within the sub-network."""
        attention, mlp = self._params(read)
        layers = attention + mlp
        return {
            "attention_params": attention / self._whole[0],
            "mlp_params": mlp / self._whole[1],
            "attention_of_layers": attention / layers,
            "layers_of_params": layers / (layers + self.teacher.padded_vocab_size * read.n_embd),
        }

    def _params(self, read: Read) -> np.ndarray:
        """Return the parameters of attention and of the MLPs in all kept layers, shape (2, n)."""
        sizes = (read.n_embd, read.head_size, *(read.sizes[name] for name in ("n_query_groups", "heads_per_group")))
        powers = [np.stack((np.ones_like(size), size)) for size in (*sizes, read.sizes["neurons"])]
        experts = read.sizes["n_expert"].max(1)
        counts = np.zeros((2, len(read.n_embd)))
        for costs, layers in self._costs:
            of = np.stack((read.sizes["n_query_groups"], read.sizes["neurons"])).astype(bool) & layers
            n_expert = np.stack((np.ones_like(experts), experts))
            counts += np.einsum("puvabcw,un,vn,anl,bnl,cnl,wn,pnl->pn", costs, *powers, n_expert, of, optimize=True)
        return counts


def _part_costs(teacher: Config) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the closed forms of the parameter counts of attention and MLP for each kind of layers.

    Returns:
        Per kind, the coefficients of polynomials that are affine in channels, head size, query groups, heads per group,
        neurons and experts, shape (2, 2, 2, 2, 2, 2, 2), and the mask of its layers, bool, shape (n_layer,).
    """
    space = SizeSpace(teacher, layerwise=True, tied=False, args=SpaceArgs(fixed=[]))
    found = []
    for number, kind in enumerate(space.kinds):
        layers = np.array(space.kind_of) == number
        names = ("n_embd", "head_size", "n_query_groups", "heads_per_group", kind.width)
        bounds = [(space.grids[name][0], space.grids[name][-1]) for name in names]
        bounds.append((space.grids["n_expert"][0], space.grids["n_expert"][-1]) if kind.has_experts else (0, 0))

        def cost(*sizes: int, part: str, layer: int = int(layers.argmax())) -> int:
            slices = layer_takes(teacher, layer, *sizes)
            return sum(take.numel() for name, take in slices.items() if name.startswith(part) and not take.is_buffer)

        found.append((np.stack([multi_affine(partial(cost, part=part), bounds) for part in ("attn.", "mlp.")]), layers))
    return found


def _gaps(is_kept: np.ndarray) -> dict[str, np.ndarray]:
    """Return features of the dropped layers before the first kept layer, after the last, and in between."""
    _n, depth = is_kept.shape
    first, behind = is_kept.argmax(1), is_kept[:, ::-1].argmax(1)
    before = np.maximum.accumulate(np.where(is_kept, np.arange(depth), -1), axis=1)[:, :-1]
    gaps = np.arange(1, depth) - before - 1  # number of layers dropped right before each kept layer
    is_between = is_kept[:, 1:] & (before >= 0)
    return {
        "before_first": first / depth,
        "behind_last": behind / depth,
        "longest_gap": np.where(is_between, gaps, 0).max(1, initial=0) / depth,
        "n_gaps": (is_between & (gaps > 0)).sum(1) / depth,
        "gap_deviation": _moments(gaps, is_between)[1] / depth,
    }


def _spread(name: str, share: np.ndarray, is_kept: np.ndarray) -> dict[str, np.ndarray]:
    """Return statistics of the kept layers' shares, and the kept share of the whole teacher."""
    depth = np.broadcast_to(np.arange(share.shape[1]) / share.shape[1], share.shape)
    (mean, deviation), (middle, spread) = _moments(share, is_kept), _moments(depth, is_kept)
    covariance = _moments((share - mean[:, None]) * (depth - middle[:, None]), is_kept)[0]
    return {
        f"{name}_mean": mean,
        f"{name}_deviation": deviation,
        f"{name}_least": np.where(is_kept, share, np.inf).min(1),
        f"{name}_most": share.max(1),
        f"{name}_slope": covariance / np.where(spread > 0, spread, 1) ** 2,
        f"{name}_of_teacher": share.mean(1),
    }


def _moments(values: np.ndarray, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return means and standard deviations along rows of the values selected by the mask `of`; 0 if no value is."""
    n = np.maximum(of.sum(1), 1)
    mean = (values * of).sum(1) / n
    return mean, np.sqrt((((values - mean[:, None]) * of) ** 2).sum(1) / n)


class _Masses:
    """Kept shares of a ranking's scores: of channels, of layers, and of other units, averaged over the layers."""

    def __init__(self, ranking: Ranking) -> None:
        self.units: dict[str, dict[str, list[np.ndarray | None]]] = {}
        for metric, scores in ranking.scores.units.items():
            layers = [{name: _running_share(own.numpy()) for name, own in layer.items()} for layer in scores.layers]
            # a kind with a single unit, such as one head per group, is redundant with its layer
            names = {name: None for layer in layers for name, share in layer.items() if len(share) > 2}
            self.units[metric] = {"n_embd": [_running_share(scores.n_embd.sum(0).numpy())]}
            self.units[metric] |= {name: [layer.get(name) for layer in layers] for name in names}
        self.layers = {metric: np.diff(_running_share(own.numpy())) for metric, own in ranking.scores.layers.items()}

    def __call__(self, layers: list[int], kept: Mapping[str, list[Units]]) -> dict[str, float]:
        """Return the kept shares by the names of metrics and fields."""
        found = {f"{metric}_layers": float(shares[layers].sum()) for metric, shares in self.layers.items()}
        for metric, masses in self.units.items():
            for name, mass in masses.items():
                at = [0] if name == "n_embd" else layers
                shares = [_mass(own, units) for i, units in zip(at, kept[name]) if (own := mass[i]) is not None]
                found[f"{metric}_{name}"] = sum(shares) / sum(own is not None for own in mass)
        return found


def _running_share(scores: np.ndarray) -> np.ndarray:
    """Return the share of the total score that the first n units have, for n = 0, …, len(scores).

    If the total is 0, all units count equally.
    """
    shares = np.clip(scores.astype(np.float64), 0, None)
    shares = shares if shares.sum() > 0 else np.ones(len(scores))
    return np.concatenate(([0.0], np.cumsum(shares / shares.sum())))


def _mass(running: np.ndarray, units: Units) -> float:
    if isinstance(units, int):
        return float(running[units])
    return float((running[units[:, 1]] - running[units[:, 0]]).sum())


def _units(value: int | str | UnitIndex | None) -> Units:
    if value is None:
        return 0
    if isinstance(value, UnitIndex) and value.is_prefix:
        return len(value)
    return value if isinstance(value, int) else ranges(value)


def _size(units: Units) -> int:
    return units if isinstance(units, int) else int((units[:, 1] - units[:, 0]).sum())
