"""PRACTISE: Practical Network Acceleration with Tiny Sets (Wang & Wu, CVPR 2023).

A network is to become faster with 50 to 1000 images, and without labels. Whole residual blocks are dropped:
that saves more time than as many filters. Which blocks? One after the other is taken out, and what stands
around the gap gets linear adaptors, 1x1 convolutions that start as the identity. These alone are trained to
restore the map that the network pools; the error that stays (recoverability) over the share of the time
that is saved is the block's price. The cheapest blocks go for good, adaptors too, and what is left mimics
the whole network.
Claim: above dropping other blocks, above labels, and not below pruned filters that save as much.

  python -m experiments.practise
  python -m experiments.practise --config=imagenet_resnet34 --workdir=DIR
"""

import bisect
import dataclasses
import functools
import json
import pathlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils

from experiments.harness import launcher, pictures, results, runs
from experiments.harness.networks import Loaded
from experiments.harness.results import row
from experiments.harness.runs import Run, Variables, say
from experiments.harness.settings import found_by, identity
from experiments.harness.supervised import cross_entropy
from experiments.protocols import block_recovery, few_shot_compression
from experiments.protocols.block_recovery import Recovery, recovery, remaining_errors
from experiments.protocols.few_shot_compression import mimicking, small_network
from jaxlab import compression, data
from jaxlab.compression import Plan

Array = jax.Array
PyTree = Any

WHOLE, CHANCE = 'whole', 'any order'
TITLES = {
  'practise': 'PRACTISE',
  'worst': 'dearest blocks',
  'random': 'drawn blocks',
  'labels': 'PRACTISE, labels (BP)',
  'untuned': 'PRACTISE, not tuned',
  'filters': 'filters, mimicking',
}
# What blocks are ordered by, and the metric that says how well that is their loss of accuracy.
ORDERS = {'recoverability': 'recoverability', 'error': 'error without adaptors'}
ORDER = 'rank_correlation'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(block_recovery.Settings):
  """Settings of PRACTISE; the first of `totals` images also say what blocks cost.

  Attributes:
    counts: numbers of blocks that are dropped.
    price: what a block saves: 'latency' (needs `timed`), or 'macs', multiply-accumulates.
    runs: rows.
    label_rate: learning rate of 'labels'.
    judged: whether the test accuracy without each block is measured, next to its score.
  """

  counts: tuple[int, ...]
  price: Literal['latency', 'macs'] = 'latency'
  runs: tuple[Literal['practise', 'worst', 'random', 'labels', 'untuned', 'filters'], ...] = tuple(
    TITLES
  )
  label_rate: float = 1e-4
  judged: bool = True

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    if not self.label_rate > 0:
      yield f'label_rate={self.label_rate}: expected a positive number.'
    if not self.runs:
      yield f'runs is empty; runs: {", ".join(TITLES)}.'
    if self.price == 'latency' and not self.timed:
      yield "price='latency' needs timed, the number of repeats; it is 0."
    if 'labels' in self.runs and not self.labeled:
      yield f"runs: 'labels' needs labels, which images of origin={self.origin!r} do not have."


def candidates(config: Settings) -> tuple[str, ...]:
  """Returns the blocks that can be dropped."""
  return compression.candidate_blocks(few_shot_compression.whole_network(config))


def stages(config: Settings) -> dict[str, tuple[str, ...]]:
  """Returns the blocks of each stage that can be dropped: those that one program scores."""
  found: dict[str, tuple[str, ...]] = {}
  for block in candidates(config):
    stage = compression.stage_of(block)
    found[stage] = (*found.get(stage, ()), block)
  return found


def dropping(config: Settings, blocks: Sequence[str]) -> Plan:
  """Returns the plan that drops some blocks."""
  return compression.plan(few_shot_compression.whole_network(config), drop=blocks)


