"""Which filters within residual blocks stay: those with the largest L1 norm, the same share in each block."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from jaxlab.compression.plan import Plan
from jaxlab.compression.plan import plan as make_plan
from jaxlab.compression.scores import kernel_norms
from jaxlab.compression.selection import highest_channels
from jaxlab.compression.structure import structure

PyTree = Any


def keep_count(size: int, ratio: float) -> int:
  """Returns how many of `size` channels stay where a share `ratio` is removed: `ceil(size (1 - ratio))`.

  At least one, whatever the ratio.

  Raises:
    ValueError: for a ratio outside of [0, 1), or no channels.

  >>> [keep_count(size, ratio) for size, ratio in ((64, 0.5), (5, 0.5), (10, 0.7))]
  [32, 3, 3]
  """
  if not 0 <= ratio < 1:
    raise ValueError(f'ratio={ratio}: expected a share in [0, 1).')
  if size < 1:
    raise ValueError(f'size={size}: expected a number of channels.')
  # 10 * (1 - 0.7) is a hair above 3.
  return max(1, math.ceil(round(size * (1 - ratio), 9)))


def filter_plan(
  model: nn.Module,
  variables: Mapping[str, PyTree] | None,
  ratio: float,
  *,
  blocks: Collection[str] | None = None,
  all_convs: bool = False,
) -> Plan:
  """Returns the plan that removes a share of the filters within residual blocks, of the smallest L1 norm.

  Of a basic block those of its first convolution, of a bottleneck those of the 3x3 one, of an inverted
  residual those of the expansion, whose norms alone count; the depthwise ones behind them go with them. Of
  equal norms the first stay. What blocks hand on keeps its width.

  Args:
    model: the whole network.
    variables: of it; None: the first filters stay, for shapes alone.
    ratio: share that is removed, in [0, 1); see `keep_count`.
    blocks: paths; None: those with an identity as shortcut.
    all_convs: of bottlenecks also those of the first 1x1 convolution.

  Raises:
    ValueError: for a ratio out of its range, or blocks without filters of their own.

  References:
    Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017 (https://arxiv.org/abs/1608.08710); by
    block as few-sample compression has it (Wang et al., Mimicking then Replacing, CVPR 2022,
    https://arxiv.org/abs/2201.02620, after a third party's code).

  >>> from jaxlab import models
  >>> found = filter_plan(models.create('resnet18'), None, 0.5)
  >>> {name: len(kept) for name, kept in found.keep.items()}['layer2_1/conv1']
  64
  """
  found = structure(model)
  names = []
  for block in found.parts if blocks is None else blocks:
    inner = [name for name in found.groups if name.startswith(f'{block}/')]
    if not inner:
      raise ValueError(f'blocks: {block!r} has no filters of its own.')
    names += inner if all_convs else inner[-1:]
  counts = {name: keep_count(found.groups[name].size, ratio) for name in names}
  if variables is None:
    return make_plan(model, {name: range(count) for name, count in counts.items()})
  norms = kernel_norms(model, variables, names, named_layer=True)
  return make_plan(model, {name: _largest(norms[name], count) for name, count in counts.items()})


def _largest(scores: Any, count: int) -> np.ndarray:
  """Returns the channels of the largest scores, ascending; of equal ones the first."""
  scores = np.asarray(scores)
  return len(scores) - 1 - highest_channels(scores[::-1], count)[::-1]
