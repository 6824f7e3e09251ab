"""Few-shot recognition on features that stay as they are: all classes at once, a few images of each.

Features are those of a frozen network, of the pixels themselves, or of a user's file. What is compared is
fitted on several draws of every few-shot set, all at once, and judged on the whole test set (practical
few-shot learning, pFSL).
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import networks, results
from experiments.harness.data import Images
from experiments.harness.runs import Call, Variables, say
from experiments.harness.sections import Experiment
from experiments.harness.settings import found_by, free, section
from experiments.harness.tasks import ImageTask
from experiments.protocols.features import read_features
from jaxlab import data, losses, models, parallel
from jaxlab.training import map_batches

Array = jax.Array
PyTree = Any
Arrays = dict[str, np.ndarray]

REPRESENTATIONS = ('raw', 'relu', 'network')
OWN = 'own'  # the representation of a user's file


@dataclasses.dataclass(frozen=True)
class RandomReLU:
  """Random features of pixels, `relu((x - mean) W + b)`; W and b are normal with these deviations."""

  units: int = 256
  weight_std: float = 0.25
  bias_std: float = 0.3

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.units < 1:
      yield f'units={self.units}: expected at least 1.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
  """A frozen network with weights of a file.

  Attributes:
    model: name and fields of `jaxlab.models.create`.
    feature: 'output' (the class token behind the last norm, or pooled channels), or 'token_before_norm' (the
      class token as the last block leaves it).
    weights: a .safetensors or .npz file of PyTorch's names.
    prefix: which the names of the network's weights begin with; all others are dropped.
    ignore: patterns of names without the prefix (heads) that the network does without.
    published: where the weights are found.
  """

  model: Mapping[str, Any]
  feature: Literal['output', 'token_before_norm'] = 'output'
  weights: str = ''
  prefix: str = ''
  ignore: tuple[str, ...] = ()
  published: str = free('')

  @property
  def needs(self) -> str:
    """Where the weights come from, in a sentence."""
    found = f'; published: {self.published}' if self.published else ''
    return f'--config.backbone.weights=FILE (.safetensors or .npz){found}'

  def make(self) -> nn.Module:
    """Returns the network without classifier."""
    return networks.create(self.model, num_classes=None)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from found_by('model', self.make)
    for pattern in self.ignore:
      try:
        re.compile(pattern)
      except re.error as error:
        yield f'ignore: {pattern!r} is no regular expression: {error}.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of a comparison on frozen features.

  Attributes:
    data: images of all classes.
    features: an npz file of a user's own features, which take the place of the images.
    features_shots: as `shots`, of `features`.
    representations: of the images: 'raw' (pixels in [0, 1]), 'relu', 'network' (those of `backbone`).
    relu: random features.
    backbone: the network.
    shots: labeled images of each class; 0: all training images.
    draws: few-shot sets of each size.
  """

  data: Images
  features: str = ''
  features_shots: tuple[int, ...] = (0,)
  representations: tuple[Literal['raw', 'relu', 'network'], ...]
  relu: RandomReLU = section(RandomReLU)
  backbone: Backbone | None = None
  shots: tuple[int, ...]
  draws: int

  @property
  def task_names(self) -> tuple[str, ...]:
    """The names of the tasks, such as `relu_5shot`, in order."""
    kinds, shots = (OWN,), self.features_shots
    if not self.features:
      kinds, shots = self.representations, self.shots
    return tuple(task_name(kind, k) for kind in kinds for k in shots)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    for name in ('shots', 'features_shots'):
      shots = getattr(self, name)
      if not shots or min(shots) < 0 or len(set(shots)) < len(shots):
        yield f'{name}={shots}: expected different numbers of images per class; 0: all.'
    kinds = self.representations
    if not kinds or len(set(kinds)) < len(kinds):
      yield f'representations={kinds}: expected different ones of {", ".join(REPRESENTATIONS)}.'
    if self.draws < 1:
      yield f'draws={self.draws}: expected at least 1.'
    if self.data.num_classes < 2:
      yield f'data.num_classes={self.data.num_classes}: expected at least 2.'
    size, most = self.data.train_size, max(self.shots, default=0)
    if size is None and 0 in self.shots:
      yield 'data.train_size: missing; shots=0 takes all training images.'
    if size is not None and most * self.data.num_classes > size:
      yield f'shots={most} of each of {self.data.num_classes} classes exceed data.train_size={size}.'


class Facts(NamedTuple):
  """Sizes of a task: classes, examples of a draw, channels of a feature, test examples."""

  num_classes: int
  examples: int
  dim: int
  test_examples: int


class Task(NamedTuple):
  """A few-shot problem in several draws; features are rows of unit length.

  Attributes:
    name: such as `relu_5shot`.
    features: float32 `[draws, examples, dim]`.
    labels: int32 `[draws, examples]`.
    test_features: float32 `[test examples, dim]`, the same for all draws.
    test_labels: int32 `[test examples]`.
    num_classes: number of classes.
  """

  name: str
  features: np.ndarray
  labels: np.ndarray
  test_features: np.ndarray
  test_labels: np.ndarray
  num_classes: int

  @property
  def facts(self) -> Facts:
    """The sizes."""
    return Facts(self.num_classes, *self.features.shape[1:], len(self.test_labels))


