"""A backbone with a projection head, and its passes over several views: what siamese methods train."""

from typing import Any

import jax
import optax
from flax import linen as nn

from jaxlab.models.intercept import apply

Array = jax.Array
PyTree = Any


class Encoder(nn.Module):
  """Returns `projector(backbone(images))`, `[batch, dim]`.

  Attributes:
    backbone: a network that returns pooled features, e.g. `create('resnet50', num_classes=None)`.
    projector: a head from `jaxlab.models.heads`.
  """

  backbone: nn.Module
  projector: nn.Module

  def __call__(self, images: Array, train: bool = False) -> Array:
    """Returns the projections of `images` `[batch, height, width, channels]`."""
    return self.projector(self.backbone(images, train=train), train=train)


def apply_in_turn(
  module: nn.Module,
  variables: dict[str, PyTree],
  inputs: list[Array],
  *,
  mutable: tuple[str, ...] = ('batch_stats',),
  **kwargs: Any,
) -> tuple[list[Array], dict[str, PyTree]]:
  """Applies a module in train mode to one array after the other; mutable collections go from call to call.

  So each view has batch statistics of its own, and the running ones see the views in order.

  Args:
    module: called as `module(x, train=True)`.
    variables: its variables.
    inputs: one array a call.
    mutable: collections that calls change, e.g. running statistics, or ranges that hooks record.
    **kwargs: passed to `intercept.apply`, e.g. `hooks`.

  Returns:
    The outputs, and the mutable collections after the last call.
  """
  outputs, state = [], {name: variables[name] for name in mutable if name in variables}
  for x in inputs:
    y, state = apply(module, {**variables, **state}, x, train=True, mutable=list(mutable), **kwargs)
    outputs.append(y)
  return outputs, dict(state)


def momentum_pass(
  encoder: nn.Module, params: PyTree, target: dict[str, PyTree], views: list[Array], momentum: float
) -> tuple[list[Array], dict[str, PyTree]]:
  """Moves the momentum network to the online one, then returns its features of the views, and itself.

  `target <- momentum * target + (1 - momentum) * params` over parameters alone; its running statistics are
  its own, from its own passes in train mode (MoCo, BYOL). Features carry no gradient.

  Args:
    encoder: the module of both networks.
    params: of the online network, before the optimizer's step.
    target: `{'params', 'batch_stats'}` of the momentum network.
    views: arrays `[batch, height, width, channels]`, one pass each.
    momentum: share of the momentum network that is kept.
  """
  moved = optax.incremental_update(params, target['params'], 1 - momentum)
  z, state = apply_in_turn(encoder, {**target, 'params': moved}, views)
  return jax.lax.stop_gradient(z), {'params': moved, **state}
