"""Batch statistics of a network that has none of its own: an average of networks, other data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from jaxlab.training.averaging import running_average

if TYPE_CHECKING:
  from jaxlab import models

PyTree = Any


def recompute_batch_stats(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Iterable[jax.Array],
  *,
  hooks: Sequence[models.Hook] = (),
  keep: Sequence[str] = (),
) -> dict[str, PyTree]:
  """Returns the variables with running statistics that are the plain mean of those of the batches.

  A batch norm moves its statistics by `new = m old + (1 - m) batch`. From `old` 0 and 1 follow `m` and the
  batch's own, whatever momentum the network has.

  Args:
    model: called as `model(batch, train=True)`.
    variables: with a collection `batch_stats`.
    batches: the model's inputs.
    hooks: around its modules.
    keep: patterns of modules that keep the statistics that they have; hooks must hold them in eval mode.
  """
  from jaxlab import models  # trainings on features load no networks

  stats = traverse_util.flatten_dict(dict(variables['batch_stats']), sep='/')

  def stays(path: str) -> bool:
    parts = path.split('/')
    modules = ['/'.join(parts[:depth]) for depth in range(1, len(parts))]
    return any(re.fullmatch(pattern, module) for pattern in keep for module in modules)

  kept = {path: leaf for path, leaf in stats.items() if stays(path)}

  @jax.jit
  def measure(inputs):
    def moved(old):
      own = {path: jnp.full_like(leaf, old) for path, leaf in stats.items()} | kept
      given = {**variables, 'batch_stats': traverse_util.unflatten_dict(own, sep='/')}
      _, new = models.apply(model, given, inputs, train=True, mutable=['batch_stats'], hooks=hooks)
      return traverse_util.flatten_dict(new['batch_stats'], sep='/')

    return jax.tree.map(lambda zero, one: zero / (1 - (one - zero)), moved(0.0), moved(1.0))

  added = jax.jit(running_average)
  average = None
  for count, inputs in enumerate(batches):
    found = measure(inputs)
    average = found if average is None else added(average, found, count)
  if average is None:
    raise ValueError('recompute_batch_stats: there is no batch.')
  return {**variables, 'batch_stats': traverse_util.unflatten_dict(average | kept, sep='/')}
