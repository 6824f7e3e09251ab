"""IbM2: Instance-based Max-margin for Practical Few-shot Recognition (Fu et al., CVPR 2024).

On cached features, a linear head learns from noisy copies of a few labeled examples. Bisection finds the
strongest noise that it still fits; trained there it keeps a margin around every example. Claim: never much
below the plain head on clean features, often above it, and clearly above it on noisy ones.

  python -m experiments.ibm2
  python -m experiments.ibm2 --config.features=FILE.npz     # your own features
  python -m experiments.ibm2 --config=mlcollections_configs/ibm2/imagenet_dino_vit_small.py --workdir=DIR

The file holds `train_features` [records, dim], `train_labels`, `test_features` and `test_labels`; all
training features are taken, or so many of each class as `'--config.features_shots=(1,5)'` says.
arXiv 2305.17368.
"""

import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from experiments import frozen_features, launcher, training
from experiments.frozen_features import Task
from experiments.results import measured_claims, print_table, results, row
from jaxlab import models, parallel
from jaxlab.classifiers import (
  MaxMargin,
  feature_std,
  fit_max_margin,
  margin_head,
  noisy_accuracy,
  train_head,
)
from jaxlab.classifiers.bisection import num_iterations
from jaxlab.classifiers.noisy_head import initial_params
from jaxlab.models.classifier_heads import nearest_class_mean

Array = jax.Array
PyTree = Any


class Programs(NamedTuple):
  """The computations on one draw, pure functions of arrays; `jax.vmap` takes them to all draws.

  Attributes:
    ibm2: `(key, features, labels) -> MaxMargin`: threshold, bisection, final training.
    naive: `(key, features, labels) -> params`: the same head without noise.
    judge: `(key, features, labels, test_features, test_labels, naive, found) -> metrics`, see there.
  """

  ibm2: Callable[[Array, Array, Array], MaxMargin]
  naive: Callable[[Array, Array, Array], PyTree]
  judge: Callable[..., dict[str, Array]]


def programs(config: ConfigDict, num_classes: int, num_examples: int, mesh: Any = None) -> Programs:
  """Returns IbM2, the baseline and their evaluation as functions of the configuration.

  Args:
    config: of `mlcollections_configs/ibm2`.
    num_classes: of the task.
    num_examples: of a draw.
    mesh: devices that share the noisy copies of a chunk, where they divide it.
  """
  head = margin_head(num_classes, config.head.scale, config.head.eps)
  chunk = min(config.chunk_size or config.batch_size, config.batch_size, num_examples)
  step = {
    'batch_size': config.batch_size,
    'smoothing': config.head.smoothing,
    'chunk_size': chunk,
    'sharding': _sharding(mesh, chunk),
  }

  def ibm2(key: Array, x: Array, y: Array) -> MaxMargin:
    return fit_max_margin(
      key, head, x, y, **config.train, **config.search, num_copies=config.num_copies, **step
    )

  def naive(key: Array, x: Array, y: Array) -> PyTree:
    init_key, train_key = jax.random.split(key)
    return train_head(
      train_key, head, initial_params(init_key, head, x), x, y, **config.train, **step
    )

  def judge(key, x, y, test_x, test_y, naive_params, found) -> dict[str, Array]:
    return _judge(config, head, step, key, (x, y), (test_x, test_y), naive_params, found)

  return Programs(ibm2, naive, judge)


