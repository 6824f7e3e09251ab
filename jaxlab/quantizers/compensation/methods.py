"""The settings of QwT, QwT-v2 and NBC, and how each is fitted from rows that are streamed."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.quantizers.compensation import bipolar, bipolar_scales, channel_affine, conv, linear
from jaxlab.quantizers.compensation.parts import Parked, Programs

Array = jax.Array
LINEAR_NAMES = r'proj|fc2|c_proj|o_proj|down_proj|linear_conv'
Kind = Literal['auto', 'linear', 'conv']


@dataclasses.dataclass(frozen=True)
class QwT:
  """Linear map from the block's input (QwT, arXiv 2411.13918).

  Attributes:
    ridge: absolute penalty; None: 0 for the linear form, 1e-3 for the convolutional one, as in the code.
    kind: `'conv'` is a grouped convolution, for blocks of convolutions; `'auto'` decides by the kernels.
    kernel_size: of the convolution, odd.
    channels_per_group: of its input.
  """

  ridge: float | None = None
  kind: Kind = 'auto'
  kernel_size: int = 1
  channels_per_group: int = 64


@dataclasses.dataclass(frozen=True)
class QwTv2:
  """Scale and shift of each output channel (QwT-v2, arXiv 2505.20932).

  A convolution followed by a batch norm is compensated at its own output: the norm is affine in each channel,
  so the fit is the same.

  Attributes:
    granularity: `'linear'`: every layer with a kernel inside the blocks; `'branch'`: the last of each
      residual branch (`proj`, `fc2`, `conv3` or else `conv2`, ...); `'block'`: the block's output, which
      cannot be folded.
    modules: regular expression over the paths seen from the block, in place of the granularity's choice.
    eps: relative variance below which a channel is constant.
    clip: keep |gamma| in [1/16, 16].
    held_out: leave channels alone that get worse on every second batch when fitted on the others.
  """

  granularity: Literal['linear', 'branch', 'block'] = 'linear'
  modules: str | None = None
  eps: float = 1e-12
  clip: bool = False
  held_out: bool = False

  def __post_init__(self):
    if self.granularity not in ('linear', 'branch', 'block'):
      raise ValueError(f"granularity={self.granularity!r}; choose 'linear', 'branch' or 'block'.")


@dataclasses.dataclass(frozen=True)
class NBC:
  """Linear map between bipolar logarithms of input and error (NBC, arXiv 2605.16423).

  Attributes:
    scale_rule: scale of both transforms: a number, `'mean_abs'` or `'max_abs'` of inputs and of errors, or
      `'search'` over `factors` times the mean magnitudes on a held-out quarter of the images.
    ridge: relative penalty on the weight.
    debiased: fit a factor for each channel in the original space.
    factors: candidates of the search.
    kind: as for `QwT`.
    kernel_size: as for `QwT`.
    channels_per_group: as for `QwT`.
  """

  scale_rule: float | Literal['mean_abs', 'max_abs', 'search'] = 1.0
  ridge: float = 1e-6
  debiased: bool = True
  factors: tuple[float, ...] = bipolar_scales.SCALE_FACTORS
  kind: Kind = 'auto'
  kernel_size: int = 1
  channels_per_group: int = 64

  def __post_init__(self):
    rule = self.scale_rule
    if isinstance(rule, str):
      if rule not in ('mean_abs', 'max_abs', 'search'):
        raise ValueError(
          f"scale_rule={rule!r}; choose 'mean_abs', 'max_abs', 'search' or a number."
        )
    elif not rule > 0:
      raise ValueError(f'scale_rule={rule}: a scale must be positive.')


Method = QwT | QwTv2 | NBC


@dataclasses.dataclass
class Rows:
  """The calibration rows of one module: batches of its input x, quantized output y and error, parked.

  Attributes:
    batches: `(x, y, err)`, parked.
    programs: where compiled functions are shared.
    is_conv: whether the convolutional form is to be used.
  """

  batches: Sequence[tuple[Parked, Parked, Parked]]
  programs: Programs
  is_conv: bool

  @property
  def in_features(self) -> int:
    """Channels of x."""
    return self.batches[0][0].shape[-1]

  @property
  def err_shape(self) -> tuple[int, ...]:
    """Shape of the first batch's error."""
    return self.batches[0][2].shape

  @property
  def num_examples(self) -> int:
    """Number of examples in all batches."""
    return sum(err.shape[0] for *_, err in self.batches)

  def _restored(self) -> Iterator[tuple[int, tuple[Array, Array, Array]]]:
    start = 0
    for batch in self.batches:
      yield start, tuple(parked.restore() for parked in batch)
      start += batch[2].shape[0]

  def fold(
    self,
    update: Callable[..., Any],
    state: Any,
    *arrays: Array,
    weights: Callable[[int, int], np.ndarray] | None = None,
  ) -> Any:
    """Returns `state` after `update(state, x, y, err, weights, *arrays)` with every batch.

    `weights(start, size)` are those of the examples `start .. start + size - 1`; None: ones. On a mesh the
    state is a copy on every device and sums run over the whole batch.
    """
    for start, (x, y, err) in self._restored():
      everywhere = replicated_like(err)
      given = np.ones(err.shape[0]) if weights is None else weights(start, err.shape[0])
      given = jax.device_put(np.asarray(given, np.float32), everywhere)
      state, arrays = jax.device_put((state, arrays), everywhere)
      if start == 0:
        run = self.programs(update, state, x, y, err, given, *arrays, out_shardings=everywhere)
      state = run(state, x, y, err, given, *arrays)
    return jax.device_get(state)


