"""QwT*: a compensated network learns for an epoch, its compensation and its classifier alone.

What is trained starts from the closed form: all weights and biases of the compensation, in float32 while they
learn, and the classifier. Everything quantized is frozen, and gradients pass through it straight. The
classifier stays quantized, too: its float kernel learns behind its quantizer, whose scales are those of the
calibration, so that the kernel that is left has the codes of an ordinary 8-bit one. Without a compensation
the classifier learns alone: what the same budget brings to quantization by itself.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from experiments import networks, training
from jaxlab import models, parallel, quantizers
from jaxlab.losses import label_smoothing_cross_entropy
from jaxlab.models import Hook
from jaxlab.quantizers import compensation
from jaxlab.training import Program, TrainState, make_optimizer, make_schedule

Array = jax.Array
PyTree = Any
KERNEL = quantizers.AffineQuantizer(rule='asymmetric', granularity='channel')


class Tuning(NamedTuple):
  """A row of the comparison: its role, the row that it starts from, and the settings of the training.

  The settings are `tasks` (kinds of networks that are tuned), `bits` (`'lowest'`, the last of `config.bits`,
  or `'all'`), `epochs`, `batch_size`, `optimizer`, `schedule`, `label_smoothing` (of images' classes; none
  for tokens), `head` (a regular expression: the classifier's path; networks without one, such as those whose
  embedding is tied to it, tune their compensation alone), `log_every` and `checkpoint_every`.
  """

  role: str
  base: str
  settings: ConfigDict


def split(
  variables: Mapping[str, PyTree], head: str
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
  """Returns what is trained of a network's variables, the compensation and modules `head`, and the rest."""
  flat = traverse_util.flatten_dict(dict(variables), sep='/')
  pattern = re.compile(rf'compensation/.*|params/({head})/[^/]*')
  chosen = {path: leaf for path, leaf in flat.items() if pattern.fullmatch(path)}
  rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
  return tuple(traverse_util.unflatten_dict(part, sep='/') for part in (chosen, rest))


def merge(trained: Mapping[str, PyTree], frozen: Mapping[str, PyTree]) -> dict[str, PyTree]:
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


def program(
  config: ConfigDict,
  model: nn.Module,
  hooks: Sequence[Hook],
  shapes: tuple[PyTree, PyTree],
  steps_per_epoch: int,
) -> Program:
  """Returns the training as pure functions: cross-entropy with smoothed labels, in eval mode.

  `init` makes zeros of the `shapes` of what is trained and what is frozen (in `extra`); the values are data
  of the run (`tune`). `config` is a network's section with the settings of `Tuning` in it.
  """
  schedule = make_schedule(**config.schedule, epochs=config.epochs, steps_per_epoch=steps_per_epoch)
  optimizer = make_optimizer(learning_rate=schedule, **config.optimizer)
  smoothing = 0.0 if config.task == 'language' else config.label_smoothing

  def init(key: Array) -> TrainState:
    params, frozen = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    extra = {'frozen': frozen, 'key': jax.random.key_data(key)}
    return TrainState(jnp.int32(0), params, optimizer.init(params), {}, extra)

  def step(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.wrap_key_data(state.extra['key'])
    x, y = networks.augmented(config, key, state.step, batch), networks.targets(config, batch)

    def loss_fn(params):
      variables = merge(params, state.extra['frozen'])
      logits = models.apply(model, variables, x, hooks=hooks).astype(jnp.float32)
      loss = label_smoothing_cross_entropy(logits, y, smoothing)
      return jnp.mean(loss), jnp.mean(jnp.argmax(logits, -1) == y)

    (loss, accuracy), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = jax.tree.map(jnp.add, state.params, updates)
    new = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    return new, {'loss': loss, 'accuracy': accuracy, 'learning_rate': schedule(state.step)}

  return Program(init, step, networks.batch_shapes(config))


def bit_widths(config: ConfigDict, own: ConfigDict, settings: ConfigDict) -> tuple[str, ...]:
  """Returns those of `config.bits` at which a network with section `own` is tuned.

  Raises:
    ValueError: unless `settings.bits` is `'lowest'` or `'all'` and its batches divide over the devices and do
      not exceed the training split.
  """
  if settings.bits not in ('lowest', 'all'):
    raise ValueError(f"fine_tuning.bits={settings.bits!r}: expected 'lowest' or 'all'.")
  if own.task not in settings.tasks:
    return ()
  parallel.check_batch_size(settings.batch_size, training.mesh(config))
  if settings.batch_size > own.data.train_size:
    raise ValueError(
      f'fine_tuning.batch_size={settings.batch_size}: expected at most {own.data.train_size}, the training '
      f'split.'
    )
  return tuple(config.bits[-1:] if settings.bits == 'lowest' else config.bits)


def section(own: ConfigDict, settings: ConfigDict, start: Mapping[str, Any]) -> ConfigDict:
  """Returns a network's section under the settings of `Tuning`; `start` says what is trained."""
  merged = own.copy_and_resolve_references()
  with merged.unlocked():
    for key in settings:  # in place of the section's own: update() would merge the nested ones
      if key not in ('bits', 'tasks'):
        merged[key] = settings[key]
    kinds = ('quantization', 'gptq', 'edges', 'conv_act_bits', 'blocks')
    merged.start = {**start, **{key: own[key] for key in kinds if key in own}}
  return merged


def tune(
  config: ConfigDict,
  network: networks.Network,
  quantized: quantizers.Quantized,
  start: quantizers.Quantized | compensation.Compensated,
  folder: epath.PathLike,
  description: str,
) -> dict[str, PyTree] | None:
  """Returns the variables of `start` after the training; None if there is nothing to train.

  Args:
    config: from `section`.
    network: where the training images come from.
    quantized: the network that `start` is, or has compensated.
    start: what is tuned. Its own hooks judge the result: half precision in the compensation, as before.
    folder: of the training, which goes on from where it was left.
    description: the run's name.
  """
  hooks = start.hooks
  variables = dict(start.variables)
  if isinstance(start, compensation.Compensated):
    hooks = (*quantized.hooks, compensation.compensation_hook(start.report.paths, jnp.float32))
  trained, frozen = split(variables, config.head)
  if not jax.tree.leaves(trained):
    return None
  # The classifier starts from its float kernel, which its quantizer turns into the calibrated one.
  floats, _ = split({'params': quantized.float_variables['params']}, config.head)
  trained = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), {**trained, **floats})
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), (trained, frozen)
  )
  steps_per_epoch = len(network.train) // config.batch_size

  def begin(state: TrainState) -> TrainState:
    old = state.params, state.extra['frozen']
    params, rest = jax.tree.map(lambda a, b: jax.device_put(b, a.sharding), old, (trained, frozen))
    return state.replace(params=params, extra={**state.extra, 'frozen': rest})

  state, _ = training.train(
    program(config, network.model, hooks, shapes, steps_per_epoch),
    network.train,
    config,
    folder,
    num_steps=config.epochs * steps_per_epoch,
    description=description,
    begin=begin,
  )
  return merge(state.params, state.extra['frozen'])
