"""Sections that settings are made of: what every experiment has, and the recipe of a training."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import optax
from jax.sharding import PartitionSpec

from experiments.harness.overrides import entries
from experiments.harness.settings import found_by, free, section
from jaxlab import parallel
from jaxlab.training import make_optimizer, make_schedule
from jaxlab.training.schedules import per_epoch


@dataclasses.dataclass(frozen=True)
class Mesh:
  """The device mesh; -1 is the rest."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1

  def make(self) -> jax.sharding.Mesh:
    """Returns the mesh over all devices, see `meshes_over`."""
    return parallel.make_mesh(self.data, self.fsdp, self.tensor, _DEVICES.get())


_DEVICES: contextvars.ContextVar[Sequence[jax.Device] | None] = contextvars.ContextVar(
  'devices', default=None
)


@contextlib.contextmanager
def meshes_over(devices: Sequence[jax.Device]) -> Iterator[None]:
  """Within it `Mesh.make` lays meshes over these devices: settings are checked for a machine elsewhere."""
  token = _DEVICES.set(devices)
  try:
    yield
  finally:
    _DEVICES.reset(token)


@dataclasses.dataclass(frozen=True)
class Claim:
  """That `metric` of row `method` is at least `margin` better than that of row `baseline`."""

  statement: str
  metric: str
  baseline: str
  method: str
  margin: float = 0.0
  higher_is_better: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """What the settings of every paper have.

  Attributes:
    paper: name of the module in `experiments`.
    setting: name of the settings' file.
    seed: of all that is drawn.
    mesh: of the devices.
    eval_batch_size: of what is only evaluated.
    log_every: steps between rows of metrics.
    checkpoint_every: steps between checkpoints.
    claims: judged at the end.
    pictured: names of the rows that are drawn; none: all.
    reported: what the paper reports, in a sentence or two with data and network; the paper's page shows it
      next to what was measured.
  """

  paper: str = free('')
  setting: str = free('')
  seed: int = 0
  mesh: Mesh = free(default_factory=Mesh)
  eval_batch_size: int = free(512)
  log_every: int = free(100)
  checkpoint_every: int = free(1000)
  claims: tuple[Claim, ...] = free(())
  pictured: tuple[str, ...] = free(())
  reported: str = free('')

  def __str__(self) -> str:
    """Returns all settings, `key=value` a line."""
    return '\n'.join(f'{key}={text}' for key, text in entries(self))

  def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
    """What a notebook shows."""
    printer.text(str(self))

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from found_by('mesh', self.mesh.make)
    yield from check_batch(self.mesh, self.eval_batch_size, 'eval_batch_size')
    if not 0 <= self.seed < 2**32:
      yield f'seed={self.seed}: expected 0 to {2**32 - 1}.'
    for name in ('log_every', 'checkpoint_every'):
      if getattr(self, name) < 1:
        yield f'{name}={getattr(self, name)}: expected a positive number of steps.'


def check_batch(mesh: Mesh, size: int, name: str) -> Iterator[str]:
  """Yields a problem if a batch does not divide over the devices."""
  try:
    parallel.check_batch_size(size, mesh.make(), name)
  except ValueError as error:
    yield str(error)


