"""Learning from images of which few have labels: who keeps his, batches of both kinds, pseudo-labels.

The data sets here are labeled; all labels but those of a drawn part are hidden. What is hidden says how good
pseudo-labels are, and nothing else reads it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import networks, supervised
from experiments.harness.data import Augment, Images
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Experiment, Recipe, check_batch
from experiments.harness.settings import found_by
from experiments.harness.supervised import Table
from experiments.harness.tasks import ImageTask
from experiments.protocols import stages
from experiments.protocols.subsets import Subset
from jaxlab import data, parallel, training
from jaxlab.training import TrainState, map_batches

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of an experiment with few labels.

  Attributes:
    data: the images.
    labeled: those that keep their labels, drawn by the seed.
    model: name and fields of the network.
    augment: of training images.
  """

  data: Images
  labeled: Subset
  model: Mapping[str, Any]
  augment: Augment = dataclasses.field(default_factory=Augment)

  @property
  def task(self) -> ImageTask:
    """What the network is asked."""
    return ImageTask.of(self.data, self.augment)

  @property
  def num_labeled(self) -> int:
    """Images that keep their labels."""
    return self.labeled.of(self.data).train_size

  @property
  def num_unlabeled(self) -> int:
    """Images whose labels are hidden."""
    return self.data.train_size - self.num_labeled

  @property
  def network(self) -> nn.Module:
    """The network that is trained."""
    return networks.create(self.model, num_classes=self.data.num_classes)


class Sources(NamedTuple):
  """The data of an experiment.

  Attributes:
    train: all training records, with all labels.
    test: test records.
    labels: of the training records, int32 `[records]`.
    labeled: which of them are not hidden, bool `[records]`.
  """

  train: data.Source
  test: data.Source
  labels: np.ndarray
  labeled: np.ndarray

  @property
  def given(self) -> np.ndarray:
    """The labels that are not hidden, -1 for others, int32 `[records]`."""
    return np.where(self.labeled, self.labels, -1).astype(np.int32)

  @property
  def labeled_records(self) -> data.Source:
    """The records with labels."""
    return data.subset(self.train, np.flatnonzero(self.labeled))

  def accuracy(self, pseudo_labels: np.ndarray) -> float:
    """Returns how many pseudo-labels int `[records]` of unlabeled records are right, in percent."""
    return 100 * float(np.mean((pseudo_labels == self.labels)[~self.labeled]))


def load(config: Settings) -> Sources:
  """Returns the data of an experiment, with the labels that its seed leaves.

  Raises:
    ValueError: if the data are not what the settings say, or a class is left without labels.
    FileNotFoundError: if they are not there.
  """
  train, test = (harness_data.load(config.data, split) for split in ('train', 'test'))
  labels = data.source_labels(train)
  return Sources(train, test, labels, draw_labeled(config, labels))


def draw_labeled(config: Settings, labels: np.ndarray) -> np.ndarray:
  """Returns which records keep their labels, bool `[records]`; a function of the seed and the labels."""
  part = {'total': config.labeled.total, 'per_class': config.labeled.per_class}
  chosen = data.sample_subset(np.random.default_rng((config.seed, 1)), labels, **part)
  kept = np.zeros(len(labels), bool)
  kept[chosen] = True
  if missing := sorted(set(labels.tolist()) - set(labels[kept].tolist())):
    raise ValueError(
      f'labeled: classes {missing} keep no label; draw so many of each, labeled.per_class.'
    )
  return kept


def sampler(
  config: Settings, batch_size: int, labeled_size: int
) -> Callable[[data.Source], data.TwoStreamSampler]:
  """Returns `source -> sampler` of batches with `labeled_size` labeled records behind unlabeled ones."""

  def make(source: data.Source) -> data.TwoStreamSampler:
    labeled = draw_labeled(config, data.source_labels(source))
    streams = np.flatnonzero(~labeled), np.flatnonzero(labeled)
    return data.TwoStreamSampler(*streams, batch_size, labeled_size, config.seed)

  return make


