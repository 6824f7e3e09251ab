"""Where networks see objects, as drawn or trained: their features, and maps of them over a data set."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import networks
from experiments.harness.data import Images
from experiments.harness.runs import Call, Variables
from experiments.harness.sections import Experiment
from experiments.harness.settings import found_by
from jaxlab import data, models, parallel
from jaxlab.models.initializers import kaiming_normal_fan_out
from jaxlab.training import map_batches

Array = jax.Array
Reduce = Callable[[Array], Array]

Init = Literal[
  *('kaiming_normal', 'kaiming_uniform', 'kaiming_tanh', 'xavier_normal', 'xavier_uniform'),
  *('normal', 'uniform'),
]
_SCALED = nn.initializers.variance_scaling


def uniform_tenth(key: Array, shape: tuple[int, ...], dtype: Any = float, **_) -> Array:
  """Draws uniformly from (-0.1, 0.1)."""
  return jax.random.uniform(key, shape, dtype, -0.1, 0.1)


INITIALIZERS = {
  'kaiming_normal': kaiming_normal_fan_out,
  'kaiming_uniform': _SCALED(2.0, 'fan_out', 'uniform'),
  'kaiming_tanh': _SCALED(25 / 9, 'fan_out', 'normal'),
  'xavier_normal': _SCALED(1.0, 'fan_avg', 'normal'),
  'xavier_uniform': _SCALED(1.0, 'fan_avg', 'uniform'),
  'normal': nn.initializers.normal(0.1),
  'uniform': uniform_tenth,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomCNN:
  """A network that is not trained, unless it is given other variables.

  Attributes:
    model: name and fields of `jaxlab.models.create`; as drawn it is evaluated with the statistics that it
      begins with.
    features: path of the module whose output is the map.
    init: of its convolutions, see `INITIALIZERS`.
    size: side to which images are resized; None: their own.
  """

  model: Mapping[str, Any]
  features: str
  init: Init = 'kaiming_normal'
  size: int | None = None

  def make(self) -> nn.Module:
    """Returns the network."""
    return networks.create(self.model, num_classes=None, conv_init=INITIALIZERS[self.init])

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from found_by('model', self.make)
    if self.size is not None and self.size < 1:
      yield f'size={self.size}: expected a positive number of pixels.'


def forward(own: RandomCNN, images: Images) -> Callable[[Variables, Array], Array]:
  """Returns `(variables, images of records) -> features`, `[batch, rows, columns, channels]`."""
  model, size = own.make(), _size(own, images)

  def features(variables: Variables, image: Array) -> Array:
    x = data.normalize(data.to_float(image), images.mean, images.std)
    if x.shape[1:3] != size:
      x = jax.image.resize(x, (len(x), *size, x.shape[-1]), 'bilinear')
    found = models.capture(model, variables, [own.features], x, train=False)[1]
    (only,) = found.values()
    if only.ndim != 4:
      raise ValueError(f'features={own.features!r}: shape {only.shape} is no map of features.')
    return only

  return features


def mapper(
  config: Experiment, own: RandomCNN, images: Images, reduce: Reduce
) -> Callable[[Array | Variables, data.Source, str], Any]:
  """Returns `(begin, records, split) -> maps`: what `reduce` makes of the features, of all records on host.

  `begin` is a key, which draws the network, or the network's variables; all calls share their compilations.

  Args:
    config: the experiment.
    own: the network.
    images: the section of the data.
    reduce: `features -> map`.

  `maps` raises ValueError for features that are NaN.
  """
  start, function = jax.jit(_init(own, images)), jax.jit(_reduced(own, images, reduce))

  def maps(begin: Array | Variables, source: data.Source, split: str) -> Any:
    variables = begin if isinstance(begin, Mapping) else start(begin)
    found = map_batches(
      lambda batch: function(variables, batch['image']),
      source,
      batch_size=config.eval_batch_size,
      mesh=config.mesh.make(),
      **harness_data.reading(images, split),
    )
    if any(np.isnan(leaf).any() for leaf in jax.tree.leaves(found)):
      raise ValueError(
        f'Features of the {split} images are NaN: are images and variables free of NaN?'
      )
    return found

  return maps


def program(config: Experiment, own: RandomCNN, images: Images, reduce: Reduce) -> Call:
  """Returns the computation of `mapper`'s maps."""

  def make(mesh: jax.sharding.Mesh) -> tuple[Callable[..., Array], tuple[Any, ...]]:
    batch = jax.ShapeDtypeStruct(
      (config.eval_batch_size, *images.stored_image),
      jnp.dtype(images.dtype),
      sharding=parallel.batch_sharding(mesh),
    )
    variables = jax.eval_shape(_init(own, images), jax.random.key(0))
    return _reduced(own, images, reduce), (variables, batch)

  return Call(make)


def check(own: RandomCNN, images: Images, reduce: Reduce, name: str) -> Iterator[str]:
  """Yields what is wrong with a network, its features, or what is made of them."""

  def trace() -> None:
    variables = jax.eval_shape(_init(own, images), jax.random.key(0))
    image = jax.ShapeDtypeStruct((2, *images.stored_image), jnp.dtype(images.dtype))
    jax.eval_shape(_reduced(own, images, reduce), variables, image)

  yield from found_by(name, trace)


def _init(own: RandomCNN, images: Images) -> Callable[[Array], Variables]:
  blank = jnp.zeros((1, *_size(own, images), images.stored_image[2]))
  return lambda key: dict(own.make().init(key, blank))


def _reduced(own: RandomCNN, images: Images, reduce: Reduce) -> Callable[[Variables, Array], Array]:
  features = forward(own, images)
  return lambda variables, image: reduce(features(variables, image))


def _size(own: RandomCNN, images: Images) -> tuple[int, int]:
  return images.stored_image[:2] if own.size is None else (own.size, own.size)
