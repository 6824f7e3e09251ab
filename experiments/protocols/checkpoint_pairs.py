"""A network and what it was tuned to, weight by weight: where they differ, and what is made of both.

Checkpoints on disk are read and written tensor by tensor: memory is that of a few tensors.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.harness import pictures, results
from experiments.harness.runs import say
from experiments.harness.sections import Experiment
from experiments.harness.settings import free
from jaxlab import models
from jaxlab.models import LazyStateDict, ParameterChange

# Of a row's module type: mean over blocks of the norm of its change, its share of the square of all types'
# changes (%), and the blocks (%) whose relative changes have two modes.
METRICS = ('delta', 'delta_share', 'bimodal')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of the comparison of two networks A and B.

  Attributes:
    base: checkpoint of A, a safetensors file or a folder of them; empty: A is no checkpoint. Likewise
    tuned: of B.
    untie: give a checkpoint whose embedding is the head a head of its own.
    merges: groups of module types of B that A is given.
    base_share: A's share in merged weights.
    bins: of the distributions of relative changes; 0: none.
    max_shard_bytes: of a file of a merged checkpoint.
  """

  base: str = ''
  tuned: str = ''
  untie: bool = False
  merges: tuple[tuple[str, ...], ...] = ()
  base_share: float = 0.0
  bins: int = 200
  max_shard_bytes: float = free(5e9)

  @property
  def needs(self) -> str:
    """What checkpoints it needs, in a sentence."""
    if not self.base:
      return ''
    return f'{self.base} and {self.tuned}: safetensors of one architecture, each a file or a folder'

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    if not 0 <= self.base_share <= 1:
      yield f'base_share={self.base_share}: expected a share in [0, 1].'
    if not self.max_shard_bytes > 0:
      yield f'max_shard_bytes={self.max_shard_bytes}: expected a positive number.'
    if self.bins != 0 and self.bins < 9:
      yield f'bins={self.bins}: expected at least 9, or 0 for none.'
    if not all(self.merges):
      yield 'merges: expected groups of module types, got an empty one.'
    folders = [folder_name(types) for types in self.merges]
    if len(set(folders)) < len(folders):
      yield f'merges: expected groups of different names, got {", ".join(folders)}.'


def folder_name(types: Sequence[str]) -> str:
  """Returns the folder of what is merged.

  >>> folder_name(['o_proj', '.*norm']), folder_name(['.*'])
  ('o_proj_norm', 'all')
  """
  return '_'.join(filter(None, (re.sub(r'\W', '', name) for name in types))) or 'all'


def title(types: Sequence[str]) -> str:
  """Returns the name of the row of A with these types of B."""
  return f'merge {", ".join(types)}'


def compare(
  config: Settings,
  workdir: Any,
  further: Callable[[str, LazyStateDict], Mapping[str, float]] = lambda name, state_dict: {},
) -> list[dict[str, Any]]:
  """Returns the rows of two checkpoints and of what they are merged to, and writes that.

  `distances.json` ranks all parameters by the norm of their change; a merged checkpoint is
  `merged/<types>`.

  Args:
    config: the experiment.
    workdir: where all is written.
    further: `(name, checkpoint) -> metrics` of 'A', 'B' and the folders of what is merged.
  """
  base, tuned = opened(config.base, config.tuned, config.untie)
  for types in config.merges:  # all are looked at before anything is read
    models.select_parameters(base.shapes, types)
  changes = list(models.parameter_changes(base, tuned, bins=config.bins or None))
  ranked = sorted(((own.path, own.norm) for own in changes), key=lambda own: -own[1])
  results.save_json(workdir / 'distances.json', dict(ranked))
  draw(config, changes, workdir)
  found = rows(delta(changes))
  for name, own in (('A', base), ('B', tuned)):
    if metrics := further(name, own):
      found.append(results.row(name, 'reference', metrics))
  for types in config.merges:
    folder = workdir / 'merged' / folder_name(types)
    share = merge(
      base, tuned, types, config.base_share, os.fspath(folder), config.base, config.max_shard_bytes
    )
    metrics = {'merged': share, **further(folder.name, models.open_state_dict(folder))}
    found.append(results.row(title(types), 'reference', metrics))
  return found


def opened(base: str, tuned: str, untie: bool = False) -> tuple[LazyStateDict, LazyStateDict]:
  """Returns two checkpoints, of which nothing is read yet.

  Args:
    base: a safetensors file, or a folder of them.
    tuned: likewise.
    untie: give a checkpoint without a head its own, the embedding.

  Raises:
    ValueError: for files that are not whole; for other names or shapes, naming the first.
    FileNotFoundError: if there is no such file or folder.
  """
  both = [models.open_state_dict(path) for path in (base, tuned)]
  if untie:
    both = [models.untied(own) for own in both]
  heads = [any('lm_head' in name for name in own) for own in both]
  if heads[0] != heads[1]:
    without = base if heads[1] else tuned
    raise ValueError(
      f'{without}: its embedding is the head, too, and the other checkpoint has a head of its own: give both '
      'one, --config.untie=true.'
    )
  return both[0], both[1]