def _judge(
  config: ConfigDict,
  head: nn.Module,
  step: Mapping[str, Any],
  key: Array,
  train: tuple[Array, Array],
  test: tuple[Array, Array],
  naive: PyTree,
  found: MaxMargin,
) -> dict[str, Array]:
  """Returns what one draw shows, shares in [0, 1].

  `{naive,ibm2,means}_accuracy` on clean test features, `{naive,ibm2}_noisy_accuracy` on
  `eval.num_copies` noisy copies of each with the training deviation and epsilon, the same for both; and
  `train_accuracy_{below,above}`: the search's head after further `search_epochs` of training at epsilon
  -+ `eval.step`, on noisy copies of the training features.
  """
  (x, y), (test_x, test_y), epsilon = train, test, found.search.epsilon
  test_key, train_key, eval_key = jax.random.split(key, 3)
  sigma = feature_std(x)
  heads = jax.tree.map(lambda *leaves: jnp.stack(leaves), naive, found.params)

  def on_test(**noise: Any) -> Array:
    options = {'sigma': sigma, 'chunk_size': config.eval.chunk_size, **noise}
    return jax.vmap(lambda p: noisy_accuracy(test_key, head, p, test_x, test_y, **options))(heads)

  noise = {'sigma': sigma, 'num_copies': config.num_copies}

  def moved_by(offset: Array) -> Array:
    moved = jnp.maximum(epsilon + offset, 0)
    params = train_head(
      train_key, head, found.search.params, x, y, epsilon=moved, **noise, **step,
      epochs=config.search.search_epochs, learning_rate=config.search.search_learning_rate,
    )  # fmt: skip
    return noisy_accuracy(
      eval_key, head, params, x, y, epsilon=moved, **noise,
      chunk_size=step['chunk_size'], sharding=step['sharding'],
    )  # fmt: skip

  clean, noisy = on_test(), on_test(epsilon=epsilon, num_copies=config.eval.num_copies)
  below, above = jax.vmap(moved_by)(jnp.array([-config.eval.step, config.eval.step]))
  means = test_x @ nearest_class_mean(x, y, head.num_classes)
  return {
    'means_accuracy': jnp.mean(jnp.argmax(means, -1) == test_y, dtype=x.dtype),
    'naive_accuracy': clean[0],
    'ibm2_accuracy': clean[1],
    'naive_noisy_accuracy': noisy[0],
    'ibm2_noisy_accuracy': noisy[1],
    'train_accuracy_below': below,
    'train_accuracy_above': above,
  }


