"""MLS: Multi-Label Self-Supervised Learning with Scene Images (Zhu, Fu & Wu, ICCV 2023).

A scene shows several objects, but InfoNCE gives a view one positive. MLS takes a view for an image of several
labels: the nearest entries of a dictionary of backbone features are its positives, all others negatives. Its
projection is to say which is which, by binary cross-entropy against a second dictionary in the same order,
next to MoCo v2's loss. Claim: better backbones from scenes. At small scale: pseudo-labels that wait until
InfoNCE has made them good cost nothing; without this warm-up they destroy what is learned.

  python -m experiments.mls
  python -m experiments.mls --config=coco_400 --workdir=DIR
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks, pictures, results, runs
from experiments.harness.runs import Run
from experiments.harness.settings import found_by, section
from experiments.protocols import multi_label_evaluation, pretraining, siamese, siamese_methods
from experiments.protocols.multi_label_evaluation import Evaluation
from experiments.protocols.siamese_methods import Heads, Momentum
from jaxlab import data, evaluation, losses, parallel
from jaxlab.training import LossState, Out

Array = jax.Array
PyTree = Any

BASELINE = siamese_methods.TITLES['moco']
CURVES = ('queue_start', 'queue_end', 'z_std', 'feature_std')
SHOWN = 8  # queries, and neighbors of each, in a picture


@dataclasses.dataclass(frozen=True)
class MultiLabel:
  """The loss of pseudo positives, next to InfoNCE.

  Attributes:
    k: pseudo positives of a view.
    weight: of the loss.
    warmup: share of the steps, from the first on, in which InfoNCE trains alone; 0: the paper's last recipe.
    info_nce: whether InfoNCE stays behind the warm-up.
    loss: 'bce'; the paper's ablations are 'positives', without the terms of negatives, and 'neighbors',
      InfoNCE with each pseudo positive in turn.
    labels_from: the dictionary in which neighbors are looked up.
    logits_from: the dictionary that a view is compared with.
    title: of the row; empty: the key of the setting.
  """

  k: int = 20
  weight: float = 0.5
  warmup: float = 0.5
  info_nce: bool = True
  loss: Literal['bce', 'positives', 'neighbors'] = 'bce'
  labels_from: Literal['features', 'projections'] = 'features'
  logits_from: Literal['features', 'projections'] = 'projections'
  title: str = ''

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.k < 1:
      yield f'k={self.k}: expected at least 1.'
    if not 0 <= self.warmup < 1:
      yield f'warmup={self.warmup}: expected a share of the steps in [0, 1).'
    if self.weight <= 0:
      yield f'weight={self.weight}: expected a positive number; the row without the loss is {BASELINE}.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(pretraining.Settings):
  """Settings of MLS.

  Attributes:
    heads: over the backbone.
    target: momentum encoder, size of both dictionaries, temperature of both losses.
    losses: rows by name, next to MoCo v2's.
    runs: names of those that are trained; none: all.
    eval: of the frozen backbone.
  """

  heads: Heads = section(Heads)
  target: Momentum = section(Momentum)
  losses: dict[str, MultiLabel] = dataclasses.field(default_factory=lambda: {'mls': MultiLabel()})
  runs: tuple[str, ...] = ()
  eval: Evaluation = section(Evaluation)


def multi_label_loss(
  own: MultiLabel,
  features: Array,
  projections: Array,
  feature_queue: Array,
  queue: Array,
  temperature: float,
) -> tuple[Array, Array]:
  """Returns the loss of pseudo positives, and their labels `[batch, size]` of 0 and 1.

  Args:
    own: the section.
    features: of the backbone, `[batch, channels]`, of any length.
    projections: `[batch, dim]`, of any length.
    feature_queue: unit vectors as columns, `[channels, size]`, without those of this batch.
    queue: likewise of projections, in the same order, `[dim, size]`.
    temperature: of the logits.
  """
  views = {'features': (features, feature_queue), 'projections': (projections, queue)}
  labels = losses.top_k_pseudo_labels(*views[own.labels_from], own.k)
  vectors, classifiers = views[own.logits_from]
  if own.loss == 'neighbors':
    return losses.neighbor_queue_loss(vectors, classifiers, labels, temperature), labels
  value = losses.multi_label_queue_loss(
    vectors, classifiers, labels, temperature, positives_only=own.loss == 'positives'
  )
  return value, labels


def method(config: Settings) -> tuple[siamese.Networks, siamese.Targets]:
  """Returns MoCo v2's networks, features included, and its targets with both dictionaries."""
  length = pretraining.length(config)
  nets, _ = siamese_methods.method('moco', config.model, config.heads, config.target, length)
  nets = nets._replace(encoder=nets.encoder.clone(with_features=True))
  images = jax.ShapeDtypeStruct((2 * groups(config), *config.data.view), jnp.float32)
  (features, _), _ = jax.eval_shape(nets.encoder.init_with_output, jax.random.key(0), images)
  share, own = config.target.schedule(length.num_steps), config.target
  return nets, siamese_methods.momentum_queue(
    share, own.queue_size, config.heads.features, own.temperature, features.shape[-1],
    groups=groups(config),
  )  # fmt: skip


