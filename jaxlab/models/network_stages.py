"""Networks without their last stages, and stages that are attached to trained weights later."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn
from flax import traverse_util

from jaxlab.models.resnet import ResNet

PyTree = Any


def truncate(model: ResNet, count: int = 1) -> ResNet:
  """Returns a ResNet without its last `count` stages; what is left pools and classifies as before.

  Its parameters are those of the whole network by name and shape, but for the classifier.

  Args:
    model: the whole network.
    count: of stages that are left out.

  Raises:
    ValueError: if no stage would be left; for networks that are no `ResNet`.

  References:
    Cao & Wu, Rethinking Self-Supervised Learning: Small is Beautiful, 2021
    (https://arxiv.org/abs/2103.13559): pretraining without conv5.

  >>> whole = ResNet((2, 2, 2, 2))
  >>> truncate(whole).stage_sizes, total_stride(whole), total_stride(truncate(whole))
  ((2, 2, 2), 32, 16)
  """
  _require_resnet(model)
  stages = len(model.stage_sizes)
  if not 0 <= count < stages:
    raise ValueError(f'count={count} of {stages} stages: expected 0 to {stages - 1}.')
  kept = stages - count
  sizes = tuple(model.stage_sizes[:kept])
  by_stage = ('widths', 'trunk_widths', 'projections')
  fields = {name: (own := getattr(model, name)) and tuple(own[:kept]) for name in by_stage}
  inner = model.inner_widths and tuple(model.inner_widths[: sum(sizes)])
  return model.clone(stage_sizes=sizes, inner_widths=inner, **fields)


def last_stage(model: ResNet) -> str:
  """Returns the pattern of the paths that lie in a ResNet's last stage.

  >>> last_stage(ResNet((2, 2, 2, 2)))
  'layer4_\\\\d+/.*'
  """
  _require_resnet(model)
  return rf'layer{len(model.stage_sizes)}_\d+/.*'


def total_stride(model: ResNet) -> int:
  """Returns the number of pixels, along a side, that a position of a ResNet's last map stands for."""
  _require_resnet(model)
  return math.prod(model.strides[: len(model.stage_sizes)]) * (1 if model.stem == 'cifar' else 4)


def feature_width(model: ResNet) -> int:
  """Returns the channels of a ResNet's pooled features."""
  _require_resnet(model)
  return model.stage_widths[-1]


def require_resolution(model: nn.Module, size: int) -> None:
  """Raises ValueError if images of side `size` are smaller than a ResNet's total stride.

  Its last map would then be a single position that is mostly padding.
  """
  if size < (stride := total_stride(model)):
    raise ValueError(
      f'images of {size} pixels are smaller than the total stride of the network, {stride}.'
    )


def attach_stage(
  pretrained: Mapping[str, PyTree],
  drawn: Mapping[str, PyTree],
  fresh: Sequence[str] = (),
  *,
  allow_missing: bool = False,
  allow_unused: bool = False,
) -> dict[str, PyTree]:
  """Returns drawn variables with pretrained ones in place of all that are not `fresh`, bit for bit.

  A network is pretrained without its last stage and then has it, as drawn, behind the trained ones; or all
  of it is pretrained, and the last stage is drawn anew. Nothing is passed over in silence: what either tree
  lacks is an error that lists it, unless a pattern of `fresh` names it.

  Args:
    pretrained: variables `{'params': ..., 'batch_stats': ...}` of the shared stages.
    drawn: variables of the whole network.
    fresh: patterns of whole paths within a collection, e.g. `r'layer4_\\d+/.*'` (`last_stage`) and
      `'head/.*'`: these stay as drawn, and pretrained ones of that name are dropped.
    allow_missing: what `pretrained` lacks stays as drawn, too.
    allow_unused: what `drawn` lacks is dropped, too.

  Raises:
    ValueError: listing every array that is missing, left over, or of another shape.

  >>> import numpy as np
  >>> pretrained = {'params': {'layer1_0': {'scale': np.full(2, 5.0)}}}
  >>> drawn = {'params': {'layer1_0': {'scale': np.ones(2)}, 'layer2_0': {'scale': np.ones(3)}}}
  >>> attach_stage(pretrained, drawn, ['layer2_0/.*'])['params']
  {'layer1_0': {'scale': array([5., 5.])}, 'layer2_0': {'scale': array([1., 1., 1.])}}
  """
  given, own = (traverse_util.flatten_dict(dict(tree)) for tree in (pretrained, drawn))

  def stays(path: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, '/'.join(path[1:])) for pattern in fresh)

  taken, problems = dict(own), []
  for path, leaf in own.items():
    name = '/'.join(path)
    if stays(path):
      continue
    if path not in given:
      problems += [f'missing: {name} {leaf.shape}'] * (not allow_missing)
    elif given[path].shape != leaf.shape:
      problems.append(f'shape: {name} is {given[path].shape}, {leaf.shape} is needed')
    else:
      taken[path] = given[path]
  if not allow_unused:
    unused = [path for path in given if path not in own and not stays(path)]
    problems += [f'left over: {"/".join(path)} {given[path].shape}' for path in unused]
  if problems:
    raise ValueError(
      f'The pretrained variables do not fit the network in {len(problems)} places:\n  '
      + '\n  '.join(problems)
    )
  return traverse_util.unflatten_dict(taken)


def _require_resnet(model: nn.Module) -> None:
  if not isinstance(model, ResNet):
    raise ValueError(f'{type(model).__name__} has no stages that are known here: give a ResNet.')
