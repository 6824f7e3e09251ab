"""Networks that learn under quantization, in stages that go on from a float network.

A stage puts quantizers around the network of another stage, or around the float one, their first ranges from
training inputs, and trains its parameters with what the quantizers learn. Its loss may learn from a frozen
network, quantized or not, on the very same inputs. An experiment's stages are a table by name; each keeps its
run in a folder of its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import networks, runs, supervised
from experiments.harness.costs import Side, relative
from experiments.harness.data import Images
from experiments.harness.networks import Loaded, feature_path, feature_vector
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Experiment, Recipe, check_batch
from experiments.harness.settings import found_by, free, identity
from experiments.harness.supervised import Loss, cross_entropy
from experiments.harness.tasks import is_correct
from jaxlab import data, models, parallel, quantizers
from jaxlab.quantizers import Quantized
from jaxlab.training import TrainState, map_batches

Array = jax.Array
PyTree = Any

FLOAT = 'float'
CONSTANTS = 'quantization'  # of operands whose constants are not learned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of a training under quantization.

  Attributes:
    network: the float network that everything starts from.
    networks_dir: folder of its training, which other experiments may share; empty: in the work directory.
    calibration: training inputs that first ranges are from.
    bits: such as '4w4a', of weights and activations.
    recipe: of the trainings that are compared.
    timed: repeats of the measurement of a step's cost; 0: none.
  """

  network: networks.Network
  networks_dir: str = free('')
  calibration: int = 512
  bits: tuple[str, ...]
  recipe: Recipe
  timed: int = free(5)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    if self.timed < 0:
      yield f'timed={self.timed}: expected a number of repeats, or 0 for none.'
    own = self.network.data
    if not isinstance(own, Images) or own.train_size is None:
      yield 'network.data: expected images, with their train_size.'
      return
    if not own.labeled:
      yield f'network.data.labeled: {own.name} has no labels to learn.'
    if not 1 <= self.calibration <= own.train_size:
      yield f'calibration={self.calibration}: expected 1 to {own.train_size}, the training images.'
    yield from check_view('network.data', own, own.view)

  @property
  def float_training(self) -> Mapping[str, Any]:
    """Options of `networks.training` for the float network, with what `decides` about them."""
    return {}


def check_view(key: str, own: Images, view: tuple[int, int, int]) -> Iterator[str]:
  """Yields a problem unless test images, as they are read, are what a network sees."""
  height, width, channels = own.stored_image
  if own.test_decode is not None:
    height = width = own.test_decode.get('size')
  if (height, width, channels) != tuple(view):
    yield (
      f'{key}: test images are read as {(height, width, channels)}, but the network sees {tuple(view)}: see '
      f'{key}.test_decode and {key}.image_size.'
    )


class Stage(NamedTuple):
  """One training.

  Attributes:
    title: on the screen, and of its row.
    role: of its row.
    recipe: of the training.
    quantize: `(model, variables, inputs) -> Quantized`, with first ranges.
    learned: collections of the quantizers that are trained next to the parameters.
    start: the stage whose float parameters and statistics it goes on from.
    loss: `(logits, labels, seen) -> values`.
    teacher: the stage whose network the loss learns from; None: none.
    captured: patterns of modules whose outputs the loss reads, of both networks.
    constants: shapes of further arrays that the loss reads.
    optimizer: see `supervised.program`.
    decides: sections, by name, that decide quantizers and loss.
  """

  title: str
  role: str
  recipe: Recipe
  quantize: Callable[[nn.Module, Variables, Array], Quantized]
  learned: tuple[str, ...] = ()
  start: str = FLOAT
  loss: Loss = cross_entropy
  teacher: str | None = None
  captured: tuple[str, ...] = ()
  constants: PyTree = None
  optimizer: Callable[[optax.Schedule], optax.GradientTransformation] | None = None
  decides: Mapping[str, Any] = {}


Table = Mapping[str, Stage]


def in_float(model: nn.Module, variables: Variables, inputs: Array | None = None) -> Quantized:
  """Returns the network without any quantizer."""
  del inputs
  return Quantized(model, {**variables, CONSTANTS: {}}, {})


def shapes(config: Settings, table: Table, name: str) -> Quantized:
  """Returns the network of a stage, or the float one, with shapes for arrays."""
  own = config.network
  quantize = in_float if name == FLOAT else table[name].quantize
  return _shapes(quantize, networks.create(own.model), own.data.view, config.calibration)


@functools.lru_cache(maxsize=64)
def _shapes(
  quantize: Callable[..., Quantized], model: nn.Module, view: tuple[int, ...], count: int
) -> Quantized:
  inputs = jax.ShapeDtypeStruct((count, *view), jnp.float32)
  variables = models.abstract_variables(model, view)
  return jax.eval_shape(functools.partial(quantize, model), variables, inputs)