def check_bits(
  bits: Sequence[str], low: int, high: int, in_float: int | None = None
) -> Iterator[str]:
  """Yields what is wrong with bit-widths such as '4w4a', or with there being none.

  Args:
    bits: of weights and activations.
    low: fewest bits of either.
    high: most.
    in_float: a further number of activation bits, which stands for float.
  """
  from jaxlab.quantizers import parse_bits  # a device that trains on features loads no networks

  if not bits:
    yield 'bits: expected at least one.'
  for name in dict.fromkeys(bits):
    if problems := list(found_by('bits', parse_bits, name)):
      yield from problems
      continue
    weights, inputs = parse_bits(name)
    if not (low <= weights <= high and (low <= inputs <= high or inputs == in_float)):
      other = '' if in_float is None else f', and {in_float} of activations for float'
      yield f'bits: {name!r} is outside of {low} to {high} bits{other}.'
  if len(set(bits)) < len(bits):
    yield f'bits={tuple(bits)}: expected each once.'


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Options of `jaxlab.training.make_optimizer`; None: its default."""

  name: str = 'sgd'
  weight_decay: float = 0.0
  momentum: float | None = None
  nesterov: bool | None = None
  trust_coefficient: float | None = None
  betas: tuple[float, float] | None = None
  eps: float | None = None
  no_decay: tuple[str, ...] | None = None
  lr_multipliers: tuple[tuple[str, float], ...] = ()
  clip_global_norm: float | None = None
  clip_per_tensor: float | None = None

  def make(
    self,
    learning_rate: float | optax.Schedule,
    frozen: Sequence[str] = (),
    decoupled: optax.GradientTransformation | None = None,
    **others: Any,
  ) -> optax.GradientTransformation:
    """Returns the optimizer; `frozen` are patterns of parameters that stay, `decoupled` as there.

    `others` are options in place of the section's, such as a schedule of the weight decay.
    """
    options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    given = {name: value for name, value in options.items() if value is not None}
    given |= {'frozen': tuple(frozen), 'decoupled': decoupled, **others}
    return make_optimizer(learning_rate=learning_rate, **given)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from found_by('name', self.make, 0.1)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Options of `jaxlab.training.make_schedule`; a `staircase` changes between epochs alone."""

  base: float
  name: str = 'cosine'
  end: float = 0.0
  decay_epochs: float | None = None
  warmup_epochs: float = 0.0
  warmup_start: float = 0.0
  warmup_inclusive: bool = False
  milestones: tuple[float, ...] = ()
  factor: float | tuple[float, ...] = 0.1
  staircase: bool = False

  def make(self, epochs: float, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate over steps."""
    options = dataclasses.asdict(self)
    if options.pop('staircase'):
      by_epoch = make_schedule(**options, epochs=epochs, steps_per_epoch=1)
      return per_epoch(by_epoch, steps_per_epoch)
    return make_schedule(**options, epochs=epochs, steps_per_epoch=steps_per_epoch)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How something is trained.

  Attributes:
    epochs: length.
    batch_size: of the whole mesh.
    schedule: of the learning rate.
    optimizer: with its own options.
    mixup: alpha; 0: none.
    cutmix: alpha; 0: none. With both, each step takes one of them with equal chances.
    mix_partners: of both, see `jaxlab.data.mixup`.
    microbatches: parts of a batch that gradients are accumulated over.
    precision: type of the computation; parameters stay in float32.
    partition: partition rules of parameters, pairs (pattern, axes of the mesh).
    eval_every: steps between evaluations on the test records; 0: none.
    best_metric: of the evaluation; the training ends with the variables that were best by it.
  """

  epochs: int
  batch_size: int
  schedule: Schedule
  optimizer: Optimizer = section(Optimizer)
  mixup: float = 0.0
  cutmix: float = 0.0
  mix_partners: Literal['permutation', 'flip'] = 'permutation'
  microbatches: int = 1
  precision: Literal['float32', 'bfloat16'] = 'float32'
  partition: tuple[tuple[str, tuple[str | None, ...]], ...] = free(())
  eval_every: int = free(0)
  best_metric: str = ''

  @property
  def program_options(self) -> dict[str, Any]:
    """Options of `jaxlab.training.make_program`."""
    return {
      'microbatches': self.microbatches,
      'compute_dtype': None if self.precision == 'float32' else self.precision,
      'rules': tuple((pattern, PartitionSpec(*axes)) for pattern, axes in self.partition),
    }

  def with_rules(self, rules: Sequence[tuple[str, PartitionSpec]]) -> 'Recipe':
    """Returns the recipe with further partition rules, of what a method keeps besides parameters."""
    own = tuple((pattern, tuple(spec)) for pattern, spec in rules)
    return dataclasses.replace(self, partition=(*self.partition, *own))

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    for name in ('epochs', 'batch_size', 'microbatches'):
      if getattr(self, name) < 1:
        yield f'{name}={getattr(self, name)}: expected at least 1.'
    if self.microbatches > 0 and self.batch_size % self.microbatches:
      yield f'microbatches={self.microbatches} does not divide batch_size={self.batch_size}.'
    for name in ('mixup', 'cutmix'):
      if getattr(self, name) < 0:
        yield f'{name}={getattr(self, name)}: expected alpha, or 0 for none.'
    if self.mix_partners != 'permutation' and not (self.mixup or self.cutmix):
      yield f'mix_partners={self.mix_partners!r} needs mixup or cutmix, both are 0.'
    if self.eval_every < 0:
      yield f'eval_every={self.eval_every}: expected a number of steps, or 0 for none.'
    if self.best_metric and not self.eval_every:
      yield f'best_metric={self.best_metric!r} needs eval_every, now 0.'
    if self.epochs > 0:
      yield from found_by('schedule', self.schedule.make, self.epochs, 10)
