"""Classifiers trained in stages, each from scratch or from what another stage ends with.

An experiment's stages are a table by name. A stage is trained when its variables are asked for, those that it
starts from or learns from first; each keeps its run in a folder of its own.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import data as harness_data
from experiments.harness import networks, runs, supervised
from experiments.harness.data import Augment, Images
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Experiment, Recipe, check_batch
from experiments.harness.settings import found_by
from experiments.harness.supervised import Loss, cross_entropy
from experiments.harness.tasks import ImageTask
from jaxlab import data, models
from jaxlab.models.classifier_heads import Classifier
from jaxlab.training import map_batches

Array = jax.Array
PyTree = Any

SAMPLERS = {
  'class_balanced': data.ClassBalancedSampler,
  'class_aware': data.ClassAwareSampler,
  'square_root': data.SquareRootSampler,
}
# All of the classifier anew, over a network that stays as it is.
CLASSIFIER = {'fresh': ('head/.*',), 'frozen': ('backbone/.*',), 'eval_mode': ('backbone',)}


@dataclasses.dataclass(frozen=True)
class Stage:
  """One training.

  Attributes:
    title: name of its row.
    role: of its row.
    recipe: length, batches, optimizer, schedule, mixup.
    size: records that it is trained on.
    loss: `(logits, labels, seen) -> values`.
    head: 'linear', 'scaled' (learnable weight scaling) or 'cosine'.
    start: the stage whose variables it takes over, all but those that match `fresh`.
    fresh: patterns of variables that are drawn anew.
    pretrained: name of public weights of the backbone that it starts from instead.
    teacher: the stage whose predictions the loss learns from.
    frozen: patterns of parameters that stay.
    eval_mode: patterns of modules whose batch norms use and keep their running statistics. A frozen backbone
      outside of them goes on adapting its statistics.
    sampler: None (every record once an epoch) or a name of `SAMPLERS`.
    records: the training records out of all of them.
    decides: sections, by name, that decide its loss and its records.
  """

  title: str
  role: str
  recipe: Recipe
  size: int
  loss: Loss = cross_entropy
  head: str = 'linear'
  start: str | None = None
  fresh: tuple[str, ...] = ()
  pretrained: str | None = None
  teacher: str | None = None
  frozen: tuple[str, ...] = ()
  eval_mode: tuple[str, ...] = ()
  sampler: str | None = None
  records: Callable[[data.Source], data.Source] = lambda source: source
  decides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def epoch_size(self) -> int:
    """Records that an epoch draws.

    With the class-aware sampler so many that `ceil(N / batch) + 1` batches come out, as in the code of
    MiSLAS.
    """
    batch = self.recipe.batch_size
    return (
      (math.ceil(self.size / batch) + 1) * batch if self.sampler == 'class_aware' else self.size
    )

  @property
  def steps_per_epoch(self) -> int:
    """Optimizer steps of an epoch."""
    return self.epoch_size // self.recipe.batch_size


@dataclasses.dataclass(frozen=True)
class Beginning:
  """What a network starts from: public weights, of which parts are trained; by default from scratch."""

  pretrained: str | None = None
  fresh: tuple[str, ...] = ()
  frozen: tuple[str, ...] = ()
  eval_mode: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Derived:
  """Variables that are made of what a stage's runs end with; whoever makes them gives them to `train`.

  Attributes:
    of: name of the stage.
    decides: sections, by name, that decide how they are made.
  """

  of: str
  decides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Table = Mapping[str, Stage | Derived]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staged(Experiment):
  """Settings of an experiment in stages.

  Attributes:
    data: images, or features.
    model: name and fields of the backbone.
    head_init: initializer of linear classifiers.
    augment: of training images.
    runs: stages that have a row; those that they build on are trained, too.
  """

  data: Images
  model: Mapping[str, Any]
  head_init: str = 'torch'
  augment: Augment = dataclasses.field(default_factory=Augment)
  runs: tuple[str, ...] = ()

  @property
  def task(self) -> ImageTask:
    """What the networks are asked."""
    return ImageTask.of(self.data, self.augment)


def get(table: Table, name: str) -> Stage:
  """Returns the stage `name`, or that which something derived is of.

  Raises:
    ValueError: if there is none.
  """
  if name not in table:
    raise ValueError(f'there is no stage {name!r}; stages: {", ".join(table)}.')
  own = table[name]
  return get(table, own.of) if isinstance(own, Derived) else own


def classifier(config: Staged, stage: Stage) -> Classifier:
  """Returns the network of a stage."""
  return networks.classifier(config.model, config.data.num_classes, stage.head, config.head_init)


def run(config: Staged, table: Table, name: str) -> Run:
  """Returns the run of a stage."""
  own = get(table, name)
  program = supervised.program(
    classifier(config, own),
    config.task,
    own.recipe,
    own.steps_per_epoch,
    loss=own.loss,
    teacher=classifier(config, get(table, own.teacher)) if own.teacher else None,
    frozen=own.frozen,
    hooks=models.eval_mode_hooks(own.eval_mode),
    repeats=own.sampler is not None,
    draw=streams,
  )
  return Run(
    config, config.data, own.recipe, program, own.recipe.epochs * own.steps_per_epoch,
    ancestry(config, table, name), own.title, sampler(config, own),
  )  # fmt: skip


def streams(key: Array) -> tuple[Array, dict[str, Array]]:
  """Returns the key that draws the parameters, and the base keys of what every step draws."""
  init_key, dropout, step_key = jax.random.split(key, 3)
  augment, mixup = jax.random.split(step_key)
  return init_key, {'augment': augment, 'mixup': mixup, 'dropout': dropout}


def programs(config: Staged, table: Table, names: Sequence[str] | None = None) -> dict[str, Run]:
  """Returns the runs of stages and of all that they build on; default: of `config.runs`."""
  return {name: run(config, table, name) for name in needed(config, table, names)}


def needed(config: Staged, table: Table, names: Sequence[str] | None = None) -> list[str]:
  """Returns the stages that have to be trained for `names`, in an order in which they can be.

  Raises:
    ValueError: for names that do not exist, and stages that need one another.
  """
  order: list[str] = []

  def visit(name: str, below: tuple[str, ...]) -> None:
    if name in below:
      raise ValueError(f'stages {" -> ".join([*below, name])} need one another.')
    if name not in table:
      who = f'{below[-1]!r} builds on' if below else 'runs name'
      raise ValueError(f'{who} {name!r}: there is no such stage; stages: {", ".join(table)}.')
    own = table[name]
    for other in _parents(own):
      visit(other, (*below, name))
    if name not in order and isinstance(own, Stage):
      order.append(name)

  for name in config.runs if names is None else names:
    visit(name, ())
  return order


def _parents(own: Stage | Derived) -> list[str]:
  given = (own.of,) if isinstance(own, Derived) else (own.start, own.teacher)
  return [name for name in given if name]


def ancestry(config: Staged, table: Table, name: str) -> dict[str, Any]:
  """Returns what decides a stage's end besides seed, data and recipe: the stages that it builds on, too."""
  own = table[name]
  if isinstance(own, Derived):
    return {'of': ancestry(config, table, own.of), **own.decides}
  fields = ('head', 'fresh', 'pretrained', 'frozen', 'eval_mode', 'sampler')
  given = {field: getattr(own, field) for field in fields}
  given |= {'recipe': own.recipe, 'size': own.size, **own.decides}
  for field in ('start', 'teacher'):
    if getattr(own, field):
      given[field] = ancestry(config, table, getattr(own, field))
  return {'model': config.model, 'head_init': config.head_init, 'augment': config.augment, **given}