def training_run(
  config: Settings,
  title: str,
  recipe: Recipe,
  steps_per_epoch: int,
  *,
  augment: Augment | None = None,
  table: Table | None = None,
  decides: Mapping[str, Any] | None = None,
  revise_at: tuple[int, ...] = (),
  sampler: Callable[[data.Source], Any] | None = None,
  **options: Any,
) -> Run:
  """Returns a training of the network.

  Args:
    config: the settings.
    title: of the run.
    recipe: of the training.
    steps_per_epoch: its optimizer steps in an epoch.
    augment: of the images, in place of the settings'.
    table: state of every record.
    decides: what else decides what it ends with.
    revise_at: see `Run`.
    sampler: see `Run`.
    **options: further ones of `supervised.program`.
  """
  augment = config.augment if augment is None else augment
  task = ImageTask.of(config.data, augment)
  if table is not None:
    recipe = recipe.with_rules(training.row_rules(config.mesh.make(), r'extra/table(/.*)?'))
  options |= {'table': table}
  program = supervised.program(config.network, task, recipe, steps_per_epoch, **options)
  own = {'model': config.model, 'augment': augment, 'labeled': config.labeled, **(decides or {})}
  num_steps = recipe.epochs * steps_per_epoch
  return Run(config, config.data, recipe, program, num_steps, own, title, sampler, revise_at)


def accuracy(config: Settings, variables: Variables, source: data.Source) -> float:
  """Returns the accuracy of the network on test records, in percent."""
  return networks.accuracy(config, config.data, config.network, config.task, variables, source)


def predict(config: Settings, variables: Variables, source: data.Source) -> np.ndarray:
  """Returns the logits of training records without augmentation, float32 `[records, classes]`."""
  return map_batches(
    functools.partial(stages.forward, variables, model=config.network, task=config.task),
    source,
    batch_size=config.eval_batch_size,
    mesh=config.mesh.make(),
    # Whole images, as they are evaluated.
    **harness_data.reading(config.data, 'test'),
  )


def check(config: Settings) -> Iterator[str]:
  """Yields what is wrong with data, labels and network."""
  size = config.data.train_size
  if size is None:
    yield 'data.train_size: missing; the schedules are made for it.'
    return
  if config.data.multi_label:
    yield 'data.multi_label: expected one label an image.'
  if (config.labeled.total is None) == (config.labeled.per_class is None):
    yield 'labeled: expected one of total and per_class, the images that keep their labels.'
  elif config.labeled.num_classes is not None:
    yield 'labeled.num_classes: expected none; every class keeps some labels.'
  else:
    problems = list(found_by('labeled', config.labeled.of, config.data))
    yield from problems
    if not problems and config.num_labeled >= size:
      yield f'labeled: {config.num_labeled} of data.train_size={size} leave none without a label.'
  yield from found_by('model', lambda: config.network)


def check_recipe(config: Settings, key: str, recipe: Recipe, size: int) -> Iterator[str]:
  """Yields what is wrong with a training, of records of which an epoch has `size`, a batch a part."""
  if size < recipe.batch_size:
    yield f'{key}.batch_size={recipe.batch_size} exceeds its {size} training records.'
  elif recipe.epochs > 0:
    steps = size // recipe.batch_size
    yield from found_by(f'{key}.schedule', recipe.schedule.make, recipe.epochs, steps)
  yield from check_batch(config.mesh, recipe.batch_size, f'{key}.batch_size')


# --- Pseudo-labels ---


def pseudo_label_shapes(config: Settings) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of the records' pseudo-label logits, and of which of them are given labels."""
  size, classes = config.data.train_size, config.data.num_classes
  return {
    'logits': jax.ShapeDtypeStruct((size, classes), jnp.float32),
    'labeled': jax.ShapeDtypeStruct((size,), jnp.bool_),
  }


def with_pseudo_labels(
  state: TrainState, sources: Sources, given: np.ndarray, predicted: np.ndarray
) -> TrainState:
  """Returns a state whose table has `given` logits of labeled records, `predicted` ones of all others."""
  logits = np.where(sources.labeled[:, None], given, predicted).astype(np.float32)
  table = training.pad_rows({'logits': logits, 'labeled': sources.labeled})
  return state.replace(extra={**state.extra, 'table': table})


def mean_entropy(logits: Array, labeled: np.ndarray) -> float:
  """Returns the mean entropy of the softmax of unlabeled records' logits, in nats.

  Args:
    logits: `[rows, num_classes]`; rows beyond the records are ignored.
    labeled: bool `[records]`.
  """
  return float(_mean_entropy(logits, labeled))


@jax.jit
def _mean_entropy(logits: Array, labeled: Array) -> Array:
  logits = logits[: len(labeled)]
  entropy = optax.softmax_cross_entropy(logits, jax.nn.softmax(logits))
  return jnp.mean(entropy, where=~labeled)


def pseudo_labels(config: Settings, state: TrainState) -> np.ndarray:
  """Returns the labels that the logits of a state's table say, int32 `[records]`, in every process."""
  whole = parallel.replicated(config.mesh.make())
  largest = jax.jit(lambda logits: jnp.argmax(logits, -1), out_shardings=whole)
  found = jax.device_get(largest(state.extra['table']['logits']))
  return found[: config.data.train_size].astype(np.int32)