def groups(config: Settings) -> int:
  """Returns into how many parts with statistics of their own a batch is cut."""
  return config.model.get('norm_groups', 1)


def training(config: Settings, own: MultiLabel | None, title: str) -> Run:
  """Returns the pretraining by InfoNCE and, behind the warm-up, by pseudo positives; None: without these.

  The dictionaries carry along which image each entry is of, and its labels: no loss sees them, the metric
  `queue_precision` does.
  """
  nets, targets = method(config)
  images = jnp.zeros((2 * groups(config), *config.data.view))
  drawn = ('drop_path',) * bool(config.model.get('drop_path'))
  begin = round((own.warmup if own else 1) * pretraining.length(config).num_steps)
  size, temperature = config.target.queue_size, config.target.temperature

  def init(variables: runs.Variables, key: Array) -> PyTree:
    labels = jnp.zeros((config.data.num_classes, size))
    origin = {'index': jnp.full((1, size), -1, jnp.int32), 'labels': labels}
    return {**targets.init(variables, key), 'origin': origin}

  def loss(
    params: PyTree,
    state: LossState,
    views: list[Array],
    keys: dict[str, Array],
    index: Array,
    labels: Array,
  ) -> tuple[Array, Out]:
    extra = state.extra
    seen = targets.see(nets.encoder, extra, views, keys['order'], state.step)
    stats, rngs = state.model_state['batch_stats'], {name: keys[name] for name in drawn}
    online = siamese.online_pass(nets, params, stats, seen.views, rngs=rngs)
    features, projections = online.projections[0]
    value = info_nce = seen.loss([projections], seen.targets)
    metrics = {'info_nce': info_nce}
    if own:
      queues = extra['feature_queue'], extra['queue']
      more, _ = multi_label_loss(own, features, projections, *queues, temperature)
      both = own.weight * more + (info_nce if own.info_nce else 0)
      value = jnp.where(state.step < begin, info_nce, both)
      metrics['multi_label'] = more
    still, origin = jax.lax.stop_gradient((features, projections)), extra['origin']
    nearest = losses.top_k_pseudo_labels(still[0], extra['feature_queue'], config.eval.k)
    bank = jnp.transpose(origin['labels'])
    metrics |= {
      'feature_std': evaluation.feature_std(still[0]),
      'z_std': evaluation.feature_std(still[1]),
      'queue_precision': evaluation.shared_label_precision(nearest, labels, bank),
    }
    old, new = (origin['index'], origin['labels']), (index[:, None], labels)
    pushed, _ = losses.queues_push(old, extra['queue_pointer'], new)
    origin = dict(zip(('index', 'labels'), pushed, strict=True))
    left = {**seen.extra, 'origin': origin}
    return value, Out({'batch_stats': online.batch_stats}, left, metrics)

  parts = config.recipe.optimizer, config.heads, pretraining.length(config)
  decides = {'loss': dataclasses.replace(own, title='') if own else None}
  decides |= {'heads': config.heads, 'target': config.target, 'k': config.eval.k}
  return pretraining.training(
    config, title, siamese.init(nets, targets._replace(init=init), images, drawn), loss,
    after=targets.after, optimizer=siamese_methods.optimizer('moco', *parts), decides=decides,
    fields=('index', 'multi_label'),
  )  # fmt: skip