def sampler(config: Staged, stage: Stage) -> Callable[[data.Source], Any] | None:
  """Returns `source -> sampler` of a stage."""
  if stage.sampler is None:
    return None
  make = SAMPLERS[stage.sampler]
  return lambda source: make(data.source_labels(source), config.seed, stage.epoch_size)


def train(
  config: Staged,
  table: Table,
  name: str,
  source: data.Source,
  workdir: Any,
  found: dict[str, Variables],
  evaluate: Callable[[str, Variables], Mapping[str, float]] | None = None,
) -> Variables:
  """Returns the variables that a stage ends with, and adds them to `found`, with those that it builds on.

  Args:
    config: the experiment.
    table: its stages.
    name: of the stage.
    source: all training records.
    workdir: a stage's run lies in the folder of its name.
    found: variables that are there already; something `Derived` must be.
    evaluate: `(name, variables) -> metrics`, for stages whose recipe asks for it.
  """
  if name in found:
    return found[name]
  own, given = table[name], {}
  if isinstance(own, Derived):
    raise ValueError(f'{name!r} is made of {own.of!r} and not there yet: name {own.of!r} before.')
  if own.start:
    start = train(config, table, own.start, source, workdir, found, evaluate)
    given |= {'start': start, 'fresh': own.fresh}
  if own.pretrained:
    _, public = models.load_pretrained(own.pretrained, num_classes=None)
    start = {collection: {'backbone': tree} for collection, tree in public.items()}
    given |= {'start': start, 'fresh': own.fresh}
  if own.teacher:
    teacher = train(config, table, own.teacher, source, workdir, found, evaluate)
    given['frozen'] = {'teacher': teacher}
  if evaluate is not None:
    given['evaluate'] = functools.partial(evaluate, name)
  training = run(config, table, name)
  found[name] = runs.train(training, own.records(source), workdir / name, **given).variables
  return found[name]


