"""CSRA: Residual Attention, a simple but effective method for multi-label recognition (Zhu & Wu, ICCV 2021).

Global pooling washes small objects out. CSRA turns the score map of each class into its own attention, a
softmax over positions, and adds the score that this gives, weighted by lambda, to the pooled one; heads of
several temperatures are summed. Claim: better mean average precision for a few lines on any backbone. With an
infinite temperature, `mean + lambda * max`, it helps a trained network that knew nothing of it, untrained.

  python -m experiments.csra
  python -m experiments.csra --config=voc2007_resnet101 --workdir=DIR
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks, pictures, results, runs, supervised
from experiments.harness.data import Augment, Images
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Experiment, Recipe, check_batch
from experiments.harness.settings import found_by, section
from experiments.harness.supervised import Seen
from experiments.harness.tasks import ImageTask
from experiments.protocols import multi_label_evaluation
from experiments.protocols.multi_label_evaluation import Protocol
from jaxlab import data, losses, models
from jaxlab.training import map_batches

Array = jax.Array

GAP = 'GAP'
SHOWN = ('mAP', 'OF1', 'CF1', 'OF1_top3', 'CF1_top3')
DRAWN = 6  # images in a picture
CLASSES = 3  # of which attention is drawn in each


@dataclasses.dataclass(frozen=True)
class Head:
  """CSRA's classifier over a map of features.

  Attributes:
    num_heads: 1, 2, 4, 6 or 8: decides on the temperatures.
    lam: lambda, the attention's weight.
    temperatures: of the heads, in place of those; infinite: the maximum.
    title: of the row; empty: the key of the setting.
  """

  num_heads: int = 1
  lam: float = 0.1
  temperatures: tuple[float, ...] | None = None
  title: str = ''

  def make(self, num_classes: int) -> models.CSRAMultiHead:
    """Returns the module."""
    return models.CSRAMultiHead(num_classes, self.num_heads, self.lam, self.temperatures)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from found_by('num_heads', self.make, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of CSRA.

  Attributes:
    data: images that show several classes.
    model: name and fields of the backbone.
    map_path: module of the backbone whose output is the map; empty: the one that the network pools.
    pretrained: name of public weights that the backbone starts from; empty: from scratch.
    augment: of training images.
    recipe: of all trainings alike.
    protocol: of the metrics.
    drop_unlabeled: whether test images without any class are left out.
    heads: rows by name, next to global average pooling, the same classifier with lambda 0.
    runs: names of those that are trained; none: all.
    test_time: lambdas of `mean + lambda * max` on the network of global average pooling, a row each.
  """

  data: Images
  model: Mapping[str, Any]
  map_path: str = ''
  pretrained: str = ''
  augment: Augment = section(Augment)
  recipe: Recipe
  protocol: Protocol = 'coco'
  drop_unlabeled: bool = False
  heads: dict[str, Head] = dataclasses.field(default_factory=lambda: {'csra': Head()})
  runs: tuple[str, ...] = ()
  test_time: tuple[float, ...] = ()

  @property
  def task(self) -> ImageTask:
    """What the networks are asked."""
    return ImageTask.of(self.data, self.augment)

  def head(self, name: str) -> Head:
    """Returns the head of a run, 'gap' or a name of `heads`."""
    return Head(lam=0.0, title=GAP) if name == 'gap' else self.heads[name]


def cross_entropies(logits: Array, labels: Array, seen: Seen) -> Array:
  """Returns each image's binary cross-entropies, averaged over classes."""
  del seen
  return losses.multi_label_bce(logits, labels)


def network(config: Settings, name: str) -> models.MapClassifier:
  """Returns the backbone under the head of a run; what the backbone pools itself is not used."""
  backbone = networks.create(config.model, num_classes=None)
  head = config.head(name).make(config.data.num_classes)
  return models.MapClassifier(backbone, head, map_path=config.map_path or None)


