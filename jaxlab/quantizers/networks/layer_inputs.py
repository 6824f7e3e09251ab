"""The inputs of a layer as rows, for every kind of linear layer: what its kernel, as a matrix, multiplies."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.linear import canonicalize_padding

from jaxlab.models.intercept import Site
from jaxlab.quantizers.numerics.hessians import unfold

Array = jax.Array


class KernelLayout(NamedTuple):
  """How a layer's kernel is a plain one, `[..., in, out]` for each of its groups.

  Attributes:
    groups: of channels, which have kernels of their own (grouped and depthwise convolutions); else 1.
    transposed: whether it is `[..., out, in]` (`ConvTranspose(transpose_kernel=True)`).
    input_axes: number of leading axes that are inputs, all others being outputs (`DenseGeneral`); 0: a plain
      kernel.
  """

  groups: int = 1
  transposed: bool = False
  input_axes: int = 0

  def plain(self, kernel: Array) -> Array:
    """Returns the kernels of all groups `[groups, ..., in, out]`; without groups one `[..., in, out]`."""
    if self.input_axes:
      return kernel.reshape(math.prod(kernel.shape[: self.input_axes]), -1)
    if self.transposed:
      kernel = jnp.swapaxes(kernel, -1, -2)
    if self.groups > 1:
      kernel = jnp.moveaxis(kernel.reshape(*kernel.shape[:-1], self.groups, -1), -2, 0)
    return kernel

  def restore(self, plain: Array, shape: tuple[int, ...]) -> Array:
    """Returns plain kernels in the layer's layout and `shape`."""
    if self.groups > 1:
      plain = jnp.moveaxis(plain, 0, -2)
      plain = plain.reshape(*plain.shape[:-2], -1)
    if self.transposed:
      plain = jnp.swapaxes(plain, -1, -2)
    return plain.reshape(shape)


def kernel_layout(site: Site, kernel: Array) -> KernelLayout:
  """Returns the layout of a layer's kernel.

  Raises:
    ValueError: for a layer whose kernel is no matrix over rows of its input; names it.
  """
  module = site.module
  if isinstance(module, nn.DenseGeneral):
    if module.batch_dims:
      raise ValueError(_unknown(site, 'its batch_dims have kernels of their own'))
    return KernelLayout(input_axes=len(jnp.atleast_1d(jnp.asarray(module.axis))))
  if isinstance(module, nn.ConvTranspose | nn.Conv):
    if module.mask is not None:
      raise ValueError(_unknown(site, 'a mask is over its kernel'))
    if isinstance(module, nn.ConvTranspose):
      return KernelLayout(transposed=module.transpose_kernel)
    return KernelLayout(groups=module.feature_group_count)
  if kernel.ndim != 2:
    raise ValueError(_unknown(site, f'its kernel {list(kernel.shape)} is no matrix'))
  return KernelLayout()


def _unknown(site: Site, reason: str) -> str:
  return (
    f'GPTQ does not know which inputs the kernel of {site.path!r} ({type(site.module).__name__}) multiplies: '
    f'{reason}. Leave it out of the rules.'
  )


class LayerRows:
  """Gives the rows that a layer's flattened kernel multiplies, `[..., in]`, of groups `[..., groups, in]`.

  Those of a convolution are channel by channel as `unfold` orders them. A layer that is no plain convolution
  gives them itself: they are its output under the kernel that is the identity.

  Attributes:
    running: whether a layer is called for its rows: hooks have to leave that call alone.
  """

  def __init__(self):
    self.running = False

  def __call__(self, site: Site, x: Array, kernel: Array) -> Array:
    """Returns the rows.

    Args:
      site: of the layer's call.
      x: its input.
      kernel: its kernel.

    Raises:
      ValueError: for a layer whose kernel is no matrix over rows of its input; names it.
    """
    module, layout = site.module, kernel_layout(site, kernel)
    if not isinstance(module, nn.DenseGeneral | nn.Conv | nn.ConvTranspose):
      if x.shape[-1:] != kernel.shape[:1]:
        raise ValueError(_unknown(site, f'its first argument is {list(x.shape)}'))
      return x
    if isinstance(module, nn.Conv) and (padding := _plain_padding(module, x)) is not None:
      size, strides, dilation = (
        _each(value, x.ndim - 2)
        for value in (module.kernel_size, module.strides, module.kernel_dilation)
      )
      patches = unfold(x, size, strides, padding, dilation)
    else:
      identity = _identity(layout, kernel.shape, x.dtype)
      rows = identity.shape[-2 if layout.transposed else -1]
      changes = {'features': (rows,) if layout.input_axes else rows, 'use_bias': False}
      changes['precision'] = jax.lax.Precision.HIGHEST
      alone = module.clone(parent=None, name=None, **changes)
      self.running = True
      try:
        patches = alone.apply({'params': {'kernel': identity}}, x)
      finally:
        self.running = False
    groups = layout.groups
    return patches.reshape(*patches.shape[:-1], groups, -1) if groups > 1 else patches


def _identity(layout: KernelLayout, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
  """Returns the kernel, in the layer's layout, whose outputs are the rows that it multiplies."""
  plain = jax.eval_shape(layout.plain, jax.ShapeDtypeStruct(shape, dtype)).shape
  *window, inputs, _ = plain[1:] if layout.groups > 1 else plain
  rows = inputs * math.prod(window)
  identity = jnp.moveaxis(jnp.eye(rows, dtype=dtype).reshape(inputs, *window, rows), 0, -2)
  if layout.input_axes:
    return identity.reshape(*shape[: layout.input_axes], rows)
  identity = jnp.tile(identity, layout.groups)
  return jnp.swapaxes(identity, -1, -2) if layout.transposed else identity


def _plain_padding(module: nn.Conv, x: Array) -> str | Sequence[tuple[int, int]] | None:
  """Returns the padding of a convolution whose rows are copies of its input, as `unfold` makes them."""
  size = len(_each(module.kernel_size, 1))
  padding = canonicalize_padding(module.padding, size)
  holes = any(step != 1 for step in _each(module.input_dilation, size))
  if x.ndim != size + 2 or holes or padding in ('CIRCULAR', 'REFLECT', 'CAUSAL'):
    return None
  return padding


def _each(value: int | Sequence[int] | None, size: int) -> tuple[int, ...]:
  """Returns an argument of a convolution for each axis; None is 1."""
  return (1 if value is None else value,) * size if isinstance(value, int | None) else tuple(value)
