"""NRS: Neural Random Subspace (Cao, Wu, Wang & Lasenby, Pattern Recognition 2021, arXiv 1911.07845).

A random forest as a layer: a fixed random index cuts a feature vector into many small patches, each a random
subset of the features; a convolution of its own makes a weak learner of every patch, and dense layers combine
them, in one network and one forward pass. On tables it competes with forests of trees; behind the pooled
features of an image network or of a network over points it is a cheap non-linear head. Claim: better than
forests on tables, no worse than a perceptron of the same depth, and better than the plain head.

  python -m experiments.nrs
  python -m experiments.nrs --config=table --config.data.train=TRAIN.csv --config.data.test=TEST.csv
  python -m experiments.nrs --config=images     # behind a convolutional network; points: behind PointNet
"""

import dataclasses
import functools
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from experiments.harness import costs, launcher, networks, pictures, results, runs, supervised
from experiments.harness import data as harness_data
from experiments.harness.data import Arrays, Augment, Images, Table
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Experiment, Recipe, check_batch
from experiments.harness.settings import found_by, free
from experiments.harness.tasks import ArrayTask, ImageTask, PointAugment, Task
from jaxlab import data, losses, models
from jaxlab.training import map_batches

Array = jax.Array

# What is assumed of a table before it is read.
NOMINAL = {'shape': (16,), 'num_classes': 2, 'train_size': 1000}
TREES = {
  'decision_tree': 'decision tree',
  'random_forest': 'random forest',
  'gradient_boosting': 'gradient boosting',
  'hist_gradient_boosting': 'gradient boosting of histograms',
  'random_subspace': 'random subspace bagging',
}
MATRIX = 'backbone/feature_transform/matrix'  # of PointNet


@dataclasses.dataclass(frozen=True)
class Subspaces:
  """An NRS layer, see `jaxlab.models.NRSLayer`.

  Attributes:
    patch: side of a patch: features of a subset are its square.
    n_mul: subsets for each feature.
    n_per: subsets that a convolution combines.
  """

  patch: int = 3
  n_mul: int = 1
  n_per: int = 1

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from found_by('layer', models.NRSLayer, self.patch, self.n_mul, self.n_per)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of NRS.

  Attributes:
    data: a table, images, or clouds of points.
    model: name and fields of the network whose pooled features the head sees; None: the table's own.
    pretrained: name of public weights that this network starts from; empty: from scratch.
    weights: file with them; empty: they are downloaded.
    augment: of images.
    point_augment: of clouds.
    recipe: of all networks.
    layers: NRS layers by the title of their row.
    hidden: units of the head's hidden layers; behind a table the perceptron without NRS has one more.
    dropout: of the head behind PointNet.
    transform_weight: of the penalty that keeps PointNet's feature transform orthogonal.
    trees: forests that a table is compared with, by name of `TREES`.
    tree_options: further options of scikit-learn's classifiers, by the same names.
    repeats: of every measurement of time; 0: times are not measured.
  """

  data: Table | Images | Arrays
  model: Mapping[str, Any] | None = None
  pretrained: str = ''
  weights: str = free('')
  augment: Augment = dataclasses.field(default_factory=Augment)
  point_augment: PointAugment = dataclasses.field(default_factory=PointAugment)
  recipe: Recipe
  layers: dict[str, Subspaces]
  hidden: tuple[int, ...] = ()
  dropout: float = 0.0
  transform_weight: float = 0.0
  trees: tuple[str, ...] = ()
  tree_options: dict[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  repeats: int = free(5)

  @property
  def task(self) -> Task:
    """What the networks are asked."""
    if isinstance(self.data, Images):
      return ImageTask.of(self.data, self.augment)
    return ArrayTask(self.data.shape, self.point_augment)

  @property
  def baseline(self) -> str:
    """The row without an NRS layer."""
    return 'MLP' if self.model is None else self.model['name']


def known(config: Settings, source: data.Source | None = None) -> Settings:
  """Returns the settings with what a table's records say in place of None; without them nominal values."""
  facts, own = NOMINAL, config.data
  if source is not None:
    facts = {'num_classes': source.num_classes, 'train_size': len(source)}
    facts |= {'shape': source[0]['features'].shape} if isinstance(own, Arrays) else {}
  unknown = {name: value for name, value in facts.items() if getattr(own, name, value) is None}
  return dataclasses.replace(config, data=dataclasses.replace(own, **unknown))


def head(config: Settings, layer: Subspaces | None) -> nn.Module:
  """Returns what stands behind the features: an NRS layer, or none, and dense layers."""
  classes, hidden = config.data.num_classes, config.hidden
  if config.model is None and layer is None:
    return models.mlp_baseline(classes, hidden[-1], len(hidden) + 1)
  dense = models.MLPHead((*hidden, classes), hidden_bias=True)
  if config.model is not None and isinstance(config.data, Arrays):
    dense = models.PointNetHead(classes, hidden, config.dropout)
  return dense if layer is None else models.NRSHead(dense, **dataclasses.asdict(layer))


