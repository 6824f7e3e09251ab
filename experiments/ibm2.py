"""IbM2: Instance-based Max-margin for Practical Few-shot Recognition (Fu et al., CVPR 2024).

On cached features, a linear head learns from noisy copies of a few labeled examples. Bisection finds the
strongest noise that it still fits; trained there it keeps a margin around every example. Claim: never much
below the plain head on clean features, often above it, and clearly above it on noisy ones.

  python -m experiments.ibm2
  python -m experiments.ibm2 --config.features=FILE.npz     # your own features
  python -m experiments.ibm2 --config=imagenet_dino_vit_small --config.backbone.weights=FILE --workdir=DIR

The file holds `train_features` [records, dim], `train_labels`, `test_features` and `test_labels`; all
training features are taken, or so many of each class as `--config.features_shots=1,5` says. arXiv 2305.17368.
"""

import dataclasses
import functools
import operator
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import launcher, networks, pictures, results
from experiments.harness.runs import Call, say
from experiments.harness.settings import free, section
from experiments.protocols import draws, frozen_features
from experiments.protocols.draws import Methods, Solved
from experiments.protocols.frozen_features import Facts
from jaxlab import classifiers, evaluation
from jaxlab.classifiers import MaxMargin
from jaxlab.classifiers.noisy_head import initial_params
from jaxlab.models.classifier_heads import WeightNormHead, nearest_class_mean

Array = jax.Array
PyTree = Any
Labeled = tuple[Array, Array]

ROWS = {'class means': 'reference', 'naive': 'baseline', 'IbM2': 'method', 'required': 'reference'}
METRICS = (
  'accuracy', 'noisy_accuracy', 'epsilon', 'threshold', 'width', 'train_accuracy_below',
  'train_accuracy_above', 'slack_below', 'slack_above', 'seconds', 'seconds_ratio',
)  # fmt: skip

SHOWN = ('accuracy', 'noisy_accuracy', 'epsilon', 'seconds')


@dataclasses.dataclass(frozen=True)
class Head:
  """The linear head, `scale * x / (|x| + eps) . (g_c v_c / |v_c|)`, and the smoothing of its labels."""

  scale: float = 10.0
  eps: float = 1e-5
  smoothing: float = 0.1


@dataclasses.dataclass(frozen=True)
class Search:
  """The bisection; names and constants are those of `jaxlab.classifiers.fit_max_margin`."""

  right: float = 10.0
  tolerance: float = 0.05
  max_threshold: float = 0.9
  search_learning_rate: float = 1.0
  search_epochs: int = 20
  threshold_epochs: int = 100


@dataclasses.dataclass(frozen=True)
class Training:
  """The final training, with and without noise; the rate is for 256 examples a step."""

  learning_rate: float = 0.05
  epochs: int = 100


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """How heads are judged.

  Attributes:
    num_copies: noisy copies of a test feature.
    chunk_size: test features whose copies are in memory at a time.
    step: how far below and above epsilon the search's head is tried.
  """

  num_copies: int = 20
  chunk_size: int = 256
  step: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(frozen_features.Settings):
  """Settings of IbM2.

  Attributes:
    head: the linear head.
    batch_size: examples a step, before they are copied.
    num_copies: noisy copies of an example in a step.
    chunk_size: examples whose copies are in memory at a time; 0: the batch.
    search: of the margin.
    train: at the margin.
    eval: of both heads.
  """

  head: Head = section(Head)
  batch_size: int = 256
  num_copies: int = 200
  chunk_size: int = free(0)
  search: Search = section(Search)
  train: Training = section(Training)
  eval: Evaluation = free(default_factory=Evaluation)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    counts = ('batch_size', 'num_copies', 'search.search_epochs', 'search.threshold_epochs')
    for name in (*counts, 'train.epochs', 'eval.num_copies', 'eval.chunk_size'):
      if (value := operator.attrgetter(name)(self)) < 1:
        yield f'{name}={value}: expected at least 1.'
    for name in ('search.right', 'search.tolerance', 'head.scale'):
      if (value := operator.attrgetter(name)(self)) <= 0:
        yield f'{name}={value}: expected a positive number.'
    if self.chunk_size < 0:
      yield f'chunk_size={self.chunk_size}: expected a number of examples, or 0, the batch.'
    if not 0 <= self.head.smoothing <= 1:
      yield f'head.smoothing={self.head.smoothing}: expected a share in [0, 1].'
    if 0 < self.search.right < self.search.tolerance:
      yield (
        f'search.tolerance={self.search.tolerance:g} is above search.right={self.search.right:g}: nothing '
        'would be searched.'
      )


