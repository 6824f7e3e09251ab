"""Bilinear CNN (Lin et al., ICCV 2015): a linear classifier on correlations of channels; their sketches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike

from jaxlab.models.heads import unit
from jaxlab.models.initializers import kaiming_normal_fan_in
from jaxlab.models.intercept import HookPoint
from jaxlab.models.vgg import VGG
from jaxlab.tracing import is_concrete

Array = jax.Array


def bilinear_pool(x: Array, eps: float = 1e-5, signed: bool = False) -> Array:
  """Correlations of channels over positions: square roots, of length 1.

    Z = sum_hw x_hw x_hw^T / (height width);  y = sqrt(Z + eps) / |sqrt(Z + eps)|

  `eps` keeps the gradient finite where two channels are never active together. Without sign features are to
  stand behind a ReLU; entries of Z below 0, of traced features that do not, count as 0. With it,

    y = r / |r|,  r = sign(Z) sqrt(|Z| + eps),

  entries of 0 stay 0 and have no gradient, and a map of zeros gives zeros.

  Args:
    x: floats `[batch, height, width, channels]`, not negative unless `signed`.
    eps: positive.
    signed: whether roots keep the sign of their correlation.

  Returns:
    `[batch, channels ** 2]`, float32 or wider, entry `i channels + j` of channels i and j.

  Raises:
    ValueError: for other shapes, integers, an `eps` that is not positive, or without sign (concrete) negative
      features.

  References:
    Lin et al., Bilinear CNN Models for Fine-grained Visual Recognition, ICCV 2015; without sign as in the
    official code of Sun et al., ICCV 2021 (https://arxiv.org/abs/2108.02399), with sign (and `eps=1e-8`) as
    in the official code of iSQRT-COV (https://arxiv.org/abs/1712.01034).

  Examples:
    >>> y = bilinear_pool(jnp.array([[[[1.0, 0.0]], [[1.0, 2.0]]]]))
    >>> [round(float(value), 3) for value in y[0]]
    [0.447, 0.447, 0.447, 0.632]
  """
  x = wide_map(x)
  if not eps > 0:
    raise ValueError(f'eps must be positive, got {eps}.')
  if not signed and is_concrete(x) and (lowest := float(jnp.min(x))) < 0:
    raise ValueError(
      f'x must not be negative, got values down to {lowest:.3g}: it belongs behind a ReLU, or signed=True.'
    )
  z = _products(x).reshape(len(x), -1) / (x.shape[1] * x.shape[2])
  if signed:
    return unit(signed_root(z, eps), -1)
  # Not `maximum`, which passes half of the gradient at 0.
  roots = jnp.sqrt(jnp.where(z < 0, 0, z) + eps)
  return roots / jnp.linalg.norm(roots, axis=-1, keepdims=True)


def compact_bilinear(
  x: Array, hashes: ArrayLike, signs: ArrayLike, dim: int, eps: float = 1e-8
) -> Array:
  """Sketches of bilinear features, signed roots, of length 1: the outer products in few dimensions.

  A count sketch sends channel c to entry `hashes[s, c]` with the sign `signs[s, c]`; the convolution of two
  sketches of a position is a sketch of its outer product:

    z[k] = sum_hw sum_{i, j: hashes[0, i] + hashes[1, j] = k mod dim} signs[0, i] signs[1, j] x_hwi x_hwj

  What papers compute by FFTs at every position is linear in the outer product, so the products of channels
  are summed over positions first: the same numbers, without two spectra of each position.

  Args:
    x: floats `[batch, height, width, channels]`.
    hashes: integers `[2, channels]`, 0 to `dim - 1`; see `draw_sketches`.
    signs: -1 or 1, `[2, channels]`.
    dim: of the output; static.
    eps: positive, within the roots `sign(z) sqrt(|z| + eps)`.

  Returns:
    `[batch, dim]`, float32 or wider.

  Raises:
    ValueError: for other shapes, integers in `x`, an `eps` or a `dim` that is not positive, or (concrete)
      hashes out of range.

  References:
    Gao et al., Compact Bilinear Pooling, CVPR 2016 (https://arxiv.org/abs/1511.06062).

  Examples:
    >>> x = jnp.array([[[[2.0, 0.0]]]])
    >>> compact_bilinear(x, jnp.array([[1, 0], [2, 0]]), jnp.array([[1, 1], [-1, 1]]), 4).tolist()
    [[0.0, 0.0, 0.0, -1.0]]
  """
  x = wide_map(x)
  hashes, signs = jnp.asarray(hashes), jnp.asarray(signs)
  if not eps > 0 or dim < 1:
    raise ValueError(f'eps and dim must be positive, got eps={eps}, dim={dim}.')
  if hashes.shape != (2, x.shape[-1]) or signs.shape != hashes.shape:
    raise ValueError(
      f'hashes and signs must be [2, {x.shape[-1]}], got {hashes.shape} and {signs.shape}.'
    )
  if is_concrete(hashes) and not 0 <= jnp.min(hashes) <= jnp.max(hashes) < dim:
    raise ValueError(f'hashes must be from 0 to dim - 1 = {dim - 1}.')
  place = (hashes[0][:, None] + hashes[1]) % dim
  sign = signs[0][:, None] * signs[1].astype(x.dtype)
  products = sign * _products(x)
  z = jnp.zeros((len(x), dim), x.dtype).at[:, place].add(products)
  return unit(signed_root(z, eps), -1)


def draw_sketches(seed: int, channels: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws what `compact_bilinear` sketches with: hashes int32 and signs float32, both `[2, channels]`.

  >>> hashes, signs = draw_sketches(0, 3, 8)
  >>> hashes.shape, bool((abs(signs) == 1).all())
  ((2, 3), True)
  """
  rng = np.random.default_rng(seed)
  hashes = rng.integers(dim, size=(2, channels), dtype=np.int32)
  return hashes, rng.choice(np.float32([-1, 1]), (2, channels))


def _products(x: Array) -> Array:
  """Returns the products of channels of a map, summed over positions, `[batch, channels, channels]`."""
  return jnp.einsum('bhwi,bhwj->bij', x, x, precision='highest')


def signed_root(z: Array, eps: float) -> Array:
  """Returns `sign(z) sqrt(|z| + eps)`; 0 with gradient 0 where z is 0."""
  return jnp.sign(z) * jnp.sqrt(jnp.abs(z) + eps)


def wide_map(x: Array) -> Array:
  """Returns a map of features in float32 or wider.

  Raises:
    ValueError: unless it is of floats `[batch, height, width, channels]`, not empty.
  """
  if jnp.ndim(x) != 4 or 0 in jnp.shape(x):
    raise ValueError(f'x must be [batch, height, width, channels], not empty, got {jnp.shape(x)}.')
  if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
    raise ValueError(f'x must be floats, got {jnp.result_type(x)}.')
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class BilinearCNN(VGG):
  """A VGG network's feature map in front of the last pooling, `bilinear_pool`ed, and a linear classifier.

  Modules of the features are those of `VGG`, whose public weights fit; hook point `pool` behind the pooling,
  classifier `fc` (Kaiming normal by its fan in, bias 0). Fields are those of `VGG`; `hidden` has no meaning.

  Raises:
    ValueError: as `VGG`, and at construction for hidden layers.
  """

  hidden: int | None = None

  def __post_init__(self):
    if self.hidden is not None:
      raise ValueError(
        f'BilinearCNN: hidden={self.hidden}; correlations go to the classifier alone.'
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns logits `[batch, num_classes]`; without classifier correlations, `[batch, widths[-1] ** 2]`."""
    x = HookPoint(name='pool')(bilinear_pool(self._maps(x, train, last_pool=False)))
    if self.num_classes is None:
      return x
    return nn.Dense(
      self.num_classes, kernel_init=kaiming_normal_fan_in, dtype=self.dtype, name='fc'
    )(x)