def training(config: Settings, name: str) -> Run:
  """Returns the training of a run."""
  own, recipe = config.head(name), config.recipe
  steps = (config.data.train_size or 0) // recipe.batch_size
  program = supervised.program(
    network(config, name), config.task, recipe, steps, loss=cross_entropies
  )
  decides = {key: getattr(config, key) for key in ('model', 'map_path', 'pretrained', 'augment')}
  decides['head'] = dataclasses.replace(own, title='')
  title = titles(config)[name]
  return Run(config, config.data, recipe, program, recipe.epochs * steps, decides, title)


def titles(config: Settings) -> dict[str, str]:
  """Returns the rows' titles by the names of the runs."""
  return {'gap': GAP, **{name: own.title or name for name, own in config.heads.items()}}


def residual_title(lam: float) -> str:
  """Returns the title of a row of the network of global average pooling with the maximum added."""
  return f'{GAP}, mean + {lam:g} max'


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  if not config.data.multi_label:
    yield f'data.multi_label=False: {config.data.name} has one label an image.'
  named = titles(config)
  rows = [*named.values(), *map(residual_title, config.test_time)]
  yield from results.check_claims(
    config, [*map(re.escape, rows)], multi_label_evaluation.classifier_metrics()
  )
  if 'gap' in config.heads:
    yield f"heads: 'gap' is the name of the run without attention, {GAP}; choose another."
  if len({*rows}) < len(rows):
    yield f'heads, test_time: rows need titles that differ, got {rows}.'
  if unknown := [name for name in config.runs if name not in config.heads]:
    yield f'runs: {unknown} are none of heads, {", ".join(config.heads)}.'
  if wrong := [lam for lam in config.test_time if not lam > 0]:
    yield f'test_time={config.test_time}: expected positive lambdas, got {wrong}; 0 is the row {GAP}.'
  recipe, size = config.recipe, config.data.train_size
  yield from check_batch(config.mesh, recipe.batch_size, 'recipe.batch_size')
  if size is None or size < recipe.batch_size:
    yield f'data.train_size={size}: expected at least recipe.batch_size={recipe.batch_size}.'
    return
  steps = size // recipe.batch_size
  yield from found_by('recipe.schedule', recipe.schedule.make, recipe.epochs, steps)
  try:
    shapes = supervised.abstract_variables(network(config, 'gap'), config.task)
  except (ValueError, TypeError) as error:
    yield f'model, map_path: {error}'
    return
  yield from found_by('recipe.optimizer', recipe.optimizer.make(0.1).init, shapes['params'])


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings: 'gap', and those of `config.runs`."""
  del facts
  return {name: training(config, name) for name in ('gap', *(config.runs or config.heads))}


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains with and without attention, adds the maximum to what was trained without, and compares."""
  sources = {split: harness_data.load(config.data, split) for split in ('train', 'test')}
  multi_label_evaluation.require_known(sources['test'], config.protocol)
  given = {'start': public_weights(config), 'fresh': ('head/.*',)} if config.pretrained else {}
  rows = []
  for name, own in programs(config).items():
    judge = evaluator(config, name, sources['test'])
    mean_of = lambda variables, judge=judge: judge(variables)['']  # noqa: E731
    trained = runs.train(own, sources['train'], workdir / name, evaluate=mean_of, **given)
    found = judge(trained.variables)
    role = 'baseline' if name == 'gap' else 'method'
    rows.append(results.row(own.title, role, found.pop('')))
    rows += [results.row(title, 'method', metrics) for title, metrics in found.items()]
    if not config.pictured or own.title in config.pictured:
      draw_attention(
        config, name, trained.variables, sources['test'], workdir / f'attention_{name}.png'
      )
  everything = dataclasses.replace(config, pictured=())
  panels = {'%': {name: name for name in ('mAP', 'OF1')}}
  pictures.bars(workdir / 'average_precision.png', everything, rows, panels)
  return results.results(config, rows, SHOWN, 'all in %')


