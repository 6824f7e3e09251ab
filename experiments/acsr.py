"""ACSR: Worst Case Matters for Few-Shot Recognition (Fu, Cao & Wu, ECCV 2022, arXiv 2203.06574).

A user runs one few-shot episode, so the worst accuracy counts; `mean - 3 sigma` over episodes stands for it.
A network pre-trained on base classes is fine-tuned anew in every episode: adaptability calibration (AC)
chooses how much of it, stability regularization (SR) holds the features of base images near those of the
pre-trained network, and an ensemble (EnSR) averages networks held on disjoint parts of the base set. Claim:
features drift less, and the mean and the worst accuracies rise.

  python -m experiments.acsr
  python -m experiments.acsr --config=mlcollections_configs/acsr/mini_imagenet.py --workdir=DIR
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments import episodes, launcher, networks, training
from experiments.episode_files import run_tasks
from experiments.results import check_claims, measured_claims, print_table, results, row
from jaxlab import data, models, parallel
from jaxlab.data.protocols.few_shot import sample_episodes
from jaxlab.data.sources.source import source_labels
from jaxlab.data.sources.subset import subset
from jaxlab.evaluation.episodes import episode_metrics
from jaxlab.parallel import aot

PyTree = Any

# Names of rows and metrics, whatever betas are run.
ROWS = r'plain|beta 0|SR [\d.e-]+|EnSR [\d.e-]+( members)?'
METRICS = r'acc_(mean|1|10|100)|std|mean_minus_3std|ci95_half_width|cosine|drift|drift_ratio'


class Arm(NamedTuple):
  """A row of the comparison.

  Attributes:
    name: as in the table.
    beta: weight of the regularizer; None leaves the pass over base images away.
    members: networks of the ensemble; each has a classifier and a part of the base set of its own.
  """

  name: str
  beta: float | None
  members: int = 1


def arms(config: ConfigDict) -> list[Arm]:
  """Returns the rows of `config.betas` and `config.ensemble_betas`."""

  def name(beta: float | None) -> str:
    return f'SR {beta:g}' if beta else 'plain' if beta is None else 'beta 0'

  single = [Arm(name(beta), beta) for beta in config.betas]
  many = [Arm(f'EnSR {beta:g}', beta, config.members) for beta in config.ensemble_betas]
  return single + many


def load_pool(config: ConfigDict, part: str) -> data.Source:
  """Returns the images of `part`, 'base' or 'novel': of the classes `data.<part>_classes`, or all.

  Raises:
    ValueError: if their number is not `data.train_size` (base) or `data.novel_size`, for which programs are
      made.
  """
  own = config.network.backbone.data
  source = data.load(own.name, own[f'{part}_split'], **own[f'{part}_options'])
  if (classes := own[f'{part}_classes']) is not None:
    source = subset(source, np.flatnonzero(np.isin(source_labels(source), classes)))
  name = 'train_size' if part == 'base' else 'novel_size'
  training.check_size(f'network.backbone.data.{name}', own[name], source)
  return source


def pretrain(config: ConfigDict, base: data.Source, workdir: Any) -> PyTree:
  """Returns the variables of the backbone: of a checkpoint, or trained on the base classes, once."""
  own = networks.section(config, 'backbone')
  data.check_labels(source_labels(base), own.model.num_classes)
  backbone, _ = episodes.network(config)
  shapes = models.abstract_variables(backbone, (own.data.image_size,) * 2 + (own.data.channels,))
  if own.checkpoint:
    weights = models.read_state_dict(own.checkpoint)
    weights = {re.sub(r'^((module|feature)\.)+', '', name): w for name, w in weights.items()}
    heads = ('linear.', 'fc.', 'classifier.')
    weights = {name: w for name, w in weights.items() if not name.startswith(heads)}
    return models.from_torch(shapes, weights)
  state, _ = training.train(
    networks.program(own),
    base,
    own,
    workdir / 'backbone',
    num_steps=own.epochs * (len(base) // own.batch_size),
    description='backbone on base classes',
  )
  variables = {'params': state.params, **state.model_state}
  return {name: {k: variables[name][k] for k in tree} for name, tree in shapes.items()}


def measure(accuracies: np.ndarray, cosine: float) -> dict[str, float]:
  """Returns the metrics of a row, accuracies in percent; `drift` is 1 - cosine."""
  found = {name: 100 * value for name, value in episode_metrics(accuracies).items()}
  return found | {'cosine': cosine, 'drift': 1 - cosine}


def ensemble(probabilities: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the members' mean probabilities `[..., classes]`, and the predicted classes."""
  mean = np.mean(np.asarray(probabilities, np.float64), axis=0)
  return mean, np.argmax(mean, -1)