def held(network: Quantized) -> Variables:
  """Returns a network's variables without collections that hold nothing."""
  return {name: tree for name, tree in network.variables.tree.items() if jax.tree.leaves(tree)}


def run(config: Settings, table: Table, name: str) -> Run:
  """Returns the training of a stage."""
  own, network = table[name], shapes(config, table, name)
  variables = held(network)
  trained = ('params', *own.learned)
  if missing := [part for part in own.learned if part not in variables]:
    raise ValueError(f'{name}: nothing is learned in {", ".join(missing)}: no operand has bits.')
  carried = {part: tree for part, tree in variables.items() if part not in trained}

  def zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

  def before_call(variables: Variables) -> Variables:
    variables = {**variables, CONSTANTS: {}}
    return network.prepare(variables) if network.prepare else variables

  steps = config.network.data.train_size // own.recipe.batch_size
  program = supervised.program(
    network.model,
    config.network.task,
    own.recipe,
    steps,
    loss=own.loss,
    teacher=own.teacher and teacher(shapes(config, table, own.teacher)),
    constants=own.constants,
    prepare=lambda params: {
      'params': params,
      **{part: zeros(variables[part]) for part in own.learned},
    },
    collections=zeros(carried),
    unbind=dict,
    before_call=before_call,
    # Batch statistics go on; nothing is dropped.
    options={'train': 'batch_stats' in variables},
    optimizer=own.optimizer,
    hooks=network.hooks,
    captured=own.captured,
    taught=own.captured if own.teacher else (),
  )
  num_steps = own.recipe.epochs * steps
  data_of = config.network.data
  decides = {'calibration': config.calibration, **ancestry(config, table, name)}
  return Run(config, data_of, own.recipe, program, num_steps, decides, own.title)


def teacher(network: Quantized) -> Quantized:
  """Returns a network as a teacher holds it: without collections that hold nothing."""
  return dataclasses.replace(network, variables=held(network))


def ancestry(config: Settings, table: Table, name: str) -> dict[str, Any]:
  """Returns what decides a stage's end, what it starts and learns from, too; not seed, data, calibration."""
  if name == FLOAT:
    own = config.network
    further = config.float_training.get('decides', {})
    known = {**networks.drawn_by(own), 'pretrained': own.pretrained, 'recipe': own.recipe}
    return identity({**known, **further})
  own = table[name]
  found = {'recipe': own.recipe, **own.decides, 'start': ancestry(config, table, own.start)}
  if own.teacher:
    found['teacher'] = ancestry(config, table, own.teacher)
  return found


def float_run(config: Settings) -> Run:
  """Returns the training of the float network."""
  return networks.training(config, config.network, 'in float', **config.float_training)


def programs(config: Settings, table: Table) -> dict[str, Run]:
  """Returns the trainings by name, that of the float network first, if it is trained here."""
  found = {}
  if config.network.recipe is not None:
    found[FLOAT] = float_run(config)
  return found | {name: run(config, table, name) for name in table}


def check(config: Settings, recipes: Mapping[str, Recipe]) -> Iterator[str]:
  """Yields what is wrong with the network, and with batches and schedules of recipes, by their keys."""
  if not isinstance(config.network.data, Images):
    raise ValueError('network.data: expected images.')
  yield from found_by('network.model', feature_shape, config)
  size = config.network.data.train_size
  for name, recipe in recipes.items():
    yield from check_batch(config.mesh, recipe.batch_size, f'{name}.batch_size')
    if recipe.batch_size > size:
      yield f'{name}.batch_size={recipe.batch_size} exceeds the {size} training images.'
    elif recipe.batch_size > 0:
      steps = size // recipe.batch_size
      yield from found_by(f'{name}.schedule', recipe.schedule.make, recipe.epochs, steps)


