"""QFD: Quantized Feature Distillation for Network Quantization (Zhu, He & Wu, AAAI 2023).

A quantized network imitates a quantized target more easily than a float one. So the teacher is a float
network whose penultimate features alone are quantized, to a few bits, and fine-tuned so; the student,
weights and activations quantized, learns the labels and these features. Claim: better than training under
quantization without a teacher, and than distillation of logits or of float features, the more so the fewer
the bits.

  python -m experiments.qfd
  python -m experiments.qfd --config=embedded_vit
  python -m experiments.qfd --config=imagenet_resnet18 --workdir=DIR
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
import optax
from flax import linen as nn

from experiments.harness import launcher, networks, pictures, results
from experiments.harness.networks import feature_path
from experiments.harness.results import row
from experiments.harness.runs import Run, Variables, say
from experiments.harness.sections import Optimizer, Recipe, Schedule, check_bits
from experiments.harness.settings import section
from experiments.harness.supervised import Loss, Seen, cross_entropy
from experiments.protocols import quantized_training
from experiments.protocols.quantized_training import (
  FLOAT,
  Stage,
  Trained,
  feature_shape,
)
from jaxlab import losses, models, quantizers
from jaxlab.quantizers import Quantized, Rule
from jaxlab.training import by_path

Array = jax.Array

RANGES = 'learned_ranges'
IN_FLOAT = 32  # activation bits that leave them as they are
TEACHER = 'teacher'
# What is measured at every bit-width, and what at the last one alone.
METRICS, COSTS = ('accuracy', 'feature_error'), ('time', 'memory')


@dataclasses.dataclass(frozen=True)
class Target:
  """The quantizer of the teacher's features.

  Attributes:
    bits: of the teacher that QFD's rows learn from; further numbers make further rows.
    units: see `quantizers.quantize_feature`.
    trained: 'all' of the teacher, or its 'ranges' alone.
  """

  bits: tuple[int, ...] = (4,)
  units: Literal['feature', 'scaled'] = 'feature'
  trained: Literal['all', 'ranges'] = 'all'

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not self.bits or not all(1 <= bits <= 16 for bits in self.bits):
      yield f'bits={self.bits}: expected numbers from 1 to 16, at least one.'
    if len(set(self.bits)) < len(self.bits):
      yield f'bits={self.bits}: expected each once.'


@dataclasses.dataclass(frozen=True)
class Ranges:
  """How learned ranges are trained: with an optimizer of their own."""

  optimizer: Optimizer = dataclasses.field(default_factory=lambda: Optimizer('adamw'))
  schedule: Schedule = dataclasses.field(default_factory=lambda: Schedule(1e-5))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(quantized_training.Settings):
  """Settings of QFD; `recipe` is that of all students, and bits such as '1w32a' leave activations in float.

  Attributes:
    target: the quantizer of the teacher's.
    teacher: recipe of its fine-tuning.
    ranges: how their ranges learn.
    delta: of EWGS's gradient of rounding; 0 is straight-through.
    weight: of what is distilled.
    weights: further weights, each a row of QFD.
    temperature: of distilled logits.
    rows: students besides QFD's: 'baseline' (labels alone), 'logits' and 'features' (distilled from the float
      network).
  """

  bits: tuple[str, ...] = ('2w2a',)
  target: Target = section(Target)
  teacher: Recipe
  ranges: Ranges = section(Ranges)
  delta: float = 0.0
  weight: float = 0.5
  weights: tuple[float, ...] = ()
  temperature: float = 1.0
  rows: tuple[Literal['baseline', 'logits', 'features'], ...] = ('baseline', 'logits', 'features')

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    yield from check_bits(self.bits, 1, 16, IN_FLOAT)
    for name in ('delta', 'weight'):
      if not getattr(self, name) >= 0:
        yield f'{name}={getattr(self, name)}: expected a number that is not negative.'
    if not all(weight >= 0 for weight in self.weights):
      yield f'weights={self.weights}: expected numbers that are not negative.'
    if len({self.weight, *self.weights}) <= len(self.weights):
      yield f'weights={self.weights}: expected each once, and other ones than weight={self.weight}.'
    if not self.temperature > 0:
      yield f'temperature={self.temperature}: expected a positive number.'


def first_ranges(
  model: nn.Module, variables: Variables, inputs: Array, rules: Sequence[Rule], **options: Any
) -> Quantized:
  """Returns the network with ranges of a first batch, behind the statistics that training has of it."""
  train = 'batch_stats' in variables
  found = quantizers.range_qat(model, variables, inputs, rules, train=train, **options)
  return dataclasses.replace(found, kwargs={})


def quantized_features(
  config: Settings, bits: int, model: nn.Module, variables: Variables, inputs: Array
) -> Quantized:
  """Returns the teacher as it starts: the float network with quantized features."""
  rules = [Rule(models.any_of([feature_path(model)]), 'output', bits, learned=True)]
  return first_ranges(model, variables, inputs, rules, units=config.target.units)


def inner_layers(model: nn.Module) -> list[str]:
  """Returns the layers of a student that are quantized: all but the first and the last."""
  parts = models.anatomy(model)
  return [path for path in parts.layers if path not in parts.edges]


def quantized_student(
  config: Settings, bits: str, model: nn.Module, variables: Variables, inputs: Array
) -> Quantized:
  """Returns the student as it starts."""
  weights, activations = quantizers.parse_bits(bits)
  rules = quantizers.uniform_rules(
    weights, None if activations == IN_FLOAT else activations,
    path=models.any_of(inner_layers(model)), learned=True,
  )  # fmt: skip
  return first_ranges(model, variables, inputs, rules, delta=config.delta)


def features_distilled(weight: float, path: str) -> Loss:
  """Returns cross-entropy plus the distance to the teacher's features: QFD's if those are quantized."""

  def loss(logits: Array, labels: Array, seen: Seen) -> Array:
    features = seen.captured[path], seen.taught[path]
    return losses.qfd_loss(logits, labels, *features, weight=weight)[0]

  return loss


def logits_distilled(weight: float, temperature: float) -> Loss:
  """Returns cross-entropy plus the divergence from the teacher's predictions."""

  def loss(logits: Array, labels: Array, seen: Seen) -> Array:
    told = losses.distillation_loss(logits, seen.teacher, temperature)
    return cross_entropy(logits, labels, seen) + weight * told

  return loss


