"""Results of few-shot episodes, kept in files from which an interrupted run goes on."""

import json
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from experiments import training
from experiments.episodes import BATCH_AXES
from jaxlab.training.checkpoints import config_difference

PyTree = Any


def run_tasks(
  config: ConfigDict, compiled: Callable[..., Any], tasks: PyTree, mesh: Mesh, file: Any, title: str
) -> dict[str, np.ndarray]:
  """Returns what `compiled` gives for all tasks; what `file` already holds of this run is not done again.

  It grows by `episodes.per_call` tasks at a time. One that cannot be read is written anew, after a warning.

  Raises:
    ValueError: if it holds episodes of another configuration.
  """
  settings = fingerprint(config)
  count = len(tasks['episode'])
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  chunk = -(-min(config.episodes.per_call, count) // parts) * parts
  done = read_done(file, settings)
  for first in range(len(done.get('cosine', ())), count, chunk):
    rows = np.minimum(np.arange(first, first + chunk), count - 1)  # the last call is filled up
    batch = {name: values[rows] for name, values in tasks.items()}
    out = compiled(jax.device_put(batch, NamedSharding(mesh, BATCH_AXES)))
    if jax.process_count() > 1:
      out = multihost_utils.process_allgather(out, tiled=True)
    new = {name: np.asarray(value)[: count - first] for name, value in out.items()}
    done = {name: np.concatenate([done[name], v]) if done else v for name, v in new.items()}
    if jax.process_index() == 0:
      partial = file.parent / f'{file.name}.partial'
      with partial.open('wb') as stream:
        np.savez(stream, settings=settings, **done)
      partial.replace(file)
    training.say(f'{title}: {min(first + chunk, count)} of {count} episodes')
  return done


def read_done(file: Any, settings: str) -> dict[str, np.ndarray]:
  """Returns the results that a file of `run_tasks` holds, nothing if there is no file that can be read."""
  if not file.exists():
    return {}
  try:
    with file.open('rb') as stream:
      held = dict(np.load(stream, allow_pickle=False))
    there = json.loads(held.pop('settings').item())
  except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
    warnings.warn(f'{file} cannot be read ({error}) and is written anew.', stacklevel=3)
    return {}
  if lines := config_difference(there, json.loads(settings)):
    raise ValueError(
      f'{file} holds episodes of another config:\n  '
      + '\n  '.join(lines)
      + '\nUse another workdir, or the config it was started with.'
    )
  return held


def fingerprint(config: ConfigDict) -> str:
  """Returns the entries that decide an episode's result, as text."""
  names = ('seed', 'network', 'finetune', 'episodes', 'members', 'base_limit', 'cosine_images')
  own = {name: value for name, value in json.loads(config.to_json()).items() if name in names}
  own['episodes'].pop('per_call')
  return json.dumps(own, sort_keys=True)
