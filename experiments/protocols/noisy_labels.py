"""Learning from labels of which some are wrong: noisy training records, clean test records.

Noise that is made here is known: the share of correct labels is measured before and after.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments.harness import data as harness_data
from experiments.harness import networks, pictures, runs, supervised
from experiments.harness import sources as known_sources
from experiments.harness.data import Augment, Images
from experiments.harness.runs import Run, Trained, Variables
from experiments.harness.sections import Experiment, Recipe, check_batch
from experiments.harness.settings import found_by
from experiments.harness.supervised import Loss, Table
from experiments.harness.tasks import ImageTask
from experiments.protocols.open_noise import OpenNoise
from jaxlab import data, models, training

Array = jax.Array
PyTree = Any

# What the classes of a data set are mistaken for, by its name.
CONFUSIONS = {
  'cifar10': data.CIFAR10_CONFUSIONS,
  'cifar100': data.next_class(data.CIFAR100_SUPERCLASSES),
}


@dataclasses.dataclass(frozen=True)
class Noise:
  """Noise of training labels, drawn by the experiment's seed.

  - 'symmetric': with probability `rate` a uniform draw of all classes, the true one among them.
  - 'others': likewise of the other classes.
  - 'asymmetric': the class that it is mistaken for, see `CONFUSIONS`; other classes stay.
  - 'pair': the next class.
  """

  kind: Literal['symmetric', 'others', 'asymmetric', 'pair'] = 'symmetric'
  rate: float = 0.0

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not 0 <= self.rate < 1:
      yield f'rate={self.rate}: expected a share of labels in [0, 1).'

  def draw(self, rng: np.random.Generator, labels: np.ndarray, own: Images) -> np.ndarray:
    """Returns noisy labels, int32 of the shape of `labels`; each of several is wrong independently."""
    if labels.ndim == 2:
      draws = {'include_true': self.kind == 'symmetric'}
      return data.symmetric_noise(rng, labels.ravel(), self.rate, 2, **draws).reshape(labels.shape)
    if self.kind in ('symmetric', 'others'):
      draws = {'include_true': self.kind == 'symmetric'}
      return data.symmetric_noise(rng, labels, self.rate, own.num_classes, **draws)
    confusions = data.next_class([0] * own.num_classes)
    if self.kind == 'asymmetric':
      confusions = CONFUSIONS[own.name]
    return data.asymmetric_noise(rng, labels, self.rate, confusions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyImages(Images):
  """Images of which training labels are wrong.

  Attributes:
    noise: that is put on the training labels, which are taken for true; None: they are noisy as they come.
    open: in place of `noise`: images of no class and unequal classes, too.
    held_out: of the training records, drawn by the seed, are left out.
  """

  noise: Noise | None = None
  open: OpenNoise | None = None
  held_out: int = 0

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    if self.noise and self.noise.kind == 'asymmetric' and self.name not in CONFUSIONS:
      known = ', '.join(CONFUSIONS)
      yield f"noise.kind='asymmetric': known for {known}, not for {self.name!r}; 'pair' is."
    if self.train_size is not None and not 0 <= self.held_out < self.train_size:
      yield f'held_out={self.held_out}: expected at least 0, below train_size={self.train_size}.'
    if self.open and (self.noise or self.held_out):
      yield 'open: expected neither noise nor held_out besides, the set is drawn as a whole.'

  @property
  def size(self) -> int:
    """Records that are trained on."""
    if self.open:
      return self.open.size(self.num_classes)
    return (self.train_size or 0) - self.held_out

  @property
  def outcomes(self) -> int:
    """Of a label: the classes, or 2 for each class where an image shows several."""
    return 2 if self.multi_label else self.num_classes

  @property
  def label_shape(self) -> tuple[int, ...]:
    """Of a record's labels."""
    return (self.num_classes,) if self.multi_label else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of an experiment on noisy labels.

  Attributes:
    data: the images.
    augment: of training images.
    model: name and fields of the network.
    pretrained: name of public weights that it starts from, but for the classifier; '': from scratch.
    weights: a local file that holds them; '': they are downloaded.
    class_attention: whether each class looks at places of its own, `models.ClassAttention` over the map that
      the network would pool.
    recipe: of the training.
  """

  data: NoisyImages
  augment: Augment = dataclasses.field(default_factory=Augment)
  model: Mapping[str, Any]
  pretrained: str = ''
  weights: str = ''
  class_attention: bool = False
  recipe: Recipe

  @property
  def task(self) -> ImageTask:
    """What the network is asked."""
    return ImageTask.of(self.data, self.augment)


class Sources(NamedTuple):
  """The data of an experiment.

  Attributes:
    train: records with the labels as they are given.
    test: clean records.
    given: labels of the training records, int32 `[records]`, or `[records, num_classes]` of 0 and 1.
    true: what they are; None: not known.
  """

  train: data.Source
  test: data.Source
  given: np.ndarray
  true: np.ndarray | None

  @property
  def facts(self) -> dict[str, float]:
    """What is reported of the labels: the share of correct ones in percent, where it is known."""
    if self.true is None:
      return {}
    return {'label_accuracy': 100 * (1 - data.noise_rate(self.given, self.true))}


def load(config: Settings) -> Sources:
  """Returns the data of an experiment, with the noise that its seed draws.

  Raises:
    ValueError: if the data are not what the settings say.
    FileNotFoundError: if they are not there.
  """
  own, rng = config.data, np.random.default_rng((config.seed, 1))
  train, test = (harness_data.load(own, split) for split in ('train', 'test'))
  if own.held_out:
    train = data.subset(train, np.sort(rng.permutation(len(train))[own.held_out :]))
  if own.open:
    made = own.open.draw(rng, data.in_memory(train))
    return Sources(made.train, test, made.given, made.true)
  if own.multi_label:
    labels = data.materialize(train)['multi_label'].astype(np.int32)
  else:
    labels = data.source_labels(train)
  if own.noise is None:
    return Sources(train, test, labels, None)
  given = own.noise.draw(rng, labels, own)
  return Sources(data.Relabeled(train, given), test, given, labels)


def steps_per_epoch(config: Settings, recipe: Recipe | None = None) -> int:
  """Returns the optimizer steps of an epoch."""
  return max(config.data.size // (recipe or config.recipe).batch_size, 1)


def training_run(
  config: Settings,
  title: str,
  *,
  recipe: Recipe | None = None,
  loss: Loss = supervised.cross_entropy,
  table: Table | None = None,
  decides: Mapping[str, Any] | None = None,
  **options: Any,
) -> Run:
  """Returns the training of the network on the labels as they are given.

  Args:
    config: the settings.
    title: of the run.
    recipe: in place of the settings'.
    loss: see `supervised.program`.
    table: state of every record.
    decides: what else decides what it ends with.
    **options: further ones of `supervised.program`.
  """
  recipe = recipe or config.recipe
  steps, model = steps_per_epoch(config, recipe), network(config)
  if table is not None:
    rules = training.row_rules(config.mesh.make(), r'extra/table(/.*)?')
    recipe = recipe.with_rules(rules)
  program = supervised.program(model, config.task, recipe, steps, loss=loss, table=table, **options)
  own = {**decided(config), **(decides or {})}
  return Run(config, config.data, recipe, program, recipe.epochs * steps, own, title)


def decided(config: Settings) -> dict[str, Any]:
  """Returns the sections that decide what a training ends with besides seed, data and recipe."""
  fields = 'model', 'augment', 'pretrained', 'class_attention'
  return {name: getattr(config, name) for name in fields}


def network(config: Settings) -> Any:
  """Returns the network that is trained."""
  count = config.data.num_classes
  if not config.class_attention:
    return networks.create(config.model, num_classes=count)
  backbone = networks.create(config.model, num_classes=None)
  return models.MapClassifier(backbone, models.ClassAttention(count))


def train(
  config: Settings,
  run: Run,
  sources: Sources,
  folder: pathlib.Path,
  rows: Callable[[Sources], PyTree] | None = None,
  evaluate: Callable[[Variables], Mapping[str, float]] | None = None,
  **options: Any,
) -> Trained:
  """Returns what a run ends with; `history` has its test accuracy `test` every `recipe.eval_every` steps.

  Args:
    config: the settings.
    run: of `training_run`.
    sources: the data.
    folder: of this run.
    rows: what the table of records starts with.
    evaluate: `variables -> metrics`, in place of the test accuracy.
    **options: further ones of `runs.train`.
  """
  if rows is not None:
    begin = lambda state: state.replace(  # noqa: E731
      extra={**state.extra, 'table': training.pad_rows(rows(sources))}
    )
    options['begin'] = begin
  if config.pretrained and 'start' not in options:
    options |= {'start': public(config), 'fresh': [f'{path}/.*' for path in head(config)]}

  def accuracy(variables: Variables) -> dict[str, float]:
    given = network(config), config.task, variables, sources.test
    return {'test': networks.accuracy(config, config.data, *given)}

  return runs.train(run, sources.train, folder, evaluate=evaluate or accuracy, **options)


def public(config: Settings) -> Variables:
  """Returns the public weights that the network starts from, but for its classifier."""
  given = {'file': known_sources.file(config.weights)} if config.weights else {}
  _, found = models.load_pretrained(config.pretrained, num_classes=None, **given)
  if config.class_attention:
    found = {name: {'backbone': tree} for name, tree in found.items()}
  return found


def head(config: Settings) -> tuple[str, ...]:
  """Returns the paths of the network's classifier."""
  return ('head',) if config.class_attention else models.anatomy(network(config)).head


