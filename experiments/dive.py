"""DiVE: Distilling Virtual Examples for Long-tailed Recognition (He, Wu & Wei, ICCV 2021).

A teacher's prediction for a head image supplies small shares of tail classes: virtual examples. Summed over
the training set they form a distribution; where it is flatter than the class counts, distillation helps the
tail. So: a teacher of balanced softmax, flattened by temperature and power, and a student that learns from it
and from the balanced softmax. Claim: far above distillation of a plain teacher under the same budget.

  python -m experiments.dive
  python -m experiments.dive --config=cifar100_lt --workdir=DIR
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import data as harness_data
from experiments.harness import launcher, pictures, settings
from experiments.harness.results import row
from experiments.harness.runs import Run, Variables, say
from experiments.harness.sections import Recipe
from experiments.harness.settings import free
from experiments.harness.supervised import Loss
from experiments.protocols import long_tail, long_tail_data, stages
from experiments.protocols.classification_losses import distillation
from experiments.protocols.long_tail_data import Facts
from experiments.protocols.stages import Stage
from jaxlab import data, losses, parallel
from jaxlab.losses.distillation import flatten_distribution


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
  """A network that learns from a teacher.

  Attributes:
    title: name of its row.
    loss: 'kd' (plain distillation, of the cross-entropy teacher) or 'dive' (of the balanced one).
    temperature: of both sides.
    power: of DiVE's flattening.
    alpha: share of the teacher.
  """

  title: str = free()
  loss: Literal['kd', 'dive']
  temperature: float = 2.0
  power: float = 0.5
  alpha: float = 0.5


@dataclasses.dataclass(frozen=True)
class Virtual:
  """Whose virtual examples are counted, and at which temperatures."""

  teachers: tuple[str, ...] = ('ce', 'bsce')
  temperatures: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 6.0)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    values = np.asarray(self.temperatures)
    if not values.size or values.min() <= 0 or np.any(np.diff(values) <= 0):
      yield f'temperatures={self.temperatures}: expected numbers > 0 in increasing order.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(long_tail.Settings):
  """Settings of DiVE.

  Attributes:
    runs: rows among 'ce', 'bsce' (the teachers) and `students`.
    network: recipe of teachers and students.
    students: by the names of their runs.
    virtual: virtual examples.
  """

  runs: tuple[str, ...] = ('ce', 'bsce', 'kd', 'dive')
  network: Recipe
  students: dict[str, Student]
  virtual: Virtual = free(default_factory=Virtual)


def dive(own: Student, counts: np.ndarray) -> Loss:
  """Returns the paper's loss: balanced softmax, and KL to the flattened virtual examples of the teacher."""

  def loss(logits, labels, seen):
    options = {'temperature': own.temperature, 'power': own.power, 'alpha': own.alpha}
    return losses.dive_loss(logits, seen.teacher, labels, counts, **options)[0]

  return loss


def table(config: Settings, facts: Facts) -> dict[str, Stage]:
  """Returns two teachers and their students, all of one recipe."""

  def network(title, role, *loss, **fields):
    return long_tail.stage(config, facts, title, role, config.network, *loss, **fields)

  found = {
    'ce': network('CE', 'baseline'),
    'bsce': network('BSCE', 'baseline', 'balanced_softmax'),
  }
  for name, own in config.students.items():
    if own.loss == 'kd':
      loss = distillation(temperature=own.temperature, alpha=own.alpha)
      role, teacher = 'baseline', 'ce'
    else:
      loss, role, teacher = dive(own, facts.counts), 'method', 'bsce'
    found[name] = network(own.title, role, loss, teacher=teacher, decides={'student': own})
  return found


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  own = table(config, long_tail_data.nominal_facts(config.data))
  yield from long_tail.check(config, own, ['class counts'], [r'virtual_(rise|tau\d+(\.\d+)?)'])
  yield from settings.found_by(
    'virtual.teachers', stages.needed, config, own, config.virtual.teachers
  )


