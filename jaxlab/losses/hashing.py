"""Mimicking the direction of a teacher's features: bits by random hyperplanes (locality-sensitive hashing).

Wang, Ge & Wu, Distilling Knowledge by Mimicking Features, TPAMI 2022 (https://arxiv.org/abs/2011.01424), here
"the paper". A hyperplane tells two vectors apart with a probability that grows with their angle and not with
their lengths: a student that falls on the teacher's side of all of them has its direction, and any length.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_finite, require_positive
from jaxlab.losses._labels import require_labels
from jaxlab.losses.feature_distillation import feature_distillation_loss


def draw_hyperplanes(key: jax.Array, dim: int, count: int, std: ArrayLike) -> jax.Array:
  """Draws the normals of hyperplanes, which stay as they are: normal with deviation `std`.

  Args:
    key: a typed key.
    dim: of the features.
    count: number of bits; the paper takes 32 times `dim`, or 2048 or 8192, and 4096 for detection.
    std: the deviation of all weights of the teacher's classifier (0.06 of ResNet-34 on ImageNet). The larger,
      the sharper the bits.

  Returns:
    float32 `[count, dim]`.

  Raises:
    ValueError: unless `dim`, `count` and `std` are positive.
  """
  require_positive(dim=dim, count=count, std=std)
  return std * jax.random.normal(key, (count, dim))


def hyperplane_bias(
  weight: ArrayLike,
  features: ArrayLike,
  kind: Literal['median', 'mean'] = 'median',
  chunk: int = 512,
) -> jax.Array:
  """Returns the bias that balances each bit over the teacher's features: minus the median of `W f`.

  Of an even number of features it is the lower one of the two medians, as in PyTorch.

  Args:
    weight: normals `[count, dim]`.
    features: of the teacher on the training images, `[images, dim]`.
    kind: or minus the mean.
    chunk: hyperplanes that are looked at at once: their values of all images are in memory.

  Returns:
    `[count]`, float32 or wider.

  Raises:
    ValueError: for another kind, shapes that do not fit, no features, or ones that are not finite.

  References:
    The paper, section on the bias.

  Examples:
    >>> hyperplane_bias(jnp.array([[2.0]]), jnp.array([[1.0], [2.0], [3.0], [9.0]])).tolist()
    [-4.0]
  """
  if kind not in ('median', 'mean'):
    raise ValueError(f"kind is {kind!r}, expected 'median' or 'mean'.")
  _require_hyperplanes(weight, features)
  if jnp.ndim(features) != 2 or not jnp.shape(features)[0]:
    raise ValueError(f'features must be [images, dim] with images, got {jnp.shape(features)}.')
  require_finite(features=features)

  def own(weight: jax.Array) -> jax.Array:
    values = hash_values(features, weight)
    if kind == 'mean':
      return -jnp.mean(values, 0)
    return -jnp.sort(values, 0)[(len(values) - 1) // 2]

  weight = jnp.asarray(weight)
  parts = [own(weight[start : start + chunk]) for start in range(0, len(weight), chunk)]
  return jnp.concatenate(parts)


def hash_values(features: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None) -> jax.Array:
  """Returns on which side of each hyperplane features lie, and how far: `W f + b`.

  Args:
    features: `[..., dim]`.
    weight: normals `[count, dim]`; no gradient.
    bias: `[count]`; no gradient; None: 0.

  Returns:
    `[..., count]`, float32 or wider: values of hundreds are far apart in half precision.

  Raises:
    ValueError: if shapes do not fit.
  """
  _require_hyperplanes(weight, features, bias)
  features, weight = accumulated(features, jax.lax.stop_gradient(jnp.asarray(weight)))
  values = jnp.matmul(features, weight.T, precision='highest')
  return values if bias is None else values + jax.lax.stop_gradient(jnp.asarray(bias))


def lsh_loss(
  student_features: ArrayLike,
  teacher_features: ArrayLike,
  weight: ArrayLike,
  bias: ArrayLike | None = None,
  *,
  kind: Literal['bce', 'l1', 'l2'] = 'bce',
) -> jax.Array:
  """Binary cross-entropy of the student's sides and the teacher's bits, a mean over hyperplanes.

    h = W f + b;  y = 1[h(teacher) > 0]
    'bce': mean_n softplus(h_n) - y_n h_n;  'l1', 'l2': mean_n |h_n - h_n(teacher)|^p

  Args:
    student_features: `[..., dim]`.
    teacher_features: `[..., dim]`; no gradient.
    weight: normals `[count, dim]`, see `draw_hyperplanes`.
    bias: `[count]`, see `hyperplane_bias`; None: 0.
    kind: the paper's loss, or a distance of the values.

  Returns:
    `[...]`, float32 or wider.

  Raises:
    ValueError: for another kind, or shapes that do not fit.

  References:
    The paper, section on the LSH loss.

  Examples:
    >>> student, teacher = jnp.array([[1.0, 0.0]]), jnp.array([[5.0, 0.0]])
    >>> [round(float(lsh_loss(s * student, teacher, jnp.eye(2))[0]), 3) for s in (1.0, 9.0)]
    [0.503, 0.347]
  """
  if kind not in ('bce', 'l1', 'l2'):
    raise ValueError(f"kind is {kind!r}, expected 'bce', 'l1' or 'l2'.")
  shapes = jnp.shape(student_features), jnp.shape(teacher_features)
  if shapes[0] != shapes[1]:
    raise ValueError(
      f'student_features {shapes[0]} and teacher_features {shapes[1]} must be of one shape: bring other '
      'channels to those of the teacher by a linear layer.'
    )
  own = hash_values(student_features, weight, bias)
  told = jax.lax.stop_gradient(hash_values(teacher_features, weight, bias))
  if kind != 'bce':
    distance = jnp.abs(own - told)
    return jnp.mean(distance if kind == 'l1' else jnp.square(distance), -1)
  return _sides_cross_entropy(own, told > 0)


def _sides_cross_entropy(values: jax.Array, bits: jax.Array) -> jax.Array:
  return jnp.mean(jax.nn.softplus(values) - jnp.where(bits, values, 0), -1)


def hash_bits(features: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None) -> jax.Array:
  """Returns a teacher's bits `1[W f + b > 0]`, eight a byte: what is stored of an image.

  Args:
    features: `[..., dim]`.
    weight: normals `[count, dim]`, see `draw_hyperplanes`.
    bias: `[count]`, see `hyperplane_bias`; None: 0.

  Returns:
    uint8 `[..., ceil(count / 8)]`, the first bit the highest; what is over in the last byte is 0.

  Raises:
    ValueError: if shapes do not fit, or (where concrete) features are not finite.

  Examples:
    >>> hash_bits(jnp.array([[1.0, -1.0]]), jnp.eye(2)).tolist()
    [[128]]
  """
  require_finite(features=features)
  return jnp.packbits(hash_values(features, weight, bias) > 0, axis=-1)


def stored_lsh_loss(
  student_features: ArrayLike,
  bits: ArrayLike,
  weight: ArrayLike,
  bias: ArrayLike | None = None,
) -> jax.Array:
  """`lsh_loss` of bits that were stored: no teacher is asked, of whatever view of an image (eLSH).

  Args:
    student_features: `[..., dim]`, of any view of the images.
    bits: of the images themselves, uint8 `[..., ceil(count / 8)]`, see `hash_bits`.
    weight: normals `[count, dim]`.
    bias: `[count]`; None: 0.

  Returns:
    `[...]`, float32 or wider.

  Raises:
    ValueError: if shapes do not fit.

  References:
    Zhou, Zhu & Wu, All You Need in Knowledge Distillation Is a Tailored Coordinate System, AAAI 2025
    (https://arxiv.org/abs/2412.09388). That it is the binary cross-entropy of `lsh_loss` is inferred.

  Examples:
    >>> student, teacher = jnp.array([[1.0, 0.5]]), jnp.array([[5.0, -1.0]])
    >>> bits = hash_bits(teacher, jnp.eye(2))
    >>> bool(
    ...   jnp.all(
    ...     stored_lsh_loss(student, bits, jnp.eye(2)) == lsh_loss(student, teacher, jnp.eye(2))
    ...   )
    ... )
    True
  """
  values = hash_values(student_features, weight, bias)
  count, bits = values.shape[-1], jnp.asarray(bits)
  if bits.dtype != jnp.uint8 or bits.shape != (*values.shape[:-1], -(-count // 8)):
    raise ValueError(
      f'bits must be uint8 {(*values.shape[:-1], -(-count // 8))}, {count} for each feature, got '
      f'{bits.dtype} {bits.shape}.'
    )
  return _sides_cross_entropy(values, jnp.unpackbits(bits, axis=-1, count=count) > 0)


def lsh_l2_loss(
  student_features: ArrayLike,
  teacher_features: ArrayLike,
  weight: ArrayLike,
  bias: ArrayLike | None = None,
) -> jax.Array:
  """`lsh_loss` and the squared distance of the features, with equal weights (LSHL2).

  Args:
    student_features: `[..., dim]`.
    teacher_features: `[..., dim]`; no gradient.
    weight: normals `[count, dim]`.
    bias: `[count]`; None: 0.

  Returns:
    `[...]`, float32 or wider.

  Raises:
    ValueError: if shapes do not fit.
  """
  given = student_features, teacher_features
  return feature_distillation_loss(*given) + lsh_loss(*given, weight, bias)


def mean_where_right(values: ArrayLike, teacher_logits: ArrayLike, labels: ArrayLike) -> jax.Array:
  """Mean over the examples that the teacher classifies correctly; 0 if there is none.

  Args:
    values: of each example, `[...]`.
    teacher_logits: `[..., num_classes]`.
    labels: integers `[...]`.

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: if shapes or labels do not fit.

  References:
    The paper's losses for single labels, `lsh_s` and `lshl2_s`; its code divides 0 by 0 where no teacher is
    right.

  Examples:
    >>> logits = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    >>> float(mean_where_right(jnp.array([3.0, 5.0]), logits, jnp.array([0, 1])))
    3.0
  """
  require_labels(teacher_logits, labels)
  if jnp.shape(values) != jnp.shape(labels):
    raise ValueError(f'values must be {jnp.shape(labels)} like labels, got {jnp.shape(values)}.')
  (values,) = accumulated(values)
  right = jnp.argmax(jnp.asarray(teacher_logits), -1) == jnp.asarray(labels)
  return jnp.sum(jnp.where(right, values, 0)) / jnp.maximum(jnp.sum(right), 1)


def merge_linear(
  first_kernel: ArrayLike,
  first_bias: ArrayLike | None,
  second_kernel: ArrayLike,
  second_bias: ArrayLike | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns kernel and bias of two linear layers in one: `K1 K2` and `b1 K2 + b2`.

  Args:
    first_kernel: `[in, inner]`.
    first_bias: `[inner]`; None: 0.
    second_kernel: `[inner, out]`.
    second_bias: `[out]`; None: 0.

  Returns:
    `[in, out]` and `[out]`, float32 or wider.

  Raises:
    ValueError: if shapes do not chain.

  Examples:
    >>> kernel, bias = merge_linear(jnp.eye(2), jnp.ones(2), jnp.array([[2.0], [3.0]]), None)
    >>> kernel.tolist(), bias.tolist()
    ([[2.0], [3.0]], [5.0])
  """
  shapes = jnp.shape(first_kernel), jnp.shape(second_kernel)
  if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][0]:
    raise ValueError(f'kernels of shapes {shapes[0]} and {shapes[1]} do not chain.')
  for name, bias, size in (
    ('first', first_bias, shapes[0][1]),
    ('second', second_bias, shapes[1][1]),
  ):
    if bias is not None and jnp.shape(bias) != (size,):
      raise ValueError(f'{name}_bias must be ({size},), got {jnp.shape(bias)}.')
  first, second = accumulated(first_kernel, second_kernel)
  bias = jnp.zeros(shapes[1][1], second.dtype) if second_bias is None else jnp.asarray(second_bias)
  if first_bias is not None:
    bias = jnp.matmul(jnp.asarray(first_bias), second, precision='highest') + bias
  return jnp.matmul(first, second, precision='highest'), bias


def _require_hyperplanes(
  weight: ArrayLike, features: ArrayLike, bias: ArrayLike | None = None
) -> None:
  shapes = jnp.shape(weight), jnp.shape(features)
  if len(shapes[0]) != 2 or not shapes[1] or shapes[0][1] != shapes[1][-1]:
    raise ValueError(
      f'weight must be [count, dim] for features [..., dim], got {shapes[0]}, {shapes[1]}.'
    )
  if bias is not None and jnp.shape(bias) != shapes[0][:1]:
    raise ValueError(f'bias must be {shapes[0][:1]} like the hyperplanes, got {jnp.shape(bias)}.')
