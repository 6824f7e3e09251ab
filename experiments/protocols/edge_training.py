"""Training on features that another machine gathered: what a device does that has no backbone.

It reads files of features (`jaxlab.data.FeatureFile`), two of a task: `<task>-train.npz` and
`<task>-test.npz`. No network of `jaxlab.models` is loaded here.
"""

import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import runs
from experiments.harness.data import Arrays
from experiments.harness.runs import Run, say
from experiments.harness.sections import Experiment, Optimizer, Recipe, Schedule
from experiments.harness.settings import found_by, section
from experiments.protocols.hold_out import Order, held_out_rows
from experiments.protocols.replicas import diverged, sweep
from jaxlab import adapters, data, losses
from jaxlab.data import FeatureFile, FeatureHeader
from jaxlab.data.sources.feature_file import SUFFIXES
from jaxlab.training import (
  Initial,
  LossState,
  Out,
  Program,
  cast_floating,
  make_program,
  map_batches,
)

Array = jax.Array
PyTree = Any

MODULES = {
  'attention': (adapters.low_rank_attention, adapters.init_low_rank_attention),
  'mlp': (adapters.low_rank_mlp, adapters.init_low_rank_mlp),
}


@dataclasses.dataclass(frozen=True)
class Edge:
  """The edge network and how its rates are chosen.

  Attributes:
    kind: of its modules; an MLP has as many numbers as attention of the rank.
    rank: of a module.
    depth: modules in a row; 0: a linear probe.
    pool: what the head reads: the mean patch, or the class token.
    rates: learning rates; of several, trained side by side, the best on held-out records is taken; none: the
      recipe's.
    decays: weight decays, likewise.
    held_out: records that these are chosen on.
    held_out_order: which these are: the 'last' ones, or of every class its share, drawn by the seed.
  """

  kind: Literal['attention', 'mlp'] = 'attention'
  rank: int = 16
  depth: int = 4
  pool: Literal['mean_patches', 'cls'] = 'mean_patches'
  rates: tuple[float, ...] = ()
  decays: tuple[float, ...] = ()
  held_out: int = 200
  held_out_order: Order = 'last'

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from found_by('edge', functools.partial(self.init, jax.random.key(0), 8, 2))
    for name in ('rates', 'decays'):
      own = getattr(self, name)
      if len(set(own)) < len(own) or any(value < 0 for value in own):
        yield f'{name}={own}: expected different numbers of at least 0.'
    if self.held_out < 1:
      yield f'held_out={self.held_out}: expected at least 1.'

  def init(self, key: Array, width: int, num_classes: int) -> PyTree:
    """Draws the network."""
    _, init = MODULES[self.kind]
    return adapters.init_edge_network(
      key, width, num_classes, rank=self.rank, depth=self.depth, init=init
    )

  def logits(self, edge: PyTree, gathered: Array, num_prefix_tokens: int) -> Array:
    """Returns the logits of gathered features."""
    return adapters.apply_edge_network(
      edge,
      gathered,
      pool=self.pool,
      num_prefix_tokens=num_prefix_tokens,
      module=MODULES[self.kind][0],
    )

  def pairs(self, recipe: Recipe) -> list[tuple[float, float]]:
    """Returns all pairs of a learning rate and a weight decay."""
    rates = self.rates or (recipe.schedule.base,)
    return list(itertools.product(rates, self.decays or (recipe.optimizer.weight_decay,)))


