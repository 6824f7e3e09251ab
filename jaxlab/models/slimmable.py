"""Slimmable networks: a network of any width is the leading channels of one set of weights.

`narrow(model, width)` is an ordinary smaller network, `slice_params` cuts its parameters out of those of the
whole one. Slices are views of one tree: what a narrow network learns lands in the whole one, since gradients
flow through the slices, and channels outside of them get none.

  small, own = at_width(model, params, 0.5, images)
  features = small.apply({'params': own}, images, train=True, mutable=['batch_stats'])[0]

Statistics of batch norms belong to one width (`training.recompute_batch_stats`).
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.channels import make_divisible
from jaxlab.models.mobilenetv2 import MobileNetV2, scale_channels
from jaxlab.models.resnet import ResNet
from jaxlab.models.siamese import Encoder
from jaxlab.models.vit import ViT

Array = jax.Array
PyTree = Any


def narrow(model: nn.Module, width: float) -> nn.Module:
  """Returns the network with `make_divisible(channels * width)` in place of each number of channels.

  Knows `ResNet`, `MobileNetV2` (and `EfficientNet`), `ViT` and an `Encoder` around them, whose projector
  keeps its width. A ViT keeps its heads: each is narrower. A MobileNetV2 keeps the channels of its last 1x1
  convolution, so that its features are as many at each width. A network of your own has a method
  `narrowed(width)` that returns the narrow one.

  Args:
    model: the whole network.
    width: in (0, 1].

  Raises:
    ValueError: for another width, a network that is not known, or one whose narrow form would not be the
      leading channels: grouped convolutions (other than depthwise ones), padded shortcuts, SwiGLU, a
      bottleneck or a deep stem of which this width rounds inner and outer channels apart, fewer than eight
      channels that this width rounds up to more.

  References:
    Yu & Huang, Universally Slimmable Networks, ICCV 2019 (https://arxiv.org/abs/1903.05134); rounding as in
    the code of Cao et al., Three Guidelines You Should Know for Universally Slimmable Self-Supervised
    Learning, CVPR 2023 (https://arxiv.org/abs/2303.06870).
  """
  if not 0 < width <= 1:
    raise ValueError(f'width={width}: expected a share of the channels in (0, 1].')
  return model if width == 1 else _narrow(model, width)


@functools.singledispatch
def _narrow(model: nn.Module, width: float) -> nn.Module:
  if hasattr(model, 'narrowed'):
    return model.narrowed(width)
  raise ValueError(
    f'{type(model).__name__} is no slimmable network: known are ResNet, MobileNetV2, ViT, Encoder.'
  )


def _fewer(channels: int, width: float) -> int:
  """Returns `make_divisible(channels * width)`; raises ValueError where that is more than there are."""
  if (found := make_divisible(channels * width)) > channels:
    raise ValueError(f'width={width}: {channels} channels round to {found}, more than there are.')
  return found


@_narrow.register
def _(model: Encoder, width: float) -> Encoder:
  return model.clone(backbone=narrow(model.backbone, width))


@_narrow.register
def _(model: ResNet, width: float) -> ResNet:
  pruned = model.trunk_widths or model.inner_widths
  if model.cardinality != 1 or model.base_width != 64 or model.shortcut == 'pad' or pruned:
    raise ValueError(
      "a ResNet is slimmable without groups, base widths and widths of its own, and shortcut='pad'."
    )
  whole = model.widths or [model.width * 2**stage for stage in range(len(model.stage_sizes))]
  own, stem = [_fewer(c, width) for c in whole], _fewer(model.width, width)
  apart = model.stem == 'deep' and make_divisible(model.width // 2 * width) != stem // 2
  if model.block != 'basic':
    apart |= any(make_divisible(4 * c * width) != 4 * n for c, n in zip(whole, own, strict=True))
  if apart:
    raise ValueError(
      f'width={width}: inner and outer channels of a block round to different shares; take a multiple '
      f'of {8 / math.gcd(*whole, model.width // (2 if model.stem == "deep" else 1)):g}.'
    )
  return model.clone(width=stem, widths=tuple(own))


@_narrow.register
def _(model: MobileNetV2, width: float) -> MobileNetV2:
  widths = model.widths[: len(model.stage_sizes)]
  inputs = [model.stem_width, *widths[:-1]]
  inner = model.inner_widths or [
    scale_channels(before if index == 0 else after, model.expansion)
    for before, after, size in zip(inputs, widths, model.stage_sizes, strict=True)
    for index in range(size)
  ]
  # Rounding makes channels equal that are not in the whole network: there still is no shortcut.
  given = model.shortcuts or [True] * len(widths)
  shortcuts = [own and a == b for own, a, b in zip(given, inputs, widths, strict=True)]
  return model.clone(
    stem_width=_fewer(model.stem_width, width),
    widths=tuple(_fewer(c, width) for c in widths),
    inner_widths=tuple(_fewer(c, width) for c in inner),
    shortcuts=tuple(shortcuts),
  )


@_narrow.register
def _(model: ViT, width: float) -> ViT:
  if model.activation == 'swiglu':
    raise ValueError("a ViT is slimmable with GELUs alone, not with activation='swiglu'.")
  if model.attention_widths or model.hidden_widths:
    raise ValueError('a ViT is slimmable without attention_widths and hidden_widths.')
  own = make_divisible(model.width * width, math.lcm(8, model.num_heads))
  return model.clone(width=min(own, model.width))


def packed_axes(model: nn.Module) -> tuple[tuple[str, int, int], ...]:
  """Returns (pattern, axis, parts) of parameters of which an axis holds several parts side by side.

  Each part is cut by itself: in a ViT query, key and value of each head.
  """
  if isinstance(model, Encoder):
    return tuple((f'backbone/{p}', axis, parts) for p, axis, parts in packed_axes(model.backbone))
  if isinstance(model, ViT):
    heads = model.num_heads
    return (
      (r'blocks(_\d+)?/attention/qkv/(kernel|bias)', -1, 3 * heads),
      (r'blocks(_\d+)?/attention/proj/kernel', -2, heads),
    )
  return ()


def slice_params(
  params: PyTree, shapes: PyTree, packed: Sequence[tuple[str, int, int]] = ()
) -> PyTree:
  """Returns the leading entries of each parameter.

  Args:
    params: of the whole network.
    shapes: arrays or shapes of the narrow one, with the same paths.
    packed: see `packed_axes`.

  Raises:
    ValueError: if paths differ, or a parameter is not as large as it should be; all are listed.

  >>> whole = {'kernel': jnp.arange(6).reshape(2, 3)}
  >>> slice_params(whole, {'kernel': jax.ShapeDtypeStruct((1, 2), int)})['kernel']
  Array([[0, 1]], dtype=int32)
  """
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  wanted = traverse_util.flatten_dict(dict(shapes), sep='/')
  problems = [f'{path}: in one of the two alone' for path in flat.keys() ^ wanted.keys()]
  for path in flat.keys() & wanted.keys():
    sizes = jnp.shape(flat[path]), wanted[path].shape
    if len(sizes[0]) != len(sizes[1]) or any(a < b for a, b in zip(*sizes)):
      problems.append(f'{path}: {sizes[0]} holds no {sizes[1]}')
  if problems:
    raise ValueError(f'the narrow network is no part of this one: {"; ".join(sorted(problems))}.')
  found = {}
  for path, leaf in flat.items():
    shape, parts = wanted[path].shape, {}
    for pattern, axis, count in packed:
      if re.fullmatch(pattern, path):
        parts[axis % len(shape)] = count
    for axis, size in enumerate(shape):
      leaf = _lead(leaf, axis, size, parts.get(axis, 1))
    found[path] = leaf
  return traverse_util.unflatten_dict(found, sep='/')


def _lead(leaf: Array, axis: int, size: int, parts: int) -> Array:
  """Returns the first `size / parts` entries of each of `parts` equal parts of an axis."""
  if leaf.shape[axis] == size:
    return leaf
  before, after = leaf.shape[:axis], leaf.shape[axis + 1 :]
  split = leaf.reshape(*before, parts, leaf.shape[axis] // parts, *after)
  cut = jax.lax.slice_in_dim(split, 0, size // parts, axis=axis + 1)
  return cut.reshape(*before, size, *after)


def at_width(model: nn.Module, params: PyTree, width: float, x: Array) -> tuple[nn.Module, PyTree]:
  """Returns the network at a width, and its parameters out of the whole ones.

  Args:
    model: the whole network, called as `model(x, train=True)`.
    params: its parameters.
    width: in (0, 1].
    x: an input, of which the shape matters.
  """
  small = narrow(model, width)
  if width == 1:
    return model, params
  return small, slice_params(params, _shapes(small, jnp.shape(x), x.dtype), packed_axes(model))


@functools.lru_cache
def _shapes(model: nn.Module, shape: tuple[int, ...], dtype: Any) -> Mapping[str, PyTree]:
  x = jax.ShapeDtypeStruct(shape, dtype)
  init = functools.partial(model.init, train=False)
  return jax.eval_shape(init, jax.random.key(0), x)['params']


def width_floor(
  epoch: Array | int, epochs: int, min_width: float = 0.25, max_width: float = 1.0
) -> Array:
  """Returns the smallest width that an epoch trains: the range grows over four quarters of the training.

  The first quarter trains `max_width` alone; the others reach down to
  `min_width + (4 - q) (max_width - min_width) / 3`, q = 2, 3, 4. Epochs behind four whole quarters belong to
  the last.

  Args:
    epoch: from 0; may be traced.
    epochs: of the training, at least 4.
    min_width: the smallest width of all.
    max_width: the largest.

  Raises:
    ValueError: for fewer than 4 epochs, or widths that are not 0 < min <= max <= 1.

  References:
    Cao et al., CVPR 2023 (https://arxiv.org/abs/2303.06870), dynamic sampling, scheduler A.

  >>> [float(width_floor(epoch, 8)) for epoch in (0, 2, 4, 7)]
  [1.0, 0.75, 0.5, 0.25]
  """
  if epochs < 4:
    raise ValueError(f'epochs={epochs}: the range grows over four quarters of a training.')
  if not 0 < min_width <= max_width <= 1:
    raise ValueError(f'{min_width=}, {max_width=}: expected 0 < min_width <= max_width <= 1.')
  quarter = jnp.minimum(jnp.asarray(epoch) // (epochs // 4), 3)
  return jnp.where(quarter == 0, max_width, min_width + (3 - quarter) * (max_width - min_width) / 3)