class Trained:
  """The float network, and the networks of stages, each trained when it is asked for.

  Attributes:
    config: the settings.
    table: the stages.
    workdir: their folders lie in it.
    constants: values of `Stage.constants`, by stage.
    loaded: the float network with its data.
    inputs: the training inputs that first ranges are from.
  """

  def __init__(self, config: Settings, table: Table, workdir: Any):
    folder = type(workdir)(config.networks_dir or workdir / 'networks')
    name, trained_here = config.network.model['name'], config.network.recipe is not None
    self.config, self.table, self.workdir = config, table, workdir
    self.constants: dict[str, PyTree] = {}
    self.loaded: Loaded = networks.load(
      config,
      config.network,
      folder / f'{name}-seed{config.seed}',
      float_run(config) if trained_here else None,
    )
    (self.inputs,) = self.loaded.calibration(config.calibration, config.calibration)
    self._found: dict[str, Quantized] = {}
    self._started: dict[str, Quantized] = {}

  def start(self, name: str) -> Quantized:
    """Returns the network that a stage starts from, its quantizers with their first ranges."""
    if name not in self._started:
      own = self.table[name]
      variables = self[own.start].variables.tree
      float_parts = {part: variables[part] for part in self.loaded.variables}
      self._started[name] = own.quantize(self.loaded.model, float_parts, self.inputs)
    return self._started[name]

  def __getitem__(self, name: str) -> Quantized:
    """Returns the network that a stage, or the float one, ends with."""
    if name in self._found:
      return self._found[name]
    if name == FLOAT:
      self._found[name] = in_float(self.loaded.model, self.loaded.variables)
      return self._found[name]
    training, start = run(self.config, self.table, name), self.start(name)
    begin, frozen = self._given(name, start)
    source = self.loaded.train
    state = runs.train(training, source, self.workdir / name, frozen=frozen, begin=begin).state
    self._found[name] = start.update(**state.params, **state.model_state)
    return self._found[name]

  def _given(
    self, name: str, start: Quantized
  ) -> tuple[Callable[[TrainState], TrainState], dict[str, PyTree] | None]:
    """Returns what puts the first values into a drawn state, and the frozen arrays of a stage."""
    own = self.table[name]
    frozen = {}
    if own.teacher:
      frozen['teacher'] = held(self[own.teacher])
    if own.constants is not None:
      frozen['constants'] = self.constants[name]

    def begin(state: TrainState) -> TrainState:
      given = held(start)
      params = {part: given[part] for part in state.params}
      carried = {part: given[part] for part in state.model_state}
      return state.replace(
        params=parallel.place(params, state.params, 'variables to start from'),
        model_state=parallel.place(carried, state.model_state, 'variables to start from'),
      )

    return begin, frozen or None

  def costs(self, names: Iterable[str], base: str) -> dict[str, dict[str, float]]:
    """Returns `time`, `memory` and `flops` of a step of stages over those of stage `base` (`costs.relative`).

    Nothing is measured if `config.timed` is 0.
    """
    if not self.config.timed:
      return {name: {} for name in names}
    sides = {}
    for name in dict.fromkeys((*names, base)):
      begin, frozen = self._given(name, self.start(name))
      sides[name] = Side(run(self.config, self.table, name).program, begin, frozen)
    return relative(sides, base, self.config.mesh.make(), self.config.timed)

  def outputs(
    self, network: Quantized, own: Images | None = None, source: data.Source | None = None
  ) -> dict[str, np.ndarray]:
    """Returns `features` `[records, dim]`, `label` and `correct` of all records, in evaluation mode.

    Args:
      network: whose.
      own: the records' section; None: that of the float network.
      source: the records; None: its test records. Those of a training split, too, are read as test records
        are: without the augmentation, nothing else brings them to the network's view.
    """
    own = self.config.network.data if own is None else own
    variables, hooks = network.unbind()
    task = dataclasses.replace(self.config.network, data=own).task
    fn = functools.partial(_outputs, variables, model=network.model, hooks=tuple(hooks), task=task)
    return map_batches(
      fn,
      self.loaded.test if source is None else source,
      batch_size=self.config.eval_batch_size,
      mesh=self.config.mesh.make(),
      **harness_data.reading(own, 'test'),
    )


@functools.partial(jax.jit, static_argnames=('model', 'hooks', 'task'))
def _outputs(variables: Variables, batch: Any, *, model, hooks, task) -> dict[str, Array]:
  """Returns what a batch gives; networks with equal hooks share a compilation."""
  path = feature_path(model)
  logits, found = models.capture(model, variables, [path], task.inputs(batch), hooks=hooks)
  correct = is_correct(logits.astype(jnp.float32), batch['label'])
  return {'features': feature_vector(found[path]), 'label': batch['label'], 'correct': correct}


def accuracy(outputs: Mapping[str, np.ndarray]) -> float:
  """Returns the accuracy of what `Trained.outputs` returns, in percent."""
  return 100 * float(np.mean(outputs['correct']))


def feature_shape(config: Settings) -> Any:
  """Returns the shape of an image's penultimate features, `[1, dim]`; of a distilled transformer two.

  Raises:
    ValueError: if the network does not take the images, or no module of its own has its features.
  """
  own = config.network
  model, view = networks.create(own.model), own.data.view
  path = feature_path(model)
  image = jax.ShapeDtypeStruct((1, *view), jnp.float32)
  fn = lambda variables, x: models.capture(model, variables, [path], x)[1][path]  # noqa: E731
  return jax.eval_shape(fn, models.abstract_variables(model, view), image)


def edge_rules(model: nn.Module, weights: int, inputs: int | None, **options: Any) -> Any:
  """Returns the rules of a bit-width, stem and classifier at 8 bits."""
  return quantizers.edge_rules(weights, inputs, edges=models.anatomy(model), **options)
