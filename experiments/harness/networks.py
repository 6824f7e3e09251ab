"""Networks by the settings that describe them: made, loaded with public weights, or trained here once."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from experiments.harness import data as harness_data
from experiments.harness import runs, sources, supervised
from experiments.harness.data import Augment, Completions, Images, Sentences, Tokens
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Experiment, Recipe
from experiments.harness.settings import free
from experiments.harness.tasks import (
  CompletionTask,
  ImageTask,
  SentenceTask,
  Task,
  TokenTask,
  is_correct,
)
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
# Kernel and bias of linear heads; None: PyTorch's.
KERNELS = {
  'torch': (torch_default, None),
  'kaiming': (kaiming_normal_fan_in, None),
  'normal': (nn.initializers.normal(0.01), nn.initializers.zeros),
}


def create(model: Mapping[str, Any], **changes: Any) -> nn.Module:
  """Returns the network of a setting's `model`: a name and fields of `jaxlab.models.create`."""
  return models.create(**{**model, **changes})


def feature_path(model: nn.Module) -> str:
  """Returns the module whose output is the penultimate feature.

  Raises:
    ValueError: if no module of its own has it.
  """
  path = models.anatomy(model).features
  if not path:
    raise ValueError(f'{type(model).__name__} has no module whose output are its features.')
  return path


def feature_vector(features: Array | tuple[Array, ...]) -> Array:
  """Returns what enters the classifier; of a distilled transformer the class token's."""
  return features[0] if isinstance(features, tuple) else features


def classifier(
  model: Mapping[str, Any], num_classes: int, head: str = 'linear', kernel_init: str = 'torch'
) -> Classifier:
  """Returns the features of a setting's `model` under a head.

  Args:
    model: see `create`.
    num_classes: number of logits.
    head: 'linear', 'scaled' (learnable weight scaling) or 'cosine'.
    kernel_init: of a linear head, 'torch', 'kaiming' or 'normal' (deviation 0.01, without bias at first).

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
  kernel, bias = KERNELS[kernel_init]
  return Classifier(backbone, Linear(num_classes, kernel, bias_init=bias))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
  """A network with the data that it was made for.

  Attributes:
    model: name and fields of `jaxlab.models.create`.
    data: images that it classifies, tokens whose next one it predicts (of completions of prompts, or of all),
      or sentences that it encodes.
    augment: of training images.
    pretrained: name of public weights (`jaxlab.models.load_pretrained`).
    recipe: of its training here; with public weights of its fine-tuning, under a classifier drawn anew.
    weights: file with the public weights; empty: they are downloaded.
    massive: (token, channel, value) of the position embedding before training: entries of some 15 grow into
      the massive activations of large transformers.
    fan_in_scaled: patterns of kernels that are drawn with PyTorch's default deviation, 1 / sqrt(3 fan in), in
      place of the model's own: narrow transformers stand higher learning rates with it than with 0.02.
  """

  model: Mapping[str, Any]
  data: Images | Completions | Tokens | Sentences
  augment: Augment = dataclasses.field(default_factory=Augment)
  pretrained: str = ''
  weights: str = free('')
  recipe: Recipe | None = None
  massive: tuple[tuple[int, int, float], ...] = ()
  fan_in_scaled: tuple[str, ...] = ()

  @property
  def measure(self) -> str:
    """The metric that says how good the network is; without labels, how close to the float network."""
    if isinstance(self.data, Tokens):
      return 'perplexity'
    if isinstance(self.data, Sentences):
      return 'rank_correlation'
    return 'accuracy' if self.data.labeled else 'agreement'

  @property
  def task(self) -> Task:
    """What the network is asked."""
    if isinstance(self.data, Completions):
      return CompletionTask.of(self.data)
    if isinstance(self.data, Tokens):
      return TokenTask.of(self.data)
    if isinstance(self.data, Sentences):
      return SentenceTask(self.data.length)
    return ImageTask.of(self.data, self.augment)

  def check(self) -> Any:
    """Yields what is wrong with the values."""
    if not self.pretrained and self.recipe is None:
      yield 'pretrained: expected public weights, a recipe, or both.'
    name = self.model.get('name')
    if self.pretrained and self.pretrained.partition('.')[0] != name:
      yield f'pretrained: {self.pretrained!r} are weights of another network than {name!r}.'
    if self.weights and not self.pretrained:
      yield f'weights={self.weights!r}: give the name of the weights, pretrained, too.'
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
    **options: of `supervised.program`: `loss`, `captured`, `teacher`, ...; `prepare` is given the parameters
      as the network's section changes them.
  """
  steps = network.data.train_size // network.recipe.batch_size
  model = create(network.model)
  further = options.pop('prepare', lambda params: params)
  prepare = lambda params: further(prepared(network, params))  # noqa: E731
  program = supervised.program(
    model, network.task, network.recipe, steps, prepare=prepare, **options
  )
  num_steps = network.recipe.epochs * steps
  public_weights = {'pretrained': network.pretrained} if network.pretrained else {}
  own = {**drawn_by(network), **public_weights, **decides}
  return Run(config, network.data, network.recipe, program, num_steps, own, title)


