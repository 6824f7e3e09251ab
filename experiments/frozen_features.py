"""Features of frozen networks, and few-shot sets drawn from them: what IbM2 and its kin start from.

Practical few-shot learning (pFSL, Fu et al., CVPR 2024): all classes at once, k labeled images of each, a
backbone that was trained without labels, the whole test set.
"""

import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from experiments import training
from experiments.protocols.features import read_features
from jaxlab import data, losses, models, parallel
from jaxlab.data.protocols.few_shot import few_shot_split
from jaxlab.data.sources.subset import subset
from jaxlab.training import map_batches

Array = jax.Array
PyTree = Any


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


def tasks(config: ConfigDict, workdir: pathlib.Path) -> Iterator[Task]:
  """Yields the tasks of a configuration: its representations times its shots, or those of a user's features.

  Draw `i` of k shots holds the first k images of each class in an order that depends on (seed, i) alone,
  so that fewer shots are a part of more. `0` shots are all training features, the same in every draw.

  - `config.features`: arrays of a file, `train_features`, `train_labels`, `test_features`, `test_labels`;
    shots `config.features_shots`.
  - representation 'raw': pixels in [0, 1]; 'relu': `relu((x - mean) W + b)` with random W and b.
  - representation 'network': those of `config.model`; they are left in `workdir/features.npz`.

  Raises:
    ValueError: for features, labels or shots that make no few-shot problem.
  """
  if config.features:
    arrays = read_features(config.features, complete=('train',))
    parts = [arrays[name] for name in ('train_features', 'train_labels')]
    rest = [arrays[name] for name in ('test_features', 'test_labels')]
    classes = int(parts[1].max()) + 1
    orders = [
      draw_order(rng(config, i), parts[1], max(config.features_shots), classes)
      for i in range(config.draws)
    ]
    yield from _cut('own', config.features_shots, orders, parts, rest, classes)
    return
  sources = {split: training.load_data(config, split) for split in ('train', 'test')}
  classes = sources['train'].num_classes
  orders = [
    draw_order(rng(config, i), sources['train'], max(config.shots), classes)
    for i in range(config.draws)
  ]
  for name in config.representations:
    if name == 'network':
      # Only the images that some draw shows go through the network.
      everything = 0 in config.shots
      shown = np.arange(len(sources['train'])) if everything else np.unique(np.stack(orders))
      sources['train'] = subset(sources['train'], shown)
      orders = [np.searchsorted(shown, order) for order in orders]
      arrays = extract(config, sources)
      if jax.process_index() == 0:
        save(workdir / 'features.npz', arrays)
      parts, rest = ([arrays[f'{s}_{w}'] for w in ('features', 'labels')] for s in sources)
    else:
      parts, rest = pixels(config, name, sources)
    yield from _cut(name, config.shots, orders, parts, rest, classes)


def rng(config: ConfigDict, draw: int) -> np.random.Generator:
  """Returns the stream of draw number `draw`."""
  return np.random.default_rng((config.seed, draw))


def draw_order(
  generator: np.random.Generator, labels: np.ndarray | data.Source, num_shots: int, num_classes: int
) -> np.ndarray:
  """Draws the images that come first in each class: positions `[num_classes, num_shots]`, or all (`0`).

  A source whose labels are not in memory is read at random until all classes are complete: a few records
  for each one that is needed, not the whole of ImageNet.

  Raises:
    ValueError: if a class has too few images.
  """
  if isinstance(labels, data.InMemory):
    labels = labels.arrays['label']
  if num_shots == 0:
    return np.arange(len(labels))
  if isinstance(labels, np.ndarray):
    return few_shot_split(generator, labels, num_shots, num_classes).reshape(num_classes, num_shots)
  found: list[list[int]] = [[] for _ in range(num_classes)]
  missing = num_classes * num_shots
  for index in generator.permutation(len(labels)):
    rows = found[int(labels[int(index)]['label'])]
    if len(rows) < num_shots:
      rows.append(int(index))
      missing -= 1
    if not missing:
      return np.array(found)
  short = [c for c, rows in enumerate(found) if len(rows) < num_shots]
  raise ValueError(
    f'shots={num_shots}, but {len(short)} classes have fewer images, the first is class {short[0]} with '
    f'{len(found[short[0]])}.'
  )


