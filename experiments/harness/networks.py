"""Networks by the settings that describe them: made, loaded with public weights, or trained here once."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from experiments.harness import data as harness_data
from experiments.harness import runs, supervised
from experiments.harness.data import Augment, Images, Tokens
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Experiment, Recipe
from experiments.harness.tasks import ImageTask, Task, TokenTask
from jaxlab import data, models, parallel
from jaxlab.models.classifier_heads import (
  Classifier,
  LearnableWeightScaling,
  Linear,
  NormedLinear,
)
from jaxlab.models.initializers import kaiming_normal_fan_in, torch_default
from jaxlab.training import map_batches

Array = jax.Array

HEADS = ('linear', 'scaled', 'cosine')
KERNELS = {'torch': torch_default, 'kaiming': kaiming_normal_fan_in}


def create(model: Mapping[str, Any], **changes: Any) -> nn.Module:
  """Returns the network of a setting's `model`: a name and fields of `jaxlab.models.create`."""
  return models.create(**{**model, **changes})


def classifier(
  model: Mapping[str, Any], num_classes: int, head: str = 'linear', kernel_init: str = 'torch'
) -> Classifier:
  """Returns the features of a setting's `model` under a head.

  Args:
    model: see `create`.
    num_classes: number of logits.
    head: 'linear', 'scaled' (learnable weight scaling) or 'cosine'.
    kernel_init: of a linear head, 'torch' or 'kaiming'.

  Raises:
    ValueError: for a head or an initializer that does not exist.
  """
  backbone = create(model, num_classes=None)
  if head == 'scaled':
    return Classifier(backbone, LearnableWeightScaling(num_classes))
  if head == 'cosine':
    return Classifier(backbone, NormedLinear(num_classes))
  if head != 'linear' or kernel_init not in KERNELS:
    raise ValueError(
      f'head={head!r} with kernel_init={kernel_init!r}: expected one of {", ".join(HEADS)} and of '
      f'{", ".join(KERNELS)}.'
    )
  return Classifier(backbone, Linear(num_classes, KERNELS[kernel_init]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
  """A network with the data that it was made for.

  Attributes:
    model: name and fields of `jaxlab.models.create`.
    data: images that it classifies, or tokens whose next one it predicts.
    augment: of training images.
    pretrained: name of public weights (`jaxlab.models.load_pretrained`), or
    recipe: of its training here.
    massive: (token, channel, value) of the position embedding before training: entries of some 15 grow into
      the massive activations of large transformers.
  """

  model: Mapping[str, Any]
  data: Images | Tokens
  augment: Augment = dataclasses.field(default_factory=Augment)
  pretrained: str = ''
  recipe: Recipe | None = None
  massive: tuple[tuple[int, int, float], ...] = ()

  @property
  def task(self) -> Task:
    """What the network is asked."""
    if isinstance(self.data, Tokens):
      return TokenTask.of(self.data)
    return ImageTask.of(self.data, self.augment)

  def check(self) -> Any:
    """Yields what is wrong with the values."""
    if bool(self.pretrained) == (self.recipe is not None):
      yield 'pretrained: expected public weights or a recipe, one of the two.'
    try:
      create(self.model)
    except (ValueError, TypeError) as error:
      yield f'model: {error}'


def training(
  config: Experiment,
  network: Network,
  title: str,
  *,
  decides: Mapping[str, Any] = MappingProxyType({}),
  **options: Any,
) -> Run:
  """Returns the training of a network from scratch.

  Args:
    config: the experiment.
    network: with a recipe.
    title: of the run.
    decides: what else decides what it ends with, such as the settings of a loss.
    **options: of `supervised.program`: `loss`, `captured`, `teacher`, ...
  """
  steps = network.data.train_size // network.recipe.batch_size

  def plant(params: Any) -> Any:
    for token, channel, value in network.massive:
      params = {**params, 'pos_embed': params['pos_embed'].at[0, token, channel].set(value)}
    return params

  model = create(network.model)
  options = {'prepare': plant, **options}
  program = supervised.program(model, network.task, network.recipe, steps, **options)
  own = {name: getattr(network, name) for name in ('model', 'augment', 'massive')}
  num_steps = network.recipe.epochs * steps
  return Run(config, network.data, network.recipe, program, num_steps, {**own, **decides}, title)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A network with variables, and the data that calibrate and judge what is made of it.

  Attributes:
    config: the experiment.
    network: its section.
    model: the module.
    variables: its float variables.
    train: training records.
    test: test records.
  """

  config: Experiment
  network: Network
  model: nn.Module
  variables: Variables
  train: data.Source
  test: data.Source

  def calibration(self, count: int, size: int) -> list[Array]:
    """Returns `count` shuffled training inputs, augmented as for training, in batches of `size`."""
    own, task, key = self.network.data, self.network.task, jax.random.key(self.config.seed)
    sharding = calibration_sharding(self.config.mesh.make(), size)
    index, processes = data.process_shard(sharding, size)
    loader = data.make_loader(
      self.train,
      batch_size=size,
      seed=self.config.seed,
      process_index=index,
      process_count=processes,
      **harness_data.reading(own, 'train'),
    )
    prepare = jax.jit(
      lambda batch: task.augmented(data.example_keys(key, 0, batch['index']), batch)
    )
    try:
      batches = itertools.islice(loader, count // size)
      return [prepare(data.to_device(batch, sharding)) for batch in batches]
    finally:
      loader.close()

  def score(self, variables: Variables, hooks: Sequence[models.Hook] = ()) -> dict[str, float]:
    """Returns how good variables under hooks are on the test records.

    `accuracy` in percent or, of tokens, `perplexity`; and `logit_mse`, the mean squared difference of the
    outputs from those of the float network.
    """
    fn = functools.partial(
      judge, self.variables, variables, model=self.model, hooks=tuple(hooks), task=self.network.task
    )
    found = map_batches(
      fn,
      self.test,
      batch_size=self.config.eval_batch_size,
      mesh=self.config.mesh.make(),
      **harness_data.reading(self.network.data, 'test'),
    )
    metrics = {'logit_mse': float(found['logit_mse'].mean())}
    if isinstance(self.network.data, Tokens):
      return {'perplexity': float(jnp.exp(found['loss'].mean())), **metrics}
    return {'accuracy': 100 * float(found['correct'].mean()), **metrics}


def load(config: Experiment, network: Network, folder: Any, run: Run | None = None) -> Loaded:
  """Returns a network with public weights, or trained from wherever its folder was left.

  Args:
    config: the experiment.
    network: its section.
    folder: of its training.
    run: its training; None: `training(config, network)`.
  """
  sources = {split: harness_data.load(network.data, split) for split in ('train', 'test')}
  if network.pretrained:
    fields = {name: value for name, value in network.model.items() if name != 'name'}
    model, variables = models.load_pretrained(network.pretrained, **fields)
    shardings = parallel.fsdp_shardings(variables, config.mesh.make())
    variables = jax.tree.map(
      lambda leaf, sharding: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__),
      variables,
      shardings,
    )
  else:
    model = create(network.model)
    run = run or training(config, network, 'in float')
    variables = runs.train(run, sources['train'], folder).variables
  return Loaded(config, network, model, variables, sources['train'], sources['test'])


def calibration_sharding(mesh: jax.sharding.Mesh, size: int) -> NamedSharding:
  """Returns how a calibration batch lies on the devices: split, or whole on each if it is too small."""
  if size % (mesh.shape['data'] * mesh.shape['fsdp']):
    return NamedSharding(mesh, PartitionSpec())
  return parallel.batch_sharding(mesh)


@functools.partial(jax.jit, static_argnames=('model', 'hooks', 'task'))
def judge(float_variables, variables, batch, *, model, hooks, task) -> dict[str, Array]:
  """Returns scores of each record; networks with equal hooks share a compilation."""
  x, y = task.inputs(batch), task.targets(batch)
  reference = model.apply(float_variables, x).astype(jnp.float32)
  outputs = models.apply(model, variables, x, hooks=hooks).astype(jnp.float32)
  error = jnp.mean(jnp.square(outputs - reference), tuple(range(1, outputs.ndim)))
  return {'logit_mse': error, **task.score(outputs, y)}