def run(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Runs the plain head and IbM2 on all draws of every task, and compares them."""
  check(config)
  metrics: dict[str, dict[str, float]] = {
    name: {} for name in ('class means', 'naive', 'IbM2', 'required')
  }
  traces, singles = {}, {}
  for index, task in enumerate(frozen_features.tasks(config, workdir)):
    key = jax.random.fold_in(jax.random.key(config.seed), index)
    found, values = solve(config, task, key)
    _add(config, metrics, task.name, values)
    traces[task.name] = {
      'threshold': found.search.threshold.tolist(),
      'trace': found.search.trace.tolist(),
    }
    singles[task.name] = {name: np.asarray(v).tolist() for name, v in values.items()}
    _say(config, task, values)
  roles = {'naive': 'baseline', 'IbM2': 'method'}
  rows = [row(name, roles.get(name, 'reference'), own) for name, own in metrics.items()]
  show(config, rows, traces, singles, workdir)
  claims = measured_claims(config, rows)
  return results(config, rows, claims) | {'draws': singles, 'bisection': traces}


def check(config: ConfigDict) -> None:
  """Raises ValueError for what can be seen to be wrong before any feature is computed."""
  shots = config.features_shots if config.features else config.shots
  name = 'features_shots' if config.features else 'shots'
  if not shots or min(shots) < 0 or len(set(shots)) < len(shots):
    raise ValueError(f'{name}={shots}: expected different numbers of images per class; 0: all.')
  for name, value in (
    ('draws', config.draws),
    ('num_copies', config.num_copies),
    ('batch_size', config.batch_size),
    ('eval.num_copies', config.eval.num_copies),
    ('eval.chunk_size', config.eval.chunk_size),
  ):
    if value < 1:
      raise ValueError(f'{name}={value} must be at least 1.')
  if not num_iterations(config.search.right, config.search.tolerance):
    raise ValueError(
      f'search.tolerance={config.search.tolerance:g} is above search.right={config.search.right:g}: nothing '
      'would be searched.'
    )
  if 'network' in config.representations and not config.features:
    frozen_features.feature_fn(config, frozen_features.network(config))


def solve(config: ConfigDict, task: Task, key: Array) -> tuple[MaxMargin, dict[str, Any]]:
  """Returns what IbM2 finds on all draws of a task, stacked, and the values of `Programs.judge` and time.

  Seconds are those of the compiled programs, of all draws together.
  """
  draws, count = task.labels.shape
  if task.num_classes < 2 or count < 2:
    raise ValueError(
      f'{task.name}: {count} training features of {task.num_classes} class(es); a margin needs at least 2 '
      f'of both.'
    )
  own = programs(config, task.num_classes, count, training.mesh(config))
  fit_key, naive_key, judge_key = (jax.random.split(k, draws) for k in jax.random.split(key, 3))
  x, y = jnp.asarray(task.features), jnp.asarray(task.labels)

  def timed(fn, *arguments, repeats=1):
    compiled = jax.jit(jax.vmap(fn)).lower(*arguments).compile()
    seconds = []
    for _ in range(repeats):
      began = time.perf_counter()
      out = jax.block_until_ready(compiled(*arguments))
      seconds.append(time.perf_counter() - began)
    return out, min(seconds)

  found, seconds = timed(own.ibm2, fit_key, x, y)
  naive, naive_seconds = timed(own.naive, naive_key, x, y, repeats=3)
  judge = jax.jit(jax.vmap(own.judge, in_axes=(0, 0, 0, None, None, 0, 0)))
  values = jax.device_get(
    judge(judge_key, x, y, task.test_features, task.test_labels, naive, found)
  )
  found = jax.device_get(found)
  if np.any(found.search.interval[:, 1] >= config.search.right):
    training.say(
      f'warning: {task.name}: epsilon is at the end of the range; raise search.right, now '
      f'{config.search.right:g}.'
    )
  values |= {'epsilon': found.search.epsilon, 'threshold': found.search.threshold}
  values |= {'width': found.search.interval[:, 1] - found.search.interval[:, 0]}
  return found, values | {'seconds': seconds, 'naive_seconds': naive_seconds}


def _add(config: ConfigDict, metrics: dict, name: str, values: Mapping[str, Any]) -> None:
  """Adds a task's values to the rows: accuracies in percent, means and population deviations of draws."""
  percent = {
    key: 100 * np.asarray(v) for key, v in values.items() if 'accuracy' in key or key == 'threshold'
  }
  for title, own in (('class means', 'means'), ('naive', 'naive'), ('IbM2', 'ibm2')):
    for kind in ('accuracy', 'noisy_accuracy'):
      if (found := percent.get(f'{own}_{kind}')) is not None:
        metrics[title][f'{name}_{kind}'] = found.mean()
        metrics[title][f'{name}_{kind}_std'] = found.std()
  ratio = values['seconds'] / values['naive_seconds']
  below = percent['train_accuracy_below'] - percent['threshold']
  above = percent['threshold'] - percent['train_accuracy_above']
  metrics['naive'] |= {f'{name}_seconds': values['naive_seconds'], f'{name}_seconds_ratio': 1.0}
  metrics['IbM2'] |= {
    f'{name}_epsilon': values['epsilon'].mean(),
    f'{name}_epsilon_std': values['epsilon'].std(),
    f'{name}_threshold': percent['threshold'].mean(),
    f'{name}_width': values['width'].max(),
    f'{name}_train_accuracy_below': percent['train_accuracy_below'].mean(),
    f'{name}_train_accuracy_above': percent['train_accuracy_above'].mean(),
    f'{name}_slack_below': below.min(),
    f'{name}_slack_above': above.min(),
    f'{name}_seconds': values['seconds'],
    f'{name}_seconds_ratio': ratio,
  }
  # What the bisection must reach in its worst draw, as a row for claims to name.
  metrics['required'] |= {
    f'{name}_width': config.search.tolerance,
    f'{name}_slack_below': 0.0,
    f'{name}_slack_above': 0.0,
  }


def _say(config: ConfigDict, task: Task, values: Mapping[str, Any]) -> None:
  shares = {name: 100 * np.mean(v) for name, v in values.items() if name.endswith('accuracy')}
  training.say(
    f'{task.name} ({config.draws} draws of {task.labels.shape[1]}, {task.features.shape[-1]} '
    f'channels): naive {shares["naive_accuracy"]:.1f} -> IbM2 {shares["ibm2_accuracy"]:.1f}; with noise '
    f'{shares["naive_noisy_accuracy"]:.1f} -> {shares["ibm2_noisy_accuracy"]:.1f}; epsilon '
    f'{np.mean(values["epsilon"]):.2f}; {values["seconds"]:.1f} s'
  )


def lower(config: ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, jax.stages.Lowered]:
  """Returns the programs of a setting, lowered for a mesh, at its largest number of shots.

  `features`: a batch of images through the network (where there is one); `ibm2`: the whole search and the
  final training on all draws; `naive`: the baseline.
  """
  check(config)
  everywhere, lowered = parallel.replicated(mesh), {}

  def abstract(shape, dtype, sharding=everywhere):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  if 'network' in config.representations:
    model = frozen_features.network(config)
    image = tuple(config.data.stored_image)
    variables = jax.tree.map(
      lambda leaf: abstract(leaf.shape, leaf.dtype), models.abstract_variables(model, image)
    )
    batch = (config.eval_batch_size, *image)
    images = abstract(batch, jnp.uint8, parallel.batch_sharding(mesh))
    fn = frozen_features.feature_fn(config, model)
    lowered['features'] = jax.jit(fn).lower(variables, images)
    dim = lowered['features'].out_info.shape[-1]
  else:
    dim = config.relu.units
  classes = config.data.num_classes
  count = config.data.train_size if 0 in config.shots else classes * max(config.shots)
  own = programs(config, classes, count, mesh)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), config.draws))
  arguments = (
    abstract(keys.shape, keys.dtype),
    abstract((config.draws, count, dim), jnp.float32),
    abstract((config.draws, count), jnp.int32),
  )
  for name in ('ibm2', 'naive'):
    lowered[name] = jax.jit(jax.vmap(getattr(own, name))).lower(*arguments)
  return lowered


