"""A frozen network adapted to tasks of few images: one program for all ways of adapting it.

What a way trains besides a linear head, and the features that the head reads, is a `Method`: two functions.
The frozen network is an argument of the step, as are learning rate and weight decay, so that tasks share
compilations and several of both are trained side by side.
"""

import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from experiments.harness import networks, runs, supervised
from experiments.harness.data import Augment, Images
from experiments.harness.networks import Network
from experiments.harness.runs import Variables
from experiments.harness.sections import Experiment, Recipe, check_batch
from experiments.harness.settings import SettingsError, convert
from experiments.harness.tasks import ImageTask
from experiments.protocols.adaptation_tuning import Tuning
from experiments.protocols.hold_out import Order
from jaxlab import models
from jaxlab.models.initializers import vit_normal
from jaxlab.training import Initial, LossState, Out, Program, cast_floating, make_program

Array = jax.Array
PyTree = Any

Pool = Literal['mean_patches', 'model']
SWEPT = ('rate', 'decay')


class Method(NamedTuple):
  """A way to adapt a frozen network.

  Attributes:
    features: `(tuned, variables, images, *, train, rngs) -> [batch, width]`, what the linear head reads:
      `tuned` as of `init`, `variables` of the network without a classifier, images normalized; `rngs` are
      the streams 'dropout' and 'drop_path' in training, else empty.
    init: `(key, params) -> tuned`, draws what is trained; `params` are shapes of the network's parameters.
    patterns: of those parameters of the network that are trained, too.
  """

  features: Callable[..., Array]
  init: Callable[[Array, PyTree], PyTree] = lambda key, params: {}
  patterns: tuple[str, ...] = ()


