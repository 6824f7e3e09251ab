"""Bilinear CNN (Lin et al., ICCV 2015): a linear classifier on correlations of a VGG's channels."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.initializers import kaiming_normal_fan_in
from jaxlab.models.intercept import HookPoint
from jaxlab.models.vgg import VGG
from jaxlab.tracing import is_concrete

Array = jax.Array


def bilinear_pool(x: Array, eps: float = 1e-5) -> Array:
  """Correlations of channels over positions: square roots, of length 1.

    Z = sum_hw x_hw x_hw^T / (height width);  y = sqrt(Z + eps) / |sqrt(Z + eps)|

  `eps` keeps the gradient finite where two channels are never active together. There is no sign: features
  stand behind a ReLU. Entries of Z below 0, of traced features that do not, count as 0.

  Args:
    x: floats `[batch, height, width, channels]`, not negative.
    eps: positive.

  Returns:
    `[batch, channels ** 2]`, float32 or wider, entry `i channels + j` of channels i and j.

  Raises:
    ValueError: for other shapes, integers, (concrete) negative features, or an `eps` that is not positive.

  References:
    Lin et al., Bilinear CNN Models for Fine-grained Visual Recognition, ICCV 2015; as in the official code of
    Sun et al., ICCV 2021 (https://arxiv.org/abs/2108.02399).

  Examples:
    >>> y = bilinear_pool(jnp.array([[[[1.0, 0.0]], [[1.0, 2.0]]]]))
    >>> [round(float(value), 3) for value in y[0]]
    [0.447, 0.447, 0.447, 0.632]
  """
  if jnp.ndim(x) != 4 or 0 in jnp.shape(x):
    raise ValueError(f'x must be [batch, height, width, channels], not empty, got {jnp.shape(x)}.')
  if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
    raise ValueError(f'x must be floats, got {jnp.result_type(x)}.')
  if not eps > 0:
    raise ValueError(f'eps must be positive, got {eps}.')
  if is_concrete(x) and (lowest := float(jnp.min(x))) < 0:
    raise ValueError(
      f'x must not be negative, got values down to {lowest:.3g}: it belongs behind a ReLU.'
    )
  x = jnp.asarray(x)
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  positions = x.shape[1] * x.shape[2]
  z = jnp.einsum('bhwi,bhwj->bij', x, x).reshape(len(x), -1) / positions
  # Not `maximum`, which passes half of the gradient at 0.
  roots = jnp.sqrt(jnp.where(z < 0, 0, z) + eps)
  return roots / jnp.linalg.norm(roots, axis=-1, keepdims=True)


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
