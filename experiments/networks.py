"""Float networks that post-training methods start from: trained here once, or public weights.

A network is a section of the configuration: `model` and `data`, and either `pretrained` (a name of
`models.load_pretrained`) or a training (`batch_size`, `epochs`, `optimizer`, `schedule`). It learns to
classify images or, with `task='language'`, to predict the next token.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments import training
from jaxlab import data, models, parallel
from jaxlab.models import Hook
from jaxlab.training import Program, TrainState, make_optimizer, make_schedule, map_batches

Array = jax.Array
PyTree = Any


class Network(NamedTuple):
  """A float network with the data that calibrate and judge what is made of it.

  Attributes:
    model: the module.
    variables: its float variables.
    train: the training split.
    calibration: `(count, batch_size) -> batches` of model inputs from the training split.
    score: `(float_variables, variables, hooks) -> metrics` on the test split: `accuracy` in percent or
      `perplexity`, and `logit_mse`, the mean squared difference of the logits from those of the float
      network.
  """

  model: nn.Module
  variables: dict[str, PyTree]
  train: data.Source
  calibration: Callable[[int, int], list[Array]]
  score: Callable[..., dict[str, float]]


def inputs(config: ConfigDict, batch: dict[str, Array]) -> Array:
  """Returns what the model reads of a batch: normalized images, or all tokens but the last."""
  if config.task == 'language':
    return batch['tokens'][:, :-1]
  return data.normalize(data.to_float(batch['image']), config.data.mean, config.data.std)


def targets(config: ConfigDict, batch: dict[str, Array]) -> Array:
  """Returns what the model is to say: labels, or each position's next token."""
  return batch['tokens'][:, 1:] if config.task == 'language' else batch['label']


def augmented(config: ConfigDict, key: Array, step: Array | int, batch: dict[str, Array]) -> Array:
  """Returns the model's inputs under the training augmentation of the section, if it has one."""
  if config.task == 'language' or config.get('augment') is None:
    return inputs(config, batch)
  augment = data.siamese_augment(
    config.data.image_size, **config.augment, mean=config.data.mean, std=config.data.std
  )
  keys = data.example_keys(key, step, batch['index'])
  return data.draw_views(augment, keys, batch['image'], 1)[0]