def public_weights(config: Settings) -> Variables:
  """Returns the backbone's public weights as variables of the networks."""
  fields = {name: value for name, value in config.model.items() if name != 'name'}
  _, public = models.load_pretrained(config.pretrained, **{**fields, 'num_classes': None})
  return {collection: {'backbone': tree} for collection, tree in public.items()}


def evaluator(
  config: Settings, name: str, source: data.Source
) -> Callable[[Variables], dict[str, dict[str, float]]]:
  """Returns `variables -> metrics by row` of a run on the test records, in percent.

  The row '' is the network's own; that of global average pooling has one more for each `test_time`.
  """
  model, task = network(config, name), config.task
  lams = config.test_time if name == 'gap' else ()

  @jax.jit
  def forward(variables: Variables, batch: dict[str, Array]) -> dict[str, Any]:
    features = model.apply(variables, task.inputs(batch), method='features')
    weights = variables['params']['head']['weight']
    found = {'': model.head.apply({'params': {'weight': weights}}, features)}
    for lam in lams:
      scores = models.csra_scores(features, weights[0])
      found[residual_title(lam)] = models.max_residual(scores, lam)
    told = {'known': batch['known']} if 'known' in batch else {}
    return {'logits': found, 'labels': task.targets(batch), **told}

  def evaluate(variables: Variables) -> dict[str, dict[str, float]]:
    found = map_batches(
      functools.partial(forward, variables),
      source,
      batch_size=config.eval_batch_size,
      mesh=config.mesh.make(),
      **harness_data.reading(config.data, 'test'),
    )
    if config.drop_unlabeled:
      there = found['labels'].any(1)
      found = jax.tree.map(lambda array: array[there], found)
    truth = found['labels'], found.get('known'), config.protocol
    judge = multi_label_evaluation.classifier_scores
    return {title: judge(logits, *truth) for title, logits in found['logits'].items()}

  return evaluate


def draw_attention(
  config: Settings, name: str, variables: Variables, source: data.Source, picture: pathlib.Path
) -> None:
  """Draws test images, and on them the attention of the classes that they show, with their probabilities.

  The attention is that of the first head; for an infinite temperature, and for global average pooling, the
  softmax of temperature 1.
  """
  model, task = network(config, name), config.task
  places = range(min(DRAWN, len(source)))
  batch = multi_label_evaluation.records(config, source, places, 'test')
  variables = jax.device_get(variables)
  first = model.head.head_temperatures[0]
  temperature = first if np.isfinite(first) else 1.0

  @jax.jit
  def look(variables: Variables, batch: dict[str, Array]) -> tuple[Array, Array]:
    images = task.inputs(batch)
    features = model.apply(variables, images, method='features')
    scores = models.csra_scores(features, variables['params']['head']['weight'][0])
    maps = models.class_attention(scores, temperature).reshape(*features.shape[:3], -1)
    whole = jax.image.resize(maps, (*images.shape[:3], maps.shape[-1]), 'linear')
    return whole, jax.nn.sigmoid(model.apply(variables, images))

  fields = {'image': jnp.asarray(batch['image'])}
  maps, probabilities = map(np.asarray, look(variables, fields))
  with pictures.drawn(
    picture, 1 + CLASSES, len(places), size=(1.5 * len(places), 6.8), squeeze=False
  ) as axes:
    for axis in axes.flat:
      axis.set_axis_off()
    for column in places:
      axes[0, column].imshow(np.squeeze(batch['image'][column]), cmap='gray')
      shown = np.flatnonzero(batch['multi_label'][column])[:CLASSES]
      for axis, label in zip(axes[1:, column], shown):
        axis.imshow(np.squeeze(batch['image'][column]), cmap='gray')
        axis.imshow(maps[column, ..., label], cmap='magma', alpha=0.6)
        chance = 100 * probabilities[column, label]
        axis.set_title(f'{source.class_names[label]}: {chance:.0f} %', fontsize=8)
    axes[0, 0].set_title(titles(config)[name], fontsize=8, loc='left')


if __name__ == '__main__':
  launcher.main('csra')
