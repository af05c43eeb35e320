"""Draw a sub-network against its teacher, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt_whittle.subnet import SubNet

KEPT, CUT = "#2a6fdb", "#dfe3ea"
DROPPED: dict[str, Any] = dict(facecolor="white", edgecolor="#b9bfca", hatch="////", linewidth=0.6)


@dataclass(frozen=True)
class Row:
    """Unit counts of one kind in each of the teacher's layers: the teacher's and the kept ones."""

    name: str
    of: list[int]
    """The teacher's units per layer, 0 in a layer without such units"""
    kept: list[int]
    """The student's units per layer of the teacher, 0 in a dropped layer or sub-layer"""

    @property
    def span(self) -> str:
        """Range of the sizes in the kept layers: `6-11`, or `8` if all are equal."""
        sizes = [size for size in self.kept if size] or [0]
        return f"{min(sizes)}-{max(sizes)}" if len(set(sizes)) > 1 else str(sizes[0])


def rows(subnet: SubNet) -> list[Row]:
    """Return a row for each kind of unit."""
    full = SubNet.full(subnet.teacher)
    of = [_sizes(full, i) for i in range(len(full))]
    kept = {layer: _sizes(subnet, i) for i, layer in enumerate(subnet.layers)}
    names = dict.fromkeys(name for sizes in of for name in sizes)
    return [
        Row(name, [sizes.get(name, 0) for sizes in of], [kept.get(i, {}).get(name, 0) for i in range(len(full))])
        for name in names
    ]


def plot_architecture(subnet: SubNet, path: Path, title: str = "") -> None:
    """Draw the teacher's and the kept units of every layer; dropped layers and sub-layers are hatched."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    teacher, panels = subnet.teacher, rows(subnet)
    width = min(max(8.5, 0.3 * teacher.n_layer + 1), 14)
    figure = Figure(figsize=(width, 2.3 + 1.5 * len(panels)), layout="constrained")
    shares, *grid = figure.subplots(len(panels) + 1, 1, height_ratios=[0.75] + [1] * len(panels))
    _draw_shares(shares, subnet)
    for axes, row in zip(grid, panels):
        _draw_row(axes, row)
        axes.sharex(grid[-1])
        axes.tick_params(labelbottom=axes is grid[-1])
    grid[-1].set_xlabel("the teacher's layer")
    figure.suptitle(title, x=0.01, ha="left")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


def _sizes(subnet: SubNet, index: int) -> dict[str, int]:
    """Return the sizes of the student's layer `index`, by readable names."""
    groups, per_group, width, n_expert = subnet.layer(index).sizes
    sizes = {"heads": groups * per_group}
    if subnet.teacher.n_query_groups != subnet.teacher.n_head:
        sizes["query groups"] = groups
    return sizes | ({"experts": n_expert, "neurons/expert": width} if n_expert else {"neurons": width})


def _draw_shares(axes: Any, subnet: SubNet) -> None:
    """Draw the dimensions that all layers share, as bars from 0 to the teacher's size."""
    teacher = subnet.teacher
    sizes = {
        "layers": (len(subnet), teacher.n_layer),
        "channels": (len(subnet.n_embd), teacher.n_embd),
        "head size": (len(subnet.head_size), teacher.head_size),
    }
    places = range(len(sizes))
    axes.barh(places, 1, color=CUT, height=0.62)
    axes.barh(places, [kept / of for kept, of in sizes.values()], color=KEPT, height=0.62)
    for place, (kept, of) in zip(places, sizes.values()):
        axes.text(1.01, place, f"{kept} of {of}", va="center", fontsize=9)
    axes.set_yticks(places, sizes)
    axes.set_xlim(0, 1.15)
    axes.set_xticks([])
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _draw_row(axes: Any, row: Row) -> None:
    """Draw one kind of unit: the student's bars in front of the teacher's."""
    places = range(len(row.of))
    stays = [i for i in places if row.kept[i]]
    goes = [i for i in places if not row.kept[i]]
    axes.bar(stays, [row.of[i] for i in stays], color=CUT)
    axes.bar(goes, [row.of[i] for i in goes], **DROPPED)
    axes.bar(stays, [row.kept[i] for i in stays], color=KEPT)
    if len(row.of) <= 40:
        _write_numbers(axes, row)
    most = max(row.of)
    axes.set_title(f"{row.name}: {row.span} of {most}", loc="left", fontsize=10)
    axes.set_yticks(sorted({0, most // 2, most}))
    axes.set_xlim(-0.6, len(row.of) - 0.4)
    axes.locator_params(axis="x", integer=True, nbins=20)
    axes.spines[["top", "right"]].set_visible(False)


def _write_numbers(axes: Any, row: Row) -> None:
    """Write each kept size on its bar, rotated if bars are narrow."""
    is_narrow = len(row.of) * len(str(max(row.of))) > 60
    for place, kept in enumerate(row.kept):
        if kept:
            inside = kept > 0.5 * max(row.of)
            axes.annotate(
                str(kept),
                (place, kept),
                xytext=(0, -3 if inside else 3),
                textcoords="offset points",
                ha="center",
                va="top" if inside else "bottom",
                color="white" if inside else "#333333",
                rotation=90 if is_narrow else 0,
                fontsize=7,
            )


def _legend() -> list[Any]:
    from matplotlib.patches import Patch

    return [
        Patch(color=KEPT, label="kept"),
        Patch(color=CUT, label="cut away"),
        Patch(**DROPPED, label="dropped"),
    ]