def head(config: Settings, num_classes: int) -> WeightNormHead:
  """Returns the linear head."""
  return classifiers.margin_head(num_classes, config.head.scale, config.head.eps)


def step(config: Settings, mesh: jax.sharding.Mesh, x: Array) -> dict[str, Any]:
  """Returns the options of a training step; the copies of a chunk are shared by devices that divide it."""
  chunk = min(config.chunk_size or config.batch_size, config.batch_size, len(x))
  return {
    'batch_size': config.batch_size,
    'smoothing': config.head.smoothing,
    'chunk_size': chunk,
    'sharding': networks.calibration_sharding(mesh, chunk),
  }


def ibm2(config: Settings, classes: int, mesh: Any, key: Array, x: Array, y: Array) -> MaxMargin:
  """The method on one draw: the threshold, the widest noise that is fitted, and a head trained there."""
  options = {**dataclasses.asdict(config.train), **dataclasses.asdict(config.search)}
  options |= {'num_copies': config.num_copies, **step(config, mesh, x)}
  return classifiers.fit_max_margin(key, head(config, classes), x, y, **options)


def naive(config: Settings, classes: int, mesh: Any, key: Array, x: Array, y: Array) -> PyTree:
  """The baseline on one draw: the same head without noise."""
  own, (init_key, train_key) = head(config, classes), jax.random.split(key)
  params = initial_params(init_key, own, x)
  options = {**dataclasses.asdict(config.train), **step(config, mesh, x)}
  return classifiers.train_head(train_key, own, params, x, y, **options)


def judge(
  config: Settings, classes: int, mesh: Any, key: Array, train: Labeled, test: Labeled, fitted: PyTree
) -> dict[str, Array]:  # fmt: skip
  """Returns what one draw shows, shares in [0, 1].

  `{naive,ibm2,means}_accuracy` on clean test features, `{naive,ibm2}_noisy_accuracy` on noisy copies of them
  with the training deviation and epsilon, the same for both; and `train_accuracy_{below,above}`: that of the
  search's head on noisy copies of the training features, after further `search_epochs` of training at
  epsilon -+ `eval.step`. Of the search `epsilon`, `threshold` and the `width` of its last interval.
  """
  own, (x, y), search = head(config, classes), train, fitted['ibm2'].search
  test_key, train_key, eval_key = jax.random.split(key, 3)
  sigma, options = classifiers.feature_std(x), step(config, mesh, x)
  heads = jax.tree.map(lambda *both: jnp.stack(both), fitted['naive'], fitted['ibm2'].params)

  def on_test(**noise: Any) -> Array:
    noise |= {'sigma': sigma, 'chunk_size': config.eval.chunk_size}
    accuracy = functools.partial(classifiers.noisy_accuracy, test_key, own, **noise)
    return jax.vmap(lambda params: accuracy(params, *test))(heads)

  def moved_by(offset: Array) -> Array:
    noise = {'epsilon': jnp.maximum(search.epsilon + offset, 0), 'num_copies': config.num_copies}
    params = classifiers.train_head(
      train_key, own, search.params, x, y, sigma=sigma, **noise, **options,
      epochs=config.search.search_epochs, learning_rate=config.search.search_learning_rate,
    )  # fmt: skip
    cost = {name: options[name] for name in ('chunk_size', 'sharding')}
    return classifiers.noisy_accuracy(eval_key, own, params, x, y, sigma=sigma, **noise, **cost)

  clean, noisy = on_test(), on_test(epsilon=search.epsilon, num_copies=config.eval.num_copies)
  below, above = jax.vmap(moved_by)(jnp.array([-config.eval.step, config.eval.step]))
  cosines = test[0] @ nearest_class_mean(x, y, classes)
  return {
    'means_accuracy': evaluation.top_k_accuracy(cosines, test[1]),
    'naive_accuracy': clean[0],
    'ibm2_accuracy': clean[1],
    'naive_noisy_accuracy': noisy[0],
    'ibm2_noisy_accuracy': noisy[1],
    'train_accuracy_below': below,
    'train_accuracy_above': above,
    'epsilon': search.epsilon,
    'threshold': search.threshold,
    'width': search.interval[1] - search.interval[0],
  }


def methods(config: Settings, classes: int) -> Methods:
  """Returns what is compared on tasks of so many classes."""
  fits = {fit.__name__: functools.partial(fit, config, classes) for fit in (ibm2, naive)}
  return Methods(fits, functools.partial(judge, config, classes))


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from frozen_features.check(config, list(ROWS), [f'{name}(_std)?' for name in METRICS])