class Row(NamedTuple):
  """A row of the comparison.

  Attributes:
    title: in tables.
    role: 'baseline' or 'method'.
    make: `(model, images, **options) -> Method`: the network without a classifier, and the shape of a batch
      of its inputs; `options` as the settings have them (`Tuning.options`), `pool` among them.
    decides: settings that `make` holds: with the options all that decides what the method is.
  """

  title: str
  role: str
  make: Callable[..., Method]
  decides: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """A task that the network is adapted to.

  Attributes:
    data: its images; `train_size` are those that are read.
    group: of tasks, over which scores are averaged first.
    augment: of training images.
    test: the test images, where they are another data set's.
    shots: images of each class that training draws by the seed; 0: all.
    validation: split of `data` on which the state is chosen; empty: the last is taken.
    validation_epochs: between two states that are judged there.
  """

  data: Images
  group: str = 'natural'
  augment: Augment = dataclasses.field(default_factory=Augment)
  test: Images | None = None
  shots: int = 0
  validation: str = ''
  validation_epochs: int = 10

  @property
  def size(self) -> int:
    """Training images."""
    return self.shots * self.data.num_classes if self.shots else self.data.train_size or 0

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.data.multi_label or self.data.train_size is None:
      yield 'data: expected images of one class each, with their train_size.'
    elif self.shots < 0 or self.size > self.data.train_size:
      yield f'shots={self.shots}: expected at least 0, and no more than data.train_size images in all.'
    if self.validation_epochs < 1:
      yield f'validation_epochs={self.validation_epochs}: expected at least 1.'
    if self.test is not None and self.test.num_classes != self.data.num_classes:
      yield f'test.num_classes={self.test.num_classes}: expected {self.data.num_classes}.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of the adaptation of one network to several tasks.

  Attributes:
    network: the network, with public weights or trained here on a source task.
    target: tasks by name.
    tasks: those that are run, in this order.
    recipe: of all rows on all tasks: the same budget.
    tuning: of single rows, by name.
    runs: rows that are run.
    pool: what heads read: 'mean_patches' (the norm of the mean patch token) or as the model pools.
    held_out: images of a task that learning rates are chosen on, where a row has several.
    held_out_order: which these are: the 'last' ones, or of every class its share, drawn by the seed.
    accounted: fields of the network, and `batch_size`, for which memory is counted, in place of its own.
  """

  network: Network
  target: dict[str, Target]
  tasks: tuple[str, ...]
  recipe: Recipe
  tuning: dict[str, Tuning] = dataclasses.field(default_factory=dict)
  runs: tuple[str, ...]
  pool: Pool = 'mean_patches'
  held_out: int = 200
  held_out_order: Order = 'last'
  accounted: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def tuned(self, name: str, task: str) -> Tuning:
    """Returns how a row is trained on a task."""
    return self.tuning.get(name, Tuning()).on(task)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    yield from check_batch(self.mesh, self.recipe.batch_size, 'recipe.batch_size')
    yield from self.check_accounted()
    for name in ('mixup', 'cutmix', 'eval_every'):
      if getattr(self.recipe, name):
        yield (
          f'recipe.{name}={getattr(self.recipe, name)}: expected 0; images are not mixed, and states are '
          'judged as the targets say.'
        )
    if not self.tasks or len(set(self.tasks)) < len(self.tasks) or {*self.tasks} - {*self.target}:
      yield f'tasks={self.tasks}: expected different ones of {", ".join(self.target)}.'
      return
    if len(set(self.runs)) < len(self.runs) or not self.runs:
      yield f'runs={self.runs}: expected different rows, at least one.'
    if any([*own.check()] for own in self.tuning.values()):
      return
    for name, row in self.tuning.items():
      for key, value in row.overruled(self.tasks):
        yield (
          f'tuning.{name}.{key}={value}: every task has its own, as '
          f'tuning.{name}.tasks.{self.tasks[0]}.{key}; expected a change there.'
        )
    view = self.network.data.view
    for task in self.tasks:
      own = self.target[task]
      searched = any(len(self.tuned(name, task).pairs(self.recipe)) > 1 for name in self.runs)
      least = own.size - self.held_out * searched
      if own.data.view != view or (own.test is not None and own.test.view != view):
        yield f'target.{task}.data: images of {own.data.view}, the network sees {view}.'
      if searched and self.held_out < 1:
        yield f'held_out={self.held_out}: expected at least 1 where a row has several rates or decays.'
      elif searched and self.held_out >= own.size:
        yield f'held_out={self.held_out}: expected fewer than the {own.size} images of {task}.'
      elif least < self.recipe.batch_size:
        yield (
          f'recipe.batch_size={self.recipe.batch_size} exceeds the {least} training images of {task}: an '
          'epoch would have no step.'
        )

  def check_accounted(self) -> Iterator[str]:
    """Yields what is wrong with the sizes that memory is counted for."""
    parts, sizes = self.recipe.microbatches, self.accounted
    for name in ('batch_size', 'image_size'):
      if name in sizes and (type(sizes[name]) is not int or sizes[name] < 1):
        yield f'accounted.{name}={sizes[name]!r}: expected a positive integer.'
      elif name == 'batch_size' and name in sizes and parts > 0 and sizes[name] % parts:
        yield f'accounted.{name}={sizes[name]}: expected a multiple of recipe.microbatches={parts}.'


def backbone(config: Settings, **fields: Any) -> nn.Module:
  """Returns the network without a classifier, with some fields in place of its own."""
  return networks.create({**config.network.model, 'num_classes': None, **fields})


# Rows and tasks of one network share it: to trace large ones takes a second.
shapes_of = functools.lru_cache(maxsize=32)(models.abstract_variables)


def without_classifier(config: Settings, variables: Variables) -> Variables:
  """Returns the variables of `backbone` out of those of the whole network."""
  own = shapes_of(backbone(config), config.network.data.view)
  return runs.matched(dict(own), variables)


def part_of(params: PyTree, patterns: Sequence[str]) -> tuple[PyTree, PyTree]:
  """Returns the parameters whose paths match a pattern, and the others."""
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  chosen = {path for path in flat if any(re.fullmatch(own, path) for own in patterns)}
  split = ({p: flat[p] for p in flat if (p in chosen) == taken} for taken in (True, False))
  return tuple(traverse_util.unflatten_dict(own, sep='/') for own in split)


def merged(variables: Variables, params: PyTree) -> Variables:
  """Returns the network's variables out of frozen and trained ones."""
  flat = traverse_util.flatten_dict(dict(variables['params']), sep='/')
  flat |= traverse_util.flatten_dict(dict(params), sep='/')
  return {**variables, 'params': traverse_util.unflatten_dict(flat, sep='/')}


