"""Optimizers from plain keyword arguments, with groups of parameters chosen by path.

The update rules are PyTorch's, so that a published recipe gives the published trajectory: the learning
rate multiplies last, weight decay enters SGD and LARS before the momentum buffer. A parameter's path is
its keys joined by slashes (`layer1_0/conv1/kernel`); a pattern is a regular expression that must match
the whole path, and one that matches no parameter raises when the state is made.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any
Rate = float | optax.Schedule

NDIM = 'ndim<=1'


def make_optimizer(
  name: str,
  learning_rate: Rate,
  *,
  weight_decay: Rate = 0.0,
  no_decay: Sequence[str] | None = None,
  lr_overrides: Sequence[tuple[str, Rate]] = (),
  lr_multipliers: Sequence[tuple[str, float]] = (),
  frozen: Sequence[str] = (),
  decoupled: optax.GradientTransformation | None = None,
  clip_global_norm: float | None = None,
  clip_per_tensor: float | None = None,
  elsewhere: Sequence[str] = (),
  **options: Any,
) -> optax.GradientTransformation:
  """Builds an optimizer.

  With gradient g (after clipping), parameter w, learning rate lr and weight decay wd of the step:

  - 'sgd': `d = g + wd w;  v = momentum v + d;  w = w - lr v`, or with `nesterov`
    `w = w - lr (d + momentum v)`. The first v is d. Options: `momentum` (0.9), `nesterov` (False).
  - 'lars': as 'sgd' with `v = momentum v + q d`, `q = trust_coefficient |w| / |d|`, or 1 where a norm is
    zero. Options: `momentum` (0.9), `nesterov` (False), `trust_coefficient` (0.001), `no_trust_ratio`
    (patterns of parameters with q = 1, default `('ndim<=1',)`).
  - 'adamw': `w = w - lr (m / (sqrt(n) + eps) + wd w)` with the bias-corrected moments m, n. Options:
    `betas` ((0.9, 0.999)), `eps` (1e-8).
  - 'adam': `w = w - lr m / (sqrt(n) + eps)`, the moments those of `g + wd w`, as PyTorch's Adam. Options as
    'adamw'; the first of `betas` may be a schedule, whose present value corrects the bias, too.
  - 'lamb': `u = m / (sqrt(n) + eps) + wd w;  w = w - lr q u`, `q = |w| / |u|`, or 1 where a norm is zero.
    Options: `betas` ((0.9, 0.999)), `eps` (1e-6), `no_trust_ratio` (patterns of parameters with q = 1,
    default none).

  Every list of patterns may hold `'ndim<=1'`, which stands for all parameters with at most one axis:
  biases and the scales of normalization layers. (Layers stacked by `nn.scan` have one more axis: name
  them by path.) Of several patterns with a value, the first that matches a parameter counts.

  Args:
    name: 'sgd', 'lars', 'adam', 'adamw' or 'lamb'.
    learning_rate: a number or a schedule `step -> value`.
    weight_decay: a number or a schedule.
    no_decay: patterns of parameters without weight decay. Default: `('ndim<=1',)` for 'lars', none for the
      others (as PyTorch and optax).
    lr_overrides: pairs (pattern, learning rate or schedule) in place of `learning_rate`, e.g.
      `[('predictor/.*', 0.1)]` for one that does not decay.
    lr_multipliers: pairs (pattern, factor) on the learning rate, overridden ones included.
    frozen: patterns of parameters that stay as they are: no decay, no state, no share in the global norm.
    decoupled: applied to the updates behind the update rule and its weight decay, before the learning rate
      multiplies them; e.g. `colinearity_decay`.
    clip_global_norm: scales all gradients by `min(1, clip / (norm + 1e-6))`, their joint norm.
    clip_per_tensor: scales each gradient by its own `min(1, clip / (norm + 1e-6))`.
    elsewhere: paths of parameters that another optimizer of `by_path` holds: patterns may name these alone.
    **options: of the update rule, above.

  Returns:
    An `optax.GradientTransformation`; `update` needs the parameters.

  Raises:
    ValueError: for an unknown name or option, a negative rate, two kinds of clipping; and from `init`,
      if a pattern matches no parameter.

  References:
    LARS: You et al., Large Batch Training of Convolutional Networks (https://arxiv.org/abs/1708.03888),
    momentum and exclusions as in the code of Barlow Twins. AdamW: Loshchilov & Hutter, Decoupled Weight
    Decay Regularization, ICLR 2019 (https://arxiv.org/abs/1711.05101), wd multiplied by lr. LAMB: You et
    al., Large Batch Optimization for Deep Learning, ICLR 2020 (https://arxiv.org/abs/1904.00962), as in
    optax.

  Examples:
    >>> optimizer = make_optimizer('sgd', 0.1, weight_decay=0.5, no_decay=['bias'])
    >>> params = {'kernel': jnp.ones(2), 'bias': jnp.ones(2)}
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> print(updates['kernel'], updates['bias'])
    [-0.15 -0.15] [-0.1 -0.1]
  """
  rules = {'sgd': _sgd, 'lars': _lars, 'adam': _adam, 'adamw': _adamw, 'lamb': _lamb}
  if name not in rules:
    raise ValueError(f'Unknown optimizer {name!r}: choose {", ".join(rules)}.')
  known = [p for p in inspect.signature(rules[name]).parameters if p != 'decay']
  unknown = sorted(set(options) - set(known))
  if unknown:
    raise ValueError(f'Optimizer {name!r} has no option {", ".join(unknown)}; it has {known}.')
  for label, value in (('learning_rate', learning_rate), ('weight_decay', weight_decay)):
    if not callable(value) and not value >= 0:
      raise ValueError(f'{label} must not be negative, got {value}.')
  if clip_global_norm is not None and clip_per_tensor is not None:
    raise ValueError('Give clip_global_norm or clip_per_tensor, not both.')
  if no_decay is None:
    no_decay = (NDIM,) if name == 'lars' else ()

  steps = []
  if clip_global_norm is not None:
    steps.append(clip_by_global_norm(clip_global_norm))
  if clip_per_tensor is not None:
    steps.append(clip_by_tensor_norm(clip_per_tensor))
  decays = callable(weight_decay) or weight_decay > 0
  decay = (
    optax.add_decayed_weights(weight_decay, _outside(no_decay)) if decays else optax.identity()
  )
  steps += rules[name](decay, **options)
  if decoupled is not None:
    steps.append(decoupled)
  steps.append(scale_by_learning_rates(learning_rate, lr_overrides, lr_multipliers))
  optimizer = optax.chain(*steps)
  if frozen:
    trained = _outside(frozen)
    optimizer = optax.partition(
      {'trained': optimizer, 'frozen': optax.set_to_zero()},
      lambda tree: jax.tree.map(lambda t: 'trained' if t else 'frozen', trained(tree)),
    )

  patterns = {
    'no_decay': no_decay,
    'no_trust_ratio': options.get('no_trust_ratio', ()),
    'lr_overrides': [pattern for pattern, _ in lr_overrides],
    'lr_multipliers': [pattern for pattern, _ in lr_multipliers],
    'frozen': frozen,
  }

  def init(params: PyTree) -> optax.OptState:
    for argument, chosen in patterns.items():
      own = [p for p in chosen if not any(re.fullmatch(p, path) for path in elsewhere)]
      _require_matches(argument, chosen if isinstance(chosen, str) else own, params)
    return optimizer.init(params)

  return optax.GradientTransformation(init, optimizer.update)


def by_path(
  groups: Sequence[tuple[str, optax.GradientTransformation]],
) -> optax.GradientTransformation:
  """Returns the optimizer that updates each parameter by the first of `groups` that matches its path.

  Args:
    groups: pairs (pattern, optimizer), e.g. `[('head/.*', sgd), ('.*', adamw)]`. Clipping and other joint
      quantities of an optimizer are those of its own group.

  Raises:
    ValueError: from `init`, if a pattern matches no parameter, or none matches a parameter.
  """
  names = {f'{index}: {pattern}': pattern for index, (pattern, _) in enumerate(groups)}
  optimizers = {name: optimizer for name, (_, optimizer) in zip(names, groups)}
  pairs = [(pattern, name) for name, pattern in names.items()]

  def labels(params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: _first_match(pairs, path, leaf, default=''), params
    )

  chosen = optax.partition(optimizers, labels)

  def init(params: PyTree) -> optax.OptState:
    _require_matches('groups', list(names.values()), params)
    left = [
      _path_string(path)
      for path, name in jax.tree_util.tree_leaves_with_path(labels(params))
      if not name
    ]
    if left:
      raise ValueError(
        f'groups: no pattern matches {len(left)} parameter(s), such as {", ".join(left[:8])}.'
      )
    return chosen.init(params)

  return optax.GradientTransformation(init, chosen.update)


def replace_by_gradient() -> optax.GradientTransformation:
  """Returns the optimizer that writes gradients in place of parameters: `update = gradient - parameter`.

  For values that come out of the backward pass as gradients (`quantizers.init_float8`), as a group of
  `by_path`. Added to the parameter the update gives the gradient, up to rounding at the size of the larger
  of the two. A gradient that is not finite leaves the value as it was: it would be NaN ever after.
  """

  def update(updates: PyTree, params: PyTree | None) -> PyTree:
    if params is None:
      raise ValueError('replace_by_gradient needs the parameters.')
    return jax.tree.map(lambda g, p: jnp.where(jnp.isfinite(g), g - p, 0), updates, params)

  return optax.stateless(update)


def held(optimizer: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
  """Returns the optimizer that leaves parameters and its own state as they are for the first `steps` updates.

  As a group of `by_path`: DINO's last layer in the first epoch. Behind them it starts as if it were new, its
  count of steps from 0: give it schedules that are `steps` ahead.

  Raises:
    ValueError: for a negative number of steps.
  """
  if steps < 0:
    raise ValueError(f'steps must not be negative, got {steps}.')

  def init(params: PyTree) -> tuple[jax.Array, optax.OptState]:
    return jnp.zeros((), jnp.int32), optimizer.init(params)

  def update(updates: PyTree, state: tuple[jax.Array, optax.OptState], params: PyTree = None):
    count, own = state
    moved, new = optimizer.update(updates, own, params)
    pick = functools.partial(jnp.where, count >= steps)
    moved = jax.tree.map(lambda u: pick(u, jnp.zeros_like(u)), moved)
    return moved, (count + 1, jax.tree.map(pick, new, own))

  return optax.GradientTransformation(init, update)


def _sgd(decay, momentum: float = 0.9, nesterov: bool = False):
  return [decay, _trace(momentum, nesterov)]


def _lars(
  decay,
  momentum: float = 0.9,
  nesterov: bool = False,
  trust_coefficient: float = 0.001,
  no_trust_ratio: Sequence[str] = (NDIM,),
):
  adapt = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
  return [decay, optax.masked(adapt, _outside(no_trust_ratio)), _trace(momentum, nesterov)]


def _adamw(decay, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
  return [optax.scale_by_adam(betas[0], betas[1], eps), decay]


def _adam(decay, betas: tuple[Rate, float] = (0.9, 0.999), eps: float = 1e-8):
  first, second = betas
  if not callable(first):
    return [decay, optax.scale_by_adam(first, second, eps)]

  def update(updates, state, params=None):
    return optax.scale_by_adam(first(state.count), second, eps).update(updates, state, params)

  init = optax.scale_by_adam(0.9, second, eps).init  # the state is the same for all of them
  return [decay, optax.GradientTransformation(init, update)]


def _lamb(
  decay,
  betas: tuple[float, float] = (0.9, 0.999),
  eps: float = 1e-6,
  no_trust_ratio: Sequence[str] = (),
):
  adapt = optax.masked(optax.scale_by_trust_ratio(), _outside(no_trust_ratio))
  return [optax.scale_by_adam(betas[0], betas[1], eps), decay, adapt]


def _trace(momentum: float, nesterov: bool) -> optax.GradientTransformation:
  if not 0 <= momentum < 1:
    raise ValueError(f'momentum must be in [0, 1), got {momentum}.')
  return optax.trace(momentum, nesterov) if momentum else optax.identity()


def scale_by_learning_rates(
  learning_rate: Rate,
  overrides: Sequence[tuple[str, Rate]] = (),
  multipliers: Sequence[tuple[str, float]] = (),
) -> optax.GradientTransformation:
  """Multiplies each update by minus its parameter's learning rate.

  Args:
    learning_rate: a number or a schedule.
    overrides: pairs (pattern, number or schedule); the first match replaces `learning_rate`.
    multipliers: pairs (pattern, factor); the first match multiplies.
  """

  def update(updates, state, params=None):
    del params

    def scale(path, update):
      rate = _first_match(overrides, path, update, default=learning_rate)
      rate = rate(state.count) if callable(rate) else rate
      factor = _first_match(multipliers, path, update, default=1.0)
      return jnp.asarray(-rate * factor, update.dtype) * update

    scaled = jax.tree_util.tree_map_with_path(scale, updates)
    return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

  def init(params):
    del params
    return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

  return optax.GradientTransformation(init, update)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """Scales all gradients by `min(1, max_norm / (norm + 1e-6))`, as PyTorch's `clip_grad_norm_`."""
  _require_positive_norm(max_norm)

  def clip(updates, params=None):
    del params
    factor = _clip_factor(max_norm, jax.tree.leaves(updates))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

  return optax.stateless(clip)


def clip_by_tensor_norm(max_norm: float) -> optax.GradientTransformation:
  """Scales each gradient by its own `min(1, max_norm / (norm + 1e-6))`, as DINO's code."""
  _require_positive_norm(max_norm)

  def clip(updates, params=None):
    del params
    return jax.tree.map(lambda g: g * _clip_factor(max_norm, [g]).astype(g.dtype), updates)

  return optax.stateless(clip)


def _clip_factor(max_norm: float, gradients: Iterable[jax.Array]) -> jax.Array:
  wide = [g.astype(jnp.promote_types(g.dtype, jnp.float32)) for g in gradients]
  return jnp.minimum(1.0, max_norm / (optax.tree.norm(wide) + 1e-6))


def _require_positive_norm(max_norm: float) -> None:
  if not max_norm > 0:
    raise ValueError(f'The norm to clip at must be positive, got {max_norm}.')


def _path_string(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _matches(pattern: str, path: tuple[Any, ...], leaf: Any) -> bool:
  if pattern == NDIM:
    return jnp.ndim(leaf) <= 1
  return re.fullmatch(pattern, _path_string(path)) is not None


def _first_match(pairs: Sequence[tuple[str, Any]], path, leaf, default: Any) -> Any:
  return next((value for pattern, value in pairs if _matches(pattern, path, leaf)), default)


def _outside(patterns: Sequence[str]) -> Callable[[PyTree], PyTree]:
  """Returns the function that marks the leaves that no pattern matches."""

  def mask(tree: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: not any(_matches(pattern, path, leaf) for pattern in patterns), tree
    )

  return mask


def _require_matches(argument: str, patterns: Sequence[str], params: PyTree) -> None:
  """Raises ValueError if a pattern of `argument` matches no parameter."""
  if isinstance(patterns, str):
    raise ValueError(f'{argument} takes a list of patterns, got the string {patterns!r}.')
  leaves = jax.tree_util.tree_leaves_with_path(params)
  paths = [_path_string(path) for path, _ in leaves]
  for pattern in patterns:
    if pattern != NDIM and not any(_matches(pattern, path, leaf) for path, leaf in leaves):
      shown = difflib.get_close_matches(pattern, paths, 3, 0.4) or paths[:8]
      raise ValueError(
        f'{argument}: no parameter matches {pattern!r} (it must match the whole path). '
        f'Some of the {len(paths)} paths: {", ".join(shown)}.'
      )
