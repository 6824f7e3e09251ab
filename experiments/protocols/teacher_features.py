"""What a network says of every record, computed in one pass and kept in a file.

A file belongs to one network, one data set and one way of reading it: it holds their fingerprints, and is
refused for any other.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils

from experiments.harness import data as harness_data
from experiments.harness.data import Images
from experiments.harness.networks import feature_path, feature_vector
from experiments.harness.runs import Variables, say
from experiments.harness.sections import Experiment
from experiments.harness.settings import identity
from experiments.harness.tasks import ImageTask
from jaxlab import data, models
from jaxlab.training import map_batches

Array = jax.Array
Arrays = dict[str, np.ndarray]

SAMPLED = 256  # records of a source on disk that its fingerprint looks at
# Fields of a module that its outputs do not depend on.
_NO_MATTER = ('parent', 'name', 'remat', 'scan')
_CHANGED = {
  'teacher': 'another network, or of other weights',
  'data': 'other images',
  'inputs': 'images that are read or augmented otherwise',
}


def features_and_logits(model: nn.Module, variables: Variables, x: Array) -> tuple[Array, Array]:
  """Returns penultimate features `[batch, dim]` and logits in evaluation mode, float32.

  Logits of a network without classifier are `[batch, 0]`.
  """
  if models.anatomy(model).head:
    path = feature_path(model)
    logits, found = models.capture(model, variables, [path], x)
    features = feature_vector(found[path])
  else:
    features = model.apply(variables, x, train=False)
    logits = jnp.zeros((len(x), 0))
  return features.astype(jnp.float32), logits.astype(jnp.float32)


def compute(
  config: Experiment,
  own: Images,
  task: ImageTask,
  model: nn.Module,
  variables: Variables,
  source: data.Source,
  key: Array | None = None,
  fields: Sequence[str] | None = None,
) -> Arrays:
  """Returns `features`, `logits` and `targets` of all records, one pass.

  Args:
    config: the experiment.
    own: how records are read.
    task: what the network is asked.
    model: the network.
    variables: its variables.
    source: the records.
    key: images are augmented as for training, by this key; None: they are read as in the test.
    fields: those of them that are returned; None: all, and where labels tell what is `known`, that.
  """

  @jax.jit
  def fn(variables: Variables, batch: dict[str, Array]) -> dict[str, Array]:
    if key is None:
      x = task.inputs(batch)
    else:
      x = task.augmented(data.example_keys(key, 0, batch['index']), batch)
    features, logits = features_and_logits(model, variables, x)
    told = {'known': batch['known']} if 'known' in batch else {}
    found = {'features': features, 'logits': logits, 'targets': task.targets(batch), **told}
    return found if fields is None else {name: found[name] for name in fields}

  return map_batches(
    lambda batch: fn(variables, batch),
    source,
    batch_size=config.eval_batch_size,
    mesh=config.mesh.make(),
    **harness_data.reading(own, 'test' if key is None else 'train'),
  )


def fingerprints(
  own: Images,
  task: ImageTask,
  model: nn.Module,
  variables: Variables,
  source: data.Source,
  key: Array | None = None,
) -> dict[str, str]:
  """Returns what features depend on, in short: of the network, of the records, of how they are read.

  Arguments as of `compute`. Of a source on disk the number of records, their labels where they are known
  without reading, and `SAMPLED` records are looked at; of one in memory everything.
  """
  reading = {name: getattr(own, name) for name in ('mean', 'std', 'test_decode', 'image_size')}
  if key is not None:
    reading |= {'augment': task.augment, 'train_decode': own.train_decode}
    reading['key'] = np.asarray(jax.random.key_data(key)).tolist()
  return {
    'teacher': network_fingerprint(model, variables),
    'data': source_fingerprint(source),
    'inputs': _digest(identity(reading)),
  }


def network_fingerprint(model: nn.Module, variables: Variables) -> str:
  """Returns a digest of a network's kind and fields, and of all its variables by name.

  Networks of other heads or epsilons are others, also of the same variables; `remat` and `scan` change
  nothing.
  """
  found = hashlib.sha1(_described(model).encode())
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    whole = isinstance(leaf, np.ndarray) or leaf.is_fully_addressable
    value = leaf if whole else multihost_utils.process_allgather(leaf, tiled=True)
    found.update(f'{jax.tree_util.keystr(path)} {leaf.shape}'.encode())
    found.update(np.ascontiguousarray(value).tobytes())
  return found.hexdigest()


def _described(value: Any) -> str:
  """Returns a field of a module as text that is the same in all processes: functions by their names."""
  if isinstance(value, nn.Module):
    names = [own.name for own in dataclasses.fields(value) if own.name not in _NO_MATTER]
    told = ', '.join(f'{name}={_described(getattr(value, name))}' for name in names)
    return f'{type(value).__name__}({told})'
  if isinstance(value, functools.partial):
    return _described([value.func, value.args, value.keywords])
  if isinstance(value, Mapping):
    return f'{{{", ".join(f"{key}: {_described(own)}" for key, own in sorted(value.items()))}}}'
  if isinstance(value, list | tuple):
    return f'[{", ".join(map(_described, value))}]'
  if callable(value):
    own = inspect.unwrap(value)  # functions of jax with a gradient of their own wrap one of a name
    if hasattr(own, '__qualname__'):
      return f'{own.__module__}.{own.__qualname__}'
  return re.sub(' at 0x[0-9a-f]+', '', repr(value))


def source_fingerprint(source: data.Source) -> str:
  """Returns a digest of a source's records, see `fingerprints`."""
  found = hashlib.sha1(str(len(source)).encode())
  if isinstance(source, data.InMemory):
    fields = source.arrays
  else:
    places = np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(np.int64))
    records = [source[int(place)] for place in places]
    fields = {name: [record[name] for record in records] for name in records[0]}
    if hasattr(source, 'labels'):
      fields['labels'] = source.labels
  for name in sorted(fields):
    found.update(name.encode())
    for value in fields[name] if isinstance(fields[name], list) else [fields[name]]:
      found.update(value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes())
  return found.hexdigest()