def replicated_like(x: Array) -> jax.sharding.Sharding:
  """Returns the sharding that keeps a copy on every device that holds a part of `x`."""
  if isinstance(x.sharding, jax.sharding.NamedSharding):
    return jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())
  return x.sharding


def fit(method: Method, rows: Rows) -> tuple[dict[str, Array], float, bool]:
  """Returns the compensation's arrays by name, its R^2 (NaN: see the errors) and whether it was left out."""
  if isinstance(method, QwT):
    return _fit_qwt(method, rows)
  if isinstance(method, QwTv2):
    return _fit_qwt_v2(method, rows)
  return _fit_nbc(method, rows)


def _fit_qwt(method: QwT, rows: Rows) -> tuple[dict[str, Array], float, bool]:
  k = method.kernel_size
  if rows.is_conv:
    groups = conv.num_groups(rows.in_features, rows.err_shape[-1], method.channels_per_group)
    stats = conv.init_conv_stats(rows.in_features, rows.err_shape, k, groups)
    stats = rows.fold(functools.partial(_update_conv, kernel_size=k), stats)
    solved = conv.solve_conv(stats, k, 1e-3 if method.ridge is None else method.ridge)
  else:
    stats = linear.init_linear_stats(rows.in_features, rows.err_shape[-1])
    stats = rows.fold(_update_linear, stats)
    solved = linear.solve_linear(stats, method.ridge or 0.0)
    solved = solved._replace(weight=solved.weight[0])
  gated = linear.gate(solved)
  r2 = float(solved.r2)
  return {'weight': gated.weight, 'bias': gated.bias}, r2, not r2 > 0


def _update_linear(stats, x, y, err, weights):
  del y
  return linear.update_linear_stats(stats, x, err, weights)


def _update_conv(stats, x, y, err, weights, *, kernel_size):
  del y
  return conv.update_conv_stats(stats, x, err, kernel_size, weights)