def check(config: ConfigDict) -> None:
  """Raises ValueError for settings that do not fit together, before anything is trained."""
  if config.finetune.steps < 1 or config.finetune.base_batch < 1 or config.members < 1:
    raise ValueError('finetune.steps, finetune.base_batch and members must be at least 1.')
  each = (config.betas, config.ensemble_betas)
  numbers = [beta for betas in each for beta in betas if beta is not None]
  repeated = any(len(set(betas)) < len(betas) for betas in each)
  if repeated or not any(each) or None in config.ensemble_betas or min(numbers, default=0) < 0:
    raise ValueError(
      f'betas={config.betas}, ensemble_betas={config.ensemble_betas}: expected different numbers >= 0 '
      f'(None among betas: no pass over base images).'
    )
  most = episodes.num_base(config)
  if config.ensemble_betas and config.members > most:
    raise ValueError(f'members={config.members} exceeds the {most} base images: no part for each.')
  if not 1 <= config.cosine_images <= most:
    raise ValueError(
      f'cosine_images={config.cosine_images}: expected 1 to {most}, the base images.'
    )
  check_claims(config, ROWS, METRICS)
  episodes.adaptation(config, episodes.network(config)[0])
  mesh = training.mesh(config)
  parallel.check_batch_size(config.network.backbone.batch_size, mesh)
  parallel.check_batch_size(config.eval_batch_size, mesh, 'eval_batch_size')


def run(config: ConfigDict, workdir) -> dict[str, Any]:
  """Pre-trains once, then fine-tunes on the same episodes in all arms, and compares them."""
  check(config)
  mesh = training.mesh(config)
  base, novel = load_pool(config, 'base'), load_pool(config, 'novel')
  sizes = {k: v for k, v in config.episodes.items() if k not in ('count', 'per_call')}
  drawn = sample_episodes(config.seed, source_labels(novel), config.episodes.count, **sizes)
  novel, drawn = episodes.only_drawn(novel, drawn)
  plans = [
    (arm, episodes.make_tasks(drawn, arm.beta or 0.0, arm.members, episodes.num_base(config)))
    for arm in arms(config)
  ]
  variables = pretrain(config, base, workdir)
  variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
  pools = episodes.make_pools(config, variables, base, novel, mesh)
  folder = workdir / 'episodes'
  folder.mkdir(exist_ok=True)
  programs = {
    with_base: episodes.finetune_all(config, with_base, mesh) for with_base in (False, True)
  }

  def accuracies(predictions: np.ndarray) -> np.ndarray:
    return np.mean(predictions == drawn.query_labels, axis=-1)

  rows, shown = [], {}
  for arm, members in plans:
    compiled = functools.partial(programs[arm.beta is not None], variables, pools)
    found = []
    for index, tasks in enumerate(members):
      title = arm.name if arm.members == 1 else f'{arm.name}, network {index + 1}'
      file = folder / f'{title.replace(", ", "_").replace(" ", "_")}.npz'
      found.append(run_tasks(config, compiled, tasks, mesh, file, title))
    cosine = float(np.mean([item['cosine'] for item in found]))
    _, predictions = ensemble([item['probabilities'] for item in found])
    shown[arm.name] = accuracies(predictions)
    if arm.members > 1:
      single = [accuracies(np.argmax(item['probabilities'], -1)) for item in found]
      each = [measure(a, float(np.mean(f['cosine']))) for a, f in zip(single, found, strict=True)]
      mean = {name: float(np.mean([item[name] for item in each])) for name in each[0]}
      rows.append(row(f'{arm.name} members', 'reference', mean))
    role = 'method' if arm.beta else 'baseline'
    rows.append(row(arm.name, role, measure(shown[arm.name], cosine)))
  unregularized = next(
    (item['metrics']['drift'] for item in rows if item['name'] == 'beta 0'), None
  )
  if unregularized:
    for item in rows:
      item['metrics']['drift_ratio'] = item['metrics']['drift'] / unregularized
  show(config, rows, shown, workdir)
  return results(config, rows, measured_claims(config, rows))