def _digest(value: Any) -> str:
  return hashlib.sha1(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cached(file: Any, marks: Mapping[str, str], make: Callable[[], Arrays]) -> Arrays:
  """Returns the arrays of a file, or makes them and writes it, at once or not at all.

  Args:
    file: an `epath` or `pathlib` path, `.npz`.
    marks: the `fingerprints` of what `make` returns.
    make: called where there is no such file, or none that can be read; its `features` are looked at.

  Raises:
    ValueError: for a file of another network or of other data, and for features that are of no use.
  """
  if (held := _read(file, marks)) is not None:
    say(f'{file}: features that were computed before')
    require_features(held['features'], f'{file}: features')
    return held
  arrays = make()
  require_features(arrays['features'])
  if jax.process_index() == 0:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.parent / f'{file.name}.{os.getpid()}.partial'
    with partial.open('wb') as stream:
      np.savez(stream, **arrays, fingerprints=np.array(json.dumps(dict(marks))))
    partial.replace(file)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('features are written')
  return arrays


def _read(file: Any, marks: Mapping[str, str]) -> Arrays | None:
  """Returns what a file holds without its fingerprints; None: there is none that can be read."""
  if not file.exists():
    return None
  try:
    with file.open('rb') as stream, np.load(stream, allow_pickle=False) as found:
      arrays = {name: found[name] for name in found.files}
    held = json.loads(str(arrays.pop('fingerprints')))
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    warnings.warn(f'{file} cannot be read ({error}) and is written anew.', stacklevel=3)
    return None
  if other := [text for name, text in _CHANGED.items() if held.get(name) != marks[name]]:
    raise ValueError(
      f'{file} holds features of {", and of ".join(other)}: remove it, or name another folder.'
    )
  return arrays


def require_features(features: np.ndarray, name: str = 'features of the teacher') -> None:
  """Raises ValueError unless features `[records, dim]` are finite and differ from record to record."""
  features = np.asarray(features)
  wrong = np.flatnonzero(~np.isfinite(features).all(1))
  if wrong.size:
    raise ValueError(
      f'{name}: {wrong.size} of {len(features)} records have values that are not finite, the first is '
      f'record {wrong[0]}.'
    )
  if not features.any():
    raise ValueError(f'{name} are all 0: nothing reaches the classifier.')
  if len(features) > 1 and np.all(features == features[0]):
    raise ValueError(f'{name} are the same for all {len(features)} records.')
  if zeros := int(np.sum(~features.any(1))):
    say(f'WARNING: {name}: {zeros} of {len(features)} records have none but zeros.')