def _fit_qwt_v2(method: QwTv2, rows: Rows) -> tuple[dict[str, Array], float, bool]:
  empty = channel_affine.init_channel_affine_stats(rows.err_shape[-1])
  if not method.held_out:
    stats = rows.fold(_update_affine, empty)
    affine = channel_affine.solve_channel_affine(stats, method.eps, method.clip)
  else:
    if len(rows.batches) < 2:
      raise ValueError('held_out=True needs at least two calibration batches.')
    size = rows.batches[0][2].shape[0]
    halves = [
      rows.fold(
        _update_affine,
        empty,
        weights=lambda start, n, odd=odd: np.full(n, float(start // size % 2 == odd)),
      )
      for odd in (0, 1)
    ]
    stats = channel_affine.merge_channel_affine_stats(*halves)
    fits = [
      channel_affine.solve_channel_affine(s, method.eps, method.clip) for s in (stats, halves[0])
    ]
    affine = channel_affine.gate_channel_affine(*fits, halves[1])
  return {'gamma': affine.gamma, 'beta': affine.beta}, float('nan'), False


def _update_affine(stats, x, y, err, weights):
  del x
  full = y.astype(err.dtype) + err
  return channel_affine.update_channel_affine_stats(stats, y, full, weights=weights)


def _fit_nbc(method: NBC, rows: Rows) -> tuple[dict[str, Array], float, bool]:
  out = rows.err_shape[-1]
  kernel_size = method.kernel_size if rows.is_conv else None
  groups = 1
  if rows.is_conv:
    groups = conv.num_groups(rows.in_features, out, method.channels_per_group)
  empty = bipolar.init_bipolar_stats(rows.in_features, out, groups, kernel_size or 1)
  update = functools.partial(_update_bipolar, kernel_size=kernel_size)
  solve = functools.partial(bipolar.solve_bipolar, ridge=method.ridge, kernel_size=kernel_size)
  scales, score = _nbc_scales(method, rows, empty, update, solve)
  solved = solve(rows.fold(update, empty, *_scalars(scales)), *scales)
  predicted = rows.fold(_update_prediction, bipolar.init_prediction_stats(out), solved)
  solved = bipolar.debias(solved, predicted, method.debiased)
  r2 = float(solved.r2)
  if score is not None and not score > 0:  # no candidate helps on held-out examples
    solved = solved._replace(r2=jnp.zeros_like(solved.r2))
  arrays = bipolar.gate_bipolar(solved)._asdict()
  del arrays['r2']
  return arrays, r2, not float(solved.r2) > 0


def _scalars(scales: Sequence[float]) -> list[np.ndarray]:
  return [np.asarray(scale, linear.stats_dtype()) for scale in scales]


def _nbc_scales(method: NBC, rows: Rows, empty, update, solve):
  """Returns the pair of scales and, after a search, its R^2 on the held-out examples (else None)."""
  rule = method.scale_rule
  if not isinstance(rule, str):
    return (float(rule), float(rule)), None
  zeros = [np.zeros((), linear.stats_dtype()) for _ in range(6)]
  sums = rows.fold(_update_magnitudes, tuple(zeros))
  means = (float(sums[0] / sums[1]), float(sums[3] / sums[4]))
  if rule in ('mean_abs', 'max_abs'):
    values = means if rule == 'mean_abs' else (float(sums[2]), float(sums[5]))
    return tuple(value if value > 0 else float('inf') for value in values), None
  train, held = (lambda s, n: ~bipolar_scales.holdout_mask(s, n)), bipolar_scales.holdout_mask
  if rows.num_examples < 4:
    bipolar_scales.warn_no_holdout(rows.num_examples)
    train = held = None
  best = None
  blank = bipolar.init_prediction_stats(rows.err_shape[-1])
  for pair in bipolar_scales.scale_candidates(*means, method.factors):
    fitted = rows.fold(update, empty, *_scalars(pair), weights=train)
    solved = solve(fitted, *pair)
    own = rows.fold(_update_prediction, blank, solved, weights=train)
    kappa = bipolar.debias(solved, own, method.debiased).kappa
    other = rows.fold(_update_prediction, blank, solved, weights=held)
    score = float(bipolar.prediction_r2(other, kappa))
    if not np.isnan(score) and (best is None or score > best[0]):
      best = score, pair
  return (best[1], best[0]) if best else ((float('inf'),) * 2, float('-inf'))


def _update_bipolar(stats, x, y, err, weights, scale_x, scale_err, *, kernel_size):
  del y
  return bipolar.update_bipolar_stats(
    stats, x, err, scale_x, scale_err, kernel_size=kernel_size, weights=weights
  )


def _update_prediction(stats, x, y, err, weights, params):
  del y
  return bipolar.update_prediction_stats(stats, x, err, params, weights)


def _update_magnitudes(sums, x, y, err, weights):
  del y, weights
  new = []
  for old, value in zip((sums[:3], sums[3:]), (x, err)):
    size = jnp.abs(value.astype(old[0].dtype))
    new += [old[0] + jnp.sum(size), old[1] + size.size, jnp.maximum(old[2], jnp.max(size))]
  return tuple(new)