def task_name(representation: str, shots: int) -> str:
  """Returns the name of a task."""
  return f'{representation}_{shots}shot' if shots else f'{representation}_all'


def check(config: Settings, rows: Sequence[str], metrics: Sequence[str]) -> Iterator[str]:
  """Yields what is wrong with the network, and with claims about `rows` and patterns of `metrics`."""
  own = config.data
  if 'network' in config.representations:
    if config.backbone is None:
      yield "backbone: missing; the representation 'network' needs it."
    elif not list(config.backbone.check()):
      yield from found_by('backbone', dimension, config)
    if own.stored_image != own.view or own.train_decode != own.test_decode:
      yield (
        f'data.stored_image={own.stored_image}, data.train_decode={own.train_decode}: expected those of the '
        f'test, {own.view} and {own.test_decode}; the network sees all images alike.'
      )
  tasks = rf'({"|".join((*REPRESENTATIONS, OWN))})_(\d+shot|all)'
  names = [rf'{tasks}_({"|".join(metrics)})']
  yield from results.check_claims(config, list(map(re.escape, rows)), names)


def nominal_facts(config: Settings) -> Facts:
  """Returns the largest sizes that the settings promise; of test examples, a batch of the evaluation."""
  own, most = config.data, max(config.shots)
  dims = {'raw': int(np.prod(own.stored_image)), 'relu': config.relu.units}
  if 'network' in config.representations:
    dims['network'] = dimension(config)
  examples = own.train_size if 0 in config.shots else own.num_classes * most
  dim = max(dims[name] for name in config.representations)
  return Facts(own.num_classes, examples, dim, config.eval_batch_size)


def tasks(config: Settings, workdir: pathlib.Path) -> Iterator[Task]:
  """Yields the tasks of `config.task_names`; `workdir/features.npz` keeps the network's features.

  Draw `i` of k shots holds the first k images of each class in an order that depends on (seed, i) alone, so
  that fewer shots are a part of more. `0` shots are all training features, the same in every draw. What can
  be missing or wrong (files, shots) is looked at before the first task.

  Raises:
    ValueError: for features, labels, shots or weights that make no few-shot problem.
    FileNotFoundError: if the data are not there; the message says how to get them.
  """
  if config.features:
    arrays = read_features(config.features, complete=('train',))
    classes = int(arrays['train_labels'].max()) + 1
    orders = draw(config, 'features_shots', arrays['train_labels'], classes)
    yield from cut(OWN, config.features_shots, orders, arrays, classes)
    return
  classes, variables = config.data.num_classes, None
  if 'network' in config.representations:
    variables = read_weights(config.backbone, config.data.view)
  sources = {split: harness_data.load(config.data, split) for split in ('train', 'test')}
  orders = draw(config, 'shots', sources['train'], classes)
  for name in config.representations:
    if name != 'network':
      yield from cut(name, config.shots, orders, pixels(config, name, sources), classes)
      continue
    # Only the images that some draw shows go through the network.
    everything = np.arange(len(sources['train']))
    shown = everything if 0 in config.shots else np.unique(orders)
    some = {**sources, 'train': data.subset(sources['train'], shown)}
    arrays = extract(config, variables, some)
    if jax.process_index() == 0:
      with (workdir / 'features.npz').open('wb') as file:
        np.savez(file, **arrays)
    yield from cut(name, config.shots, np.searchsorted(shown, orders), arrays, classes)


def with_features(config: Settings) -> Settings:
  """Returns the settings without claims about images, if a user's own features are in their place."""
  if not config.features:
    return config
  own = tuple(c for c in config.claims if c.metric.startswith(config.task_names))
  return dataclasses.replace(config, claims=own)


def draw(
  config: Settings, key: str, labels: np.ndarray | data.Source, num_classes: int
) -> np.ndarray:
  """Returns the positions of all draws' images `[draws, classes, shots]`, none where all are taken.

  Raises:
    ValueError: if a class has too few images for the shots of `config`'s `key`.
  """
  shots = getattr(config, key)
  if max(shots) == 0:
    return np.zeros((config.draws, num_classes, 0), np.int64)
  try:
    return data.few_shot_draws(config.seed, labels, config.draws, max(shots), num_classes)
  except ValueError as error:
    raise ValueError(f'{key}={shots}: {error}') from None


def cut(
  name: str, shots: Sequence[int], orders: np.ndarray, arrays: Arrays, num_classes: int
) -> Iterator[Task]:
  """Yields a task for each number of shots of a representation, `{train,test}_features` and `_labels`.

  Raises:
    ValueError: for fewer than two training features or classes.
  """
  features, test_features = (_unit(arrays[f'{split}_features']) for split in ('train', 'test'))
  labels, test_labels = (np.int32(arrays[f'{split}_labels']) for split in ('train', 'test'))
  for k in shots:
    rows = orders[:, :, :k] if k else np.tile(np.arange(len(labels)), (len(orders), 1))
    rows = rows.reshape(len(orders), -1)
    title = task_name(name, k)
    if num_classes < 2 or rows.shape[1] < 2:
      raise ValueError(
        f'{title}: {rows.shape[1]} training features of {num_classes} class(es), expected at least 2 of '
        'both.'
      )
    yield Task(title, features[rows], labels[rows], test_features, test_labels, num_classes)