def programs(config: Settings, facts: Facts | None = None) -> dict[str, Run]:
  """Returns the trainings by name."""
  facts = facts or long_tail_data.nominal_facts(config.data)
  return stages.programs(config, table(config, facts))


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains teachers, students and baselines; measures their recalls and the teachers' virtual examples.

  Metrics `virtual_tau<t>` of `config.virtual.teachers` are `flatness` at temperature t; `virtual_rise` is the
  smallest step between successive temperatures. The row 'class counts' holds what is to be beaten. They are
  not measured where there is no many-shot or no few-shot class.
  """
  config = long_tail_data.with_features(config)
  sources = long_tail_data.load(config)
  own = table(config, sources.facts)
  settings.require(stages.check(config, own))
  rows = long_tail.Comparison(config, own, sources, workdir)
  rows.add_stages()
  groups, counts = config.groups.of(sources.facts.counts), sources.facts.counts
  if empty := [name for name in ('many', 'few') if not groups[name].any()]:
    say(f'virtual examples: not measured, no class has {" or ".join(empty)} images')
    return rows.finish()
  curves, temperatures = {}, config.virtual.temperatures
  for name in config.virtual.teachers:
    sums = virtual_examples(config, own[name], rows.variables(name), sources.train)
    curves[own[name].title] = [flatness(values, groups) for values in sums]
  level = flatness(counts, groups)
  rows.rows.append(row('class counts', 'reference', {}))
  for item in rows.rows:
    constant = [level] * len(temperatures) if item['name'] == 'class counts' else None
    if (curve := curves.get(item['name'], constant)) is not None:
      named = zip(temperatures, curve, strict=True)
      item['metrics'] |= {f'virtual_tau{t:g}': value for t, value in named}
      if len(curve) > 1:
        item['metrics']['virtual_rise'] = float(np.min(np.diff(curve)))
  draw(config, curves, level, workdir / 'virtual_examples.png')
  extra = [*(f'virtual_tau{t:g}' for t in temperatures), 'virtual_rise']
  return rows.finish(extra, note='; virtual_*: few over many')


def flatness(virtual: jax.typing.ArrayLike, groups: Mapping[str, np.ndarray]) -> float:
  """Returns the mean of the few-shot classes over that of the many-shot ones: 1 is level."""
  virtual = np.asarray(virtual)
  return float(virtual[groups['few']].mean() / virtual[groups['many']].mean())


def virtual_examples(
  config: Settings, own: Stage, variables: Variables, source: data.Source
) -> np.ndarray:
  """Returns how many virtual examples of each class a teacher sees in the training set.

  The sum of its soft targets at each of `config.virtual.temperatures`, float64 `[temperatures, num_classes]`,
  batch by batch: the logits of all records need not fit anywhere.
  """
  model, task = stages.classifier(config, own), config.task

  @jax.jit
  def sums(variables, batch):
    logits = stages.forward(variables, batch, model=model, task=task)
    soft = [flatten_distribution(logits, t) for t in config.virtual.temperatures]
    return jnp.sum(jnp.stack(soft) * batch['mask'][:, None], axis=1)

  sharding, total = parallel.batch_sharding(config.mesh.make()), 0.0
  index, count = data.process_shard(sharding, config.eval_batch_size)
  for batch in data.epoch_batches(
    source,
    config.eval_batch_size,
    process_index=index,
    process_count=count,
    **harness_data.reading(config.data, 'train'),
  ):
    batch = {field: batch[field] for field in ('image', 'mask')}
    total += np.asarray(sums(variables, data.to_device(batch, sharding)), np.float64)
  return total


def draw(
  config: Settings, curves: Mapping[str, list[float]], level: float, path: pathlib.Path
) -> None:
  """Draws how level the teachers' virtual examples are, over the temperature."""
  with pictures.drawn(path, size=(6, 3.8)) as axis:
    for name, curve in curves.items():
      axis.plot(config.virtual.temperatures, curve, marker='o', label=f'teacher: {name}')
    axis.axhline(level, color='gray', linestyle=':', label='class counts')
    axis.set_xlabel('temperature')
    axis.set_ylabel('virtual examples, few over many')
    axis.set_title(pictures.title(config))
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)


if __name__ == '__main__':
  launcher.main('dive')