class Adaptation(NamedTuple):
  """A row's training on tasks of one shape, as functions.

  Attributes:
    program: of the training; `frozen` has `network` (variables that stay), `rate` and `decay`.
    start: `(state, variables) -> state`, puts what is trained of the network in.
    frozen: `(variables, rate, decay) -> frozen`.
    logits: `(params, frozen, images) -> [batch, classes]` in evaluation.
    loss: `(params, frozen, batch, keys) -> mean loss` in training.
  """

  program: Program
  start: Callable[[Any, Variables], Any]
  frozen: Callable[[Variables, Any, Any], PyTree]
  logits: Callable[[PyTree, PyTree, Array], Array]
  loss: Callable[[PyTree, PyTree, PyTree, PyTree], Array]


def adaptation(
  method: Method,
  variables: Variables,
  task: ImageTask,
  num_classes: int,
  recipe: Recipe,
  steps_per_epoch: int,
) -> Adaptation:
  """Returns the training of a method under a linear head: softmax cross-entropy.

  The head is drawn with a deviation of 0.02, its bias is 0. Parameters are `{'tuned': what the method drew,
  'network': what it trains of the network, 'head': ...}`.

  Args:
    method: the method.
    variables: shapes of the network's variables, without a classifier.
    task: says inputs and targets.
    num_classes: of the head.
    recipe: of the training; base and weight decay are arguments of the step.
    steps_per_epoch: optimizer steps of an epoch.
  """
  dtype = recipe.program_options['compute_dtype']
  trained_shapes, rest = part_of(variables['params'], method.patterns)
  scalar = jax.ShapeDtypeStruct((), jnp.float32)
  blank = {'network': {**variables, 'params': rest}, 'rate': scalar, 'decay': scalar}
  batch = task.batch(recipe.batch_size)

  def predict(params: PyTree, frozen: PyTree, x: Array, **options: Any) -> Array:
    network = merged(frozen['network'], params['network'])
    if dtype is not None:
      network, x = cast_floating((network, x), dtype)
    features = method.features(params['tuned'], network, x, **options)
    logits = features @ params['head']['kernel'] + params['head']['bias']
    return cast_floating(logits, jnp.promote_types(logits.dtype, jnp.float32))

  def logits(params: PyTree, frozen: PyTree, x: Array) -> Array:
    if dtype is not None:
      params = cast_floating(params, dtype)
    return predict(params, frozen, x, train=False, rngs={})

  def training_logits(params: PyTree, frozen: PyTree, batch: PyTree, keys: PyTree) -> Array:
    each = jax.vmap(lambda i: jax.random.fold_in(keys['augment'], i))(batch['index'])
    dropout, drop_path = keys['dropout'], jax.random.fold_in(keys['dropout'], 1)
    rngs = {'dropout': dropout, 'drop_path': drop_path}
    return predict(params, frozen, task.augmented(each, batch), train=True, rngs=rngs)

  def loss(params: PyTree, frozen: PyTree, batch: PyTree, keys: PyTree) -> Array:
    # As the step does: what is kept is of the compute type.
    if dtype is not None:
      params = cast_floating(params, dtype)
    outputs = training_logits(params, frozen, batch, keys)
    return jnp.mean(supervised.cross_entropy(outputs, task.targets(batch), None))

  def init(key: Array) -> Initial:
    init_key, keys = supervised.streams(key)
    head_key, key = jax.random.split(init_key)
    tuned = method.init(key, variables['params'])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), trained_shapes)
    features = jax.eval_shape(
      lambda own, fixed, x: method.features(own, fixed, x, train=False, rngs={}),
      tuned, variables, jax.ShapeDtypeStruct((2, *task.view), jnp.float32),
    )  # fmt: skip
    kernel = vit_normal(head_key, (features.shape[-1], num_classes), jnp.float32)
    head = {'kernel': kernel, 'bias': jnp.zeros(num_classes, jnp.float32)}
    return Initial({'tuned': tuned, 'network': zeros, 'head': head}, key=keys)

  def single(rate: Any, decay: Any) -> Program:
    schedule = dataclasses.replace(recipe.schedule, base=rate).make(recipe.epochs, steps_per_epoch)

    def own_loss(params: PyTree, state: LossState, batch: PyTree, keys: PyTree):
      outputs = training_logits(params, state.frozen, batch, keys)
      scores = task.score(outputs, task.targets(batch))
      metrics = {'accuracy': jnp.mean(scores['correct']), 'learning_rate': schedule(state.step)}
      return jnp.mean(scores['loss']), Out(metrics=metrics)

    optimizer = recipe.optimizer.make(schedule, weight_decay=lambda step: decay)
    options = recipe.program_options
    return make_program(init, own_loss, optimizer, batch, frozen=blank, **options)

  def step(state: Any, frozen: PyTree, batch: PyTree) -> tuple[Any, dict[str, Array]]:
    return single(frozen['rate'], frozen['decay']).step(state, frozen, batch)

  def start(state: Any, variables: Variables) -> Any:
    own, _ = part_of(variables['params'], method.patterns)
    return state.replace(params={**state.params, 'network': own})

  def frozen(variables: Variables, rate: Any, decay: Any) -> PyTree:
    _, rest = part_of(variables['params'], method.patterns)
    numbers = {'rate': jnp.asarray(rate, jnp.float32), 'decay': jnp.asarray(decay, jnp.float32)}
    return {'network': {**variables, 'params': rest}, **numbers}

  nominal = single(0.0, 0.0)
  program = Program(nominal.init, step, nominal.batch, nominal.rules, nominal.frozen)
  return Adaptation(program, start, frozen, logits, loss)