def _sharding(mesh: Any, chunk: int) -> Any:
  """Returns how a chunk of examples lies on the devices: split, or None where they do not divide it."""
  if mesh is None or mesh.size == 1 or chunk % (mesh.shape['data'] * mesh.shape['fsdp']):
    return None
  return parallel.batch_sharding(mesh)


def show(
  config: ConfigDict,
  rows: list,
  traces: Mapping[str, Any],
  singles: Mapping[str, Any],
  workdir: Any,
) -> None:
  """Prints the table, and draws the bisections and the accuracies with and without noise."""
  kinds = ('accuracy', 'noisy_accuracy', 'epsilon', 'threshold', 'width', 'train_accuracy_below')
  kinds += ('train_accuracy_above', 'slack_below', 'slack_above', 'seconds', 'seconds_ratio')
  title = f'{config.paper}, {config.setting}, seed {config.seed}'
  print_table(title, rows, [f'{name}_{kind}' for name in traces for kind in kinds])
  if jax.process_index():
    return
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(5 + 1.5 * len(traces), 4))
  for index, (name, own) in enumerate(traces.items()):
    color = f'C{index % 10}'
    for number, steps in enumerate(own['trace']):
      epsilon, accuracy = np.asarray(steps)[:, :2].T
      label = name if number == 0 else None
      left.plot(epsilon, 100 * accuracy, 'o', color=color, alpha=0.6, markersize=4, label=label)
    for epsilon in singles[name]['epsilon']:
      left.axvline(epsilon, color=color, alpha=0.3, linewidth=1)
  left.axhline(100 * config.search.max_threshold, color='gray', linestyle='--', linewidth=1)
  left.set_xlabel('epsilon tried (lines: found)')
  left.set_ylabel('training accuracy on noisy copies (%)')
  left.set_title('bisection, all draws')
  left.legend(frameon=False, fontsize=8)

  metrics = {item['name']: item['metrics'] for item in rows}
  places = np.arange(len(traces))
  for offset, (title_, kind, color, hatch) in enumerate(
    (
      ('naive', 'accuracy', '#9aa5b1', ''),
      ('IbM2', 'accuracy', '#2563eb', ''),
      ('naive', 'noisy_accuracy', '#d3d9df', '//'),
      ('IbM2', 'noisy_accuracy', '#93b4f5', '//'),
    )
  ):
    own = metrics[title_]
    right.bar(
      places + 0.2 * (offset - 1.5),
      [own[f'{name}_{kind}'] for name in traces],
      0.2,
      yerr=[own[f'{name}_{kind}_std'] for name in traces],
      color=color,
      hatch=hatch,
      capsize=2,
      label=f'{title_}, {"noisy" if "noisy" in kind else "clean"} test',
    )
  right.set_xticks(places, traces, fontsize=8)
  right.set_ylabel('accuracy (%)')
  right.set_title(title)
  right.set_ylim(0, 115)
  right.legend(frameon=False, fontsize=8, ncol=2, loc='upper left')
  for axis in (left, right):
    axis.grid(alpha=0.3, axis='y')
  figure.tight_layout()
  figure.savefig(str(workdir / 'max_margin.png'), dpi=120)
  plt.close(figure)


if __name__ == '__main__':
  launcher.main(run, 'ibm2')
