"""LAST: Low-rank Attention Side-Tuning for Parameter-Efficient Fine-Tuning (Tang et al., arXiv 2402.04009).

Not only a network's weights are frozen but also what its blocks hand on, z_0 ... z_m. A side network of
low-rank self-attention alone, without MLPs, reads it:

  u_i = F_i(u_{i-1} + z_i)
  y = u_m - (z_0 + ... + z_{m-1})               the last tokens z_m, and what the F_i have learned

No gradient goes back into the network, so that little is kept for the backward pass, and side networks with
several learning rates and weight decays are trained from one forward pass of it. Claim: better than methods
that train within the network, with a third of their memory.

  python -m experiments.last
  python -m experiments.last --config=vtab_vit_base --config.tasks=caltech101, --workdir=DIR
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from experiments.harness import launcher, results
from experiments.harness.runs import Run
from experiments.harness.settings import section
from experiments.protocols import adaptation, adaptation_checks, adaptation_comparison
from experiments.protocols.adaptation import Row
from experiments.protocols.adaptation_baselines import BASELINES
from experiments.protocols.side_adaptation import side_attention


@dataclasses.dataclass(frozen=True)
class Side:
  """The side network.

  Attributes:
    rank: of an attention.
    gap: blocks of the network to one of the side network.
    modules: attentions in a row in one block of the side network.
    combine: whether the state and the network's tokens are summed 'before' a block or 'after' it.
    remat: keep modules' inputs alone for the backward pass, and compute the rest again.
  """

  rank: int = 4
  gap: int = 1
  modules: int = 4
  combine: Literal['before', 'after'] = 'before'
  remat: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(adaptation.Settings):
  """Settings of LAST.

  Attributes:
    side: the side network.
  """

  side: Side = section(Side)
  runs: tuple[str, ...] = ('linear', 'lora', 'full', 'last')


def table(config: Settings) -> dict[str, Row]:
  """Returns the rows that `config.runs` may name: baselines, LAST, and LAST with one part in another way."""
  make = functools.partial(side_attention, **dataclasses.asdict(config.side))
  changed = {
    'one_module': ('LAST, one module a block', 'method', {'modules': 1}),
    'remat': ('LAST, rematerialized', 'method', {'remat': True}),
    'after': ('LAST, summed after', 'method', {'combine': 'after'}),
    'mlp': ('LAST of MLPs', 'baseline', {'kind': 'mlp'}),
    'full_rank': ('LAST of full rank', 'baseline', {'rank': None}),
    'uncorrected': ('LAST without correction', 'baseline', {'correction': 'none'}),
  }
  variants = {
    name: Row(title, role, functools.partial(make, **own), (config.side, own))
    for name, (title, role, own) in changed.items()
  }
  return {**BASELINES, 'last': Row('LAST', 'method', make, config.side), **variants}


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from adaptation_checks.check(config, table(config))


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns each row's training on the first task, and that on the source task."""
  del facts
  return adaptation_comparison.programs(config, table(config))


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Adapts the network to every task in every way, and compares."""
  rows = adaptation_comparison.compare(config, workdir, table(config))
  adaptation_comparison.draw(config, rows, workdir / 'accuracy_over_memory.png')
  return results.results(
    config, rows, adaptation_comparison.metrics(config), adaptation_comparison.UNITS
  )


if __name__ == '__main__':
  launcher.main('last')