def network(config: Settings, layer: Subspaces | None) -> nn.Module:
  """Returns the network of a row."""
  if config.model is None:
    return head(config, layer)
  backbone = networks.create(config.model, num_classes=None)
  return models.Classifier(backbone, head(config, layer))


def training(config: Settings, layer: Subspaces | None, title: str) -> Run:
  """Returns the training of a row: cross-entropy, for PointNet with the penalty on its feature transform."""
  weight, captured = config.transform_weight, (MATRIX,) * bool(config.transform_weight)

  def loss(logits: Array, labels: Array, seen: supervised.Seen) -> Array:
    values = supervised.cross_entropy(logits, labels, seen)
    return values + weight * losses.orthogonality_loss(seen.captured[MATRIX]) if weight else values

  steps = config.data.train_size // config.recipe.batch_size
  program = supervised.program(
    network(config, layer), config.task, config.recipe, steps, loss=loss, captured=captured
  )
  fields = (
    'model',
    'pretrained',
    'augment',
    'point_augment',
    'hidden',
    'dropout',
    'transform_weight',
  )
  decides = {'layer': layer, **{name: getattr(config, name) for name in fields}}
  num_steps = config.recipe.epochs * steps
  return Run(config, config.data, config.recipe, program, num_steps, decides, title)


def forest(config: Settings, name: str) -> Any:
  """Returns a classifier of scikit-learn."""
  from sklearn import ensemble, tree

  options = {'random_state': config.seed, **config.tree_options.get(name, {})}
  if name == 'random_subspace':  # Ho 1998: each tree sees half of the features, and all records
    options = {'n_estimators': 100, 'max_features': 0.5, 'bootstrap': False, **options}
    return ensemble.BaggingClassifier(tree.DecisionTreeClassifier(), **options)
  makers = {
    'decision_tree': tree.DecisionTreeClassifier,
    'random_forest': ensemble.RandomForestClassifier,
    'gradient_boosting': ensemble.GradientBoostingClassifier,
    'hist_gradient_boosting': ensemble.HistGradientBoostingClassifier,
  }
  return makers[name](**options)


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  rows = [config.baseline, *config.layers, *TREES.values()]
  metrics = ['accuracy', 'best_accuracy', 'parameters', 'fit_seconds', 'predict_ms']
  yield from results.check_claims(config, list(map(re.escape, rows)), metrics)
  if not config.layers:
    yield 'layers is empty: there is no network with NRS.'
  if clash := sorted({*config.layers} & {config.baseline, *TREES.values()}):
    yield f'layers: {clash[0]!r} is the name of another row.'
  if isinstance(config.data, Table) and config.model is not None:
    yield f'model={config.model}: expected none for a table.'
  if not isinstance(config.data, Table) and (config.model is None or config.trees):
    yield 'images and points: expected a model, and no trees.'
  if isinstance(config.data, Images) and config.data.multi_label:
    yield f'data: {config.data.name} has images of several classes, expected one.'
  if config.model is None and not config.hidden:
    yield 'hidden=(): expected the sizes of the hidden layers behind a table.'
  if unknown := sorted({*config.tree_options, *config.trees} - {*TREES}):
    yield f'trees, tree_options: {unknown} are none of {", ".join(TREES)}.'
  for name in [name for name in config.trees if name in TREES]:
    yield from found_by(f'tree_options.{name}', forest, config, name)
  if not 0 <= config.dropout < 1 or config.transform_weight < 0 or config.repeats < 0:
    yield 'dropout, transform_weight, repeats: expected a share below 1, and numbers of at least 0.'
  own, size = known(config), config.recipe.batch_size
  yield from check_batch(config.mesh, size, 'recipe.batch_size')
  if size < 2:
    yield f'recipe.batch_size={size}: expected at least 2, for batch norms.'
  if own.data.train_size < size:
    yield f'recipe.batch_size={size} exceeds data.train_size={own.data.train_size}.'
  for name, layer in [(config.baseline, None), *config.layers.items()]:
    yield from found_by(f'layers.{name}', fits, own, layer)


def fits(config: Settings, layer: Subspaces | None) -> None:
  """Raises ValueError if a network does not fit the data, or its layer the features."""
  supervised.abstract_variables(network(config, layer), config.task)


