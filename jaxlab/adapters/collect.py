"""The tokens between the blocks of a frozen transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from jaxlab.adapters.attention_side_network import num_groups
from jaxlab.models.anatomy import anatomy as anatomy_of
from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.block_outputs import block_outputs
from jaxlab.models.intercept import Hook, Site, any_of, capture

Array = jax.Array
PyTree = Any


def collect_features(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  *inputs: Any,
  gap: int = 1,
  parts: Anatomy | None = None,
  hooks: Sequence[Hook] = (),
  **options: Any,
) -> tuple[Array, ...]:
  """Returns a frozen transformer's tokens: the first block's input `z_0`, then what every `gap` blocks make.

  No gradient goes back through them. Works with `remat` and `scan`. The class token and all patches are among
  them; nothing is normalized.

  Args:
    model: a transformer.
    variables: of the model.
    *inputs: of the model's call: images `[batch, height, width, channels]`.
    gap: divides the number of blocks.
    parts: of the model; None: `models.anatomy(model)`.
    hooks: around its modules, within what is collected: a network that is quantized, or adapted otherwise.
    **options: further arguments of the call.

  Returns:
    `depth / gap + 1` arrays, `[batch, tokens, width]`; of networks with stages each in its own shape.

  Raises:
    ValueError: for a model whose parts are not known or that has no blocks, and a gap that does not divide.
  """
  parts = anatomy_of(model) if parts is None else parts
  if not parts.blocks:
    raise ValueError(f'{type(model).__name__} has no blocks whose tokens could be collected.')
  depth = sum(block.stacked or 1 for block in parts.blocks)
  num_groups(depth, gap)
  first = parts.blocks[0]

  def keep(site: Site, x: Array) -> Array:
    site.write('tokens', x)
    return x

  hook = Hook(any_of([first.path]), input=keep, collection='side_inputs')
  (_, state), captured = capture(
    model, variables, [any_of(parts.block_paths)], *inputs, hooks=[*hooks, hook],
    mutable=['side_inputs'], **options,
  )  # fmt: skip
  (start,) = jax.tree.leaves(state['side_inputs'])
  outputs = block_outputs(captured, parts)
  chosen = [start[0] if first.stacked else start, *list(outputs)[gap - 1 :: gap]]
  return tuple(jax.lax.stop_gradient(z) for z in chosen)