def savings(config: Settings, nets: Loaded, workdir: pathlib.Path) -> dict[str, dict[str, float]]:
  """Returns the share that each block saves, of `macs` and, if it is timed, of `latency`.

  Measured once, since times differ a little each time, and which blocks go with them: `savings.json` in the
  work directory holds them. Those of process 0 hold on all hosts.

  Raises:
    ValueError: for blocks that save nothing of `price` (nothing is written), or, where they decide, times of
      another network, number of repeats or device.
  """
  file, names = workdir / 'savings.json', candidates(config)
  decides = identity({
    'model': config.network.model, 'view': config.network.data.view, 'timed': config.timed,
    'timed_batch': config.timed_batch, 'device': jax.devices()[0].device_kind,
  })  # fmt: skip
  decides = json.loads(json.dumps(decides))
  held = json.loads(file.read_text()) if file.exists() else {}
  if held and held['settings'] != decides and config.price == 'latency':
    raise ValueError(
      f'{file} holds what blocks save by {held["settings"]}; these are {decides}. Choose another work '
      'directory.'
    )
  if held.get('settings') == decides:
    shares = held['savings']
  else:
    shares = _measured(config, nets)
  shares = multihost_utils.broadcast_one_to_all(shares)
  shares = {name: {kind: float(x) for kind, x in shares[name].items()} for name in names}
  compression.require_savings({name: own[config.price] for name, own in shares.items()})
  if jax.process_index() == 0:
    results.save_json(file, {'settings': decides, 'savings': shares})
  return shares


def _measured(config: Settings, nets: Loaded) -> dict[str, dict[str, float]]:
  small = {WHOLE: (nets.model, nets.variables)}
  for block in candidates(config):
    plan = dropping(config, [block])
    small[block] = compression.slice_network(nets.model, nets.variables, plan)
  left = few_shot_compression.costs(config, small, WHOLE)
  return {
    block: {kind: compression.saved_share(100.0, value) for kind, value in left[block].items()}
    for block in candidates(config)
  }


def score(
  config: Settings, nets: Loaded, source: data.Source, workdir: pathlib.Path
) -> dict[str, dict[str, float]]:
  """Returns of each block `error` without and `recoverability` with adaptors, what it saves, and `score`."""
  saved, found, began = savings(config, nets, workdir), {}, time.perf_counter()
  for stage, blocks in stages(config).items():
    plain = Recovery(config, blocks).init(nets.variables['params'])
    folder, frozen = workdir / f'recover_{stage}', {'whole': nets.variables}
    try:
      trained = runs.train(recovery(config, blocks), source, folder, frozen=frozen).state.params
    except FloatingPointError as error:
      raise FloatingPointError(
        f'adaptors of {stage}, one gap at a time: {error} Take a lower recovery.rate.'
      ) from None
    values = remaining_errors(config, blocks, [plain, trained], nets.variables, source)
    for name, errors in zip(('error', 'recoverability'), values, strict=True):
      for block, error in errors.items():
        found.setdefault(block, {})[name] = error
  steps, gaps = config.recovery.steps, len(candidates(config))
  say(
    f'{gaps} blocks were scored in {time.perf_counter() - began:.0f} s, compilation included: {steps} steps '
    f'each, {len(stages(config))} trainings'
  )
  prices = compression.pruning_scores(
    {block: own['recoverability'] for block, own in found.items()},
    {block: own[config.price] for block, own in saved.items()},
  )
  return {block: {**found[block], **saved[block], 'score': prices[block]} for block in found}


def equal_filters(config: Settings, variables: Variables | None, blocks: Sequence[str]) -> Plan:
  """Returns the plan that prunes filters until as many multiply-accumulates are saved as without blocks.

  Without variables a plan of other sizes, for shapes.
  """
  model = few_shot_compression.whole_network(config)
  if variables is None:
    return compression.filter_plan(model, None, 0.5)

  def macs(plan: Plan) -> int:
    return few_shot_compression.multiply_accumulates(config, small_network(config, plan))

  target = macs(dropping(config, blocks))

  def saves(percent: int) -> bool:
    return macs(compression.filter_plan(model, variables, percent / 100)) <= target

  percent = bisect.bisect_left(range(100), True, lo=1, key=saves)
  if percent == 100:
    raise ValueError(f'without {", ".join(blocks)}: no share of the filters saves as much.')
  return compression.filter_plan(model, variables, percent / 100)


