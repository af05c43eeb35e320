"""Importance of the teacher's directions for a sequential repair: run the teacher once, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from litgpt.model import Block

from litgpt_whittle.blocks import NonBlockModules, run_block
from litgpt_whittle.calibration import Calibration
from litgpt_whittle.least_squares import Moments, no_outputs
from litgpt_whittle.repair.basis import DirectionImportance, readers, standardised
from litgpt_whittle.repair.cut import FiniteCheck
from litgpt_whittle.scratch import Activations
from litgpt_whittle.subnet import LayerUnits


def direction_importance(
    teacher: NonBlockModules,
    block_of: Callable[[int], Block],
    kept: Mapping[int, LayerUnits],
    calibration: Calibration,
    stream: Activations,
) -> DirectionImportance:
    """Return the importance of the residual stream's directions for the kept layers' input projections and the LM head.

    Args:
        teacher: The teacher's modules outside the blocks.
        block_of: Returns one of the teacher's blocks.
        kept: Kept units of the kept layers, by layer.
        calibration: The calibration tokens, of which 32 per channel are used, taken at equal intervals.
        stream: Buffer for the teacher's hidden states; overwritten.

    Raises:
        UserError: If activations are not finite.
    """
    config, device = teacher.model.config, calibration.device
    step = max(calibration.n_first * calibration.shape[1] // (32 * config.n_embd), 1)
    batches = calibration.share(calibration.all_batches[::step])
    importance = DirectionImportance()
    for batch in batches:
        stream[batch] = teacher.embed(calibration.ids(batch))
    for layer in range(config.n_layer):
        block, finite = block_of(layer), FiniteCheck(layer)
        before, middle = (Moments(config.n_embd, 0, device) for _ in range(2))
        inside = [] if config.parallel_residual else ["norm_2"]
        for batch in batches:
            x = stream[batch]
            before.add(standardised(x, config), no_outputs(x))
            seen = run_block(block, x, teacher.block_args[layer], inside)
            if inside:
                middle.add(standardised(seen["norm_2"], config), no_outputs(x))
            stream[batch] = finite(seen["out"])
        finite.finish()
        if layer not in kept:
            continue
        parts = kept[layer].parts
        before.over_processes()
        if "attn" in parts:
            importance.add(before, block.norm_1, readers(block, "attn"))
        if "mlp" in parts:
            mlp_norm = block.norm_1 if config.shared_attention_norm else block.norm_2
            importance.add(middle.over_processes() if inside else before, mlp_norm, readers(block, "mlp"))
    final = Moments(config.n_embd, 0, device)
    for batch in batches:
        final.add(standardised(stream[batch], config), no_outputs(stream[batch]))
    final.over_processes()  # also waits until all processes have read the stream
    head = teacher.head.weight
    # half the weight of all layers' projections: the best of 1, 1/2, 1/4 and 1/8 on a teacher of 8 layers
    importance.add(final, teacher.norm, [head - head.mean(0)], times=len(kept))
    return importance
