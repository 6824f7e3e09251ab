"""How each method is fitted from rows that are streamed: one pass that observes, some over parked rows."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.models.blockwise import Parked, Programs
from jaxlab.quantizers.compensation import bipolar, bipolar_scales, channel_affine, conv, linear
from jaxlab.quantizers.compensation.methods import NBC, Method, QwT, QwTv2

Array = jax.Array


class Shapes(NamedTuple):
  """Of one module: of its input x, of its output, and whether the convolutional form is to be used."""

  x: tuple[int, ...]
  out: tuple[int, ...]
  is_conv: bool


class Fitted(NamedTuple):
  """A compensation.

  Attributes:
    arrays: by name.
    r2: of the fit; NaN: 1 - error after / error before.
    skipped: whether the module is left as it is.
    errors: mean squared error before and after, where the statistics hold them; else None.
  """

  arrays: dict[str, Array]
  r2: float
  skipped: bool
  errors: tuple[float, float] | None = None


class FirstPass(NamedTuple):
  """What is summed up while a module is observed.

  Attributes:
    state: of no rows.
    update: `(state, x, y, err, index of the batch, weights of the rows or None) -> state`, traceable.
  """

  state: Any
  update: Callable[..., Any]


class Rows(NamedTuple):
  """The calibration rows of one module that are kept for further passes, parked.

  Attributes:
    batches: its input x and error err, None where the method does not look at them again; and 1 for rows that
      count, 0 for others, over the first axes of err, or None.
    programs: where compiled functions are shared.
  """

  batches: Sequence[tuple[Parked | None, Parked | None, np.ndarray | None]]
  programs: Programs

  @property
  def num_examples(self) -> int:
    """Number of examples in all batches."""
    return sum(err.shape[0] for _, err, _ in self.batches)

  def _restored(self) -> Iterator[tuple[int, Array, Array, np.ndarray | None]]:
    start = 0
    for x, err, counted in self.batches:
      yield start, x.restore(), err.restore(), counted
      start += err.shape[0]

  def fold(
    self,
    update: Callable[..., Any],
    state: Any,
    *arrays: Array,
    weights: Callable[[int, int], np.ndarray] | None = None,
  ) -> Any:
    """Returns `state` after `update(state, x, err, *arrays, weights=)` with every batch.

    `weights(start, size)` are those of the examples `start .. start + size - 1`, on their last axis; None:
    all that count are 1. On a mesh the state is a copy on every device and sums run over the whole batch.
    """
    weighted = lambda state, x, err, w, *arrays: update(state, x, err, *arrays, weights=w)  # noqa: E731
    run = None
    for start, x, err, counted in self._restored():
      everywhere = replicated_like(err)
      w = None if weights is None else np.asarray(weights(start, err.shape[0]), np.float32)
      if counted is not None:
        w = counted if w is None else w.reshape(*w.shape, *(1,) * (counted.ndim - 1)) * counted
      state, w, arrays = jax.device_put((state, w, arrays), everywhere)
      args = (state, x, err, w, *arrays)
      run = run or self.programs(weighted, *args, out_shardings=everywhere)
      state = run(*args)
    return jax.device_get(state)


def replicated_like(x: Array) -> jax.sharding.Sharding:
  """Returns the sharding that keeps a copy on every device that holds a part of `x`."""
  if isinstance(x.sharding, jax.sharding.NamedSharding):
    return jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())
  return x.sharding


def check(method: Method, shapes: Shapes, num_batches: int) -> None:
  """Raises ValueError if a method cannot compensate a module of these shapes from so many batches."""
  if isinstance(method, QwTv2):
    if method.held_out and num_batches < 2:
      raise ValueError('held_out=True needs at least two calibration batches.')
  elif shapes.is_conv:
    if getattr(method, 'relative', False):
      raise ValueError('relative=True is about the linear form; the block has convolutions.')
    conv.check_kernel_size(method.kernel_size)
    conv.stride_of(shapes.x, shapes.out)
    _groups(method, shapes)
  elif shapes.x[:-1] != shapes.out[:-1]:
    raise ValueError(
      f'The module is given {shapes.x} and returns {shapes.out}: a linear compensation needs one input token '
      f'per output token (a strided block needs the convolutional form).'
    )


def first_pass(method: Method, shapes: Shapes) -> FirstPass:
  """Returns what `fit` wants to be summed up over all batches."""
  features, out = shapes.x[-1], shapes.out[-1]
  if isinstance(method, QwTv2):
    empty = channel_affine.init_channel_affine_stats(out)
    return (
      FirstPass((empty, empty), _update_halves)
      if method.held_out
      else (FirstPass(empty, _update_affine))
    )
  if isinstance(method, QwT):
    if not shapes.is_conv:
      return FirstPass(linear.init_linear_stats(features, out), _update_linear)
    k, groups = method.kernel_size, _groups(method, shapes)
    stats = conv.init_conv_stats(features, shapes.out, k, groups)
    return FirstPass(stats, functools.partial(_update_conv, kernel_size=k))
  if isinstance(method.scale_rule, str):
    zeros = [np.zeros((), linear.stats_dtype()) for _ in range(6)]
    return FirstPass(tuple(zeros), _update_magnitudes)
  update = functools.partial(
    _update_bipolar, scale=float(method.scale_rule), kernel_size=_kernel_size(method, shapes)
  )
  return FirstPass(_empty_bipolar(method, shapes), update)


def fit(method: Method, shapes: Shapes, state: Any, rows: Rows) -> Fitted:
  """Returns the compensation.

  Args:
    method: settings.
    shapes: of the module.
    state: of `first_pass`, after all batches, concrete.
    rows: for the methods that look at them more than once (NBC).
  """
  if isinstance(method, QwT):
    return _fit_qwt(method, shapes, state)
  if isinstance(method, QwTv2):
    return _fit_qwt_v2(method, state)
  return _fit_nbc(method, shapes, state, rows)


def _groups(method: QwT | NBC, shapes: Shapes) -> int:
  return conv.num_groups(shapes.x[-1], shapes.out[-1], method.channels_per_group)


def _fit_qwt(method: QwT, shapes: Shapes, stats: Any) -> Fitted:
  if shapes.is_conv:
    ridge = 1e-3 if method.ridge is None else method.ridge
    solved = conv.solve_conv(stats, method.kernel_size, ridge)
  else:
    ridge = method.ridge or 0.0
    if method.relative:
      ridge = ridge * np.mean(np.diagonal(np.asarray(stats.scatter_x[0])))
    solved = linear.solve_linear(stats, ridge, penalize_bias=not method.relative)
    solved = solved._replace(weight=jnp.asarray(np.asarray(solved.weight)[0]))
  gated, r2 = linear.gate(solved), float(solved.r2)
  return Fitted({'weight': gated.weight, 'bias': gated.bias}, r2, not r2 > 0)


def _update_linear(stats, x, y, err, batch, weights):
  del y, batch
  return linear.update_linear_stats(stats, x, err, weights)


def _update_conv(stats, x, y, err, batch, weights, *, kernel_size):
  del y, batch
  return conv.update_conv_stats(stats, x, err, kernel_size, weights)


def _fit_qwt_v2(method: QwTv2, stats: Any) -> Fitted:
  # Moments of (y, err), which tell the remaining error more exactly than those of (y, y + err).
  solve = lambda own: channel_affine.solve_channel_affine(  # noqa: E731
    channel_affine.stats_of_sum(own), method.eps, method.clip
  )
  if method.held_out:
    halves, stats = stats, channel_affine.merge_channel_affine_stats(*stats)
    affine = channel_affine.gate_channel_affine(
      solve(stats), solve(halves[0]), channel_affine.stats_of_sum(halves[1])
    )
  else:
    affine = solve(stats)
  gamma, beta = map(np.asarray, affine)
  nothing = channel_affine.ChannelAffine(np.zeros_like(gamma), np.zeros_like(beta))
  errors = [
    float(np.mean(np.asarray(channel_affine.channel_affine_errors(stats, of_err), np.float64)))
    for of_err in (nothing, channel_affine.ChannelAffine(gamma - 1, beta))
  ]
  return Fitted(affine._asdict(), float('nan'), False, tuple(errors))


def _update_affine(stats, x, y, err, batch, weights):
  del x, batch
  return channel_affine.update_channel_affine_stats(stats, y, err, weights=weights)


def _update_halves(halves, x, y, err, batch, weights):
  del x
  ones = jnp.ones(y.shape[0]) if weights is None else weights
  return tuple(
    channel_affine.update_channel_affine_stats(stats, y, err, weights=ones * (batch % 2 == odd))
    for odd, stats in enumerate(halves)
  )


def _kernel_size(method: NBC, shapes: Shapes) -> int | None:
  return method.kernel_size if shapes.is_conv else None


def _empty_bipolar(method: NBC, shapes: Shapes) -> bipolar.BipolarStats:
  groups = _groups(method, shapes) if shapes.is_conv else 1
  k = _kernel_size(method, shapes) or 1
  return bipolar.init_bipolar_stats(shapes.x[-1], shapes.out[-1], groups, k)


def _fit_nbc(method: NBC, shapes: Shapes, state: Any, rows: Rows) -> Fitted:
  kernel_size = _kernel_size(method, shapes)
  solve = functools.partial(bipolar.solve_bipolar, ridge=method.ridge, kernel_size=kernel_size)
  rule, score = method.scale_rule, None
  if not isinstance(rule, str):
    scales, stats = (float(rule),) * 2, state
  else:
    scales, score = _nbc_scales(method, shapes, state, rows, solve)
    update = functools.partial(bipolar.update_bipolar_stats, kernel_size=kernel_size)
    placed = [np.asarray(scale, linear.stats_dtype()) for scale in scales]
    stats = rows.fold(update, _empty_bipolar(method, shapes), *placed)
  solved = solve(stats, *scales)
  blank = bipolar.init_prediction_stats(shapes.out[-1])
  predicted = rows.fold(bipolar.update_prediction_stats, blank, solved)
  solved = bipolar.debias(solved, predicted, method.debiased)
  r2 = float(solved.r2)
  if score is not None and not score > 0:  # no candidate helps on held-out examples
    solved = solved._replace(r2=jnp.zeros_like(solved.r2))
  arrays = bipolar.gate_bipolar(solved)._asdict()
  del arrays['r2']
  return Fitted(arrays, r2, not float(solved.r2) > 0)


def _nbc_scales(method: NBC, shapes: Shapes, sums: tuple, rows: Rows, solve: Callable):
  """Returns the pair of scales and, after a search, its R^2 on the held-out examples (else None)."""
  means = (float(sums[0] / sums[1]), float(sums[3] / sums[4]))
  if method.scale_rule != 'search':
    values = means if method.scale_rule == 'mean_abs' else (float(sums[2]), float(sums[5]))
    return tuple(value if value > 0 else float('inf') for value in values), None
  if rows.num_examples < 4:
    bipolar_scales.warn_no_holdout(rows.num_examples)
    train = held = lambda start, size: np.ones(size)
  else:
    held = bipolar_scales.holdout_mask
    train = lambda start, size: ~held(start, size)  # noqa: E731
  both = lambda start, size: np.stack([train(start, size), held(start, size)])  # noqa: E731
  update = functools.partial(
    bipolar_scales.update_candidate_stats, kernel_size=_kernel_size(method, shapes)
  )
  score, scales = bipolar_scales.search(
    bipolar_scales.scale_candidates(*means, method.factors),
    _empty_bipolar(method, shapes),
    functools.partial(rows.fold, update, weights=train),
    functools.partial(rows.fold, bipolar_scales.update_candidate_predictions, weights=both),
    solve,
    method.debiased,
  )
  return scales, score


def _update_bipolar(stats, x, y, err, batch, weights, *, scale, kernel_size):
  del y, batch
  return bipolar.update_bipolar_stats(
    stats, x, err, scale, scale, kernel_size=kernel_size, weights=weights
  )


def _update_magnitudes(sums, x, y, err, batch, weights):
  del y, batch
  new = []
  for old, value in zip((sums[:3], sums[3:]), (x, err)):
    size, count = jnp.abs(value.astype(old[0].dtype)), value.size
    if weights is not None:
      own = weights.reshape(*weights.shape, *(1,) * (value.ndim - weights.ndim)).astype(size.dtype)
      size, count = size * own, jnp.sum(own) * (value.size // own.size)
    new += [old[0] + jnp.sum(size), old[1] + count, jnp.maximum(old[2], jnp.max(size))]
  return tuple(new)
