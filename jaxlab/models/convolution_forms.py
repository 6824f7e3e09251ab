"""Formulations of a convolution for CPUs, and the measured rules that choose one by shape.

Everything here takes the arguments of JAX's convolution primitive, with a kernel that may as well be the
gradient of an output: derivatives of convolutions are convolutions, with large windows or dilated inputs.
Axes are brought into one order first, input `[batch, *positions, channels]`, kernel `[*taps, channels,
features]`, output `[batch, *positions, features]` (for the usual `NHWC, HWIO, NHWC` a relabeling).

What the rules rest on, in GFLOP/s of two cores that reach 290 at best:

- XLA hands convolutions of floats to Eigen (150 to 290), but not one whose kernel is larger than its input:
  that falls to a loop (2). `by_taps` reaches 100 to 170.
- XLA brings the axes of a convolution into the order that Eigen takes in a program's outermost computation
  alone. Within a loop or a branch (`scan`, `cond`) a gradient falls to a loop, 11 times slower than `plain`,
  which is in that order from the beginning.
- A depthwise convolution of XLA is 18 to 41 times slower than products of shifted inputs, which one loop
  fuses.
- The gradient of a depthwise kernel is a sum over the batch and all positions for every tap. One reduction
  with an operand a tap, over one axis first, reads the arrays once (5 ms for 8 x 56 x 56 x 144); one
  reduction a tap takes seven times as long, products in a rolled loop three to fifteen times.
- The gradient of a grouped kernel, for XLA a convolution of batch groups, falls to a loop (20 to 150 times
  slower than the same as channel groups).
- Grouped convolutions of few channels are faster as fewer groups with block-diagonal kernels, up to 16
  channels.
- A 1x1 convolution is a matrix product; for its kernel's gradient XLA would transpose both operands first
  (up to 7 times slower).
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
MERGED_CHANNELS = 16
MOST_TAPS = 64


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Positions of a convolution: everything but channels and values.

  Attributes:
    inputs: sizes of the input.
    taps: sizes of the kernel.
    strides: of the window.
    padding: (low, high) of each axis; may be negative.
    dilations: of the input: 1 + zeros between neighbors.
    spacings: of the taps: rhs dilation.
  """

  inputs: tuple[int, ...]
  taps: tuple[int, ...]
  strides: tuple[int, ...]
  padding: tuple[tuple[int, int], ...]
  dilations: tuple[int, ...]
  spacings: tuple[int, ...]

  @property
  def windows(self) -> tuple[int, ...]:
    """Input positions under a kernel, holes included."""
    return tuple((t - 1) * d + 1 for t, d in zip(self.taps, self.spacings))

  @property
  def padded(self) -> tuple[int, ...]:
    """Sizes of the dilated and padded input."""
    return tuple(
      max((n - 1) * d + 1, 0) + low + high
      for n, d, (low, high) in zip(self.inputs, self.dilations, self.padding)
    )

  @property
  def outputs(self) -> tuple[int, ...]:
    """Sizes of the output."""
    return tuple((n - w) // s + 1 for n, w, s in zip(self.padded, self.windows, self.strides))


Form = Callable[[Array, Array, Geometry, int, Any], Array]


def formulate(lhs: Array, rhs: Array, **params: Any) -> Array:
  """Returns JAX's convolution with these `params`, by the form that a CPU computes fastest."""
  lhs_spec, rhs_spec, out_spec = params['dimension_numbers']
  geometry = Geometry(
    inputs=tuple(lhs.shape[axis] for axis in lhs_spec[2:]),
    taps=tuple(rhs.shape[axis] for axis in rhs_spec[2:]),
    strides=params['window_strides'],
    padding=params['padding'],
    dilations=params['lhs_dilation'],
    spacings=params['rhs_dilation'],
  )
  dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
  out_dtype = params['preferred_element_type'] or dtype
  batch_groups = params['batch_group_count']
  form = None
  floats = all(jnp.issubdtype(kind, jnp.floating) for kind in (lhs.dtype, rhs.dtype, out_dtype))
  if floats and geometry.taps and lhs.size and rhs.size and min(geometry.outputs) > 0:
    form = choose_form(
      geometry,
      channels=rhs.shape[rhs_spec[1]],
      features=rhs.shape[rhs_spec[0]],
      groups=params['feature_group_count'],
      batch_groups=batch_groups,
      batch=lhs.shape[lhs_spec[0]],
      channels_first=rhs_spec[1] < min(rhs_spec[2:]),
      eigen=dtype != jnp.float64,
    )
    form = form or plain
  if form is None:
    return lax.conv_general_dilated_p.bind(lhs, rhs, **params)
  # One order of axes; sums of half precision in float32.
  accumulate = jnp.promote_types(dtype, jnp.float32)
  x = lax.transpose(lhs, (lhs_spec[0], *lhs_spec[2:], lhs_spec[1])).astype(accumulate)
  kernel = lax.transpose(rhs, (*rhs_spec[2:], rhs_spec[1], rhs_spec[0])).astype(accumulate)
  groups = params['feature_group_count'] * batch_groups
  y = form(x, kernel, geometry, groups, params['precision']).astype(out_dtype)
  return lax.transpose(y, np.argsort((out_spec[0], *out_spec[2:], out_spec[1])))


def choose_form(
  geometry: Geometry,
  *,
  channels: int,
  features: int,
  groups: int = 1,
  batch_groups: int = 1,
  batch: int = 1,
  channels_first: bool = False,
  eigen: bool = True,
) -> Form | None:
  """Returns the form for a convolution; None where XLA's own, `plain`, is the fastest.

  Args:
    geometry: of the positions.
    channels: of the input, in a group.
    features: of the output, of all groups.
    groups: of the channels.
    batch_groups: of the batch.
    batch: size of the batch.
    channels_first: whether the kernel lies in memory by its channels first, as an output's gradient does.
    eigen: whether XLA has its fast loops for this dtype.
  """
  taps, outputs = math.prod(geometry.taps), math.prod(geometry.outputs)
  dilated = max(geometry.dilations) > 1
  if batch_groups > 1:
    one_each = batch == batch_groups and outputs <= MOST_TAPS and not dilated
    return depthwise_kernel_gradient if one_each else batch_groups_as_channels
  if groups > 1:
    if channels == 1 and taps <= MOST_TAPS:
      return depthwise
    return merge_groups if _mergeable(channels, features, groups) > 1 else None
  if taps == 1:
    return pointwise
  if outputs == 1 and not dilated and channels_first:
    return single_window
  if _spreads_patches(geometry):
    return spread_patches
  larger = any(size > of for size, of in zip(geometry.taps, geometry.inputs))
  if larger or not eigen:
    if taps <= MOST_TAPS and (taps <= 16 * outputs or dilated):
      return by_taps
    return by_windows if outputs <= MOST_TAPS and not dilated else None
  return None


def pointwise(x: Array, kernel: Array, geometry: Geometry, groups: int, precision: Any) -> Array:
  """One tap: a matrix product, before or after the input is dilated, padded and strided."""
  kernel = kernel.reshape(kernel.shape[-2:])
  if math.prod(geometry.inputs) <= math.prod(geometry.outputs):
    return _tap(_pad(_multiply(x, kernel, precision), geometry), geometry, (0,) * x.ndim)
  return _multiply(_tap(_pad(x, geometry), geometry, (0,) * x.ndim), kernel, precision)


def single_window(
  x: Array, kernel: Array, geometry: Geometry, groups: int, precision: Any
) -> Array:
  """One output position: a matrix product over all channels and taps, of a kernel that lies in this order.

  It is the gradient of a 1x1 kernel: the channels are the batch, and nothing is moved.
  """
  y = _contract(_window(_pad(x, geometry), geometry, (0,) * x.ndim), kernel, precision)
  return y.reshape(len(x), *geometry.outputs, -1)


def by_taps(x: Array, kernel: Array, geometry: Geometry, groups: int, precision: Any) -> Array:
  """The sum over taps of matrix products; for few taps. Those that only ever meet padding are left out."""
  padded, y = _pad(x, geometry), 0.0
  for tap in itertools.product(*map(range, geometry.taps)):
    if _meets_input(geometry, tap):
      y += _multiply(_tap(padded, geometry, tap), kernel[tap], precision)
  shape = (len(x), *geometry.outputs, kernel.shape[-1])
  return jnp.broadcast_to(jnp.asarray(y, x.dtype), shape)


def by_windows(x: Array, kernel: Array, geometry: Geometry, groups: int, precision: Any) -> Array:
  """A matrix product an output position; for few of them."""
  padded = _pad(x, geometry)
  positions = itertools.product(*map(range, geometry.outputs))
  y = [_contract(_window(padded, geometry, at), kernel, precision) for at in positions]
  return jnp.stack(y, 1).reshape(len(x), *geometry.outputs, -1)


def spread_patches(
  x: Array, kernel: Array, geometry: Geometry, groups: int, precision: Any
) -> Array:
  """Every input becomes a patch of its own, as in the gradient of a patch embedding: one matrix product."""
  axes, (channels, features) = range(len(geometry.taps)), kernel.shape[-2:]
  kernel = jnp.moveaxis(lax.rev(kernel, tuple(axes)), -2, 0).reshape(channels, -1)
  y = _multiply(x, kernel, precision).reshape(*x.shape[:-1], *geometry.taps, features)
  y = _interleave(y, geometry.inputs, geometry.taps)
  return _resize(y, geometry.outputs)


def depthwise(x: Array, kernel: Array, geometry: Geometry, groups: int, precision: Any) -> Array:
  """One channel a group: the sum over taps of the shifted input times a vector, which XLA fuses.

  A dilated input (the gradient of a strided convolution) is taken apart by the phase of the output instead:
  of `d` neighboring outputs each meets other taps, and no tap meets a zero.
  """
  multiplier = kernel.shape[-1] // groups
  if multiplier > 1:
    x = jnp.repeat(x, multiplier, -1)
  kernel = kernel.reshape(*geometry.taps, -1)
  steps = {*geometry.strides, *geometry.spacings}
  if max(geometry.dilations) == 1 or steps != {1}:
    return _shifted_products(x, kernel, geometry)
  phases = []
  for phase in itertools.product(*map(range, geometry.dilations)):
    own, part = _phase(geometry, phase)
    phases.append(_shifted_products(x, kernel[own], part))
  y = jnp.stack(phases, -2).reshape(*phases[0].shape[:-1], *geometry.dilations, x.shape[-1])
  return _resize(_interleave(y, phases[0].shape[1:-1], geometry.dilations), geometry.outputs)


def depthwise_kernel_gradient(
  x: Array, kernel: Array, geometry: Geometry, groups: int, precision: Any
) -> Array:
  """A group an image: `y[position, group] = sum over taps and channels of window * kernel`.

  As the gradient of a depthwise kernel the images are the network's channels and the channels its batch. One
  reduction has a product for each position as operands and goes over one axis of taps; the others follow.
  """
  x, kernel = jnp.swapaxes(x, 0, -1), jnp.moveaxis(kernel, -2, 0)  # as the network sees them
  multiplier = kernel.shape[-1] // groups
  if multiplier > 1:
    x = jnp.repeat(x, multiplier, -1)
  padded = _pad(x, geometry)
  positions = itertools.product(*map(range, geometry.outputs))
  products = tuple(_window(padded, geometry, at) * kernel for at in positions)
  zeros = (np.zeros((), x.dtype),) * len(products)
  sums = lax.reduce(products, zeros, lambda a, b: tuple(map(jnp.add, a, b)), (1,))
  sums = jnp.stack(sums)
  return sums.sum(tuple(range(1, sums.ndim - 1))).reshape(1, *geometry.outputs, -1)


def batch_groups_as_channels(
  x: Array, kernel: Array, geometry: Geometry, groups: int, precision: Any
) -> Array:
  """Groups of the batch as groups of channels, for which XLA has a fast loop."""
  x = x.reshape(groups, -1, *x.shape[1:])
  x = jnp.moveaxis(x, 0, -2).reshape(x.shape[1], *geometry.inputs, -1)
  return plain(x, kernel, geometry, groups, precision)


def merge_groups(x: Array, kernel: Array, geometry: Geometry, groups: int, precision: Any) -> Array:
  """Fewer groups of more channels, with block-diagonal kernels."""
  channels, features = kernel.shape[-2], kernel.shape[-1] // groups
  merged = _mergeable(channels, kernel.shape[-1], groups)
  kernel = kernel.reshape(*geometry.taps, 1, channels, groups // merged, merged, features)
  same = jnp.eye(merged, dtype=kernel.dtype)[:, None, None, :, None]
  kernel = (kernel * same).reshape(*geometry.taps, merged * channels, groups * features)
  return plain(x, kernel, geometry, groups // merged, precision)


def _mergeable(channels: int, features: int, groups: int) -> int:
  """Returns how many groups become one: the most that keep within `MERGED_CHANNELS`."""
  widest = max(channels, features // groups)
  fitting = [n for n in range(1, groups + 1) if groups % n == 0 and n * widest <= MERGED_CHANNELS]
  return max(fitting, default=1)


def _spreads_patches(geometry: Geometry) -> bool:
  """Returns whether windows of the dilated input hold one input each, and each input fills a window."""
  return (
    geometry.dilations == geometry.taps
    and {*geometry.strides, *geometry.spacings} == {1}
    and all(low == size - 1 for (low, _), size in zip(geometry.padding, geometry.taps))
  )


def _meets_input(geometry: Geometry, tap: Sequence[int]) -> bool:
  """Returns whether `tap` lies on an input, not on padding or holes, for any output."""

  def meets(axis: int) -> bool:
    start = tap[axis] * geometry.spacings[axis] - geometry.padding[axis][0]
    places = start + np.arange(geometry.outputs[axis]) * geometry.strides[axis]
    index, hole = np.divmod(places, geometry.dilations[axis])
    return bool(np.any((hole == 0) & (index >= 0) & (index < geometry.inputs[axis])))

  return all(map(meets, range(len(tap))))


def _phase(geometry: Geometry, phase: Sequence[int]) -> tuple[tuple[slice, ...], Geometry]:
  """Returns the taps and the geometry of the outputs `phase, phase + d, ...` of an input dilated by d."""
  own, padding, taps = [], [], []
  for axis, shift in enumerate(phase):
    dilation, (low, _) = geometry.dilations[axis], geometry.padding[axis]
    first = (low - shift) % dilation
    own.append(slice(first, None, dilation))
    taps.append(len(range(first, geometry.taps[axis], dilation)))
    before = (low - shift - first) // dilation
    outputs = -(-geometry.outputs[axis] // dilation)
    padding.append((before, outputs + taps[-1] - 1 - geometry.inputs[axis] - before))
  once = (1,) * len(phase)
  return tuple(own), Geometry(geometry.inputs, tuple(taps), once, tuple(padding), once, once)


def _shifted_products(x: Array, kernel: Array, geometry: Geometry) -> Array:
  """Returns the sum over taps of the shifted input times `kernel[tap]` `[channels]`."""
  padded = _pad(x, geometry)
  y = jnp.zeros((len(x), *geometry.outputs, x.shape[-1]), x.dtype)
  products = (
    _tap(padded, geometry, tap) * kernel[tap]
    for tap in itertools.product(*map(range, geometry.taps))
  )
  return sum(products, start=next(products, y))


def _pad(x: Array, geometry: Geometry) -> Array:
  """Returns the dilated and padded input."""
  inner = ((low, high, d - 1) for (low, high), d in zip(geometry.padding, geometry.dilations))
  return lax.pad(x, np.zeros((), x.dtype), ((0, 0, 0), *inner, (0, 0, 0)))


def _tap(padded: Array, geometry: Geometry, tap: Sequence[int]) -> Array:
  """Returns what `tap` meets at all outputs, `[batch, *outputs, channels]`."""
  return padded[
    :,
    *(
      slice(t * d, t * d + (n - 1) * s + 1, s)
      for t, d, n, s in zip(tap, geometry.spacings, geometry.outputs, geometry.strides)
    ),
  ]


def _window(padded: Array, geometry: Geometry, position: Sequence[int]) -> Array:
  """Returns what all taps meet at one output position, `[batch, *taps, channels]`."""
  return padded[
    :,
    *(
      slice(at * s, at * s + size, d)
      for at, s, size, d in zip(position, geometry.strides, geometry.windows, geometry.spacings)
    ),
  ]


def _multiply(x: Array, matrix: Array, precision: Any) -> Array:
  """Returns `x @ matrix` over two axes: XLA's CPU backend multiplies arrays of higher rank slowly."""
  y = jnp.dot(x.reshape(-1, x.shape[-1]), matrix, precision=precision)
  return y.reshape(*x.shape[:-1], -1)


def _contract(window: Array, kernel: Array, precision: Any) -> Array:
  """Returns `[batch, features]`, the sum over taps and channels, channels first."""
  window = jnp.moveaxis(jnp.moveaxis(window, 0, -1), -2, 0)  # [channels, *taps, batch]
  kernel = jnp.moveaxis(kernel, -2, 0)
  flat = (array.reshape(-1, array.shape[-1]) for array in (window, kernel))
  return lax.dot_general(*flat, (((0,), (0,)), ((), ())), precision=precision)


def _interleave(y: Array, sizes: Sequence[int], parts: Sequence[int]) -> Array:
  """Brings `[batch, *sizes, *parts, features]` to `[batch, *(sizes * parts), features]`."""
  rank = len(sizes)
  order = [axis for pair in zip(range(1, rank + 1), range(rank + 1, 2 * rank + 1)) for axis in pair]
  y = lax.transpose(y, (0, *order, 2 * rank + 1))
  return y.reshape(len(y), *map(operator.mul, sizes, parts), -1)


def _resize(y: Array, sizes: Sequence[int]) -> Array:
  """Cuts the ends of the positions off, or fills them with zeros."""
  config = ((0, size - n, 0) for size, n in zip(sizes, y.shape[1:-1]))
  return lax.pad(y, np.zeros((), y.dtype), ((0, 0, 0), *config, (0, 0, 0)))


def plain(x: Array, kernel: Array, geometry: Geometry, groups: int, precision: Any) -> Array:
  """Returns XLA's convolution, its axes in the order that Eigen takes."""
  rank = len(geometry.taps)
  order = lax.ConvDimensionNumbers(
    (0, rank + 1, *range(1, rank + 1)),
    (rank + 1, rank, *range(rank)),
    (0, rank + 1, *range(1, rank + 1)),
  )
  return lax.conv_general_dilated(
    x,
    kernel,
    geometry.strides,
    geometry.padding,
    geometry.dilations,
    geometry.spacings,
    order,
    feature_group_count=groups,
    precision=precision,
  )