def check(config: Staged, table: Table, names: Sequence[str] | None = None) -> Iterator[str]:
  """Yields what is wrong with stages: names, losses, batches, variables to start from."""
  names = config.runs if names is None else names
  if not names:
    yield f'runs is empty; stages: {", ".join(table)}.'
  try:
    order = needed(config, table, names)
  except ValueError as error:
    yield str(error)
    return
  shapes: dict[str, Variables] = {}
  for name in order:
    own = table[name]
    if own.sampler not in (None, *SAMPLERS):
      yield f'{name}: sampler={own.sampler!r}: expected one of {", ".join(SAMPLERS)}.'
    batch = own.recipe.batch_size
    yield from check_batch(config.mesh, batch, f'{name}: batch_size')
    if own.size < batch:
      yield f'{name}: batch_size={batch} exceeds its {own.size} training records.'
      continue
    yield from found_by(name, own.recipe.schedule.make, own.recipe.epochs, own.steps_per_epoch)
    yield from found_by(name, _trace_loss, config, own)
    try:
      shapes[name] = abstract_variables(classifier(config, own), config.task)
      yield from found_by(
        name, own.recipe.optimizer.make(0.1, own.frozen).init, shapes[name]['params']
      )
    except (ValueError, TypeError) as error:
      yield f'{name}: {error}'
      continue
    start = own.start and (
      table[own.start].of if isinstance(table[own.start], Derived) else own.start
    )
    if start in shapes:
      yield from found_by(name, runs.matched, shapes[name], shapes[start], own.fresh)


@functools.lru_cache
def abstract_variables(model: Classifier, task: ImageTask) -> Variables:
  """Returns the shapes of a network's variables; equal networks are built once."""
  return supervised.abstract_variables(model, task)


def _trace_loss(config: Staged, stage: Stage) -> None:
  logits = jax.ShapeDtypeStruct((2, config.data.num_classes), jnp.float32)
  labels, step = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), ()))
  told = logits if stage.teacher else None
  jax.eval_shape(
    lambda z, y, s, t: stage.loss(z, y, supervised.Seen(s, t)), logits, labels, step, told
  )


def outputs(
  config: Staged,
  stage: Stage,
  variables: Variables,
  source: data.Source,
  *,
  split: str = 'test',
  method: str = '__call__',
) -> np.ndarray:
  """Returns logits (or `method='features'`) of all records, `[records, ...]`, in evaluation mode.

  Args:
    config: the experiment.
    stage: whose network it is.
    variables: of the network.
    source: the records.
    split: 'train' or 'test': how they are read (a training split is not augmented).
    method: of the `Classifier`.
  """
  model, task = classifier(config, stage), config.task
  fn = functools.partial(forward, variables, model=model, task=task, method=method)
  return map_batches(
    fn,
    source,
    batch_size=config.eval_batch_size,
    mesh=config.mesh.make(),
    **harness_data.reading(config.data, split),
  )


@functools.partial(jax.jit, static_argnames=('model', 'task', 'method'))
def forward(
  variables: PyTree,
  batch: Mapping[str, Array],
  *,
  model: Classifier,
  task: ImageTask,
  method: str = '__call__',
) -> Array:
  """Returns logits (or `method='features'`) of a batch in evaluation mode, float32."""
  return model.apply(variables, task.inputs(batch), method=method).astype(jnp.float32)
