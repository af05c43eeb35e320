"""Test the fast ranking of units and layers against removing units one at a time."""

import pytest
import torch
from architectures import ARCHITECTURES
from litgpt.config import Config

from litgpt_whittle.ranking.quick import quick_order
from litgpt_whittle.subnet import layer_sizes
from litgpt_whittle.supergpt import SuperGPT

GQA = Config.from_name(
    "Llama-3.2-1B", n_layer=4, n_embd=48, n_head=6, n_query_groups=3, head_size=8, intermediate_size=96, block_size=16,
    padded_vocab_size=64, vocab_size=61,
)  # fmt: skip


def test_the_quick_order_is_that_of_what_layers_lose_without_a_unit():
    """The oracle zeroes the columns of one unit at a time, in float64, in one layer's output projection at a time."""
    torch.manual_seed(0)
    model = SuperGPT(GQA).double().eval()
    ids = torch.randint(0, 61, (4, 16))
    order = quick_order(model, [ids])
    for layer in (0, 3):
        block, seen = model.transformer.h[layer], {}
        handles = [
            module.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
            for name, module in (("attn.proj", block.attn.proj), ("mlp.proj", block.mlp.proj))
        ]
        handles.append(block.register_forward_hook(lambda _, x, out: seen.update({"in": x[0], "out": out})))
        with torch.no_grad():
            model(ids)
        for handle in handles:
            handle.remove()
        columns = {  # 3 groups of 2 heads of 8 dimensions
            "n_query_groups": ("attn.proj", [range(16 * g, 16 * g + 16) for g in range(3)]),
            "heads_per_group": (
                "attn.proj",
                [[16 * g + 8 * h + d for g in range(3) for d in range(8)] for h in (0, 1)],
            ),
            "intermediate_size": ("mlp.proj", [[i] for i in range(96)]),
        }
        for kind, (name, units) in columns.items():
            weight, z, lost = block.get_submodule(name).weight, seen[name], []
            for unit in units:
                without = weight.detach().clone()
                without[:, list(unit)] = 0
                lost.append(float((z @ weight.T - z @ without.T).square().sum()))
            assert order.layers[layer][kind].tolist() == sorted(range(len(units)), key=lambda i: -lost[i])
    influence = []
    for block in model.transformer.h:
        handle = block.register_forward_hook(
            lambda _, x, out: influence.append(1 - torch.cosine_similarity(x[0], out, -1))
        )
        model(ids)
        handle.remove()
    assert order.n_layer.tolist() == sorted(range(4), key=lambda i: -float(influence[i].mean()))


@pytest.mark.parametrize("teacher", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_architecture_can_be_ordered_quickly(teacher):
    torch.manual_seed(0)
    order = quick_order(SuperGPT(teacher).eval(), [torch.randint(0, 61, (2, 8))])
    assert sorted(order.n_embd) == list(range(teacher.n_embd))
    for layer, units in enumerate(order.layers):
        assert {name: sorted(own) for name, own in units.items()} == {
            name: list(range(n)) for name, n in layer_sizes(teacher, layer).items()
        }


def test_only_so_many_tokens_are_read():
    class Counted(SuperGPT):
        n = 0

        def forward(self, idx, *args, **kwargs):
            Counted.n += idx.numel()
            return super().forward(idx, *args, **kwargs)

    quick_order(Counted(GQA), [torch.zeros(3, 16, dtype=torch.long)] * 9, n_tokens=64)
    assert 64 <= Counted.n < 64 + 48