def drawn_by(network: Network) -> dict[str, Any]:
  """Returns what decides a network's training besides seed, data and recipe."""
  return {name: getattr(network, name) for name in ('model', 'augment', 'massive', 'fan_in_scaled')}


def prepared(network: Network, params: Any) -> Any:
  """Returns drawn parameters as training starts from them: with `massive` and `fan_in_scaled` applied."""
  for token, channel, value in network.massive:
    params = {**params, 'pos_embed': params['pos_embed'].at[0, token, channel].set(value)}
  return fan_in_scaled(network.fan_in_scaled, params)


def fan_in_scaled(patterns: Sequence[str], params: Any) -> Any:
  """Returns drawn parameters, kernels that match a pattern scaled to the deviation 1 / sqrt(3 fan in)."""
  for pattern in patterns:
    params = models.map_matching(_fan_in_scaled, params, pattern)
  return params


def _fan_in_scaled(path: str, kernel: Array) -> Array:
  """Returns a kernel as drawn, scaled to the deviation 1 / sqrt(3 fan in)."""
  del path
  deviation = (3 * kernel.size / kernel.shape[-1]) ** -0.5
  return kernel * (deviation / jnp.sqrt(jnp.mean(jnp.square(kernel))))


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
    outputs from those of the float network. Without labels in place of the accuracy `agreement`, the
    percentage of images whose largest logit is that of the float network, and `relative_error`, the norm of
    the difference of all outputs over the norm of the float ones. Of sentences `relative_error` of their
    embeddings, and `rank_correlation`, Spearman's between the cosine similarities of all pairs of sentences
    and those of the float network.
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
    measure = self.network.measure
    if measure == 'rank_correlation':
      return similarity(**found)
    mse, size = found['logit_mse'].mean(), found['logit_square'].mean()
    metrics = {'logit_mse': float(mse)}
    if measure == 'perplexity':
      return {measure: float(jnp.exp(found['loss'].mean())), **metrics}
    if measure == 'agreement':
      relative = {'relative_error': float(np.sqrt(mse / size))}
      return {measure: 100 * float(found['agrees'].mean()), **relative, **metrics}
    return {measure: 100 * float(found['correct'].mean()), **metrics}


def load(config: Experiment, network: Network, folder: Any, run: Run | None = None) -> Loaded:
  """Returns a network with public weights, or trained from wherever its folder was left.

  Args:
    config: the experiment.
    network: its section.
    folder: of its training.
    run: its training; None: `training(config, network)`.

  Raises:
    ValueError: before any training, for data that are not what the setting says, or tokens that the network
      does not know.
  """
  records = {split: harness_data.load(network.data, split) for split in ('train', 'test')}
  for source in records.values():
    harness_data.check_vocabulary(network.data, source, create(network.model))
  if network.pretrained and network.recipe is None:
    model, variables = public(network)
    variables = over_mesh(variables, config.mesh.make())
  else:
    model = create(network.model)
    run, given = run or training(config, network, 'in float'), {}
    if network.pretrained:
      _, start = public(network, num_classes=None)
      given = {'start': start, 'fresh': [f'{path}/.*' for path in models.anatomy(model).head]}
    variables = runs.train(run, records['train'], folder, **given).variables
  return Loaded(config, network, model, variables, records['train'], records['test'])


