"""mWh: Mixup Without Hesitation (Yu, Wang & Wu, ICIG 2021).

Mixup explores the space of inputs to the very end, wants long training and a search for its alpha. mWh mixes
every batch at first, then every other one, then with a probability that falls to 0: exploration turns into
exploitation, at the same cost. Claim: better than mixup in the same epochs, and less sensitive to alpha; for
CutMix, too.

  python -m experiments.mwh
  python -m experiments.mwh --config=cifar100_preact_resnet18 --workdir=DIR
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks, pictures, results, runs
from experiments.harness.networks import Network
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Experiment, check_batch
from experiments.harness.settings import found_by
from jaxlab import data
from jaxlab.training import map_batches

Array = jax.Array

METRICS = ('accuracy', 'train_loss', 'lost')
SCHEDULES = ('none', 'always', 'mwh', 'reverse_mwh')
MIXES = {'mixup': data.mixup, 'cutmix': data.cutmix}


@dataclasses.dataclass(frozen=True)
class Mixing:
  """When and how batches are mixed.

  Attributes:
    schedule: 'none'; 'always'; 'mwh'; or 'reverse_mwh', the same backwards in time (our control).
    kind: 'mixup' or 'cutmix'.
    alpha: of the Beta distribution of the shares.
    own_half: whether an image is at least half of its mixture, as in the code of mixup; of the same law for
      unordered pairs.
    p: share of the training in which 'mwh' mixes all batches.
    q: share from which on it fades; every other batch is mixed between.
    granularity: whether 'mwh' counts batches (the paper) or epochs (its code).
    title: of the row; empty: the key of the setting.
  """

  schedule: Literal[*SCHEDULES] = 'mwh'
  kind: Literal['mixup', 'cutmix'] = 'mixup'
  alpha: float = 0.5
  own_half: bool = True
  p: float = 0.6
  q: float = 0.9
  granularity: Literal['epoch', 'batch'] = 'batch'
  title: str = ''

  def probability(self, total_steps: int, steps_per_epoch: int) -> Callable[[Array], Array]:
    """Returns the probability of mixing over the steps."""
    if self.schedule in ('none', 'always'):
      return lambda step: 0.0 * step + (self.schedule == 'always')
    return functools.partial(
      data.mwh_mix_probability, total_steps=total_steps, p=self.p, q=self.q,
      granularity=self.granularity, steps_per_epoch=steps_per_epoch,
      reverse=self.schedule == 'reverse_mwh',
    )  # fmt: skip

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not self.alpha >= 0:
      yield f'alpha={self.alpha}: expected at least 0; with 0 nothing is mixed.'
    yield from found_by('p, q', data.mwh_mix_probability, 0, 10, self.p, self.q)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of mWh.

  Attributes:
    network: model, data, augmentation before mixing, and the recipe of all rows.
    mixing: rows by name.
    runs: names of those that are trained; none: all.
    clean_records: first training records on which `train_loss` is measured; None: all.
  """

  network: Network
  mixing: dict[str, Mixing] = dataclasses.field(default_factory=lambda: {'mwh': Mixing()})
  runs: tuple[str, ...] = ()
  clean_records: int | None = None

  @property
  def steps_per_epoch(self) -> int:
    """Optimizer steps of an epoch."""
    return (self.network.data.train_size or 0) // self.network.recipe.batch_size

  @property
  def total_steps(self) -> int:
    """Optimizer steps of a training."""
    return self.network.recipe.epochs * self.steps_per_epoch


def mixer(config: Settings, own: Mixing) -> Callable[..., tuple[Array, Array, Array]] | None:
  """Returns `(key, images, step) -> (images, partners, share)` for all stages at once; None: no mixing."""
  if own.schedule == 'none' or own.alpha == 0:
    return None
  mix = functools.partial(MIXES[own.kind], alpha=own.alpha, own_half=own.own_half)
  probability = own.probability(config.total_steps, config.steps_per_epoch)

  def mixed(key: Array, images: Array, step: Array) -> tuple[Array, Array, Array]:
    return data.mix_with_probability(key, images, probability(step), mix)

  return mixed


def training(config: Settings, name: str) -> Run:
  """Returns the training of a row."""
  own = config.mixing[name]
  decides = {'mixing': dataclasses.replace(own, title='')}
  title = titles(config)[name]
  return networks.training(config, config.network, title, mix=mixer(config, own), decides=decides)


