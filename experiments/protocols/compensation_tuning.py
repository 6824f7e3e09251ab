"""A compensated network learns for an epoch: its compensation and its classifier alone.

What is trained starts from the closed form: all weights and biases of the compensation, in float32 while they
learn, and the classifier. Everything quantized is frozen, and gradients pass through it straight. The
classifier stays quantized, too: its float kernel learns behind its quantizer, whose scales are those of the
calibration, so that the kernel that is left has the codes of an ordinary 8-bit one. Without a compensation
the classifier learns alone: what the same budget brings to quantization by itself.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from experiments.harness import networks, runs
from experiments.harness.data import Tokens
from experiments.harness.runs import Call, Run, Variables
from experiments.harness.sections import Recipe, check_batch
from experiments.protocols import quantized_networks
from experiments.protocols.post_training import Further, Point
from experiments.protocols.quantized_networks import Method, Network, Settings
from jaxlab import models, parallel, quantizers
from jaxlab.losses import label_smoothing_cross_entropy
from jaxlab.models import Hook
from jaxlab.quantizers import compensation
from jaxlab.training import Initial, LossState, Out, Program, TrainState, make_program

Array = jax.Array
PyTree = Any
Trees = dict[str, PyTree]
KERNEL = quantizers.AffineQuantizer(rule='asymmetric', granularity='channel')


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning:
  """The training.

  Attributes:
    recipe: of it.
    bits: 'lowest', the last of the experiment's bit-widths, or 'all'.
    label_smoothing: of images' classes; none of tokens.
    tokens: whether networks of tokens are tuned, too.
  """

  recipe: Recipe
  bits: Literal['lowest', 'all'] = 'lowest'
  label_smoothing: float = 0.0
  tokens: bool = False

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not 0 <= self.label_smoothing < 1:
      yield f'label_smoothing={self.label_smoothing}: expected a share in [0, 1).'
    for name in ('mixup', 'cutmix'):
      if getattr(self.recipe, name):
        yield f'recipe.{name}={getattr(self.recipe, name)}: images are not mixed here; set it to 0.'


def tuned(own: FineTuning, config: Settings, name: str) -> tuple[str, ...]:
  """Returns the bit-widths at which network `name` is tuned."""
  if isinstance(config.network[name].data, Tokens) and not own.tokens:
    return ()
  return config.bits[-1:] if own.bits == 'lowest' else config.bits


def check(config: Settings, own: FineTuning) -> Iterator[str]:
  """Yields what is wrong with batches."""
  size = own.recipe.batch_size
  yield from check_batch(config.mesh, size, 'fine_tuning.recipe.batch_size')
  for name in config.networks:
    if name in config.network and tuned(own, config, name):
      most = config.network[name].data.train_size
      if size > most:
        yield (
          f'fine_tuning.recipe.batch_size={size}: expected at most {most}, the training split ({name}).'
        )


def split(variables: Mapping[str, PyTree], head: Sequence[str]) -> tuple[Trees, Trees]:
  """Returns what is trained of a network's variables, the compensation and modules `head`, and the rest."""
  flat = traverse_util.flatten_dict(dict(variables), sep='/')
  pattern = re.compile(rf'compensation/.*|params/({models.any_of(head)})/[^/]*')
  chosen = {path: leaf for path, leaf in flat.items() if pattern.fullmatch(path)}
  rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
  return tuple(traverse_util.unflatten_dict(part, sep='/') for part in (chosen, rest))


def merge(trained: Mapping[str, PyTree], frozen: Mapping[str, PyTree]) -> Variables:
  """Returns the network's variables, with trained kernels fake-quantized by the frozen constants.

  The gradient of a kernel is the upstream one inside its range, else 0; a classifier whose kernel is not
  quantized stays in float.
  """
  flat = traverse_util.flatten_dict(dict(trained), sep='/')
  fixed = traverse_util.flatten_dict(dict(frozen), sep='/')
  for path, leaf in flat.items():
    constants = path.replace('params/', 'quantization/', 1)
    if f'{constants}/scale' in fixed:
      fields = ('scale', 'zero_point', 'low', 'high')
      params = quantizers.AffineParams(*(fixed[f'{constants}/{field}'] for field in fields))
      flat[path] = quantizers.fake_quantize(KERNEL, leaf, params)
  return traverse_util.unflatten_dict({**fixed, **flat}, sep='/')


def beginning(
  model: nn.Module, variables: Mapping[str, PyTree], float_params: PyTree
) -> tuple[Trees, Trees]:
  """Returns the values of what is trained and of what is frozen.

  Args:
    model: the network.
    variables: quantized, maybe compensated.
    float_params: of the same network: the classifier starts from its float kernel, which its quantizer turns
      into the calibrated one.
  """
  head = models.anatomy(model).head
  trained, frozen = split(variables, head)
  if not jax.tree.leaves(trained):
    return {}, frozen
  floats, _ = split({'params': float_params}, head)
  as_float32 = lambda leaf: jnp.asarray(leaf, jnp.float32)  # noqa: E731
  return jax.tree.map(as_float32, {**trained, **floats}), frozen