def plans(
  config: Settings, count: int, scores: Mapping[str, float], variables: Variables | None = None
) -> dict[str, Plan]:
  """Returns what stays in each row when `count` blocks are dropped, or as much is saved."""
  best = compression.select_blocks(scores, count)
  worst = compression.select_blocks({block: -own for block, own in scores.items()}, count)
  drawn = np.random.default_rng((config.seed, count)).choice(list(scores), count, replace=False)
  chosen = {'worst': worst, 'random': [str(block) for block in drawn]}
  return {
    name: equal_filters(config, variables, best)
    if name == 'filters'
    else dropping(config, chosen.get(name, best))
    for name in config.runs
  }


def training(config: Settings, name: str, plan: Plan, small: nn.Module, total: int) -> Run:
  """Returns the tuning of a row on `total` images."""
  options = {'loss': cross_entropy, 'rate': config.label_rate}
  if name != 'labels':
    options = mimicking(few_shot_compression.whole_network(config), small)
  decides = {
    'drop': list(plan.drop),
    'keep': plan.keep,
    'loss': 'bp' if name == 'labels' else 'mir',
  }
  return few_shot_compression.tuning(config, small, total, TITLES[name], decides=decides, **options)


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  found = list(few_shot_compression.check(config))
  found = found or list(found_by('network.model', candidates, config))
  yield from found
  if not found:
    known = len(candidates(config))
    if not config.counts or any(not 1 <= count <= known for count in config.counts):
      yield f'counts={config.counts}: expected numbers from 1 to {known}, the blocks that can be dropped.'
  rows = [WHOLE, CHANCE, *ORDERS.values(), *TITLES.values()]
  metrics = [ORDER, *(metric(*own) for own in columns(config)), r'(macs|latency)_\d+']
  yield from results.check_claims(config, list(map(re.escape, rows)), metrics)


def columns(config: Settings) -> list[tuple[int, int]]:
  """Returns numbers of blocks and of images."""
  return [(count, total) for count in config.counts for total in config.totals]


def metric(count: int, total: int) -> str:
  """Returns the name of an accuracy."""
  return f'accuracy_{count}_{total}'


