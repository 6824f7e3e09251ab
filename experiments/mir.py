"""MiR: Compressing Models with Few Samples: Mimicking then Replacing (Wang et al., CVPR 2022).

A network is pruned, and 50 to 1000 images are all there is to repair it with. Earlier methods repair it
layer by layer. This one trains the whole pruned backbone at once to hand on what the original one does,
just before its features are pooled, without labels and without a head ("mimicking"); the original head,
untouched, goes on top of it ("replacing"). Claim: far above fine-tuning on the labels, and above mimicking
pooled features.

  python -m experiments.mir
  python -m experiments.mir --config.origin=noise --config.runs=mir_post_pool,mir   # no image at all
  python -m experiments.mir --config=imagenet_resnet34 --workdir=DIR
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
from flax import linen as nn

from experiments.harness import launcher, pictures, results
from experiments.harness.runs import Run, Variables, say
from experiments.harness.settings import found_by
from experiments.harness.supervised import Seen, cross_entropy
from experiments.protocols import few_shot_compression
from experiments.protocols.few_shot_compression import mimicking
from jaxlab import compression, losses
from jaxlab.compression import Plan

Array = jax.Array

TITLES = {
  'bp': 'labels (BP)',
  'kd': 'distilled logits',
  'mir_post_pool': 'MiR, pooled features',
  'mir': 'MiR',
}
METHODS = ('mir', 'mir_post_pool')
WHOLE, PRUNED = 'whole', 'pruned'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(few_shot_compression.Settings):
  """Settings of MiR.

  Attributes:
    ratio: share of the filters within residual blocks that is removed.
    all_convs: see `compression.filter_plan`.
    drop: blocks that are left out as a whole, besides.
    runs: rows among 'bp' (cross-entropy on labels), 'kd' (on the original's logits), 'mir_post_pool' and
      'mir'.
    label_rate: learning rate of 'bp'.
    temperature: of 'kd'.
  """

  ratio: float = 0.5
  all_convs: bool = False
  drop: tuple[str, ...] = ()
  runs: tuple[Literal['bp', 'kd', 'mir_post_pool', 'mir'], ...] = tuple(TITLES)
  label_rate: float = 1e-4
  temperature: float = 4.0

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    for name in ('label_rate', 'temperature'):
      if not getattr(self, name) > 0:
        yield f'{name}={getattr(self, name)}: expected a positive number.'
    if self.ratio == 0 and not self.drop:
      yield 'ratio=0.0: expected a share above 0, or blocks in drop: nothing would be removed.'
    if not self.runs:
      yield f'runs is empty; runs: {", ".join(TITLES)}.'
    if 'bp' in self.runs and not self.labeled:
      yield f"runs: 'bp' learns labels, which images of origin={self.origin!r} do not have."


def pruning(config: Settings, variables: Variables | None = None) -> Plan:
  """Returns what stays of the network; without variables a plan of the same shapes."""
  model = few_shot_compression.whole_network(config)
  kept = [path for path in compression.structure(model).parts if path not in config.drop]
  filters = compression.filter_plan(
    model, variables, config.ratio, blocks=kept, all_convs=config.all_convs
  )
  return compression.plan(model, filters.keep, config.drop)


def distilled(temperature: float) -> Any:
  """Returns the divergence from the original network's predictions as a loss."""

  def loss(logits: Array, labels: Array, seen: Seen) -> Array:
    del labels
    return losses.distillation_loss(logits, seen.teacher, temperature)

  return loss


def method(config: Settings, name: str, small: nn.Module) -> dict[str, Any]:
  """Returns the options of `few_shot_compression.tuning` of a row."""
  whole = few_shot_compression.whole_network(config)
  if name == 'bp':
    return {'loss': cross_entropy, 'rate': config.label_rate}
  if name == 'kd':
    return {'loss': distilled(config.temperature), 'teacher': whole}
  return mimicking(whole, small, pooled=name == 'mir_post_pool')


def training(config: Settings, name: str, small: nn.Module, total: int) -> Run:
  """Returns the tuning of a row on `total` images."""
  decides = {own: getattr(config, own) for own in ('ratio', 'all_convs', 'drop')}
  decides |= {'loss': name}
  decides |= {'temperature': config.temperature} if name == 'kd' else {}
  options = method(config, name, small)
  return few_shot_compression.tuning(config, small, total, TITLES[name], decides=decides, **options)


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  found = list(few_shot_compression.check(config))
  yield from found
  if not found:
    yield from found_by('ratio, drop', pruning, config)
  rows = [WHOLE, PRUNED, *map(re.escape, TITLES.values())]
  metrics = [*(f'accuracy_{total}' for total in config.totals), 'macs', 'latency']
  yield from results.check_claims(config, rows, metrics)


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the tunings by row and number of images."""
  del facts
  small = few_shot_compression.small_network(config, pruning(config))
  return {
    f'{name}_{total}': training(config, name, small, total)
    for total in config.totals
    for name in config.runs
  }


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Prunes the network, tunes what is left on each number of images in each way, and compares."""
  nets = few_shot_compression.load(config, workdir)
  plan, tunings = pruning(config, nets.variables), programs(config)
  plan.save(workdir / 'plan.json')
  small, start = compression.slice_network(nets.model, nets.variables, plan)
  rows = {}

  def add(name: str, role: str, model: nn.Module, variables: Variables) -> float:
    own = few_shot_compression.accuracy(config, nets, model, variables)
    found = {f'accuracy_{total}': own for total in config.totals}
    rows[name] = results.row(name, role, found)
    say(f'{name}: accuracy {own:.4g}')

  add(WHOLE, 'reference', nets.model, nets.variables)
  add(PRUNED, 'baseline', small, start)
  for total in config.totals:
    images = few_shot_compression.tiny_set(config, nets, total)
    for name in config.runs:
      folder = workdir / f'{name}_{total}'
      tuned = few_shot_compression.tune(tunings[folder.name], images, folder, start, nets.variables)
      own = few_shot_compression.accuracy(config, nets, small, tuned)
      say(f'{TITLES[name]}, {total} images: accuracy {own:.4g}')
      role = 'method' if name in METHODS else 'baseline'
      row = rows.setdefault(TITLES[name], results.row(TITLES[name], role, {}))
      row['metrics'][f'accuracy_{total}'] = own
  both = {WHOLE: (nets.model, nets.variables), PRUNED: (small, start)}
  for name, own in few_shot_compression.costs(config, both, WHOLE).items():
    rows[name]['metrics'] |= own
  draw(config, list(rows.values()), workdir / 'accuracy_over_images.png')
  return results.results(config, list(rows.values()), title='in %; macs and latency of the whole')


def draw(config: Settings, rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Draws accuracies over the number of images; those of networks that are not tuned as lines."""
  totals = sorted(config.totals)
  with pictures.drawn(path, size=(5.5, 3.8)) as axis:
    for item in rows:
      if config.pictured and item['name'] not in config.pictured:
        continue
      own = [item['metrics'][f'accuracy_{total}'] for total in totals]
      tuned = item['name'] not in (WHOLE, PRUNED)
      axis.plot(totals, own, '-o' if tuned else '--', label=item['name'], markersize=4)
    axis.set_xscale('log')
    axis.set_xticks(totals, [str(total) for total in totals])
    axis.minorticks_off()
    axis.set_xlabel('images')
    axis.set_ylabel('accuracy (%)')
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(pictures.title(config), fontsize=9)


if __name__ == '__main__':
  launcher.main('mir')