def programs(config: Settings, facts: data.Source | None = None) -> dict[str, Run]:
  """Returns the trainings by name; `facts` are the training records."""
  config = known(config, facts)
  table = {config.baseline: None, **config.layers}
  return {name: training(config, layer, name) for name, layer in table.items()}


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains the networks, and the forests where the data are a table, and compares."""
  sources = {split: harness_data.load(config.data, split) for split in ('train', 'test')}
  own = known(config, sources['train'])
  table, rows, sides, predict = programs(config, sources['train']), [], {}, {}
  start = beginning(own)
  for number, (name, one) in enumerate(table.items()):
    layer, folder = own.layers.get(name), workdir / f'network{number}'
    judge = functools.partial(accuracy, own, network(own, layer), sources['test'])
    trained = runs.train(
      one, sources['train'], folder, start=start, fresh=('head/.*',) if start else (),
      evaluate=lambda variables, judge=judge: {'accuracy_test': judge(variables)},
    )  # fmt: skip
    metrics = {'accuracy': judge(trained.variables), 'parameters': size_of(trained.variables)}
    scores = [row['accuracy_test'] for row in trained.history if 'accuracy_test' in row]
    metrics |= {'best_accuracy': max(scores)} if scores else {}
    rows.append(results.row(name, 'method' if layer else 'baseline', metrics))
    sides[name] = costs.Side(one.program)
    predict[name] = functools.partial(judge, trained.variables)
  for name in own.trees:
    rows.append(fit_forest(own, name, sources, predict))
  if own.repeats:
    measure_times(own, rows, table, sides, predict, len(sources['test']))
  draw(own, rows, workdir / 'accuracy.png')
  shown = ['accuracy', 'best_accuracy', 'parameters', 'fit_seconds', 'predict_ms']
  return results.results(config, rows, shown, 'accuracies in %, times of 1000 predictions in ms')


def beginning(config: Settings) -> Variables | None:
  """Returns the public weights that the backbones start from, if there are some."""
  if not config.pretrained:
    return None
  fields = {name: value for name, value in config.model.items() if name != 'name'}
  file = {'file': networks.sources.file(config.weights)} if config.weights else {}
  _, public = models.load_pretrained(config.pretrained, num_classes=None, **fields, **file)
  return {collection: {'backbone': tree} for collection, tree in public.items()}


def accuracy(
  config: Settings, model: nn.Module, source: data.Source, variables: Variables
) -> float:
  """Returns the share of records that are classified correctly, in percent."""
  hits = functools.partial(_correct, variables, model=model, task=config.task)
  options = {'batch_size': config.eval_batch_size, 'mesh': config.mesh.make()}
  found = map_batches(hits, source, **options, **harness_data.reading(config.data, 'test'))
  return 100 * float(np.mean(found))


@functools.partial(jax.jit, static_argnames=('model', 'task'))
def _correct(
  variables: Variables, batch: Mapping[str, Array], *, model: nn.Module, task: Task
) -> Array:
  logits = model.apply(variables, task.inputs(batch), train=False)
  return task.score(logits, task.targets(batch))['correct']


def size_of(variables: Variables) -> int:
  """Returns the number of trained numbers."""
  return sum(leaf.size for leaf in jax.tree.leaves(variables['params']))


def fit_forest(
  config: Settings,
  name: str,
  sources: Mapping[str, data.InMemory],
  predict: dict[str, Callable[[], Any]],
) -> dict[str, Any]:
  """Returns the row of a forest, and puts its prediction of the test records into `predict`."""
  train, test = (sources[split].arrays for split in ('train', 'test'))
  model, start = forest(config, name), time.perf_counter()
  model.fit(train['features'], train['label'])
  seconds, title = time.perf_counter() - start, TREES[name]
  metrics = {'accuracy': 100 * model.score(test['features'], test['label'])}
  metrics |= {'fit_seconds': seconds} if config.repeats else {}
  predict[title] = functools.partial(model.predict, test['features'])
  return results.row(title, 'baseline', metrics)


def measure_times(
  config: Settings,
  rows: Sequence[dict[str, Any]],
  table: Mapping[str, Run],
  sides: Mapping[str, costs.Side],
  predict: Mapping[str, Callable[[], Any]],
  count: int,
) -> None:
  """Puts times into the rows: `fit_seconds`, of networks their steps alone, and `predict_ms` of 1000 records.

  Of repeats that alternate between the rows the shortest counts.
  """
  steps = costs.measure(sides, config.mesh.make(), config.repeats)
  shortest = costs.alternate(dict(predict), config.repeats)
  for item in rows:
    name, metrics = item['name'], item['metrics']
    if name in steps:
      metrics['fit_seconds'] = steps[name]['milliseconds'] * table[name].num_steps / 1000
    metrics['predict_ms'] = 1e6 * shortest[name] / count


def draw(config: Settings, rows: Sequence[Mapping[str, Any]], picture: pathlib.Path) -> None:
  """Draws the accuracies, and next to them what training takes."""
  panels = {'accuracy (%)': {'accuracy': 'accuracy'}}
  panels |= {'training (s)': {'training': 'fit_seconds'}} if config.repeats else {}
  pictures.bars(picture, config, rows, panels)


if __name__ == '__main__':
  launcher.main('nrs')
