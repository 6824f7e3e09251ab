"""A backbone with a projection head, and its passes over several views: what siamese methods train."""

from typing import Any

import jax
from flax import linen as nn

from jaxlab.models.intercept import apply

Array = jax.Array
PyTree = Any


class Encoder(nn.Module):
  """Returns `projector(backbone(images))`, `[batch, dim]`.

  Attributes:
    backbone: a network that returns pooled features, e.g. `create('resnet50', num_classes=None)`.
    projector: a head from `jaxlab.models.heads`.
    with_features: returns the pair of features `[batch, channels]` and projections.
  """

  backbone: nn.Module
  projector: nn.Module
  with_features: bool = False

  def __call__(self, images: Array, train: bool = False) -> Array | tuple[Array, Array]:
    """Returns the projections of `images` `[batch, height, width, channels]`."""
    features = self.backbone(images, train=train)
    projections = self.projector(features, train=train)
    return (features, projections) if self.with_features else projections


def apply_in_turn(
  module: nn.Module,
  variables: dict[str, PyTree],
  inputs: list[Array],
  *,
  mutable: tuple[str, ...] = ('batch_stats',),
  rngs: dict[str, Array] | None = None,
  **kwargs: Any,
) -> tuple[list[Array], dict[str, PyTree]]:
  """Applies a module in train mode to one array after the other; mutable collections go from call to call.

  So each view has batch statistics of its own, and the running ones see the views in order.

  Args:
    module: called as `module(x, train=True)`.
    variables: its variables.
    inputs: one array a call.
    mutable: collections that calls change, e.g. running statistics, or ranges that hooks record.
    rngs: keys by stream, from which each call has its own.
    **kwargs: passed to `intercept.apply`, e.g. `hooks`.

  Returns:
    The outputs, and the mutable collections after the last call.
  """
  outputs, state = [], {name: variables[name] for name in mutable if name in variables}
  for index, x in enumerate(inputs):
    own = {name: jax.random.fold_in(key, index) for name, key in (rngs or {}).items()}
    y, state = apply(
      module, {**variables, **state}, x, train=True, mutable=list(mutable), rngs=own, **kwargs
    )
    outputs.append(y)
  return outputs, dict(state)
