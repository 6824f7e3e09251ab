"""Values over training: learning rate, weight decay, momentum of a teacher, temperature.

A schedule is a function `step -> value` (as optax has it) that works on Python and traced integers. The
first step is 0. Wrapping it in `per_epoch` makes a staircase, `with_warmup` puts a linear start before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

Schedule = optax.Schedule

constant = optax.constant_schedule


def with_warmup(
  schedule: Schedule, warmup_steps: int, start: float = 0.0, *, inclusive: bool = False
) -> Schedule:
  """Puts a linear warm-up of `warmup_steps` steps before a schedule.

  At step `s < warmup_steps` the value is `start + (schedule(0) - start) * s / warmup_steps`, afterwards
  `schedule(s - warmup_steps)`.

  Args:
    schedule: what follows; its step 0 is the first one after the warm-up.
    warmup_steps: length of the warm-up; 0 returns `schedule`.
    start: value at step 0.
    inclusive: divide by `warmup_steps - 1`, so that the warm-up ends on the peak, which comes twice:
      `linspace(start, peak, warmup_steps)`.

  Raises:
    ValueError: if `warmup_steps` is negative.
  """
  if warmup_steps < 0:
    raise ValueError(f'warmup_steps must not be negative, got {warmup_steps}.')
  if warmup_steps == 0:
    return schedule

  def warmed(step: ArrayLike) -> jax.Array:
    step = jnp.asarray(step)
    share = _float(step) / max(warmup_steps - inclusive, 1)
    ramp = start + (schedule(0) - start) * share
    return jnp.where(step < warmup_steps, ramp, schedule(jnp.maximum(step - warmup_steps, 0)))

  return warmed


def per_epoch(schedule: Schedule, steps_per_epoch: int) -> Schedule:
  """Makes a schedule over epochs a staircase over steps: `schedule(step // steps_per_epoch)`.

  Raises:
    ValueError: if `steps_per_epoch` is not positive.
  """
  if steps_per_epoch < 1:
    raise ValueError(f'steps_per_epoch must be positive, got {steps_per_epoch}.')
  return lambda step: schedule(jnp.asarray(step) // steps_per_epoch)


def linear_warmup(base: float, warmup_steps: int, start: float = 0.0) -> Schedule:
  """From `start` to `base` in `warmup_steps` steps, then constant."""
  return with_warmup(constant(base), warmup_steps, start)


def cosine(
  base: float,
  total_steps: int,
  end: float = 0.0,
  *,
  warmup_steps: int = 0,
  warmup_start: float = 0.0,
  warmup_inclusive: bool = False,
) -> Schedule:
  """Half a cosine from `base` to `end`, after a linear warm-up.

    end + (base - end) * (1 + cos(pi * i / n)) / 2,  i = step - warmup_steps, n = total_steps - warmup_steps

  The last step of training is `i = n - 1`, so `end` is reached only after it. `base < end` rises.

  Args:
    base: the value after the warm-up.
    total_steps: all steps, warm-up included.
    end: the value from step `total_steps` on.
    warmup_steps: length of the warm-up.
    warmup_start: value at step 0, if there is a warm-up.
    warmup_inclusive: see `with_warmup`.

  Raises:
    ValueError: if there is no step after the warm-up.

  Examples:
    >>> [round(float(cosine(1.0, 4)(step)), 3) for step in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
  """
  length = total_steps - warmup_steps
  if length < 1:
    raise ValueError(f'total_steps must exceed warmup_steps, got {total_steps} and {warmup_steps}.')

  def decay(step: ArrayLike) -> jax.Array:
    share = jnp.minimum(_float(step), length) / length
    return end + (base - end) * (1 + jnp.cos(math.pi * share)) / 2

  return with_warmup(decay, warmup_steps, warmup_start, inclusive=warmup_inclusive)


def cosine_per_epoch(base: float, epochs: int, steps_per_epoch: int, end: float = 0.0) -> Schedule:
  """`cosine` that changes between epochs only: `base * (1 + cos(pi * epoch / epochs)) / 2` for `end = 0`."""
  return per_epoch(cosine(base, epochs, end), steps_per_epoch)


def overlaid_cosine(
  base: float, epochs: int, warmup_epochs: int = 0, end: float = 0.0, warmup_start: float = 0.0
) -> Schedule:
  """Learning rate of each epoch as timm's scheduler has it: the cosine runs on under the warm-up.

    warmup_start + epoch (base - warmup_start) / warmup_epochs,  epoch < warmup_epochs
    end + (base - end) (1 + cos(pi epoch / epochs)) / 2,  epoch < epochs
    end,  from then on

  So the peak is below `base`, and a training of `epochs + warmup_epochs` ends with some at `end`. A schedule
  over epochs: `per_epoch` makes one over steps.

  Args:
    base: of both parts.
    epochs: of the cosine, from epoch 0 on.
    warmup_epochs: below `epochs`.
    end: last value.
    warmup_start: value of epoch 0, if there is a warm-up.

  Raises:
    ValueError: unless 0 <= warmup_epochs < epochs.

  Examples:
    >>> [round(float(overlaid_cosine(1.0, 4, 1)(epoch)), 3) for epoch in range(5)]
    [0.0, 0.854, 0.5, 0.146, 0.0]
  """
  if not 0 <= warmup_epochs < epochs:
    raise ValueError(
      f'warmup_epochs={warmup_epochs}: expected at least 0, and fewer than epochs={epochs}.'
    )

  def rate(epoch: ArrayLike) -> jax.Array:
    epoch = _float(epoch)
    ramp = warmup_start + epoch * (base - warmup_start) / max(warmup_epochs, 1)
    return jnp.where(epoch < warmup_epochs, ramp, cosine(base, epochs, end)(epoch))

  return rate


def displaced_cosine(
  base: float, epochs: float, steps_per_epoch: int, warmup_epochs: int = 0
) -> Schedule:
  """The cosine of IDMM's official code, whose phase a misplaced parenthesis shifts.

  With `c` the epoch as a fraction, `w` epochs of warm-up and `E` in all:
  `base * (1 + cos((pi c - w) / (E - w))) / 2` in place of `cos(pi (c - w) / (E - w))`; `base * c / w` before.
  So the cosine starts below its maximum, and rises again at the end: visibly in short trainings.

  Args:
    base: the learning rate.
    epochs: of the training, warm-up included.
    steps_per_epoch: optimizer steps in an epoch.
    warmup_epochs: whole epochs of the linear start; 0: none.

  Raises:
    ValueError: if there is no epoch after the warm-up, or it is not whole.

  References:
    Cao et al., Training Vision Transformers with Only 2040 Images, ECCV 2022.
  """
  if warmup_epochs != int(warmup_epochs) or not 0 <= warmup_epochs < epochs:
    raise ValueError(
      f'displaced_cosine takes whole warmup_epochs below epochs={epochs}, got {warmup_epochs}.'
    )

  def schedule(step: ArrayLike) -> jax.Array:
    step = jnp.asarray(step)
    place = _float(step) / steps_per_epoch
    phase = (math.pi * place - warmup_epochs) / (epochs - warmup_epochs)
    value = base * (1 + jnp.cos(phase)) / 2
    if not warmup_epochs:
      return value
    early = step // steps_per_epoch < warmup_epochs
    return jnp.where(early, base * place / warmup_epochs, value)

  return schedule


def shifted_cosine(base: float, epochs: int, warmup_epochs: int = 5) -> Schedule:
  """Learning rate of each epoch in Peer-learning's official code: a cosine that counts from behind its start.

    linspace(0, base, warmup_epochs)[t]                                t < warmup_epochs
    base * (1 + cos(pi * (t - warmup_epochs + 1) / epochs)) / 2        afterwards

  The first epoch has the rate 0 (without warm-up epochs there is none such), and as the phase is divided by
  all epochs, the cosine ends before it reaches 0: at a quarter of `base` where a third is warm-up.

  Args:
    base: the rate of the last warm-up epoch.
    epochs: of the training, warm-up included.
    warmup_epochs: whole epochs.

  Returns:
    A function `epoch -> rate`; see `per_epoch`.

  Raises:
    ValueError: if the warm-up is not whole, negative, or longer than the training.

  References:
    Sun et al., Webly Supervised Fine-Grained Recognition, ICCV 2021, the official code.

  Examples:
    >>> [round(float(shifted_cosine(1.0, 4, 2)(epoch)), 3) for epoch in range(4)]
    [0.0, 1.0, 0.854, 0.5]
  """
  if warmup_epochs != int(warmup_epochs) or not 0 <= warmup_epochs <= epochs:
    raise ValueError(
      f'shifted_cosine takes whole warmup_epochs, at most epochs={epochs}, got {warmup_epochs}.'
    )

  def schedule(epoch: ArrayLike) -> jax.Array:
    epoch = _float(epoch)
    ramp = base * epoch / max(warmup_epochs - 1, 1)
    phase = math.pi * (epoch - warmup_epochs + 1) / epochs
    return jnp.where(epoch < warmup_epochs, ramp, base * (1 + jnp.cos(phase)) / 2)

  return schedule


def drop_rate_ramp(drop_rate: float, ramp_epochs: int, epochs: int | None = None) -> Schedule:
  """Share of examples that small-loss selection leaves out in each epoch.

  `linspace(0, drop_rate, ramp_epochs)`, then constant: 0 in the first epoch, `drop_rate` from epoch
  `ramp_epochs - 1` on; with a ramp of one epoch from epoch 1 on.

  Args:
    drop_rate: the last value, in [0, 1).
    ramp_epochs: length of the ramp, at least 1.
    epochs: of the training, which the ramp must not exceed; None: not checked.

  Returns:
    A function `epoch -> share`; see `per_epoch`.

  Raises:
    ValueError: for values out of range.

  References:
    Han et al., Co-teaching, NeurIPS 2018; Sun et al., ICCV 2021.

  Examples:
    >>> [round(float(drop_rate_ramp(0.5, 3)(epoch)), 3) for epoch in range(4)]
    [0.0, 0.25, 0.5, 0.5]
  """
  if not 0 <= drop_rate < 1:
    raise ValueError(f'drop_rate must be in [0, 1), got {drop_rate}.')
  if ramp_epochs < 1 or (epochs is not None and ramp_epochs > epochs):
    longest = '' if epochs is None else f' and at most epochs={epochs}'
    raise ValueError(f'ramp_epochs must be at least 1{longest}, got {ramp_epochs}.')
  return with_warmup(constant(drop_rate), ramp_epochs, inclusive=True)


def switched(before: float, after: float, at: int) -> Schedule:
  """`before` up to step (or epoch) `at - 1`, `after` from `at` on: such as Adam's beta1, from 0.9 to 0.1.

  Raises:
    ValueError: if `at` is negative.

  Examples:
    >>> [round(float(switched(0.9, 0.1, 40)(epoch)), 3) for epoch in (0, 39, 40)]
    [0.9, 0.9, 0.1]
  """
  if at < 0:
    raise ValueError(f'at must not be negative, got {at}.')
  return lambda step: jnp.where(jnp.asarray(step) < at, *_float([before, after]))


def multistep(
  base: float, milestones: Sequence[int], factor: float | Sequence[float] = 0.1
) -> Schedule:
  """`base`, multiplied by `factor` at every milestone: from step `milestones[i]` on, `factor ** (i + 1)`.

  Several factors are of one milestone each.

  Raises:
    ValueError: if the milestones do not increase, or there are not as many factors.

  Examples:
    >>> schedule = multistep(1.0, (2, 4), (3.0, 0.1))
    >>> [round(float(schedule(step)), 3) for step in (1, 2, 4)]
    [1.0, 3.0, 0.3]
  """
  milestones = list(milestones)
  if milestones != sorted(set(milestones)):
    raise ValueError(f'milestones must increase, got {milestones}.')
  factors = [factor] * len(milestones) if jnp.ndim(factor) == 0 else list(factor)
  if len(factors) != len(milestones):
    raise ValueError(f'{len(milestones)} milestones need one factor or as many, got {factors}.')
  return optax.piecewise_constant_schedule(base, dict(zip(milestones, factors, strict=True)))


def make_schedule(
  name: str,
  base: float,
  *,
  epochs: float,
  steps_per_epoch: int,
  end: float = 0.0,
  decay_epochs: float | None = None,
  warmup_epochs: float = 0.0,
  warmup_start: float = 0.0,
  warmup_inclusive: bool = False,
  milestones: Sequence[float] = (),
  factor: float | Sequence[float] = 0.1,
) -> Schedule:
  """Builds a schedule over steps from lengths in epochs.

  Args:
    name: 'constant', 'cosine' (changes every step), 'cosine_per_epoch' (every epoch), 'displaced_cosine',
      'overlaid_cosine' (timm's, every epoch; the cosine ends at `epochs - warmup_epochs`, what follows stays
      at `end`), 'shifted_cosine' (every epoch) or 'multistep'.
    base: the value after the warm-up.
    epochs: length of the training, warm-up included; may be a fraction.
    steps_per_epoch: optimizer steps in an epoch.
    end: last value of a cosine.
    decay_epochs: of 'cosine', when it reaches its end, warm-up included; None: with the training. A longer
      one is cut off: the ramp-down of Mean Teacher's code.
    warmup_epochs: length of the linear warm-up, counted in steps; may be a fraction.
    warmup_start: value at step 0, if there is a warm-up.
    warmup_inclusive: see `with_warmup`.
    milestones: of 'multistep', in epochs from the start of the training.
    factor: of 'multistep', one for all milestones or one for each.

  Returns:
    A function `step -> value`.

  Raises:
    ValueError: for an unknown name, an option the schedule does not have, or impossible lengths.

  Examples:
    >>> schedule = make_schedule('cosine', 0.1, epochs=10, steps_per_epoch=50, warmup_epochs=1)
    >>> [round(float(schedule(step)), 4) for step in (0, 25, 50, 275)]
    [0.0, 0.05, 0.1, 0.05]
  """
  known = ('constant', 'cosine', 'cosine_per_epoch', 'displaced_cosine', 'shifted_cosine')
  known += ('overlaid_cosine', 'multistep')
  if name not in known:
    raise ValueError(f'Unknown schedule {name!r}: choose {", ".join(known[:-1])} or {known[-1]}.')
  if end and not name.startswith(('cosine', 'overlaid')):
    raise ValueError(f'end={end} belongs to the cosine schedules, not to {name!r}.')
  if decay_epochs is not None and (name != 'cosine' or decay_epochs <= 0):
    raise ValueError(
      f'decay_epochs={decay_epochs} belongs to the schedule cosine, not to {name!r}, and is positive.'
    )
  if bool(milestones) != (name == 'multistep'):
    raise ValueError(
      f'milestones belong to the schedule multistep and to it alone, got {milestones!r} for {name!r}.'
    )
  if steps_per_epoch < 1 or epochs <= 0:
    raise ValueError(
      f'epochs and steps_per_epoch must be positive, got {epochs} and {steps_per_epoch}.'
    )
  if warmup_epochs > epochs:
    raise ValueError(f'warmup_epochs={warmup_epochs} is longer than the training, epochs={epochs}.')
  if name == 'overlaid_cosine':
    if warmup_inclusive or int(warmup_epochs) != warmup_epochs or int(epochs) != epochs:
      raise ValueError(
        f'overlaid_cosine takes whole epochs, no warmup_inclusive; got epochs={epochs}, '
        f'warmup_epochs={warmup_epochs}.'
      )
    length = int(epochs - warmup_epochs)
    if not 0 <= warmup_epochs < length:
      raise ValueError(
        f'overlaid_cosine: warmup_epochs={warmup_epochs:g}: expected at least 0, and fewer than half of '
        f'epochs={epochs:g}, for its cosine lasts the epochs less those of the warm-up.'
      )
    rate = overlaid_cosine(base, length, int(warmup_epochs), end, warmup_start)
    return per_epoch(rate, steps_per_epoch)
  if name in ('displaced_cosine', 'shifted_cosine'):
    if warmup_start or warmup_inclusive:
      raise ValueError(f'{name} has a warm-up of its own: no warmup_start, no warmup_inclusive.')
    if name == 'shifted_cosine':
      return per_epoch(shifted_cosine(base, math.ceil(epochs), warmup_epochs), steps_per_epoch)
    return displaced_cosine(base, epochs, steps_per_epoch, warmup_epochs)
  warmup_steps = round(warmup_epochs * steps_per_epoch)
  if name == 'constant':
    schedule = constant(base)
  elif name == 'cosine':
    length = epochs if decay_epochs is None else decay_epochs
    schedule = cosine(base, round(length * steps_per_epoch) - warmup_steps, end)
  elif name == 'cosine_per_epoch':
    whole = math.ceil(epochs) - round(warmup_epochs)
    if round(warmup_epochs) != warmup_epochs:
      raise ValueError(f'cosine_per_epoch takes whole warmup_epochs, got {warmup_epochs}.')
    schedule = cosine_per_epoch(base, whole, steps_per_epoch, end)
  else:
    steps = [round(milestone * steps_per_epoch) - warmup_steps for milestone in milestones]
    if steps[0] < 0:
      raise ValueError(f'The first of milestones={milestones} lies within the warm-up.')
    schedule = multistep(base, steps, factor)
  return with_warmup(schedule, warmup_steps, warmup_start, inclusive=warmup_inclusive)


def _float(step: ArrayLike) -> jax.Array:
  """Returns a step count in the default float type (float64 under x64)."""
  return jnp.asarray(step, jnp.result_type(float))