def program(config: ConfigDict) -> Program:
  """Returns the supervised training of a section: mean softmax cross-entropy of every target.

  `massive` lists `(token, channel, value)` of the position embedding before training: entries of some 15
  grow into the massive activations of large transformers.
  """
  model = models.create(**config.model)
  steps = config.data.train_size // config.batch_size
  schedule = make_schedule(**config.schedule, epochs=config.epochs, steps_per_epoch=steps)
  optimizer = make_optimizer(learning_rate=schedule, **config.optimizer)
  batch = batch_shapes(config)

  def init(key: Array) -> TrainState:
    init_key, step_key = jax.random.split(key)
    blank = jax.tree.map(lambda leaf: jnp.zeros((2, *leaf.shape[1:]), leaf.dtype), batch)
    x = augmented(config, init_key, 0, blank)
    variables = dict(model.init(init_key, x))
    params = variables.pop('params')
    for token, channel, value in config.get('massive', ()):
      params = {**params, 'pos_embed': params['pos_embed'].at[0, token, channel].set(value)}
    extra = {'key': jax.random.key_data(step_key)}
    return TrainState(jnp.int32(0), params, optimizer.init(params), variables, extra)

  def step(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.wrap_key_data(state.extra['key'])
    x, y = augmented(config, key, state.step, batch), targets(config, batch)

    def loss_fn(params):
      logits, changed = model.apply(
        {'params': params, **state.model_state},
        x,
        mutable=list(state.model_state),
        **({} if config.task == 'language' else {'train': True}),
      )
      loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y)
      return jnp.mean(loss), (dict(changed), jnp.mean(jnp.argmax(logits, -1) == y))

    (loss, (changed, accuracy)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    new = TrainState(
      state.step + 1, optax.apply_updates(state.params, updates), opt_state, changed, state.extra
    )
    return new, {'loss': loss, 'accuracy': accuracy, 'learning_rate': schedule(state.step)}

  return Program(init, step, batch)


def batch_shapes(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the training batch of a section."""
  index = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
  if config.task == 'language':
    shape = (config.batch_size, config.data.length + 1)
    return {'tokens': jax.ShapeDtypeStruct(shape, jnp.int32), 'index': index}
  shape = (config.batch_size, *config.data.stored_image)
  return {'image': jax.ShapeDtypeStruct(shape, jnp.uint8), 'label': index, 'index': index}


def section(config: ConfigDict, name: str) -> ConfigDict:
  """Returns the section of network `name`, with the seed and the mesh of the whole.

  Raises:
    ValueError: if there is none.
  """
  if name not in config.network:
    raise ValueError(
      f'networks: there is no network.{name}; sections: {", ".join(config.network)}.'
    )
  own = config.network[name].copy_and_resolve_references()
  with own.unlocked():
    own.update(seed=config.seed, mesh=config.mesh, paper=config.paper, setting=config.setting)
  return own


def load(config: ConfigDict, name: str, folder: pathlib.Path) -> Network:
  """Returns the network `name` of a configuration.

  One that is trained here lies in `folder/<name>-seed<seed>`: another paper that asks for the same section
  finds it there; a section that differs is refused with the difference.
  """
  own = section(config, name)
  sources = {split: training.load_data(own, split) for split in ('train', 'test')}
  if own.get('pretrained'):
    fields = {field: value for field, value in own.model.items() if field != 'name'}
    model, variables = models.load_pretrained(own.pretrained, **fields)
    shardings = parallel.fsdp_shardings(variables, training.mesh(own))
    variables = jax.tree.map(
      lambda leaf, sharding: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__),
      variables,
      shardings,
    )
  else:
    model = models.create(**own.model)
    state, _ = training.train(
      program(own),
      sources['train'],
      own,
      folder / f'{name}-seed{config.seed}',
      num_steps=own.epochs * (len(sources['train']) // own.batch_size),
      description=f'{name} in float',
    )
    variables = {'params': state.params, **state.model_state}
  return Network(
    model,
    variables,
    sources['train'],
    functools.partial(calibration, own, sources['train']),
    functools.partial(score, own, model, sources['test']),
  )


def calibration(config: ConfigDict, source: data.Source, count: int, size: int) -> list[Array]:
  """Returns `count` shuffled training inputs, augmented as for training, in batches of `size`."""
  sharding = calibration_sharding(training.mesh(config), size)
  index, processes = data.process_shard(sharding, size)
  loader = data.make_loader(
    source,
    batch_size=size,
    seed=config.seed,
    process_index=index,
    process_count=processes,
    **training.reading(config, 'train'),
  )
  key = jax.random.key(config.seed)
  prepare = jax.jit(lambda batch: augmented(config, key, 0, batch))
  batches = itertools.islice(loader, count // size)
  try:
    return [prepare(data.to_device(batch, sharding)) for batch in batches]
  finally:
    loader.close()


def calibration_sharding(mesh: jax.sharding.Mesh, size: int) -> NamedSharding:
  """Returns how a calibration batch lies on the devices: split, or whole on each if it is too small."""
  if size % (mesh.shape['data'] * mesh.shape['fsdp']):
    return NamedSharding(mesh, PartitionSpec())
  return parallel.batch_sharding(mesh)


def score(
  config: ConfigDict,
  model: nn.Module,
  source: data.Source,
  float_variables: PyTree,
  variables: PyTree,
  hooks: Sequence[Hook] = (),
) -> dict[str, float]:
  """Returns the metrics of `Network.score`; networks with equal hooks share a compilation."""
  found = map_batches(
    lambda batch: _judge(
      float_variables, variables, batch, model=model, hooks=tuple(hooks), config=_Static(config)
    ),
    source,
    batch_size=config.eval_batch_size,
    mesh=training.mesh(config),
    **training.reading(config, 'test'),
  )
  metrics = {'logit_mse': float(found['logit_mse'].mean())}
  if config.task == 'language':
    return {'perplexity': float(jnp.exp(found['loss'].mean())), **metrics}
  return {'accuracy': 100 * float(found['correct'].mean()), **metrics}


class _Static:
  """A section as a static argument of a jitted function: equal by content."""

  def __init__(self, config: ConfigDict):
    self.config, self.text = config, config.to_json()

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Static) and self.text == other.text

  def __hash__(self) -> int:
    return hash(self.text)


@functools.partial(jax.jit, static_argnames=('model', 'hooks', 'config'))
def _judge(float_variables, variables, batch, *, model, hooks, config) -> dict[str, Array]:
  x, y = inputs(config.config, batch), targets(config.config, batch)
  reference = model.apply(float_variables, x).astype(jnp.float32)
  logits = models.apply(model, variables, x, hooks=hooks).astype(jnp.float32)
  axes = tuple(range(1, logits.ndim))
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
  return {
    'logit_mse': jnp.mean(jnp.square(logits - reference), axes),
    'loss': loss if loss.ndim == 1 else jnp.mean(loss, axes[:-1]),
    'correct': (jnp.argmax(logits, -1) == y).astype(jnp.float32),
  }
