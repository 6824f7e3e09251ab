"""The small residual networks of reference files as this library's: basic blocks behind a 3x3 stem."""

import re

import numpy as np
from flax import traverse_util

from jaxlab import models

LEAVES = {
  'weight': ('params', 'scale'),
  'bias': ('params', 'bias'),
  'running_mean': ('batch_stats', 'mean'),
  'running_var': ('batch_stats', 'var'),
}
NAME = re.compile(
  r'((?:layer\d+_\d+_)?)(conv\d|bn\d|downsample_\d|fc)_(weight|bias|running_mean|running_var)'
)


def kernel(weight):
  """A kernel `[height, width, in, out]`, or `[in, out]`, of PyTorch's `[out, in, ...]`."""
  return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T


def variables(arrays, dtype=np.float32):
  """The variables of arrays by PyTorch's names, `layer1_0_bn1_running_var`."""
  flat = {}
  for name, array in arrays.items():
    block, layer, leaf = NAME.fullmatch(name).groups()
    collection, own = LEAVES[leaf]
    if array.ndim > 1:
      own, array = 'kernel', kernel(array)
    path = (block[:-1], layer) if block else (layer,)
    flat[(collection, *path, own)] = array.astype(dtype)
  return traverse_util.unflatten_dict(flat)


def network(arrays):
  """The network that has these arrays."""
  blocks = {re.match(r'layer(\d+)_(\d+)', name) for name in arrays} - {None}
  places = {(int(own[1]), int(own[2])) for own in blocks}
  stages = sorted({stage for stage, _ in places})
  widths = [arrays[f'layer{stage}_0_conv1_weight'].shape[0] for stage in stages]
  return models.ResNet(
    stage_sizes=tuple(sum(own == stage for own, _ in places) for stage in stages),
    width=arrays['conv1_weight'].shape[0],
    widths=tuple(widths),
    strides=(1, *(2,) * (len(stages) - 1)),
    stem='cifar',
    num_classes=arrays['fc_weight'].shape[0],
  )


def batches(vectors, name):
  """The arrays `<name>_batch0`, `<name>_batch1`, ..., images as NHWC."""
  found = vectors.tree(f'in_{name}_batch')
  assert found, name
  ordered = [found[str(index)] for index in range(len(found))]
  return [own.transpose(0, 2, 3, 1) if own.ndim == 4 else own for own in ordered]


def renumbered(path, stage, dropped):
  """The path of the whole network of a path of the network without blocks `dropped` of its stage."""
  found = re.match(rf'layer{stage}_(\d+)(.*)', path)
  if not found:
    return path
  index = int(found[1])
  for own in sorted(dropped):
    index += own <= index
  return f'layer{stage}_{index}{found[2]}'