def program(
  own: FineTuning,
  network: Network,
  model: nn.Module,
  hooks: Sequence[Hook],
  trained: PyTree,
  frozen: PyTree,
) -> Program:
  """Returns the training as pure functions: cross-entropy with smoothed labels, in eval mode.

  `init` makes zeros; `trained` and `frozen` are arrays or shapes, their values are data of the run (`tune`).
  """
  task, recipe = network.task, own.recipe
  schedule = recipe.schedule.make(recipe.epochs, steps_per_epoch(own, network))
  smoothing = 0.0 if isinstance(network.data, Tokens) else own.label_smoothing
  shapes = lambda tree: jax.tree.map(  # noqa: E731
    lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), tree
  )
  zeros = functools.partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype))
  shapes_trained = shapes(trained)

  def init(key: Array) -> Initial:
    return Initial(zeros(shapes_trained), key=key)

  def loss(params: PyTree, state: LossState, batch: PyTree, key: Array) -> tuple[Array, Out]:
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch['index'])
    x, y = task.augmented(keys, batch), task.targets(batch)
    outputs = models.apply(model, merge(params, state.frozen), x, hooks=hooks).astype(jnp.float32)
    value = jnp.mean(label_smoothing_cross_entropy(outputs, y, smoothing))
    accuracy = jnp.mean(task.score(outputs, y)['correct'])
    return value, Out(metrics={'accuracy': accuracy, 'learning_rate': schedule(state.step)})

  return make_program(
    init, loss, recipe.optimizer.make(schedule), task.batch(recipe.batch_size), frozen=shapes(frozen),
    **recipe.program_options,
  )  # fmt: skip


def steps_per_epoch(own: FineTuning, network: Network) -> int:
  """Returns the optimizer steps of an epoch."""
  return network.data.train_size // own.recipe.batch_size


def row(config: Settings, own: FineTuning, role: str, base: str, method: Method | None) -> Further:
  """Returns the row of networks that are tuned from those of row `base`; `method` is its, if it has one."""
  return Further(role, base, lambda point: tune(config, own, point, base, method))


def tune(
  config: Settings, own: FineTuning, point: Point, base: str, method: Method | None
) -> Variables | None:
  """Returns the variables of `point.base` after the training; None if it is not tuned.

  The hooks of `point.base` judge the result: half precision in the compensation, as before.
  """
  if point.bits not in tuned(own, config, point.name):
    return None
  network, (variables, hooks) = config.network[point.name], point.base.unbind()
  if point.base.report is not None:
    hooks = (*point.quantized.hooks, compensation.compensation_hook(jnp.float32))
  model, floats = point.network.model, point.quantized.float_variables['params']
  trained, frozen = beginning(model, variables, floats)
  if not jax.tree.leaves(trained):
    return None
  start = {'row': base, 'bits': point.bits, 'calibration': config.calibration}
  if method is not None:
    start |= {'method': repr(method.compensation), 'fitting': method.fitting}
  run = Run(
    config,
    network.data,
    own.recipe,
    program(own, network, model, hooks, trained, frozen),
    own.recipe.epochs * steps_per_epoch(own, network),
    {'network': network, 'label_smoothing': own.label_smoothing, 'start': start},
    f'{point.name} {point.bits} from {base}',
  )

  def begin(state: TrainState) -> TrainState:
    return state.replace(params=parallel.place(trained, state.params, 'variables to start from'))

  folder = point.folder / 'fine_tuning' / f'{point.name}-{point.bits}-{base}-seed{config.seed}'
  found = runs.train(run, point.network.train, folder, frozen=frozen, begin=begin)
  return merge(found.state.params, frozen)


def programs(config: Settings, own: FineTuning) -> dict[str, Call]:
  """Returns the training of the first network's classifier, `fine_tuning`, at the last bit-width.

  It is missing where the quantized network is made block by block from the host (GPTQ), where the network is
  not tuned, or where it has no classifier of its own.
  """
  name = config.networks[0]
  network = config.network[name]
  model = networks.create(network.model)
  head = models.anatomy(model).head
  if network.quantization == 'gptq' or not tuned(own, config, name) or not head:
    return {}

  def make(mesh: jax.sharding.Mesh) -> tuple[Any, tuple[Any, ...]]:
    shape = quantized_networks.input_shape(network, config.calibration.ranges)
    variables = models.abstract_variables(model, shape.shape[1:])
    quantize = functools.partial(quantized_networks.quantize, network, model, bits=config.bits[-1])
    quantized = jax.eval_shape(quantize, variables, shape)
    start, hooks = quantized.unbind()
    _, frozen = split(start, head)
    trained, _ = split({'params': quantized.float_variables['params']}, head)
    own_program = program(own, network, model, hooks, trained, frozen)
    sharded = parallel.shard_program(own_program, mesh)
    return sharded.step, (sharded.state, sharded.frozen, sharded.batch)

  return {'fine_tuning': Call(make)}