def usual_recipe() -> Recipe:
  """Returns the recipe of tasks of 1000 images: 100 epochs of AdamW, and 10 of warm-up."""
  return Recipe(
    epochs=110,
    batch_size=32,
    optimizer=Optimizer(name='adamw', weight_decay=0.05, no_decay=('.*bias',)),
    schedule=Schedule(
      name='overlaid_cosine', base=1e-3, end=1e-8, warmup_epochs=10, warmup_start=1e-7
    ),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of a device: its network, and the recipe."""

  edge: Edge = section(Edge)
  recipe: Recipe = dataclasses.field(default_factory=usual_recipe)


class EdgeTraining(NamedTuple):
  """A training on features, as functions.

  Attributes:
    program: `frozen` are the scalars `rate` and `decay`.
    loss: `(params, batch) -> mean loss`.
    logits: `(params, features) -> [batch, classes]`.
  """

  program: Program
  loss: Any
  logits: Any


class Trained(NamedTuple):
  """What a training ends with: parameters, accuracy on the test records in percent, and the pair of rates."""

  params: PyTree
  accuracy: float
  rates: tuple[float, float]


def edge_training(
  edge: Edge, header: FeatureHeader, recipe: Recipe, steps_per_epoch: int
) -> EdgeTraining:
  """Returns the training of an edge network: softmax cross-entropy.

  Args:
    edge: the network.
    header: of the training records.
    recipe: base rate and weight decay are arguments of the step.
    steps_per_epoch: optimizer steps of an epoch.
  """
  width, size = header.shape[-1], recipe.batch_size
  batch = {
    'features': jax.ShapeDtypeStruct((size, *header.shape), np.dtype(header.dtype)),
    'label': jax.ShapeDtypeStruct((size,), np.int32),
    'index': jax.ShapeDtypeStruct((size,), np.int32),
  }
  scalar = jax.ShapeDtypeStruct((), jnp.float32)
  dtype = recipe.program_options['compute_dtype']

  def logits(params: PyTree, features: Array) -> Array:
    return edge.logits(params, features, header.num_prefix_tokens)

  def loss(params: PyTree, batch: PyTree) -> Array:
    # As the step does: what is kept is of the compute type.
    if dtype is not None:
      params, batch = cast_floating((params, batch), dtype)
    return jnp.mean(losses.cross_entropy(logits(params, batch['features']), batch['label']))

  def single(rate: Any, decay: Any) -> Program:
    schedule = dataclasses.replace(recipe.schedule, base=rate).make(recipe.epochs, steps_per_epoch)

    def own_loss(params: PyTree, state: LossState, batch: PyTree, key: Array) -> tuple[Array, Out]:
      del key
      return loss(params, batch), Out(metrics={'learning_rate': schedule(state.step)})

    optimizer = recipe.optimizer.make(schedule, weight_decay=lambda step: decay)
    init = lambda key: Initial(edge.init(key, width, header.num_classes))  # noqa: E731
    frozen = {'rate': scalar, 'decay': scalar}
    return make_program(init, own_loss, optimizer, batch, frozen=frozen, **recipe.program_options)

  def step(state: Any, frozen: PyTree, batch: PyTree) -> tuple[Any, dict[str, Array]]:
    return single(frozen['rate'], frozen['decay']).step(state, frozen, batch)

  nominal = single(0.0, 0.0)
  program = Program(nominal.init, step, nominal.batch, nominal.rules, nominal.frozen)
  return EdgeTraining(program, loss, logits)


def training(
  config: Experiment,
  edge: Edge,
  header: FeatureHeader,
  recipe: Recipe,
  title: str,
  count: int,
) -> tuple[EdgeTraining, Run]:
  """Returns the functions and the run of a training on `count` of the records that a header tells of.

  With several views of each image the recipe's epochs have the steps of epochs over images: the budget of
  a training that draws the views anew.
  """
  steps = count // header.views // recipe.batch_size
  if not steps:
    raise ValueError(f'batch_size={recipe.batch_size} exceeds the {count} records of features.')
  made = edge_training(edge, header, recipe, steps)
  own = Arrays(
    name='features', shape=header.shape, num_classes=header.num_classes, train_size=count
  )
  decides = {'edge': edge, 'features': dataclasses.asdict(header)}
  return made, Run(config, own, recipe, made.program, recipe.epochs * steps, decides, title)


def train(
  config: Experiment,
  edge: Edge,
  recipe: Recipe,
  train: FeatureFile,
  test: FeatureFile,
  folder: pathlib.Path,
  title: str,
) -> Trained:
  """Trains an edge network on a file of features, from wherever `folder` was left, and judges it on another.

  Raises:
    ValueError: for what `check_pair` refuses.
  """
  check_pair(edge, recipe, train, test)
  pairs = edge.pairs(recipe)
  rate, decay = pairs[0]
  if len(pairs) > 1:
    rate, decay = _search(
      config, edge, recipe, train, folder.parent / f'{folder.name}_search', title
    )
  made, run = training(config, edge, train.header, recipe, title, len(train))
  frozen = {'rate': jnp.float32(rate), 'decay': jnp.float32(decay)}
  params = runs.train(run, train, folder, frozen=frozen).state.params
  return Trained(params, accuracy(config, made, params, test), (rate, decay))


def check_pair(edge: Edge, recipe: Recipe, train: FeatureFile, test: FeatureFile) -> None:
  """Raises ValueError for files that an edge network cannot be trained and judged on.

  Those are files of two networks, of other layers, or of different kinds; test images of several views;
  fewer images than a batch, also of those that a choice among learning rates leaves, and several views of
  them; and features without the token that the head reads.
  """
  for name in ('network', 'layers', 'shape', 'dtype', 'num_classes', 'num_prefix_tokens'):
    held = [getattr(own.header, name) for own in (train, test)]
    if held[0] != held[1]:
      raise ValueError(
        f'{train.path} and {test.path} do not belong together: {name} {held[0]!r} and {held[1]!r}.'
      )
  if test.header.views > 1:
    raise ValueError(f'{test.path}: {test.header.views} views of each test image; expected one.')
  if edge.pool == 'cls' and not train.header.num_prefix_tokens:
    raise ValueError(
      f"{train.path}: pool='cls', but there is no class token; expected mean_patches."
    )
  several = len(edge.pairs(recipe)) > 1
  if train.header.views > 1 and several:
    raise ValueError(
      f'{train.path}: {train.header.views} views of each image; to choose among learning rates and weight '
      'decays one is expected, for the held-out records would be views of images trained on.'
    )
  found = len(train) // train.header.views
  if found < recipe.batch_size:
    raise ValueError(
      f'{train.path}: batch_size={recipe.batch_size} exceeds the {found} images there are features of.'
    )
  if not several:
    return
  if len(train) - edge.held_out < recipe.batch_size:
    raise ValueError(
      f'{train.path}: held_out={edge.held_out} leaves {len(train) - edge.held_out} of {len(train)} records; '
      f'expected at least a batch of {recipe.batch_size}.'
    )
  held_out_rows(data.source_labels(train), edge.held_out, edge.held_out_order, 0)


def _search(
  config: Experiment, edge: Edge, recipe: Recipe, train: FeatureFile, folder: Any, title: str
) -> tuple[float, float]:
  """Returns the pair that is best on held-out records; of several the first."""
  pairs, kept = edge.pairs(recipe), len(train) - edge.held_out
  made, run = training(config, edge, train.header, recipe, f'{title}, {len(pairs)} settings', kept)
  values = dict(zip(('rate', 'decay'), zip(*pairs, strict=True), strict=True))
  decides = {**run.decides, 'diverging': 'stays'}
  run = run._replace(program=sweep(made.program, values), decides=decides)
  frozen = {name: jnp.asarray(own, jnp.float32) for name, own in values.items()}
  parts = held_out_rows(data.source_labels(train), edge.held_out, edge.held_out_order, config.seed)
  own, held = (data.subset(train, part) for part in parts)
  state = runs.train(run, own, folder, frozen=frozen).state
  scores = [
    accuracy(config, made, jax.tree.map(lambda leaf, i=i: leaf[i], state.params), held)
    for i in range(len(pairs))
  ]
  scores = np.where(diverged(state), np.nan, scores)
  say(', '.join(f'{r:g}/{d:g}: {score:.3g}' for (r, d), score in zip(pairs, scores)))
  return pairs[int(np.nanargmax(scores))]


def accuracy(config: Experiment, made: EdgeTraining, params: PyTree, source: data.Source) -> float:
  """Returns the accuracy on records of features, in percent."""
  correct = map_batches(
    functools.partial(_correct, params, logits=made.logits),
    source,
    batch_size=config.eval_batch_size,
    mesh=config.mesh.make(),
  )
  return 100 * float(correct.mean())


@functools.partial(jax.jit, static_argnames=('logits',))
def _correct(params: PyTree, batch: Mapping[str, Array], *, logits: Any) -> Array:
  found = logits(params, batch['features'])
  right = jnp.argmax(found, -1) == batch['label']
  return jnp.where(jnp.any(jnp.isnan(found), -1), False, right)


def step_seconds(made: EdgeTraining, steps: int) -> float:
  """Returns the median time of a training step of zeros on this machine, behind its compilation."""
  blank = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)  # noqa: E731
  program = made.program
  state, frozen, batch = (
    program.init(jax.random.key(0)),
    blank(program.frozen),
    blank(program.batch),
  )
  return median_seconds(jax.jit(program.step), steps, state, frozen, batch)


def median_seconds(function: Any, times: int, *args: Any) -> float:
  """Returns the median time of a call, behind its compilation."""
  jax.block_until_ready(function(*args))
  taken = []
  for _ in range(times):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    taken.append(time.perf_counter() - start)
  return float(np.median(taken))


def pair_of(
  folder: pathlib.Path,
  task: str,
  suffixes: Sequence[str] = SUFFIXES,
  **expected: Any,
) -> tuple[FeatureFile, FeatureFile]:
  """Returns the training and test features of a task, from `<folder>/<task>-train.*` and `-test.*`.

  Args:
    folder: with the files.
    task: name of the task.
    suffixes: of the files, the first that is there is read; for the test features the training file's own is
      tried first.
    **expected: fields of the header that both must have.

  Raises:
    FileNotFoundError: if one is missing.
    ValueError: see `FeatureFile`.
  """

  def path(split: str, suffixes: Sequence[str]) -> pathlib.Path:
    paths = [folder / f'{task}-{split}{suffix}' for suffix in suffixes]
    return next((own for own in paths if own.is_file()), paths[0])

  train = path('train', suffixes)
  test = path('test', (train.suffix, *suffixes))
  return FeatureFile(train, expected), FeatureFile(test, expected)


def tasks_in(folder: pathlib.Path) -> list[str]:
  """Returns the tasks of which a folder holds features.

  Raises:
    FileNotFoundError: if there are none.
  """
  files = sorted(feature_files(folder, ('train',)))
  if not files:
    raise FileNotFoundError(f'{folder} holds no features: expected <task>-train.npz and the like.')
  return list(dict.fromkeys(path.stem.removesuffix('-train') for path in files))


def feature_files(
  folder: pathlib.Path, splits: Sequence[str] = ('train', 'test')
) -> set[pathlib.Path]:
  """Returns the files of features, `<task>-<split>.*`, that a folder holds."""
  kinds = itertools.product(splits, SUFFIXES)
  return {path for split, suffix in kinds for path in folder.glob(f'*-{split}{suffix}')}
