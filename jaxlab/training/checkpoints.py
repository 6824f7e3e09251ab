"""Checkpoints: state, position in the data and config of a run, written so that nothing is ever lost.

`<workdir>/checkpoints/<step>/` is written by Orbax in the background and appears by an atomic rename: a
process killed at any moment leaves the earlier checkpoints whole. Each array is saved with a checksum, so
a file that was truncated, lost or changed on disk is noticed when it is read.
"""

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from jaxlab.parallel import is_primary, tree_paths

PyTree = Any
CONFIG = 'config.json'
FOLDER = 'checkpoints'
FORMAT = 2  # of what a checkpoint holds; one of another number is refused


class Checkpoints:
  """The checkpoints of one run: the last `keep`, and the best by a metric."""

  def __init__(
    self,
    workdir: epath.PathLike,
    *,
    config: Mapping[str, Any] | None = None,
    frozen: PyTree = None,
    keep: int = 2,
    best_metric: str | None = None,
    best_mode: str = 'max',
  ):
    """Opens or makes `<workdir>/checkpoints`.

    Args:
      workdir: the run's directory; local, or a bucket's (`gs://...`).
      config: the run's settings, JSON-able; kept as `<workdir>/config.json` and in each checkpoint.
      frozen: arrays that the run reads and does not change; a checkpoint holds their checksums.
      keep: how many of the newest to keep; more than one, so that there is one to fall back to.
      best_metric: name among the metrics given to `save`: the best by it is kept as well.
      best_mode: whether more (`max`) or less (`min`) of it is better.

    Raises:
      ValueError: if the directory holds a run of another config (with the differences), or cannot be
        written.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

    if best_mode not in ('max', 'min'):
      raise ValueError(f'best_mode={best_mode!r}, expected "max" or "min".')
    if keep < 1:
      raise ValueError(f'keep={keep}: at least one checkpoint must be kept.')
    self.workdir = epath.Path(workdir if '://' in str(workdir) else os.path.abspath(workdir))
    self._config = None if config is None else _plain(config)
    self._frozen = checksums(frozen)
    self._claim_workdir()
    self._best_mode = best_mode
    worst = -math.inf if best_mode == 'max' else math.inf
    self._score = lambda metrics: _number((metrics or {}).get(best_metric), worst)
    best = BestN(get_metric_fn=self._score, reverse=best_mode == 'min', n=1)
    policies = [LatestN(keep), *([best] if best_metric else [])]
    self._manager = ocp.CheckpointManager(
      self.workdir / FOLDER,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
        best_fn=self._score,
        best_mode=best_mode,
      ),
      item_names=('state', 'run'),
    )

  @property
  def steps(self) -> list[int]:
    """The steps of which there is a checkpoint, in order."""
    return sorted(self._manager.all_steps())

  @property
  def best_step(self) -> int | None:
    """The step of the best checkpoint, None if there is none."""
    scores = {step: self._score(self._manager.metrics(step)) for step in self.steps}
    scores = {step: score for step, score in scores.items() if math.isfinite(score)}
    pick = max if self._best_mode == 'max' else min
    return pick(scores, key=scores.get) if scores else None

  def scores(self, step: int) -> dict[str, float]:
    """The evaluation's metrics that were saved with a step; empty if there are none."""
    return dict(self._manager.metrics(step) or {})

  def save(
    self, step: int, state: PyTree, position: Any, metrics: Mapping[str, float] | None = None
  ) -> None:
    """Starts to write a checkpoint. Waits for the step to finish, not for the disk.

    Args:
      step: the number of finished steps; if it was saved already, nothing is done but to add `metrics` where
        there were none.
      state: the train state, whose `params` and `model_state` must be finite.
      position: the data iterator's state, JSON-able and the same in all processes.
      metrics: the evaluation's, if there was one at this step.

    Raises:
      FloatingPointError: if a parameter or a statistic of the model is not finite; nothing is written.
    """
    import orbax.checkpoint as ocp

    if step in self._manager.all_steps():
      self.wait()
      if not metrics or self.scores(step):
        return
      self._manager.delete(step)
    if problem := not_finite(state):
      raise FloatingPointError(f'{problem} after step {step}. {self.last_good()}')
    run = {'position': position, 'config': self._config, 'format': FORMAT}
    run |= {'checksums': checksums(state), 'frozen': self._frozen}
    self._manager.save(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run)),
      metrics={name: float(x) for name, x in (metrics or {}).items()},
      force=True,
    )

  def restore(self, state: PyTree, step: int | None = None) -> tuple[int, PyTree, Any] | None:
    """Reads the newest checkpoint that is whole, onto whatever mesh `state` asks for.

    Damaged ones are reported by a warning and moved to `<workdir>/damaged`.

    Args:
      state: `jax.ShapeDtypeStruct`s with shardings, e.g. `ShardedProgram.state`.
      step: which one; the newest if None.

    Returns:
      `(step, state, position)`, or None if there is no checkpoint.

    Raises:
      ValueError: if the checkpoint is of another architecture (all differing arrays are listed), of another
        config, of other frozen arrays or of another version's format, or if all checkpoints are damaged.
    """
    steps = self.steps if step is None else [step]
    damage: dict[int, str] = {}
    for candidate in reversed(steps):
      found, reason = self._read(candidate, state)
      if _all_processes(found is not None):
        self._set_aside(damage, candidate)
        return candidate, *found
      damage[candidate] = reason or 'another process could not read it'
    if damage:
      report = '; '.join(f'{self._path(step)}: {reason}' for step, reason in damage.items())
      raise ValueError(
        f'No checkpoint can be read: {report}. To start anew, use another workdir or remove this one.'
      )
    return None

  def wait(self) -> None:
    """Waits until the checkpoints that were started are on disk; raises what went wrong there."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and releases Orbax's threads."""
    self._manager.close()

  def last_good(self) -> str:
    """Returns a sentence that names the newest checkpoint."""
    self.wait()
    if not self.steps:
      return f'No checkpoint was written to {self.workdir} yet.'
    return f'The last good checkpoint is {self._path(self.steps[-1])}.'

  def _path(self, step: int) -> epath.Path:
    return self.workdir / FOLDER / str(step)

  def _claim_workdir(self) -> None:
    """Makes the directory, checks that it can be written, and compares or leaves the config."""
    path = self.workdir / CONFIG
    try:
      if is_primary():
        self.workdir.mkdir(parents=True, exist_ok=True)
        (self.workdir / '.writable').write_text('')
        (self.workdir / '.writable').unlink()
      saved = json.loads(path.read_text()) if path.exists() else None
    except OSError as error:
      raise ValueError(f'workdir={str(self.workdir)!r} cannot be written: {error}.') from error
    except json.JSONDecodeError:
      warnings.warn(f'{path} is damaged and is written anew.', stacklevel=3)
      saved = None
    self._check_config(saved)
    if saved is None and self._config is not None and is_primary():
      (self.workdir / f'{CONFIG}.new').write_text(json.dumps(self._config, indent=2))
      (self.workdir / f'{CONFIG}.new').replace(path)

  def _check_config(self, saved: Any) -> None:
    if saved is None or self._config is None or saved == self._config:
      return
    raise ValueError(
      f'workdir={str(self.workdir)!r} holds a run of another config:\n'
      + '\n'.join(f'  {line}' for line in config_difference(saved, self._config))
      + '\nUse another workdir, or the config it was started with.'
    )

  def _read(self, step: int, state: PyTree) -> tuple[tuple[PyTree, Any] | None, str]:
    """Returns `((state, position), '')`, or None and why the checkpoint is damaged."""
    import orbax.checkpoint as ocp

    try:
      run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
    except Exception as error:
      return None, _one_line(error)
    if run.get('format') != FORMAT:
      raise ValueError(
        f'{self._path(step)} has format {run.get("format", 1)} of checkpoints, this version reads '
        f'{FORMAT}: start anew in another workdir, or go on with the version that wrote it.'
      )
    try:
      item = ocp.StandardCheckpointHandler().metadata(self._path(step) / 'state').tree
      saved = {path: tuple(leaf.shape) for path, leaf in tree_paths(item) if leaf is not None}
      if len(saved) != len(run['checksums']):
        return None, f'it names {len(saved)} of {len(run["checksums"])} arrays'
    except Exception as error:
      return None, _one_line(error)
    self._check_config(run['config'])
    if run['frozen'] != self._frozen:
      raise ValueError(
        f'{self._path(step)}: the run was started with other frozen arrays (a teacher, a backbone) '
        'than those given now. Use another workdir, or the arrays it was started with.'
      )
    wanted = {path: tuple(leaf.shape) for path, leaf in tree_paths(state)}
    if wanted != saved:
      lines = [f'  {line}' for line in _tree_difference(saved, wanted)]
      raise ValueError(
        f'{self._path(step)} is a checkpoint of another architecture:\n' + '\n'.join(lines)
      )
    try:
      restored = self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state))
      ).state
    except Exception as error:
      return None, _one_line(error)
    pairs = zip(wanted, checksums(restored), run['checksums'], strict=True)
    if wrong := [path for path, found, written in pairs if found != written]:
      return None, f'checksums of {len(wrong)} array(s) differ: {", ".join(wrong[:3])}'
    return (restored, run['position']), ''

  def _set_aside(self, damage: Mapping[int, str], used: int) -> None:
    """Moves damaged checkpoints out of the way of those that the run will write again."""
    for step, reason in damage.items():
      warnings.warn(
        f'Checkpoint {self._path(step)} is damaged ({reason}); going on from {self._path(used)}.',
        stacklevel=4,
      )
      if is_primary():
        folder = self.workdir / 'damaged'
        folder.mkdir(exist_ok=True)
        names = (f'{step}-{number}' if number else str(step) for number in range(1000))
        self._path(step).rename(next(folder / n for n in names if not (folder / n).exists()))
    if damage:
      if jax.process_count() > 1:
        multihost_utils.sync_global_devices('damaged checkpoints set aside')
      self._manager.reload()