def pixels(
  config: ConfigDict, name: str, sources: dict[str, data.Source]
) -> list[list[np.ndarray]]:
  """Returns features and labels of both splits: raw pixels, or random ReLU features of them.

  Raises:
    ValueError: for a representation that does not exist.
  """
  records = {split: data.materialize(source) for split, source in sources.items()}
  flat = {
    split: np.asarray(own['image'], np.float32).reshape(len(own['image']), -1) / 255
    for split, own in records.items()
  }
  if name == 'relu':
    generator = np.random.default_rng(config.seed)
    mean, options = flat['train'].mean(0), config.relu
    weight = generator.normal(0, options.weight_std, (len(mean), options.units))
    bias = generator.normal(0, options.bias_std, options.units)
    flat = {
      split: np.maximum((x - mean) @ weight + bias, 0).astype(np.float32)
      for split, x in flat.items()
    }
  elif name != 'raw':
    raise ValueError(f"representations: {name!r} is none of 'raw', 'relu', 'network'.")
  return [[flat[split], records[split]['label']] for split in ('train', 'test')]


def network(config: ConfigDict) -> nn.Module:
  """Returns the backbone of `config.model` without classifier."""
  own = {'feature', 'weights', 'prefix', 'ignore'}
  fields = {name: value for name, value in config.model.items() if name not in own}
  return models.create(**fields, num_classes=None)


def feature_fn(config: ConfigDict, model: nn.Module) -> Callable[[PyTree, Array], Array]:
  """Returns `(variables, uint8 images) -> features [batch, dim]`, unit rows.

  `model.feature`: 'output' (the class token behind the last norm, or pooled channels) or
  'token_before_norm' (the class token as the last block leaves it, in MSN).

  Raises:
    ValueError: for another.
  """
  if config.model.feature not in ('output', 'token_before_norm'):
    raise ValueError(
      f"model.feature={config.model.feature!r} is none of 'output', 'token_before_norm'."
    )

  def features(variables: PyTree, images: Array) -> Array:
    x = data.normalize(data.to_float(images), config.data.mean, config.data.std)
    if config.model.feature == 'output':
      return losses.normalize(model.apply(variables, x))
    last = f'blocks_{model.depth - 1}'
    _, captured = models.capture(model, variables, [last], x)
    return losses.normalize(captured[last][:, 0])

  return features


def weights(config: ConfigDict, model: nn.Module) -> PyTree:
  """Returns the variables of `config.model.weights`, a .safetensors or .npz file of PyTorch's names.

  Names begin with `model.prefix`, which is dropped with all others; those that match a pattern of
  `model.ignore` (heads) are left out.

  Raises:
    ValueError: if there is no such file, or it does not fit the model.
  """
  own = config.model
  if not own.weights or not pathlib.Path(own.weights).is_file():
    raise ValueError(
      f'model.weights={own.weights!r}: there is no such file. Give the pre-trained weights of {own.name} by '
      f'--config.model.weights=FILE (.safetensors or .npz; the settings say where to get them).'
    )
  state = models.read_state_dict(own.weights)
  state = {
    name.removeprefix(own.prefix): a for name, a in state.items() if name.startswith(own.prefix)
  }
  heads = [p for p in own.ignore if any(re.fullmatch(p, name) for name in state)]
  shapes = models.abstract_variables(model, tuple(config.data.stored_image))
  return models.from_torch(shapes, state, ignore=heads)


def extract(config: ConfigDict, sources: dict[str, data.Source]) -> dict[str, np.ndarray]:
  """Returns `{train,test}_features` and `_labels` of the sources, through the network of `config.model`."""
  model, mesh = network(config), training.mesh(config)
  parallel.check_batch_size(config.eval_batch_size, mesh, 'eval_batch_size')
  variables = jax.device_put(weights(config, model), parallel.replicated(mesh))
  features, arrays = jax.jit(feature_fn(config, model)), {}
  for split, source in sources.items():
    training.say(f'{config.model.name}: features of {len(source)} {split} images')
    arrays[f'{split}_features'], arrays[f'{split}_labels'] = map_batches(
      lambda batch: (features(variables, batch['image']), batch['label']),
      source,
      batch_size=config.eval_batch_size,
      mesh=mesh,
      **training.reading(config, split),
    )
  return arrays


def save(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes features in the form that `config.features` reads."""
  with path.open('wb') as file:
    np.savez(file, **arrays)


def _cut(
  name: str,
  shots: Sequence[int],
  orders: Sequence[np.ndarray],
  train: Sequence[np.ndarray],
  test: Sequence[np.ndarray],
  num_classes: int,
) -> Iterator[Task]:
  """Yields a task for each number of shots."""
  (features, labels), (test_features, test_labels) = (
    (_unit(x), np.asarray(y, np.int32)) for x, y in (train, test)
  )
  for k in shots:
    rows = np.stack(
      [(order[:, :k] if k else np.arange(len(labels))).reshape(-1) for order in orders]
    )
    title = f'{name}_{k}shot' if k else f'{name}_all'
    yield Task(title, features[rows], labels[rows], test_features, test_labels, num_classes)


def _unit(x: np.ndarray) -> np.ndarray:
  x = np.asarray(x, np.float32)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