def over_mesh(variables: Variables, mesh: jax.sharding.Mesh) -> Variables:
  """Returns variables split over a mesh by the rule for parameters; host arrays are the same everywhere."""

  def put(leaf: Any, sharding: NamedSharding) -> Array:
    if isinstance(leaf, jax.Array):
      return jax.device_put(leaf, sharding)
    return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)

  return jax.tree.map(put, variables, parallel.fsdp_shardings(variables, mesh))


def public(network: Network, **changes: Any) -> tuple[nn.Module, Variables]:
  """Returns a network with its public weights; `changes` of its fields."""
  fields = {name: value for name, value in network.model.items() if name != 'name'} | changes
  if network.weights:
    fields['file'] = sources.file(network.weights)
  return models.load_pretrained(network.pretrained, **fields)


def calibration_sharding(mesh: jax.sharding.Mesh, size: int) -> NamedSharding:
  """Returns how a calibration batch lies on the devices: split, or whole on each if it is too small."""
  if size % (mesh.shape['data'] * mesh.shape['fsdp']):
    return NamedSharding(mesh, PartitionSpec())
  return parallel.batch_sharding(mesh)


def accuracy(
  config: Experiment,
  own: Images,
  model: nn.Module,
  task: Task,
  variables: Variables,
  source: data.Source,
) -> float:
  """Returns the accuracy of a network on test records, in percent.

  Args:
    config: the experiment.
    own: how the records are read.
    model: the network.
    task: what it is asked.
    variables: of the network.
    source: the records.
  """
  correct = map_batches(
    functools.partial(_correct, variables, model=model, task=task),
    source,
    batch_size=config.eval_batch_size,
    mesh=config.mesh.make(),
    **harness_data.reading(own, 'test'),
  )
  return 100 * float(correct.mean())


@functools.partial(jax.jit, static_argnames=('model', 'task'))
def _correct(
  variables: Variables, batch: Mapping[str, Array], *, model: nn.Module, task: Task
) -> Array:
  """Returns which records are classified correctly; equal networks share a compilation."""
  outputs = model.apply(variables, task.inputs(batch), train=False)
  return task.score(outputs, task.targets(batch))['correct']


@functools.partial(jax.jit, static_argnames=('model', 'hooks', 'task'))
def judge(float_variables, variables, batch, *, model, hooks, task) -> dict[str, Array]:
  """Returns scores of each record; networks with equal hooks share a compilation."""
  x, y = task.inputs(batch), task.targets(batch)
  args, kwargs = ((), x) if isinstance(x, Mapping) else ((x,), {})
  reference = model.apply(float_variables, *args, **kwargs).astype(jnp.float32)
  outputs = models.apply(model, variables, *args, hooks=hooks, **kwargs).astype(jnp.float32)
  if isinstance(task, SentenceTask):
    return {'reference': task.embed(reference, y), 'embedding': task.embed(outputs, y)}
  axes = tuple(range(1, outputs.ndim))
  agrees = is_correct(outputs, jnp.argmax(reference, -1))
  agrees = jnp.where(jnp.any(jnp.isnan(reference), -1), jnp.nan, agrees)
  return {
    'logit_mse': jnp.mean(jnp.square(outputs - reference), axes),
    'logit_square': jnp.mean(jnp.square(reference), axes),
    'agrees': jnp.mean(agrees, axes[:-1]),
    **task.score(outputs, y),
  }


def similarity(reference: np.ndarray, embedding: np.ndarray) -> dict[str, float]:
  """Returns how close embeddings `[sentences, width]` are to those of the float network.

  `relative_error`, the norm of the difference over that of the reference; `rank_correlation`, Spearman's
  between the cosine similarities of all pairs; `logit_mse`, the mean squared difference.
  """
  from scipy import stats

  def cosines(vectors):
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(unit), 1)]

  difference = embedding - reference
  return {
    'rank_correlation': float(stats.spearmanr(cosines(reference), cosines(embedding)).statistic),
    'relative_error': float(np.linalg.norm(difference) / np.linalg.norm(reference)),
    'logit_mse': float(np.mean(np.square(difference))),
  }