def optimizer(config: Settings, recipe: Recipe, *, frozen: bool = False) -> Any:
  """Returns `schedule -> optimizer` of parameters and ranges; `frozen`: of ranges alone."""
  steps = config.network.data.train_size // recipe.batch_size

  def make(schedule: optax.Schedule) -> optax.GradientTransformation:
    ranges = config.ranges.optimizer.make(config.ranges.schedule.make(recipe.epochs, steps))
    rest = optax.set_to_zero() if frozen else recipe.optimizer.make(schedule)
    return by_path([(f'{RANGES}/.*', ranges), ('.*', rest)])

  return make


def table(config: Settings, widths: Sequence[str] | None = None) -> dict[str, Stage]:
  """Returns teachers, and the students of every bit-width.

  Args:
    config: the settings.
    widths: bit-widths; None: all.
  """
  path = feature_path(networks.create(config.network.model))
  found = {}
  for bits in config.target.bits:
    own = dataclasses.asdict(config.target) | {'bits': bits, 'ranges': config.ranges}
    found[f'{TEACHER}_{bits}'] = Stage(
      f'{TEACHER}, {bits}-bit features', 'reference', config.teacher,
      functools.partial(quantized_features, config, bits), (RANGES,), decides=own,
      optimizer=optimizer(config, config.teacher, frozen=config.target.trained == 'ranges'),
    )  # fmt: skip

  for bits in config.bits if widths is None else widths:
    student = functools.partial(
      Stage, recipe=config.recipe, learned=(RANGES,), optimizer=optimizer(config, config.recipe),
      quantize=functools.partial(quantized_student, config, bits),
    )  # fmt: skip
    own = {'bits': bits, 'ranges': config.ranges, 'delta': config.delta}
    if 'baseline' in config.rows:
      found[f'baseline_{bits}'] = student('QAT', 'baseline', decides=own)
    if 'logits' in config.rows:
      options = {'weight': config.weight, 'temperature': config.temperature}
      found[f'logits_{bits}'] = student(
        'logits distilled', 'baseline', teacher=FLOAT, loss=logits_distilled(**options),
        decides={**own, **options},
      )  # fmt: skip
    first, *others = config.target.bits
    rows = [('features', 'float features distilled', 'baseline', FLOAT, config.weight)]
    rows = rows if 'features' in config.rows else []
    rows.append((f'qfd_{first}', 'QFD', 'method', f'{TEACHER}_{first}', config.weight))
    for more in others:
      names = f'qfd_{more}', f'QFD, {more}-bit features', 'reference', f'{TEACHER}_{more}'
      rows.append((*names, config.weight))
    for weight in config.weights:
      names = f'qfd_weight_{weight:g}', f'QFD, weight {weight:g}', 'reference', f'{TEACHER}_{first}'
      rows.append((*names, weight))
    for name, title, role, teacher, weight in rows:
      found[f'{name}_{bits}'] = student(
        title, role, teacher=teacher, captured=(path,), loss=features_distilled(weight, path),
        decides={**own, 'weight': weight, 'distilled': 'features'},
      )  # fmt: skip
  # For its cost.
  found['float_again'] = Stage('float', 'reference', config.recipe, quantized_training.in_float)
  return found


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  recipes = {'recipe': config.recipe, 'teacher': config.teacher}
  found = list(quantized_training.check(config, recipes))
  yield from found
  if any(problem.startswith('network.model') for problem in found):
    return
  if isinstance(feature_shape(config), tuple):
    yield 'network.model: a distilled transformer has two penultimate features; QFD learns from one.'
  if not inner_layers(networks.create(config.network.model)):
    yield 'network.model: the network has no layers but the first and the last, which stay in float.'
  metrics = [rf'({"|".join(config.bits)})_({"|".join(METRICS)})', '|'.join(COSTS)]
  rows = [re.escape(stage.title) for stage in table(config).values()]
  yield from results.check_claims(config, rows, metrics)


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings by name: of the float network, of teachers, and of students at the last bit-width.

  Those of other widths are the same programs, if their activations are quantized, too: bits are arrays.
  """
  del facts
  found = table(config, config.bits[-1:])
  del found['float_again']  # measured, not trained
  return quantized_training.programs(config, found)


def feature_error(features: np.ndarray, target: np.ndarray) -> float:
  """Returns the squared distance of a student's features from its teacher's, over the variance of these."""
  error = np.mean(np.square(features - target))
  return float(error / np.mean(np.square(target - target.mean(0))))


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains teachers and students, and compares them; `feature_error` is that of the test images."""
  nets = Trained(config, table(config), workdir)
  costs = nets.costs(table(config, config.bits[-1:]), 'float_again')
  outputs = functools.cache(lambda name: nets.outputs(nets[name]))
  exact = quantized_training.accuracy(outputs(FLOAT))
  say(f'float: accuracy {exact:.4g}')
  found = {f'{bits}_accuracy': exact for bits in config.bits}
  rows: dict[str, dict[str, Any]] = {'float': row('float', 'reference', found)}
  for name, stage in nets.table.items():
    if name == 'float_again':
      continue
    found = {'accuracy': quantized_training.accuracy(outputs(name))}
    if stage.captured:
      both = (outputs(own)['features'] for own in (name, stage.teacher))
      found['feature_error'] = feature_error(*both)
    say(f'{stage.title} ({name}): ' + ', '.join(f'{k} {v:.4g}' for k, v in found.items()))
    item = rows.setdefault(stage.title, row(stage.title, stage.role, {}))
    for bits in config.bits if name.startswith(TEACHER) else [name.rpartition('_')[2]]:
      item['metrics'] |= {f'{bits}_{metric}': value for metric, value in found.items()}
    item['metrics'] |= costs.get(name, {})
  panels = {f'accuracy at {bits} (%)': {'accuracy': f'{bits}_accuracy'} for bits in config.bits}
  pictures.bars(workdir / 'accuracy.png', config, list(rows.values()), panels)
  shown = [f'{bits}_{metric}' for bits in config.bits for metric in METRICS]
  note = 'accuracy in %; time and memory of a step over those of the float network'
  return results.results(config, list(rows.values()), [*shown, *COSTS], note)


if __name__ == '__main__':
  launcher.main('qfd')
