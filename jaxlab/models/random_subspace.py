"""Neural random subspaces (NRS; Cao, Wu, Wang & Lasenby, Pattern Recognition 2021, arXiv 1911.07845).

A random forest in ordinary layers: a fixed random index cuts a vector into many small patches, each a random
subset of its features; on every patch a convolution of its own is a weak learner, and dense layers combine
what they say. Behind a network's pooled features it is a non-linear head.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike

from jaxlab.models.convolution import conv_general_dilated
from jaxlab.models.heads import MLPHead
from jaxlab.models.initializers import torch_default, torch_default_bias
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import BatchNorm
from jaxlab.tracing import is_concrete

Array = jax.Array

# 3x3 convolutions without padding that bring a patch to one pixel, by its side.
CONVOLUTIONS = {3: 1, 5: 2}


def random_subspace_index(key: Array, dim: int, patch: int = 3, n_mul: int = 1) -> Array:
  """Returns `patch^2 n_mul` independent random permutations of the features, one after the other.

  Every feature occurs `patch^2 n_mul` times. As in the official code; JAX draws other numbers than NumPy.

  Args:
    key: a typed PRNG key.
    dim: number of features.
    patch: side of a patch, 3 or 5.
    n_mul: patches for each feature.

  Returns:
    int32 `[dim * n_mul * patch * patch]`.

  Raises:
    ValueError: for a patch of another side, or sizes below 1.

  >>> random_subspace_index(jax.random.key(0), 4).reshape(9, 4).sort(1)[0]
  Array([0, 1, 2, 3], dtype=int32)
  """
  _require_sizes(patch, dim=dim, n_mul=n_mul)
  keys = jax.random.split(key, patch * patch * n_mul)
  drawn = jax.vmap(lambda own: jax.random.permutation(own, dim))(keys)
  return drawn.reshape(-1).astype(jnp.int32)


def expand_subspaces(x: ArrayLike, index: ArrayLike, patch: int = 3) -> Array:
  """Returns the features as small images, `z[b, i, j, c] = x[b, index[c patch^2 + i patch + j]]`.

  Channel c is a patch: a random subset of features, without repetition but where it straddles two
  permutations. (The paper's text stacks permutations along the channels; this is its code.)

  Args:
    x: `[batch, dim]`; integers become float32.
    index: integers `[channels * patch * patch]`, see `random_subspace_index`.
    patch: side of a patch.

  Returns:
    `[batch, patch, patch, channels]`.

  Raises:
    ValueError: unless `x` is a matrix and `index` whole patches; if concrete, for NaN and indices that are no
      features.

  >>> expand_subspaces(jnp.array([[1.0, 2.0]]), jnp.array([0, 1, 0, 0, 0, 0, 0, 0, 1]))[0, ..., 0]
  Array([[1., 2., 1.],
         [1., 1., 1.],
         [1., 1., 2.]], dtype=float32)
  """
  if jnp.ndim(x) != 2:
    raise ValueError(f'x must be [batch, dim], got shape {jnp.shape(x)}.')
  if is_concrete(x) and (wrong := np.isnan(np.asarray(x)).any(1)).any():
    raise ValueError(
      f'x {jnp.shape(x)}: {wrong.sum()} rows hold NaN, the first is row {int(np.argmax(wrong))}.'
    )
  x = jnp.asarray(x)
  x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
  area = patch * patch
  if jnp.ndim(index) != 1 or not jnp.size(index) or jnp.size(index) % area:
    raise ValueError(
      f'index must be [channels * {area}] for patches of side {patch}, got shape {jnp.shape(index)}.'
    )
  if is_concrete(index):
    held = np.asarray(index)
    low, high = held.min(), held.max()
    if low < 0 or high >= x.shape[1]:
      raise ValueError(f'index must lie in 0 to {x.shape[1] - 1}, got values from {low} to {high}.')
  z = x[:, jnp.asarray(index)].reshape(len(x), -1, patch, patch)
  return jnp.transpose(z, (0, 2, 3, 1))


def subspace_convolution(z: ArrayLike, kernel: ArrayLike) -> Array:
  """Returns the grouped convolution without padding of `z` with `kernel`.

  Where one pixel is left it is a product for each group, `y[b, g, o] = sum_hwi z[b, h, w, g, i]
  k[h, w, i, g, o]`: accelerators and CPUs are slow at convolutions of many groups.

  Args:
    z: `[batch, height, width, channels]`.
    kernel: `[rows, columns, inputs of a group, channels]`, as many outputs as inputs.

  Returns:
    `[batch, height - rows + 1, width - columns + 1, channels]`.

  Raises:
    ValueError: if channels and groups do not fit.
  """
  z, kernel = jnp.asarray(z), jnp.asarray(kernel)
  (*window, per_group, channels), (batch, *sides, inputs) = kernel.shape, z.shape
  if inputs != channels or channels % per_group:
    raise ValueError(
      f'kernel {kernel.shape} does not fit z {z.shape}: expected as many outputs as inputs, in groups of '
      f'{per_group}.'
    )
  groups = channels // per_group
  if sides != window:
    return conv_general_dilated(
      z, kernel, (1, 1), 'VALID',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=groups,
    )  # fmt: skip
  if per_group == 1:
    return jnp.einsum('bhwc,hwc->bc', z, kernel[:, :, 0])[:, None, None]
  z, kernel = (
    z.reshape(batch, *window, groups, per_group),
    kernel.reshape(*window, per_group, groups, per_group),
  )
  return jnp.einsum('bhwgi,hwigo->bgo', z, kernel).reshape(batch, 1, 1, channels)


class SubspaceConv(nn.Module):
  """`subspace_convolution` of 3x3 pixels with a bias; `n_per` channels a group, drawn as PyTorch does."""

  n_per: int = 1
  dtype: Any = None

  @nn.compact
  def __call__(self, z: Array) -> Array:
    """Maps `[batch, height, width, channels]` to `[batch, height - 2, width - 2, channels]`."""
    channels, bias_init = z.shape[-1], torch_default_bias(9 * self.n_per)
    kernel = self.param('kernel', torch_default, (3, 3, self.n_per, channels), jnp.float32)
    bias = self.param('bias', bias_init, (channels,), jnp.float32)
    z, kernel, bias = nn.dtypes.promote_dtype(z, kernel, bias, dtype=self.dtype)
    return subspace_convolution(z, kernel) + bias


class NRSLayer(nn.Module):
  """Random subsets of features under small convolutions, each with batch norm and ReLU.

  The vector is expanded by `expand_subspaces`; `conv1`, `bn1`, `relu1` (and `conv2`, `bn2`, `relu2` of
  patches of side 5) bring every patch to one number. Collections: `params`, `batch_stats`, and `constants`
  with the `index`, which is drawn at initialization, saved with the model, and not trained.

  Attributes:
    patch: side of a patch, 3 or 5.
    n_mul: patches for each feature.
    n_per: patches that a convolution combines; 1: each patch is a learner of its own (tables), more: groups
      (32 to 128 behind a network).
    norm_groups: groups of the batch with separate statistics, see `BatchNorm`.
    dtype: of the computation; None: as the input.

  Raises:
    ValueError: at construction, for sizes that cannot be; when called, for inputs that are no matrix, of
      another width than the index was drawn for, or whose patches do not divide into groups; in training, for
      a batch of one.
  """

  patch: int = 3
  n_mul: int = 1
  n_per: int = 1
  norm_groups: int = 1
  dtype: Any = None

  def __post_init__(self):
    _require_sizes(self.patch, n_mul=self.n_mul, n_per=self.n_per)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps features `[batch, dim]` to `[batch, dim * n_mul]`."""
    if x.ndim != 2:
      raise ValueError(f'NRSLayer: expected features [batch, dim], got shape {x.shape}.')
    dim = x.shape[1]
    channels = dim * self.n_mul
    if channels % self.n_per:
      raise ValueError(
        f'NRSLayer: {dim} features times n_mul={self.n_mul} are {channels} patches, which do not divide into '
        f'groups of n_per={self.n_per}.'
      )
    area = self.patch**2
    if dim < area and self.is_initializing():
      warnings.warn(
        f'NRSLayer: {dim} features do not fill a patch of {area} pixels: they occur several times in it.',
        stacklevel=2,
      )
    index = self.variable('constants', 'index', self._draw, dim)
    if index.value.shape != (channels * area,):
      drawn = index.value.size // (self.n_mul * area)
      raise ValueError(f'NRSLayer: {dim} features come, the index was drawn for {drawn}.')
    z = expand_subspaces(x, index.value, self.patch)
    for number in range(1, CONVOLUTIONS[self.patch] + 1):
      z = SubspaceConv(self.n_per, self.dtype, name=f'conv{number}')(z)
      z = BatchNorm(groups=self.norm_groups, dtype=self.dtype, name=f'bn{number}')(z, train)
      z = HookPoint(name=f'relu{number}')(nn.relu(z))
    return z.reshape(len(z), channels)

  def _draw(self, dim: int) -> Array:
    return random_subspace_index(self.make_rng('params'), dim, self.patch, self.n_mul)


class NRSHead(nn.Module):
  """Another head behind an `NRSLayer`: `head(nrs(x))`, over features `[batch, dim]`.

  Attributes:
    head: what the layer's outputs go to; a module that takes `train`.
    patch: of the layer, as are `n_mul` and `n_per`.
    n_mul: see `NRSLayer`.
    n_per: see `NRSLayer`.
  """

  head: nn.Module
  patch: int = 3
  n_mul: int = 1
  n_per: int = 1

  def setup(self):
    """Makes the layer `nrs`."""
    self.nrs = NRSLayer(self.patch, self.n_mul, self.n_per)

  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns what the head says, such as logits `[batch, num_classes]`."""
    return self.head(self.nrs(x, train), train)


def nrs_net(
  num_classes: int, hidden: Sequence[int] = (), patch: int = 3, n_mul: int = 1, n_per: int = 1
) -> NRSHead:
  """Returns an NRS layer under dense layers: the network for tables, and the head of image networks.

  Hidden layers are linear with batch norm and ReLU: two of the official networks for tables (`B_FC`), none
  or one of those for images.
  """
  head = MLPHead((*hidden, num_classes), hidden_bias=True)
  return NRSHead(head, patch=patch, n_mul=n_mul, n_per=n_per)


def mlp_baseline(num_classes: int, width: int, depth: int = 3) -> MLPHead:
  """Returns the perceptron that the official code compares with: an NRS layer replaced by a dense one.

  `depth` hidden layers of `width` units with batch norm and ReLU, and a linear classifier.
  """
  return MLPHead((*(width,) * depth, num_classes), hidden_bias=True)


def _require_sizes(patch: int, **sizes: int) -> None:
  if patch not in CONVOLUTIONS:
    raise ValueError(f'patch={patch}: expected 3 (one convolution) or 5 (two).')
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f'{name}={size}: expected at least 1.')