def titles(config: Settings) -> dict[str, str]:
  """Returns the rows' titles by their names."""
  return {name: own.title or name for name, own in config.mixing.items()}


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  network, named = config.network, titles(config)
  yield from results.check_claims(config, [*named.values()], METRICS)
  if network.recipe is None:
    yield 'network.recipe: missing; rows are trained from scratch, alike.'
    return
  for name in ('mixup', 'cutmix'):
    if getattr(network.recipe, name):
      yield f'network.recipe.{name}={getattr(network.recipe, name)}: rows of mixing say what is mixed.'
  if not config.mixing or len({*named.values()}) < len(named):
    yield f'mixing: expected rows with titles that differ, got {[*named.values()]}.'
  if unknown := [name for name in config.runs if name not in config.mixing]:
    yield f'runs: {unknown} are none of mixing, {", ".join(config.mixing)}.'
  if config.clean_records is not None and config.clean_records < 1:
    yield f'clean_records={config.clean_records}: expected at least 1, or none for all.'
  yield from check_batch(config.mesh, network.recipe.batch_size, 'network.recipe.batch_size')
  if config.steps_per_epoch < 1:
    size, batch = network.data.train_size, network.recipe.batch_size
    yield f'network.data.train_size={size}: expected at least network.recipe.batch_size={batch}.'
    return
  schedule = network.recipe.schedule.make
  yield from found_by('recipe.schedule', schedule, network.recipe.epochs, config.steps_per_epoch)


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings of the rows: those of mixup by schedule and alpha, then those of CutMix."""
  del facts

  def place(name: str) -> tuple[Any, ...]:
    own = config.mixing[name]
    return own.kind != 'mixup', SCHEDULES.index(own.schedule), own.alpha

  return {name: training(config, name) for name in sorted(config.runs or config.mixing, key=place)}


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains the rows alike, and compares what they say of test images and of plain training images."""
  sources = {split: harness_data.load(config.network.data, split) for split in ('train', 'test')}
  judge, found, histories = evaluator(config, sources), {}, {}
  for name, own in programs(config).items():
    along = lambda variables: {'test_accuracy': judge(variables, 'test')['accuracy']}  # noqa: E731
    trained = runs.train(own, sources['train'], workdir / name, evaluate=along)
    test, train = (judge(trained.variables, split) for split in ('test', 'train'))
    found[name] = {'accuracy': test['accuracy'], 'train_loss': train['loss']}
    histories[name] = trained.history
  for name, less in lost(config, found).items():
    found[name]['lost'] = less
  named = titles(config)
  rows = [results.row(named[name], role(config, name), own) for name, own in found.items()]
  draw(config, histories, workdir / 'schedules.png')
  panels = {'test accuracy (%)': {'': 'accuracy'}, 'training loss': {'': 'train_loss'}}
  pictures.bars(workdir / 'accuracy.png', dataclasses.replace(config, pictured=()), rows, panels)
  return results.results(config, rows, METRICS, 'accuracy and what a larger alpha lost in %')


def role(config: Settings, name: str) -> str:
  """Returns the role of a row."""
  return 'method' if config.mixing[name].schedule == 'mwh' else 'baseline'


def lost(config: Settings, found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """Returns how much accuracy rows lose against the row with the smallest alpha, all else being equal."""
  alike: dict[Any, list[str]] = {}
  for name in found:
    key = dataclasses.replace(config.mixing[name], alpha=0.0, title='')
    alike.setdefault(key, []).append(name)
  less = {}
  for names in alike.values():
    first, *others = sorted(names, key=lambda name: config.mixing[name].alpha)
    less |= {name: found[first]['accuracy'] - found[name]['accuracy'] for name in others}
  return less


def evaluator(
  config: Settings, sources: Mapping[str, data.Source]
) -> Callable[[Variables, str], dict[str, float]]:
  """Returns `(variables, split) -> accuracy in percent and cross-entropy` on plain images of a split.

  Of the training split the first `clean_records` are read; both splits as the network sees them in the test.
  """
  model, task = networks.create(config.network.model), config.network.task
  records = dict(sources)
  if config.clean_records is not None:
    count = min(config.clean_records, len(sources['train']))
    records['train'] = data.subset(sources['train'], range(count))

  @jax.jit
  def scores(variables: Variables, batch: dict[str, Array]) -> dict[str, Array]:
    outputs = model.apply(variables, task.inputs(batch), train=False)
    return task.score(outputs, task.targets(batch))

  def evaluate(variables: Variables, split: str) -> dict[str, float]:
    found = map_batches(
      functools.partial(scores, variables),
      records[split],
      batch_size=config.eval_batch_size,
      mesh=config.mesh.make(),
      **harness_data.reading(config.network.data, 'test'),
    )
    return {'accuracy': 100 * float(found['correct'].mean()), 'loss': float(found['loss'].mean())}

  return evaluate


def draw(
  config: Settings, histories: Mapping[str, Sequence[Mapping[str, float]]], picture: pathlib.Path
) -> None:
  """Draws the probability of mixing, and the test accuracy where it was measured, over the training."""
  named, steps = titles(config), np.arange(config.total_steps)
  shown = [name for name in histories if not config.pictured or named[name] in config.pictured]
  with pictures.drawn(picture, 1, 2, size=(10, 3.8)) as (left, right):
    for name in shown:
      own = config.mixing[name].probability(config.total_steps, config.steps_per_epoch)
      chance = np.asarray(own(steps))
      # Of each step and the one behind it: where batches alternate, every other one is a half.
      left.plot(steps[:-1] / config.steps_per_epoch, (chance[1:] + chance[:-1]) / 2)
      lines = [line for line in histories[name] if 'test_accuracy' in line]
      epochs = [line['step'] / config.steps_per_epoch for line in lines]
      right.plot(epochs, [line['test_accuracy'] for line in lines], marker='.', label=named[name])
    left.set_ylabel('probability of mixing, mean of two steps')
    right.set_ylabel('test accuracy (%)')
    for axis in (left, right):
      axis.set_xlabel('epoch')
    right.legend(frameon=False, fontsize=8)
    left.figure.suptitle(pictures.title(config))


if __name__ == '__main__':
  launcher.main('mwh')