def config_difference(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
  """Returns a line for each setting that differs.

  >>> config_difference({'optimizer': {'lr': 0.1}}, {'optimizer': {'lr': 0.2, 'nesterov': True}})
  ['optimizer.lr: 0.1 there, 0.2 given', 'optimizer.nesterov: absent there, True given']
  """
  there, given = _flat(saved), _flat(given)
  return [
    f'{name}: {there.get(name, "absent")!s} there, {given.get(name, "absent")!s} given'
    for name in sorted({*there, *given})
    if (name in there, there.get(name)) != (name in given, given.get(name))
  ]


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  if not isinstance(tree, Mapping) or not tree:
    return {prefix: tree}
  return {
    name: value
    for key, child in tree.items()
    for name, value in _flat(child, f'{prefix}.{key}' if prefix else str(key)).items()
  }


def _plain(config: Mapping[str, Any]) -> Any:
  """Returns the config as it comes back from JSON: tuples as lists, keys as strings."""
  to_dict = getattr(config, 'to_dict', None)
  return json.loads(json.dumps(to_dict() if to_dict else dict(config), default=str))


def _tree_difference(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
  def shape(tree, path):
    return list(tree[path]) if path in tree else 'absent'

  return [
    f'{path}: {shape(saved, path)} in the checkpoint, {shape(wanted, path)} in the program'
    for path in sorted({*saved, *wanted})
    if saved.get(path) != wanted.get(path)
  ]


def checksums(tree: PyTree) -> list[int]:
  """Returns a checksum of every array of a pytree, in the tree's order.

  The sum of the array's bits in words of at most 32 bits, modulo 2**32: exact, so that it does not
  depend on the mesh, and changed by any single wrong word. Each process reads the shards that it holds
  the first copy of.
  """
  tree = jax.tree.map(jnp.asarray, tree)
  jax.tree.map(lambda leaf: leaf.copy_to_host_async(), tree)

  def checksum(leaf: jax.Array) -> int:
    words = f'u{min(leaf.dtype.itemsize, 4)}'
    flat = (np.ascontiguousarray(shard).reshape(-1).view(words) for shard in _shards(leaf))
    return sum(int(part.sum(dtype=np.uint64)) for part in flat) % 2**32

  found = np.array([checksum(leaf) for leaf in jax.tree.leaves(tree)], np.uint32)
  if jax.process_count() > 1:
    found = multihost_utils.process_allgather(found).sum(axis=0, dtype=np.uint32)
  return found.tolist()


def not_finite(state: PyTree) -> str:
  """Returns what of a train state's `params` and `model_state` is not finite, in words; '' if nothing is."""
  parts = {
    'A parameter': state.params,
    'A statistic of the model (`model_state`)': state.model_state,
  }
  for what, tree in parts.items():
    floating = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not _all_processes(all(np.isfinite(s).all() for leaf in floating for s in _shards(leaf))):
      return f'{what} is not finite'
  return ''


def _shards(leaf: jax.Array) -> Iterator[np.ndarray]:
  return (np.asarray(s.data) for s in leaf.addressable_shards if s.replica_id == 0)


def _all_processes(success: bool) -> bool:
  """Returns whether all processes succeeded: they must agree on the checkpoint."""
  if jax.process_count() == 1:
    return success
  return bool(np.all(multihost_utils.process_allgather(np.asarray(success))))


def _number(value: float | None, otherwise: float) -> float:
  return value if value is not None and math.isfinite(value) else otherwise


def _one_line(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
