"""How much a network's predictions change without one of its channels or blocks."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.compression.slicing import masked_apply
from jaxlab.compression.structure import structure

Array = jax.Array
PyTree = Any
Direction = Literal['pruned_to_original', 'original_to_pruned']


def prediction_divergence(
  pruned_logits: Array,
  original_logits: Array,
  direction: Direction = 'pruned_to_original',
) -> Array:
  """Returns `sum_c p_c (log p_c - log q_c)` of each example, p and q the softmax of the logits.

  In at least float32. Tiny negative values are those of rounding.

  Args:
    pruned_logits: `[batch, num_classes]`.
    original_logits: `[batch, num_classes]`.
    direction: `'pruned_to_original'`: p is the pruned network's (CURL); `'original_to_pruned'`: p is the
      whole network's (UP-ViTs).

  Returns:
    `[batch]`.

  Raises:
    ValueError: for another direction, or logits of different shapes.

  References:
    Luo & Wu, CVPR 2020 (https://arxiv.org/abs/1911.08114), by its code; Yu & Wu, A Unified Pruning Framework
    for Vision Transformers, 2021 (https://arxiv.org/abs/2111.15127).

  >>> same = jnp.array([[1.0, 2.0]])
  >>> prediction_divergence(same, same).tolist()
  [0.0]
  """
  if direction not in ('pruned_to_original', 'original_to_pruned'):
    raise ValueError(f"direction={direction!r}: 'pruned_to_original' or 'original_to_pruned'.")
  if pruned_logits.shape != original_logits.shape or pruned_logits.ndim != 2:
    raise ValueError(
      f'logits must be [batch, num_classes] both, got {pruned_logits.shape}, {original_logits.shape}.'
    )
  wide = jnp.promote_types(pruned_logits.dtype, jnp.float32)
  pruned, original = (
    jax.nn.log_softmax(logits.astype(wide)) for logits in (pruned_logits, original_logits)
  )
  first, second = pruned, original
  if direction == 'original_to_pruned':
    first, second = original, pruned
  return jnp.sum(jnp.exp(first) * (first - second), -1)


def removal_scores(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  inputs: Array,
  *,
  score: Callable[[Array, Array], Array] = prediction_divergence,
  names: Collection[str] | None = None,
  chunk: int | None = None,
) -> dict[str, Array]:
  """Returns the score of a network without each of its channels and parts, one at a time.

  All candidates run through one compiled function, a loop over masks of which one entry is 0: one pass of
  `inputs` through the network each, and nothing is compiled anew. Pure, so jit it, sum over batches, shard
  it.

  Args:
    model: the whole network, in evaluation mode, `[batch, num_classes]` logits.
    variables: its collections.
    inputs: `[batch, ...]`, all in one pass.
    score: `(logits without, logits with) -> [batch]`; the sum over the batch is returned.
    names: groups and parts that are scored; None: all of `structure(model)`.
    chunk: candidates that run at once; None: one. More is faster where a pass does not fill the device; of
      convolutions it makes grouped ones, which are slow on a CPU.

  Returns:
    By group `[channels]`, by part `[]`: the sum over the batch.

  Raises:
    ValueError: for an unknown name, or no inputs.
  """
  if not len(inputs):
    raise ValueError('inputs: at least one example is needed to score channels.')
  found = structure(model)
  sizes = found.sizes | dict.fromkeys(found.parts, 1)
  names = list(sizes) if names is None else list(names)
  if unknown := [name for name in names if name not in sizes]:
    raise ValueError(
      f'names: {unknown[:3]} are no groups and no parts of this {type(model).__name__}.'
    )
  if not names:
    return {}
  ends = np.cumsum([sizes[name] for name in names])

  def outputs(stays: Array) -> Array:
    own = dict(zip(names, jnp.split(stays, ends[:-1]), strict=True))
    masks = {name: own[name] if name in found.groups else own[name][0] for name in names}
    return masked_apply(model, variables, masks, inputs)

  def without(candidate: Array) -> Array:
    stays = (jnp.arange(ends[-1]) != candidate).astype(jnp.float32)
    return jnp.sum(score(outputs(stays), original))

  # Scores are as small as 1e-9: neither fewer bits nor another form of the whole network may enter.
  with jax.default_matmul_precision('float32'):
    original = outputs(jnp.ones(ends[-1]))
    scores = jax.lax.map(without, jnp.arange(ends[-1]), batch_size=chunk)
  split = dict(zip(names, jnp.split(scores, ends[:-1]), strict=True))
  return {name: own if name in found.groups else own[0] for name, own in split.items()}


def kernel_norms(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  names: Collection[str] | None = None,
  *,
  named_layer: bool = False,
) -> dict[str, Array]:
  """Returns the L1 norm of what makes each channel: the sum of `|kernel|` over all but its outputs.

  Of a group that several layers write to, their sum (Li et al., Pruning Filters for Efficient ConvNets, ICLR
  2017, https://arxiv.org/abs/1608.08710, there of one layer).

  Args:
    model: the network.
    variables: its collections.
    names: groups; None: all.
    named_layer: count only the layer that a group is named after: of the hidden channels of an inverted
      residual the expansion, not the depthwise convolution behind it.

  Returns:
    `[channels]` by group.

  Raises:
    ValueError: with `named_layer`, for a group that is named after a stage or a branch.
  """
  found = structure(model)
  params = traverse_util.flatten_dict(dict(variables['params']), sep='/')
  scores = {}
  for name in found.groups if names is None else names:
    group, total = found.groups[name], jnp.zeros(found.groups[name].size)
    if named_layer and f'{name}/kernel' not in params:
      raise ValueError(f'names: {name!r} is no layer; expected such groups with named_layer=True.')
    for cut in group.cuts:
      path = cut.path.removeprefix('params/')
      if named_layer and path != f'{name}/kernel':
        continue
      if cut.axis == -1 and path.endswith('/kernel') and path in params:
        kernel = jnp.abs(params[path])
        total += jnp.sum(kernel.reshape(-1, cut.parts, group.size), (0, 1))
    scores[name] = total
  return scores