def programs(config: Settings, facts: Facts | None = None) -> dict[str, Call]:
  """Returns the network's forward pass, both methods on all draws of the largest task, and `judge`."""
  facts = facts or frozen_features.nominal_facts(config)
  own = draws.programs(config, facts, methods(config, facts.num_classes))
  return frozen_features.programs(config) | own


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Runs the plain head and IbM2 on all draws of every task, and compares them."""
  config = frozen_features.with_features(config)
  metrics: dict[str, dict[str, float]] = {name: {} for name in ROWS}
  singles, searches = {}, {}
  for index, task in enumerate(frozen_features.tasks(config, workdir)):
    key = jax.random.fold_in(jax.random.key(config.seed), index)
    solved = draws.solve(config, methods(config, task.num_classes), task, key)
    if np.any(solved.fitted['ibm2'].search.interval[:, 1] >= config.search.right):
      right = f'raise search.right, now {config.search.right:g}'
      say(f'warning: {task.name}: epsilon is at the end of the range; {right}.')
    for name, own in measured(config, solved).items():
      metrics[name] |= {f'{task.name}_{metric}': value for metric, value in own.items()}
    seconds = {'seconds': solved.seconds['ibm2'], 'naive_seconds': solved.seconds['naive']}
    singles[task.name] = {name: v.tolist() for name, v in solved.metrics.items()} | seconds
    searches[task.name] = solved.fitted['ibm2'].search
  rows = [results.row(name, role, metrics[name]) for name, role in ROWS.items()]
  draw(config, rows, searches, workdir / 'max_margin.png')
  traces = {
    name: {'threshold': own.threshold.tolist(), 'trace': own.trace.tolist()}
    for name, own in searches.items()
  }
  found = results.results(config, rows, SHOWN, 'accuracies in %', config.task_names)
  return found | {'draws': singles, 'bisection': traces}


def measured(config: Settings, solved: Solved) -> dict[str, dict[str, float]]:
  """Returns a task's metrics by row: accuracies in percent, means and deviations of draws.

  `width`, `slack_below` and `slack_above` are those of the worst draw: the length of the last interval, and
  how far the accuracy below and above epsilon is on its side of the threshold. The row 'required' says what
  they must reach.
  """
  own, seconds = solved.metrics, solved.seconds
  names = ('threshold', 'train_accuracy_below', 'train_accuracy_above')
  threshold, below, above = (100 * own[name] for name in names)

  def accuracies(head: str, *kinds: str) -> dict[str, float]:
    found = [draws.spread(kind, 100 * own[f'{head}_{kind}']) for kind in kinds]
    return {name: value for item in found for name, value in item.items()}

  both = ('accuracy', 'noisy_accuracy')
  return {
    'class means': accuracies('means', 'accuracy'),
    'naive': accuracies('naive', *both) | {'seconds': seconds['naive'], 'seconds_ratio': 1.0},
    'IbM2': {
      **accuracies('ibm2', *both),
      **draws.spread('epsilon', own['epsilon']),
      'threshold': threshold.mean(),
      'width': own['width'].max(),
      'train_accuracy_below': below.mean(),
      'train_accuracy_above': above.mean(),
      'slack_below': (below - threshold).min(),
      'slack_above': (threshold - above).min(),
      'seconds': seconds['ibm2'],
      'seconds_ratio': seconds['ibm2'] / seconds['naive'],
    },
    'required': {'width': config.search.tolerance, 'slack_below': 0.0, 'slack_above': 0.0},
  }


def draw(
  config: Settings, rows: Any, searches: Mapping[str, classifiers.Search], path: pathlib.Path
) -> None:
  """Draws the bisections of all draws, and the accuracies with and without noise."""
  with pictures.drawn(path, 1, 2, size=(5 + 1.5 * len(searches), 4)) as (left, right):
    for index, (name, own) in enumerate(searches.items()):
      tried, found = own.trace.reshape(-1, 4).T, {'color': f'C{index % 10}'}
      left.plot(tried[0], 100 * tried[1], 'o', alpha=0.6, markersize=4, label=name, **found)
      for epsilon in own.epsilon:
        left.axvline(epsilon, alpha=0.3, linewidth=1, **found)
    left.axhline(100 * config.search.max_threshold, color='gray', linestyle='--', linewidth=1)
    left.set_xlabel('epsilon tried (lines: found)')
    left.set_ylabel('training accuracy on noisy copies (%)')
    left.set_title('bisection, all draws')
    left.legend(frameon=False, fontsize=8)
    left.grid(alpha=0.3, axis='y')
    draws.draw_bars(right, config, rows, {'accuracy': 'clean test', 'noisy_accuracy': 'noisy test'})


if __name__ == '__main__':
  launcher.main('ibm2')