def programs(config: Settings, facts: Mapping[str, float] | None = None) -> dict[str, Run]:
  """Returns recoveries by stage, and tunings by row and numbers; `facts` are the scores of blocks."""
  scores = facts or {block: float(place) for place, block in enumerate(candidates(config))}
  found = {f'recover_{stage}': recovery(config, blocks) for stage, blocks in stages(config).items()}
  for count in config.counts:
    for name, plan in plans(config, count, scores).items():
      small = small_network(config, plan)
      for total in config.totals if name != 'untuned' else ():
        found[f'{name}_{count}_{total}'] = training(config, name, plan, small, total)
  return found


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Scores blocks, drops the cheapest, tunes what is left, and compares."""
  nets = few_shot_compression.load(config, workdir)
  tiny = {total: few_shot_compression.tiny_set(config, nets, total) for total in config.totals}
  blocks = score(config, nets, tiny[config.totals[0]], workdir)
  judge = functools.partial(few_shot_compression.accuracy, config, nets)
  exact = judge(nets.model, nets.variables)
  say(f'{WHOLE}: accuracy {exact:.4g}')
  rows = {WHOLE: row(WHOLE, 'reference', {metric(*own): exact for own in columns(config)})}
  if config.judged:
    for block, own in blocks.items():
      plan = dropping(config, [block])
      small = compression.slice_network(nets.model, nets.variables, plan)
      own['accuracy_loss'] = exact - judge(*small)
      say(f'{block}: ' + ', '.join(f'{name} {value:.4g}' for name, value in own.items()))
    rows |= order_rows(blocks)
  results.save_json(workdir / 'blocks.json', blocks)
  scores = {block: own['score'] for block, own in blocks.items()}
  for count in config.counts:
    small = {}
    for name, plan in plans(config, count, scores, nets.variables).items():
      small[name] = compression.slice_network(nets.model, nets.variables, plan)
      say(f'{TITLES[name]}, {count}: {", ".join(plan.drop) or "filters"}')
      found = tuned(config, nets, name, plan, small[name], count, tiny, workdir)
      role = 'method' if name == 'practise' else 'baseline'
      rows.setdefault(TITLES[name], row(TITLES[name], role, {}))['metrics'].update(found)
    whole = {WHOLE: (nets.model, nets.variables)}
    for name, costs in few_shot_compression.costs(config, {**whole, **small}, WHOLE).items():
      own = rows[TITLES.get(name, name)]['metrics']
      own.update({f'{kind}_{count}': value for kind, value in costs.items()})
  lines = list(rows.values())
  draw_blocks(config, blocks, workdir / 'blocks.png')
  draw_costs(config, lines, workdir / 'accuracy_over_cost.png')
  return results.results(config, lines, title='in %; macs and latency of the whole network')


def tuned(
  config: Settings,
  nets: Loaded,
  name: str,
  plan: Plan,
  small: tuple[nn.Module, Variables],
  count: int,
  tiny: Mapping[int, data.Source],
  workdir: pathlib.Path,
) -> dict[str, float]:
  """Returns the accuracies of a row, of each number of images."""
  model, start = small
  found = {}
  for total, source in tiny.items():
    variables = start
    if name != 'untuned':
      own, folder = training(config, name, plan, model, total), workdir / f'{name}_{count}_{total}'
      variables = few_shot_compression.tune(own, source, folder, start, nets.variables)
    accuracy = few_shot_compression.accuracy(config, nets, model, variables)
    found[metric(count, total)] = accuracy
    say(f'{TITLES[name]}, {count} blocks, {total} images: accuracy {accuracy:.4g}')
  return found


def order_rows(blocks: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
  """Returns how well the order of blocks by an error is that by their loss of accuracy (Spearman)."""
  from scipy import stats

  lost = [own['accuracy_loss'] for own in blocks.values()]
  found = {CHANCE: row(CHANCE, 'reference', {ORDER: 0.0})}
  for name, title in ORDERS.items():
    errors = [own[name] for own in blocks.values()]
    value = float(stats.spearmanr(errors, lost).statistic)
    role = 'method' if name == 'recoverability' else 'baseline'
    # Of equal values, as all lost accuracies may be, there is no order.
    found[title] = row(title, role, {ORDER: value if np.isfinite(value) else 0.0})
  return found


def draw_blocks(
  config: Settings, blocks: Mapping[str, Mapping[str, float]], path: pathlib.Path
) -> None:
  """Draws of each block errors with and without adaptors, the price, and the accuracy without it."""
  panels = {'error of the map': ('error', 'recoverability'), f'price ({config.price})': ('score',)}
  if config.judged:
    panels['accuracy lost (points)'] = ('accuracy_loss',)
  places = np.arange(len(blocks))
  with pictures.drawn(path, 1, len(panels), size=(3.6 * len(panels), 3.8), squeeze=False) as axes:
    for axis, (name, kinds) in zip(axes[0], panels.items(), strict=True):
      for index, kind in enumerate(kinds):
        values = [own[kind] for own in blocks.values()]
        axis.barh(places + 0.4 * index, values, 0.8 / len(kinds), label=kind)
      axis.set_yticks(places + 0.2 * (len(kinds) - 1), list(blocks), fontsize=7)
      axis.invert_yaxis()
      axis.set_xlabel(name)
      axis.grid(alpha=0.3, axis='x')
    axes[0, 0].legend(frameon=False, fontsize=7)
    axes[0, 0].figure.suptitle(pictures.title(config), fontsize=9)


def draw_costs(config: Settings, rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Draws accuracies over what a pass costs, of the most images; a point for each number of blocks."""
  kind, total = 'latency' if config.timed else 'macs', max(config.totals)
  with pictures.drawn(path, size=(5.5, 3.8)) as axis:
    for item in rows:
      own = item['metrics']
      counts = [count for count in sorted(config.counts) if metric(count, total) in own]
      if not counts or (config.pictured and item['name'] not in config.pictured):
        continue
      costs = [own[f'{kind}_{count}'] for count in counts]
      axis.plot(
        costs,
        [own[metric(count, total)] for count in counts],
        '-o',
        label=item['name'],
        markersize=4,
      )
    axis.set_xlabel(f'{kind} (% of the whole)')
    axis.set_ylabel('accuracy (%)')
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(f'{pictures.title(config)}, {total} images', fontsize=9)


if __name__ == '__main__':
  launcher.main('practise')
