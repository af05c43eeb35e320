"""Made-up importance scores of a teacher's units."""

import torch
from litgpt.config import Config

from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.ranking.scores import Scores, UnitScores
from litgpt_whittle.subnet import layer_sizes


def random_ranking(config: Config, seed: int = 0, **provenance) -> Ranking:
    generator = torch.Generator().manual_seed(seed)

    def scores(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    layers = ({name: scores(size) for name, size in layer_sizes(config, i).items()} for i in range(config.n_layer))
    units = UnitScores(scores(config.n_layer + 1, config.n_embd), tuple(layers))
    found = Scores({"activation": units}, {"block_influence": scores(config.n_layer)}, None)
    return Ranking(config, found, "activation", "block_influence", provenance)
