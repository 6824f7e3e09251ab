"""The residual stream behind every block, from what `capture` returns."""

from collections.abc import Mapping, Sequence

import jax

from jaxlab.models.anatomy_parts import Anatomy

Array = jax.Array


def block_outputs(captured: Mapping[str, Array], parts: Anatomy) -> Sequence[Array] | Array:
  """Returns the outputs of all blocks, in order of execution.

    parts = models.anatomy(model)
    y, captured = models.capture(model, variables, [models.any_of(parts.block_paths)], x)
    penalty = losses.tweo_loss(models.block_outputs(captured, parts))

  Works under `nn.remat` and `nn.scan`.

  Args:
    captured: the blocks' outputs by path, as `capture` returns them; others are passed over.
    parts: of the model.

  Returns:
    A list of arrays, `[batch, tokens, width]` or (Swin) `[batch, height, width, channels]`; for blocks that
    `nn.scan` stacks, `[blocks, batch, tokens, width]`.

  Raises:
    ValueError: if the model has no blocks, or `captured` lacks one.
  """
  if not parts.blocks:
    raise ValueError('The anatomy has no blocks, whose outputs could be returned.')
  missing = [path for path in parts.block_paths if path not in captured]
  if missing:
    raise ValueError(
      f'captured lacks the output of {", ".join(map(repr, missing[:3]))}: capture with the pattern '
      f'any_of(anatomy.block_paths). It holds {", ".join(map(repr, list(captured)[:8])) or "nothing"}.'
    )
  if len(parts.blocks) == 1 and parts.blocks[0].stacked:
    return captured[parts.blocks[0].path]
  outputs = []
  for block in parts.blocks:
    output = captured[block.path]
    outputs += list(output) if block.stacked else [output]
  return outputs