def features(config: Settings) -> str:
  """Returns the pattern of all parameters of the network but the classifier's."""
  return f'(?!{"|".join(f"{path}/" for path in head(config))}).*'


def scores(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Returns `last` and `best`, the test accuracy at the end and the best that a training passed, in %.

  The best one is chosen by the test records: it says what memorizing wrong labels costs, and is no result.
  """
  found = [line['test'] for line in history if 'test' in line]
  return {'last': found[-1], 'best': max(found)}


METRICS = ('last', 'best', 'label_accuracy')


def check(config: Settings) -> Iterator[str]:
  """Yields what is wrong with data and recipe."""
  yield from check_recipe(config, config.recipe, 'recipe')
  if config.weights and not config.pretrained:
    yield f'weights={config.weights!r}: give the name of the weights, pretrained, too.'
  yield from found_by('model', network, config)


def check_recipe(config: Settings, recipe: Recipe, name: str) -> Iterator[str]:
  """Yields what is wrong with a recipe `name` for the data."""
  size = config.data.size
  if config.data.train_size is None:
    yield f'data.train_size: missing; the schedule of {name} is made for it.'
  elif size < recipe.batch_size:
    yield f'{name}.batch_size={recipe.batch_size} exceeds the {size} training records.'
  elif recipe.epochs > 0:
    steps = size // recipe.batch_size
    yield from found_by(f'{name}.schedule', recipe.schedule.make, recipe.epochs, steps)
  yield from check_batch(config.mesh, recipe.batch_size, f'{name}.batch_size')


PANELS = (('test', 'test accuracy (%)', 1), ('labels_correct', 'correct labels (%)', 100))


def draw_curves(
  config: Settings,
  histories: Mapping[str, Sequence[Mapping[str, Any]]],
  path: Any,
  marks: Sequence[float] = (),
  panels: Sequence[tuple[str, str, float]] = PANELS,
) -> None:
  """Draws test accuracy over training, and what else was watched.

  Args:
    config: the settings.
    histories: metrics of runs by their titles.
    path: of the picture.
    marks: epochs at which stages begin.
    panels: metric, label and factor of each; those that no run has are left out.
  """
  each = steps_per_epoch(config)
  shown = [own for own in panels if any(own[0] in line for h in histories.values() for line in h)]
  colors = {title: f'C{index}' for index, title in enumerate(histories)}
  with pictures.drawn(path, 1, len(shown), size=(5.5 * len(shown), 4), squeeze=False) as axes:
    for axis, (metric, label, scale) in zip(axes[0], shown):
      for title, history in histories.items():
        points = [(line['step'] / each, scale * line[metric]) for line in history if metric in line]
        if points:
          axis.plot(*zip(*points), label=title, color=colors[title])
      for mark in marks:
        axis.axvline(mark, color='gray', linewidth=0.8, linestyle=':')
      axis.set_xlabel('epoch')
      axis.set_ylabel(label)
      axis.legend(frameon=False)
    axes[0, 0].set_title(pictures.title(config))