def titles(config: Settings) -> dict[str, str]:
  """Returns the rows' titles by the names of the programs."""
  return {'moco': BASELINE, **{name: own.title or name for name, own in config.losses.items()}}


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from pretraining.check(config)
  yield from multi_label_evaluation.check(config)
  rows, metrics = ['untrained', *titles(config).values()], multi_label_evaluation.METRICS
  yield from results.check_claims(config, rows, [*metrics, *CURVES])
  size, batch = config.target.queue_size, config.recipe.batch_size
  if size % batch:
    yield f'target.queue_size={size}: expected a multiple of recipe.batch_size={batch}.'
  if config.recipe.microbatches > 1:
    yield 'recipe.microbatches: expected 1; dictionaries and their labels are of the whole batch.'
  if config.eval.k > size:
    yield f'eval.k={config.eval.k}: expected at most target.queue_size={size}.'
  if 'moco' in config.losses:
    yield f"losses: 'moco' is the name of the run without the loss, {BASELINE}; choose another."
  if len({*rows}) < len(rows):
    yield f'losses: rows need titles that differ, got {rows}.'
  if unknown := [name for name in config.runs if name not in config.losses]:
    yield f'runs: {unknown} are none of losses, {", ".join(config.losses)}.'
  for name, own in config.losses.items():
    if own.k > size - (own.loss == 'neighbors'):
      rest = ', and one that is no neighbor' * (own.loss == 'neighbors')
      yield f'losses.{name}.k={own.k}: expected at most target.queue_size={size}{rest}.'
  yield from found_by('model', method, config)


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings: 'moco', and those of `config.runs`."""
  del facts
  named = titles(config)
  chosen = ['moco', *(config.runs or config.losses)]
  return {name: training(config, config.losses.get(name), named[name]) for name in chosen}


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Pretrains with and without the loss of pseudo positives, and judges the backbones."""
  sources = {split: harness_data.load(config.data, split) for split in ('train', 'test')}
  backbone = networks.create(config.model, num_classes=None)
  judge = multi_label_evaluation.evaluator(config, backbone, sources)
  images = jnp.zeros((2 * groups(config), *config.data.view))
  first = jax.jit(backbone.init)(jax.random.key(config.seed), images)
  rows, histories = [results.row('untrained', 'reference', judge(dict(first)))], {}
  for name, own in programs(config).items():
    trained = runs.train(own, sources['train'], workdir / name)
    variables = siamese.backbone_variables(trained.variables)
    role = 'baseline' if name == 'moco' else 'method'
    pretraining.say_collapse(own.title, trained.history)
    metrics = {**judge(variables), **ends(config, trained.history)}
    rows.append(results.row(own.title, role, metrics))
    histories[own.title] = trained.history
    if not config.pictured or own.title in config.pictured:
      parts = (backbone, variables), trained.state.extra
      draw_neighbors(config, sources, *parts, workdir / f'retrieved_{name}.png')
  labels = {'info_nce': 'InfoNCE', 'queue_precision': 'shares a class', 'feature_std': 'spread'}
  pictures.curves(workdir / 'curves.png', config, histories, labels)
  shown = [*multi_label_evaluation.METRICS, *CURVES]
  return results.results(config, rows, shown, 'precisions and mAP in %')


def ends(config: Settings, history: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Returns what a training's curves begin and end with.

  `queue_start` is the precision of what views retrieve, in the first rows in which the dictionaries hold no
  vector any more that was drawn; `queue_end` that in the last rows.
  """
  lines = [line for line in history if 'z_std' in line]
  filled = config.target.queue_size // config.recipe.batch_size
  full = [line for before, line in itertools.pairwise(lines) if before['step'] >= filled] or lines[
    -1:
  ]
  found = {name: lines[-1][name] for name in ('z_std', 'feature_std')}
  found['queue_start'] = 100 * full[0]['queue_precision']
  return found | {'queue_end': 100 * full[-1]['queue_precision']}


def draw_neighbors(
  config: Settings,
  sources: Mapping[str, data.Source],
  network: tuple[Any, runs.Variables],
  extra: PyTree,
  picture: pathlib.Path,
) -> None:
  """Draws the first test images with what they retrieve from the dictionary of features, nearest first."""
  mesh = config.mesh.make()
  whole = jax.jit(lambda x: x, out_shardings=parallel.replicated(mesh))
  queue, origin = jax.device_get(whole((extra['feature_queue'], extra['origin'])))
  backbone, variables = network
  queries = multi_label_evaluation.records(config, sources['test'], range(SHOWN), 'test')
  own = jax.device_get(variables)
  features = jax.jit(lambda batch: backbone.apply(own, config.task.inputs(batch), train=False))
  _, nearest = jax.lax.top_k(features(queries) @ queue, min(SHOWN, config.eval.k))
  places = origin['index'][0][np.asarray(nearest)]
  multi_label_evaluation.draw_retrieved(config, sources, queries, places, picture)


if __name__ == '__main__':
  launcher.main('mls')
