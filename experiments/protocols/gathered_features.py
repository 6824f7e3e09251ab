"""What a cloud does for devices that adapt its frozen network: gathers features of their images, in files."""

import functools
import json
import pathlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness.data import Images
from experiments.harness.runs import Variables, say
from experiments.harness.sections import Experiment
from experiments.harness.settings import identity
from experiments.harness.tasks import ImageTask
from experiments.protocols.teacher_features import network_fingerprint, source_fingerprint
from jaxlab import adapters, data, models, parallel
from jaxlab.data import FeatureFile, FeatureHeader

Array = jax.Array

Suffix = Literal['.npz', '.array_record']


class Gather(NamedTuple):
  """What is sent of a network.

  Attributes:
    layers: whose tokens are summed; None: all.
    dtype: of what is sent.
  """

  layers: tuple[int, ...] | None = None
  dtype: Literal['float32', 'float16'] = 'float32'

  @property
  def layer_names(self) -> str:
    """The layers, as a name for a folder."""
    return 'all' if self.layers is None else '_'.join(map(str, self.layers))

  @property
  def name(self) -> str:
    """A name for a folder of this type alone."""
    return f'{self.layer_names}_{self.dtype}'

  def gathered(self, model: nn.Module, variables: Variables, x: Array) -> Array:
    """Returns the features of images, `[batch, tokens, width]`."""
    return adapters.gather_sum(
      adapters.collect_features(model, variables, x), self.layers, dtype=self.dtype
    )


class Reading(NamedTuple):
  """How images become features.

  Attributes:
    own: the images' section.
    task: says what the network sees of them.
    views: of each image, augmented as for training; 0: one, read as in the test.
    seed: of the views.
  """

  own: Images
  task: ImageTask
  views: int = 0
  seed: int = 0

  @property
  def mark(self) -> str:
    """What the reading depends on, as text."""
    read = {name: getattr(self.own, name) for name in ('mean', 'std', 'test_decode', 'image_size')}
    if self.views:
      read |= {'views': self.views, 'seed': self.seed, 'train_decode': self.own.train_decode}
      read['augment'] = self.task.augment
    return json.dumps(identity(read), sort_keys=True)


def header(
  gather: Gather,
  reading: Reading,
  model: nn.Module,
  variables: Variables,
  source: data.Source,
) -> FeatureHeader:
  """Returns the header of what a network makes of some images; nothing is computed."""
  view = jax.ShapeDtypeStruct((1, *reading.task.view), np.float32)
  shape = jax.eval_shape(functools.partial(gather.gathered, model), variables, view).shape[1:]
  depth = len(models.anatomy(model).blocks)
  chosen = range(depth + 1) if gather.layers is None else gather.layers
  return FeatureHeader(
    network=network_fingerprint(model, variables),
    data=f'{source_fingerprint(source)} {reading.mark}',
    layers='+'.join(map(str, chosen)),
    shape=shape,
    dtype=gather.dtype,
    count=len(source) * max(reading.views, 1),
    num_classes=reading.own.num_classes,
    num_prefix_tokens=model.num_prefix_tokens,
    views=max(reading.views, 1),
  )


def feature_file(
  config: Experiment,
  path: pathlib.Path,
  gather: Gather,
  reading: Reading,
  model: nn.Module,
  variables: Variables,
  source: data.Source,
) -> FeatureFile:
  """Returns the file of what a network makes of some images; it is written if it is not there.

  It may hold a wider type than is asked for (`FeatureFile.astype`); of a narrower one it is written anew.
  Batch by batch: an `.array_record` is never in memory as a whole.

  Raises:
    ValueError: for a file of another network or other images, features that are not finite, and several
      processes.
  """
  if jax.process_count() > 1:
    raise ValueError('Features are gathered by one process; there are several.')
  own = header(gather, reading, model, variables, source)
  expected = {name: getattr(own, name) for name in ('network', 'data', 'layers', 'views')}
  held = FeatureFile(path, expected) if path.exists() else None
  if held is not None and held.header.record_bytes >= own.record_bytes:
    return held
  say(f'{path.name}: features of {own.count} images, {own.record_bytes} bytes each')
  batches = computed(config, gather, reading, model, variables, source)
  data.write_feature_file(path, batches, own)
  return FeatureFile(path, expected)


def computed(
  config: Experiment,
  gather: Gather,
  reading: Reading,
  model: nn.Module,
  variables: Variables,
  source: data.Source,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields features and labels of all images in order, view by view."""
  task, size = reading.task, config.eval_batch_size
  sharding = parallel.batch_sharding(config.mesh.make())

  @jax.jit
  def of_test(variables: Variables, batch: Any) -> Array:
    return gather.gathered(model, variables, task.inputs(batch))

  @jax.jit
  def of_view(variables: Variables, batch: Any, key: Array) -> Array:
    x = task.augmented(data.example_keys(key, 0, batch['index']), batch)
    return gather.gathered(model, variables, x)

  split = 'train' if reading.views else 'test'
  for view in range(max(reading.views, 1)):
    key, left = jax.random.fold_in(jax.random.key(reading.seed), view), len(source)
    for batch in data.epoch_batches(source, size, **harness_data.reading(reading.own, split)):
      placed = data.to_device(batch, sharding)
      found = of_view(variables, placed, key) if reading.views else of_test(variables, placed)
      count = min(left, size)
      yield np.asarray(found)[:count], np.asarray(batch['label'])[:count]
      left -= count


def serve(server: socket.socket, files: Sequence[FeatureFile]) -> int:
  """Sends files to one device that connects to `data.listening`'s socket; returns the bytes on the wire."""
  place, own = server.getsockname()[:2]
  say(f'waiting for a device: python -m experiments edge --cloud={place}:{own} --workdir=DIR')
  sent = data.send_features(server, {file.path.stem: file for file in files}, timeout=600.0)
  say(f'sent {sent} bytes')
  return sent