def short_names(paths: Iterable[str]) -> dict[str, str]:
  """Returns the last name of each module type's path, or the path where others end with that name, too.

  >>> short_names(['attn/c_attn', 'attn/c_proj', 'mlp/c_proj'])
  {'attn/c_attn': 'c_attn', 'attn/c_proj': 'attn/c_proj', 'mlp/c_proj': 'mlp/c_proj'}
  """
  last = {path: path.rpartition('/')[2] for path in paths}
  counts = collections.Counter(last.values())
  return {path: own if counts[own] == 1 else path for path, own in last.items()}


def delta(changes: Iterable[ParameterChange]) -> dict[str, dict[str, float]]:
  """Returns `METRICS` of each module type, by its short name."""
  found = models.changes_by_module(changes)
  short = short_names(found)
  total = sum(own.norm**2 for blocks in found.values() for own in blocks.values())
  rows = {}
  for name, blocks in found.items():
    norms = np.array([own.norm for own in blocks.values()])
    modes = [models.is_bimodal(own.histogram.counts) for own in blocks.values() if own.histogram]
    rows[short[name]] = {
      'delta': float(norms.mean()),
      'delta_share': 100 * float(np.sum(norms**2)) / total if total else 0.0,
      **({'bimodal': 100 * float(np.mean(modes))} if modes else {}),
    }
  return rows


def merge(
  base: LazyStateDict,
  tuned: LazyStateDict,
  types: Sequence[str],
  base_share: float,
  folder: str,
  beside: str,
  max_shard_bytes: float = 5e9,
) -> float:
  """Writes `base` with the chosen types of `tuned` as a checkpoint; returns the share of these weights in %.

  Args:
    base: a checkpoint.
    tuned: another of the same architecture.
    types: module types, patterns as in `models.select_parameters`.
    base_share: of the chosen weights, see `models.merge_parameters`.
    folder: that is made, at once or not at all.
    beside: path of `base`, whose configuration and tokenizer are copied.
    max_shard_bytes: of a file.
  """
  mask = models.select_parameters(base.shapes, types)
  merged = models.merge_parameters(base, tuned, mask, base_share)
  beside = beside if os.path.isdir(beside) else None
  models.save_state_dict(
    folder, merged, max_shard_bytes=max_shard_bytes, beside=beside, overwrite=True
  )
  sizes = {name: int(np.prod(own.shape)) for name, own in base.shapes.items()}
  share = 100 * sum(size for name, size in sizes.items() if mask[name]) / sum(sizes.values())
  say(f'{folder}: {share:.3g} % of the weights are of the tuned network')
  return share


def draw(config: Experiment, changes: Sequence[ParameterChange], folder: Any) -> None:
  """Draws norms by block and module type, and the distributions of relative changes."""
  found = models.changes_by_module(changes)
  draw_norms(config, found, folder / 'delta.png')
  if any(own.histogram for blocks in found.values() for own in blocks.values()):
    draw_distributions(config, found, folder / 'relative_changes.png')


Found = Mapping[str, Mapping[int, ParameterChange]]


def draw_norms(config: Experiment, found: Found, path: Any) -> None:
  """Draws norms of changes as a heat map of block and module type, and over the blocks."""
  names = list(short_names(found).values())
  blocks = sorted({index for own in found.values() for index in own})
  norms = np.full((len(blocks), len(found)), np.nan)
  for column, own in enumerate(found.values()):
    for index, change in own.items():
      norms[blocks.index(index), column] = change.norm
  with pictures.drawn(path, 1, 2, size=(10, 4)) as axes:
    image = axes[0].imshow(norms, aspect='auto', cmap='viridis', vmin=0)
    axes[0].set_xticks(range(len(names)), names, rotation=40, ha='right', fontsize=8)
    step = max(1, len(blocks) // 8)
    axes[0].set_yticks(range(0, len(blocks), step), blocks[::step])
    axes[0].set(ylabel='block', title='norm of the change')
    axes[0].figure.colorbar(image, ax=axes[0])
    for column, name in enumerate(names):
      axes[1].plot(blocks, norms[:, column], marker='.', label=name)
    axes[1].set(xlabel='block', ylabel='norm of the change', ylim=(0, None))
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    axes[1].legend(frameon=False, fontsize=8)
    axes[0].figure.suptitle(pictures.title(config))


def draw_distributions(config: Experiment, found: Found, path: Any) -> None:
  """Draws relative changes as histograms, a panel a module type and a line every fifth block."""
  depth = max(len(own) for own in found.values())
  every = 5 if depth > 8 else 1
  columns, short = -(-len(found) // 2), short_names(found)
  size = (3 * columns, 5)
  with pictures.drawn(path, 2, columns, size=size, squeeze=False, sharex=True, sharey=True) as axes:
    for axis, (name, own) in zip(axes.flat, found.items()):
      for index in sorted(own)[::every]:
        shape = own[index].histogram
        middles = (shape.edges[1:] + shape.edges[:-1]) / 2
        axis.plot(middles, shape.normalized, label=f'block {index}', linewidth=0.8)
      axis.set_title(short[name], fontsize=9)
    for axis in axes.flat[len(found) :]:
      axis.set_visible(False)
    for axis in axes[-1]:
      axis.set_xlabel('relative change', fontsize=8)
    axes[0, 0].legend(frameon=False, fontsize=6)
    axes[0, 0].figure.suptitle(pictures.title(config))


def rows(found: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
  """Returns a row of the results for each module type."""
  return [results.row(name, 'reference', own) for name, own in found.items()]