def lower(config: ConfigDict, mesh: Mesh) -> dict[str, jax.stages.Lowered]:
  """Returns the pre-training step, and the fine-tuning of one episode a device, lowered for a mesh."""
  own = networks.section(config, 'backbone')
  variables, pools, tasks = episodes.abstract(config, mesh)
  return {
    'pretrain': aot.lower_step(networks.program(own), mesh),
    'finetune': episodes.finetune_all(config, True, mesh).lower(variables, pools, tasks),
  }


def accuracy_bins(queries: int) -> np.ndarray:
  """Returns edges of a histogram, in percent: two of the possible accuracies in each bin, 0 to 100 %.

  >>> accuracy_bins(4)
  array([-12.5,  37.5,  87.5, 137.5])
  """
  return 100 * (np.arange(0, queries + 3, 2) - 0.5) / queries


def show(
  config: ConfigDict, rows: list, accuracies: Mapping[str, np.ndarray], workdir: Any
) -> None:
  """Prints the table; draws the histogram of episode accuracies with the ten lowest marked."""
  title = f'{config.paper}, {config.setting}, seed {config.seed}'
  names = ('acc_mean', 'std', 'mean_minus_3std', 'acc_1', 'acc_10', 'acc_100', 'cosine', 'drift')
  print_table(title, rows, names)
  if jax.process_index():
    return
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  chosen = {name: a for name, a in accuracies.items() if name in config.pictured} or accuracies
  figure, axes = plt.subplots(
    len(chosen), 1, figsize=(8, 1.9 * len(chosen) + 0.6), sharex=True, sharey=True, squeeze=False
  )
  bins = accuracy_bins(config.episodes.num_ways * config.episodes.num_queries)
  for axis, (name, values) in zip(axes[:, 0], chosen.items(), strict=True):
    percent = np.sort(100 * values)
    worst, rest = percent[:10], percent[10:]
    axis.hist([worst, rest], bins, stacked=True, color=['#dc2626', '#9aa5b1'])
    mean, proxy = percent.mean(), percent.mean() - 3 * percent.std()
    axis.axvline(mean, color='#2563eb', label=f'mean {mean:.1f}')
    axis.axvline(proxy, color='#2563eb', linestyle=':', label=f'mean - 3 sigma {proxy:.1f}')
    axis.plot([], [], 's', color='#dc2626', label=f'10 worst: {worst.mean():.1f}')
    axis.set_title(name, loc='left', fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
  seen = 100 * np.concatenate(list(chosen.values()))
  axes[-1, 0].set_xlim(max(seen.min() - 20, 0), min(seen.max() + 8, 100))
  axes[-1, 0].set_xlabel('accuracy of an episode (%)')
  figure.suptitle(title)
  figure.tight_layout()
  figure.savefig(str(workdir / 'episode_accuracies.png'), dpi=120)
  plt.close(figure)


if __name__ == '__main__':
  launcher.main(run, 'acsr')