def pixels(config: Settings, name: str, sources: Mapping[str, data.Source]) -> Arrays:
  """Returns features and labels of both splits: pixels in [0, 1], or random ReLU features of them."""
  records = {split: data.materialize(source) for split, source in sources.items()}
  flat = {
    split: np.asarray(own['image'], np.float32).reshape(len(own['image']), -1) / 255
    for split, own in records.items()
  }
  if name == 'relu':
    rng, options, mean = np.random.default_rng(config.seed), config.relu, flat['train'].mean(0)
    weight = rng.normal(0, options.weight_std, (len(mean), options.units))
    bias = rng.normal(0, options.bias_std, options.units)
    flat = {
      split: np.maximum((x - mean) @ weight + bias, 0).astype(np.float32)
      for split, x in flat.items()
    }
  return {
    f'{split}_{what}': array
    for split in sources
    for what, array in (('features', flat[split]), ('labels', records[split]['label']))
  }


def programs(config: Settings) -> dict[str, Call]:
  """Returns the network's forward pass as `features`; without a network, nothing."""
  own, task = config.backbone, ImageTask.of(config.data)
  if 'network' not in config.representations or config.features:
    return {}

  def make(mesh: jax.sharding.Mesh) -> tuple[Any, tuple[Any, ...]]:
    model = own.make()
    variables = parallel.abstract(
      models.abstract_variables(model, task.view), parallel.replicated(mesh)
    )
    batch = parallel.abstract(task.batch(config.eval_batch_size), parallel.batch_sharding(mesh))
    return feature_fn(model, own.feature, task), (variables, batch)

  return {'features': Call(make)}


def feature_fn(
  model: nn.Module, feature: str, task: ImageTask
) -> Callable[[Variables, Any], Array]:
  """Returns `(variables, batch) -> features [batch, dim]`, rows of unit length; see `Backbone`."""

  def features(variables: Variables, batch: Any) -> Array:
    x = task.inputs(batch)
    if feature == 'output':
      return losses.normalize(model.apply(variables, x))
    last = models.anatomy(model).blocks[-1]
    _, captured = models.capture(model, variables, [last.path], x)
    tokens = captured[last.path]
    return losses.normalize((tokens if last.stacked is None else tokens[-1])[:, 0])

  return features


def dimension(config: Settings) -> int:
  """Returns the channels of the network's features.

  Raises:
    ValueError: if it has no such features.
  """
  own = config.backbone
  return _dimension(own.make(), own.feature, ImageTask.of(config.data))


@functools.lru_cache
def _dimension(model: nn.Module, feature: str, task: ImageTask) -> int:
  variables = models.abstract_variables(model, task.view)
  if feature == 'token_before_norm' and 'cls_token' not in variables['params']:
    raise ValueError(f'feature={feature!r}, but {type(model).__name__} has no class token.')
  return jax.eval_shape(feature_fn(model, feature, task), variables, task.batch(1)).shape[-1]


def read_weights(own: Backbone, view: Sequence[int]) -> Variables:
  """Returns the variables of the network, which sees images of shape `view`.

  Raises:
    ValueError: if there is no such file, or it does not fit the network.
  """
  if not own.weights or not pathlib.Path(own.weights).is_file():
    raise ValueError(
      f'backbone.weights={own.weights!r}: there is no such file. {own.model["name"]} needs {own.needs}.'
    )
  given = models.read_state_dict(own.weights)
  given = {n.removeprefix(own.prefix): a for n, a in given.items() if n.startswith(own.prefix)}
  heads = [p for p in own.ignore if any(re.fullmatch(p, name) for name in given)]
  return models.from_torch(models.abstract_variables(own.make(), view), given, ignore=heads)


def extract(config: Settings, variables: Variables, sources: Mapping[str, data.Source]) -> Arrays:
  """Returns `{train,test}_features` and `_labels` of the sources, through the network."""
  own, mesh, arrays = config.backbone, config.mesh.make(), {}
  features = jax.jit(feature_fn(own.make(), own.feature, ImageTask.of(config.data)))
  variables = jax.device_put(variables, parallel.replicated(mesh))
  for split, source in sources.items():
    say(f'{own.model["name"]}: features of {len(source)} {split} images')
    arrays[f'{split}_features'], arrays[f'{split}_labels'] = map_batches(
      lambda batch: (features(variables, batch), batch['label']),
      source,
      batch_size=config.eval_batch_size,
      mesh=mesh,
      **harness_data.reading(config.data, split),
    )
  return arrays


def _unit(x: np.ndarray) -> np.ndarray:
  x = np.asarray(x, np.float32)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
