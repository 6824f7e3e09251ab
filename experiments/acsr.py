"""ACSR: Worst Case Matters for Few-Shot Recognition (Fu, Cao & Wu, ECCV 2022, arXiv 2203.06574).

A user runs one few-shot episode, so the worst accuracy counts; `mean - 3 sigma` over episodes stands for it.
A network pre-trained on base classes is fine-tuned anew in every episode: adaptability calibration (AC)
chooses how much of it (`fine_tuning.trained`), stability regularization (SR) holds the features of base
images near those of the pre-trained network, and an ensemble (EnSR) averages networks held on disjoint parts
of the base set. Claim: features drift less, and the mean and the worst accuracies rise.

  python -m experiments.acsr
  python -m experiments.acsr --config=mini_imagenet --workdir=DIR
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.harness import launcher, results, settings
from experiments.harness.runs import Call, Run
from experiments.protocols import episode_results, episode_settings, episodes, few_shot_data
from experiments.protocols.episodes import Method, Seen
from jaxlab import evaluation, losses
from jaxlab.models.classifier_heads import WeightNormHead

# Names of rows, whatever betas are run.
ROWS = ('plain', 'beta 0', r'SR [\d.e-]+', r'EnSR [\d.e-]+( members)?')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(episode_settings.Settings):
  """Settings of ACSR.

  Attributes:
    betas: weights of SR, a row each; 0: the pass over base images alone; None: not even that.
    ensemble_betas: weights of EnSR, likewise.
    members: networks of an ensemble.
    smoothing: of the labels of support images.
  """

  betas: tuple[float | None, ...] = (None, 0.0, 0.1)
  ensemble_betas: tuple[float, ...] = (0.1,)
  members: int = 4
  smoothing: float = 0.1


class Arm(NamedTuple):
  """A row of the comparison.

  Attributes:
    name: as in the table.
    beta: weight of SR; None leaves the pass over base images away.
    members: networks of the ensemble; each has a classifier and a part of the base set of its own.
  """

  name: str
  beta: float | None
  members: int = 1


def arms(config: Settings) -> list[Arm]:
  """Returns the rows of `config.betas` and `config.ensemble_betas`."""

  def name(beta: float | None) -> str:
    return f'SR {beta:g}' if beta else 'plain' if beta is None else 'beta 0'

  single = [Arm(name(beta), beta) for beta in config.betas]
  return single + [Arm(f'EnSR {beta:g}', beta, config.members) for beta in config.ensemble_betas]


def methods(config: Settings) -> dict[str, Method]:
  """Returns plain fine-tuning, and SR: features of base images stay near those before."""

  def plain(seen: Seen) -> jax.Array:
    each = losses.label_smoothing_cross_entropy(seen.logits, seen.labels, config.smoothing)
    return jnp.mean(each)

  def stabilized(seen: Seen) -> jax.Array:
    loss, _ = losses.acsr_loss(
      seen.logits, seen.labels, seen.features, seen.frozen,
      beta=seen.numbers['beta'], smoothing=config.smoothing,
    )  # fmt: skip
    return loss

  head, decides = WeightNormHead(config.episodes.num_ways), {'smoothing': config.smoothing}
  return {
    'plain': Method(head, plain, decides=decides),
    'SR': Method(head, stabilized, with_base=True, numbers=('beta',), decides=decides),
  }


def parts(num_base: int, members: int) -> list[tuple[int, int]]:
  """Returns the rows of base images that each member of EnSR is held on; the last takes the remainder.

  Raises:
    ValueError: if there are fewer base images than members.
  """
  if not 1 <= members <= num_base:
    raise ValueError(f'expected 1 to {num_base}, a base image for each; got {members}.')
  size = num_base // members
  return [(i * size, num_base if i == members - 1 else (i + 1) * size) for i in range(members)]


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from episode_settings.check(config)
  yield from results.check_claims(config, ROWS, [*episode_results.METRICS, 'drift_ratio'])
  if not config.betas and not config.ensemble_betas:
    yield 'betas and ensemble_betas are empty: expected at least one number.'
  for name in ('betas', 'ensemble_betas'):
    betas = getattr(config, name)
    if len(set(betas)) < len(betas) or min([b for b in betas if b is not None], default=0) < 0:
      yield f'{name}={betas}: expected different numbers >= 0.'
  if not 0 <= config.smoothing <= 1:
    yield f'smoothing={config.smoothing}: expected a share in [0, 1].'
  if config.data.train_size is not None:
    yield from settings.found_by('members', parts, config.num_base, config.members)


def programs(config: Settings, facts: None = None) -> dict[str, Run | Call]:
  """Returns the pre-training and the fine-tuning of one episode a device, plain and with SR."""
  del facts
  found = {} if config.checkpoint else {'backbone': episodes.pretraining(config)}
  return found | {name: episodes.program(config, own) for name, own in methods(config).items()}


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Pre-trains once, then fine-tunes on the same episodes in all arms, and compares them."""
  sources = few_shot_data.load(config.data)
  table = episode_results.Comparison(config, methods(config), sources, workdir)
  for arm in arms(config):
    name, numbers = ('plain', {}) if arm.beta is None else ('SR', {'beta': arm.beta})
    found = []
    for member, rows in enumerate(parts(config.num_base, arm.members)):
      title = arm.name if arm.members == 1 else f'{arm.name}, network {member + 1}'
      found.append(table.fine_tune(title, name, numbers, member=member, rows=rows))
    mean = evaluation.ensemble([item['probabilities'] for item in found]).probabilities
    if arm.members > 1:
      table.add_mean(f'{arm.name} members', 'reference', found)
    table.add(arm.name, 'method' if arm.beta else 'baseline', mean, [f['cosine'] for f in found])
  drift = {item['name']: item['metrics']['drift'] for item in table.rows}
  if drift.get('beta 0'):
    for item in table.rows:
      item['metrics']['drift_ratio'] = drift[item['name']] / drift['beta 0']
  return table.finish(extra=('drift_ratio',))


if __name__ == '__main__':
  launcher.main('acsr')