def adapted(
  config: Settings, row: Row, own: Tuning, target: Target, size: int, **fields: Any
) -> Adaptation:
  """Returns a row's training on a task.

  Args:
    config: the settings.
    row: the row.
    own: how it is trained on the task.
    target: the task.
    size: training images.
    **fields: of the network, in place of its own.

  Raises:
    ValueError: for a network that the method cannot adapt, or options that it does not have.
  """
  task = ImageTask.of(target.data, target.augment)
  given = {'pool': config.pool, **own.options}
  check_options(row, given)
  model = backbone(config, **{**own.model, **fields})
  images = jax.ShapeDtypeStruct((config.recipe.batch_size, *task.view), jnp.float32)
  method = row.make(model, images, **given)
  variables = shapes_of(model, task.view)
  steps = size // config.recipe.batch_size
  return adaptation(
    method, dict(variables), task, target.data.num_classes, config.recipe, max(steps, 1)
  )


def check_options(row: Row, options: Mapping[str, Any]) -> None:
  """Raises SettingsError for options of a row of another type than `Row.make` is annotated with."""
  make, wrong = row.make, []
  while isinstance(make, functools.partial):
    make, options = make.func, {**make.keywords, **options}
  kinds = typing.get_type_hints(make)
  for name in {*kinds} & {*options}:
    convert(kinds[name], options[name], name, wrong)
  if wrong:
    raise SettingsError(sorted(wrong))
