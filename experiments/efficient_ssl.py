"""Efficient SSL: On Improving the Algorithm-, Model-, and Data-Efficiency of Self-Supervised Learning (2024).

Cao & Wu, arXiv 2404.19289. Most self-supervised methods see two views of an image; this one sees one, and
tells the image from all others by a memory bank with a vector for each:

  s = z bank[columns].T;   loss = cross_entropy(s / T, own column) + weight * sqrt_kl(s)

Non-parametric instance discrimination (NPID) does so, too. What is added: the bank starts with the features
of the network as drawn (calibrated), and a divergence spreads the gradient over all instances. Claim: at half
the cost of a step, features as good as those of two-view methods, and better ones early on.

  python -m experiments.efficient_ssl
  python -m experiments.efficient_ssl --config=fashion_mnist
  python -m experiments.efficient_ssl --config=cifar10_resnet18 --workdir=DIR
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import costs, launcher, networks, pictures, results, runs
from experiments.harness import data as harness_data
from experiments.harness.runs import Run, say
from experiments.harness.settings import found_by, section
from experiments.protocols import feature_evaluation, pretraining, siamese, siamese_methods
from experiments.protocols.siamese_methods import Heads, Momentum
from jaxlab import data, evaluation, losses, models, parallel
from jaxlab.training import (
  LossState,
  Out,
  TrainState,
  cast_floating,
  pad_rows,
  row_rules,
  step_keys,
)

Array = jax.Array
PyTree = Any

# Rows of the single-branch method: title, role, and what differs in the section `bank`.
VARIANTS: dict[str, tuple[str, str, Callable[['Bank'], Mapping[str, Any]]]] = {
  'npid': ('NPID', 'baseline', lambda own: {'start': 'random', 'kl_weight': 0.0}),
  'calibrated': ('NPID, calibrated', 'reference', lambda own: {'kl_weight': 0.0}),
  'single_branch': ('single branch', 'method', lambda own: {}),
  'strong_kl': ('10x KL', 'reference', lambda own: {'kl_weight': 10 * own.kl_weight}),
  'gradient': ('gradient update', 'reference', lambda own: {'update': 'gradient'}),
}
TWO_VIEWS = {name: text for name, text in siamese_methods.TITLES.items() if name != 'dino'}
METRICS = ('knn_early', 'z_std', 'gigaflops', 'milliseconds', 'relative_flops', 'relative_time')


@dataclasses.dataclass(frozen=True)
class Bank:
  """The memory bank, and what is asked of an image.

  Attributes:
    start: 'features': of the network as drawn, in train mode, of every training image; 'random': unit rows.
    drop_last: leaves out the images of the last, smaller batch of that pass, whose rows then are 0 until
      they are seen, as in the official code.
    negatives: rows drawn for a step besides the batch's own; None: all of them.
    temperature: of the cross-entropy.
    momentum: share of a row that an update keeps.
    update: 'ema' moves each image's own row; 'gradient' all compared ones, see
      `losses.bank_update_gradient` (inferred: the paper's constants are not known).
    kl_weight: of `losses.sqrt_kl`; 0: none.
    power: likewise.
    cutmix: alpha of the mixtures; 0: none.
  """

  start: Literal['features', 'random'] = 'features'
  drop_last: bool = False
  negatives: int | None = 10000
  temperature: float = 0.2
  momentum: float = 0.5
  update: Literal['ema', 'gradient'] = 'ema'
  kl_weight: float = 20.0
  power: float = 0.5
  cutmix: float = 0.0

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    for name in ('temperature', 'power'):
      if getattr(self, name) <= 0:
        yield f'{name}={getattr(self, name)}: expected a positive number.'
    for name in ('kl_weight', 'cutmix'):
      if getattr(self, name) < 0:
        yield f'{name}={getattr(self, name)}: expected at least 0.'
    if not 0 <= self.momentum <= 1:
      yield f'momentum={self.momentum}: expected a share in [0, 1].'
    if self.negatives is not None and self.negatives < 1:
      yield f'negatives={self.negatives}: expected at least 1, or None for all rows.'


@dataclasses.dataclass(frozen=True)
class Projector:
  """The head over the backbone: linear layers with batch norms and ReLUs between, biases everywhere."""

  hidden: int = 2048
  features: int = 256
  layers: int = 3


@dataclasses.dataclass(frozen=True)
class TwoViews:
  """Learning rates of the two-view methods, where they are not the recipe's.

  Attributes:
    base: of the schedule; None: the recipe's.
    predictor_rate: of SimSiam's predictor, constant; None: that of all.
  """

  base: float | None = None
  predictor_rate: float | None = None

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    for name in ('base', 'predictor_rate'):
      value = getattr(self, name)
      if value is not None and not 0 < value < math.inf:
        yield f'{name}={value}: expected a positive number, or None.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(pretraining.Settings):
  """Settings of single-branch learning.

  Attributes:
    bank: of the method.
    head: over the backbone; `features` is the length of the bank's rows.
    heads: of the two-view methods.
    target: of those with a momentum encoder, and temperatures.
    two_views: learning rates of the two-view methods.
    runs: rows, of `VARIANTS` and `TWO_VIEWS`; costs are compared with the first of the latter.
    timed: repeats of the measurement of a step's time; 0: costs are not measured.
  """

  bank: Bank = section(Bank)
  head: Projector = section(Projector)
  heads: Heads = section(Heads)
  target: Momentum = section(Momentum)
  two_views: TwoViews = section(TwoViews)
  runs: tuple[str, ...] = ('npid', 'calibrated', 'single_branch', 'simsiam')
  timed: int = 5


def encoder(config: Settings) -> siamese.Networks:
  """Returns backbone and head."""
  own, norm = config.head, {'norm_groups': config.model.get('norm_groups', 1)}
  sizes = (*[own.hidden] * (own.layers - 1), own.features)
  projector = models.MLPHead(sizes, hidden_bias=True, **norm)
  return siamese.Networks(
    models.Encoder(networks.create(config.model, num_classes=None), projector), None
  )


def one_view(config: Settings) -> Callable[[Array, Array], list[Array]]:
  """Returns `(keys, images) -> [view]`."""
  normal = {'mean': config.data.mean, 'std': config.data.std}
  options = {**config.augment.crop_options(), **normal}
  augment = data.resized_crop_augment(config.data.view[0], **options)
  return lambda keys, images: data.draw_views(augment, keys, images, 1)


def training(config: Settings, name: str) -> Run:
  """Returns the pretraining by a single branch; its bank is `state.extra['bank']`, rows over all devices."""
  title, _, changes = VARIANTS[name]
  own, size = dataclasses.replace(config.bank, **changes(config.bank)), config.data.train_size or 0
  nets, count = encoder(config), size if own.negatives is None else own.negatives
  drawn = ('drop_path',) * bool(config.model.get('drop_path'))

  def draw_bank(variables: runs.Variables, key: Array) -> PyTree:
    del variables
    rows = losses.normalize(jax.random.normal(key, (size, config.head.features)))
    return {'bank': pad_rows(rows)}

  def loss(
    params: PyTree, state: LossState, views: list[Array], keys: dict[str, Array], ids: Array
  ) -> tuple[Array, Out]:
    (x,), bank, mixed = views, state.extra['bank'], {}
    if own.cutmix:
      x, partners, share = data.cutmix(keys['cutmix'], x, own.cutmix, own_half=True)
      mixed = {'partners': partners, 'share': share}
    columns, where = losses.sample_columns(keys['columns'], ids, count, size)
    stats, rngs = state.model_state['batch_stats'], {name: keys[name] for name in drawn}
    online = siamese.online_pass(nets, params, stats, [x], rngs=rngs)
    (z,) = online.projections
    found = losses.memory_bank_loss(
      z, bank, columns, own.temperature, kl_weight=own.kl_weight, power=own.power, where=where,
      **mixed,
    )  # fmt: skip
    if own.update == 'ema':
      bank = losses.bank_update_ema(bank, ids, z, own.momentum)
    else:
      given = z, found.cosines, own.temperature, own.momentum
      bank = losses.bank_update_gradient(bank, columns, *given, where=where)
    z_std = evaluation.feature_std(jax.lax.stop_gradient(z))
    metrics = {'cross_entropy': found.cross_entropy, 'kl': found.kl, 'z_std': z_std}
    return found.loss, Out({'batch_stats': online.batch_stats}, {'bank': bank}, metrics)

  images = jnp.zeros((2 * config.model.get('norm_groups', 1), *config.data.view))
  targets = siamese_methods.own_projections()._replace(init=draw_bank)
  streams = ('columns', 'cutmix', 'start', *drawn)
  rules = row_rules(config.mesh.make(), 'extra/bank')
  split = dataclasses.replace(config, recipe=config.recipe.with_rules(rules))
  return pretraining.training(
    split, title, siamese.init(nets, targets, images, streams), loss,
    fields=('index',), views=one_view(config), decides={'bank': own, 'head': config.head},
  )  # fmt: skip


def calibrated(config: Settings, name: str, source: data.Source, state: TrainState) -> TrainState:
  """Returns a drawn state with the bank that a run starts with.

  In train mode over shuffled, augmented images, as the official code does it: running statistics move along.
  The last batch is filled up with images that were there before, so that all have statistics of as many.
  """
  _, _, changes = VARIANTS[name]
  own = dataclasses.replace(config.bank, **changes(config.bank))
  if own.start == 'random':
    return state
  nets, views, mesh = encoder(config), one_view(config), config.mesh.make()
  dtype = config.recipe.program_options['compute_dtype'] or 'float32'
  key = step_keys(state)['start']

  @jax.jit
  def embed(params: PyTree, stats: PyTree, batch: PyTree) -> tuple[Array, PyTree]:
    each = jax.vmap(functools.partial(jax.random.fold_in, key))(batch['index'])
    seen = cast_floating((params, views(each, batch['image'])), dtype)
    rngs = {'drop_path': key} if config.model.get('drop_path') else None
    online = siamese.online_pass(nets, seen[0], stats, seen[1], rngs=rngs)
    return online.projections[0], online.batch_stats

  size, batch_size = len(source), config.recipe.batch_size
  order = None if own.drop_last else functools.partial(filled_order, size, batch_size, config.seed)
  feed = harness_data.loader(
    config.data, source, batch_size, mesh=config.mesh, seed=config.seed, sampler=order, num_epochs=1
  )
  stats = state.model_state['batch_stats']

  def features() -> Iterator[tuple[Array, Array]]:
    nonlocal stats
    for batch in feed:
      given = {name: batch[name] for name in ('image', 'index')}
      given = data.to_device(given, parallel.batch_sharding(mesh))
      z, stats = embed(state.params, stats, given)
      yield given['index'], z

  try:
    bank = losses.bank_init(jax.jit(jnp.zeros_like)(state.extra['bank']), features())
  finally:
    feed.close()
  return state.replace(model_state={'batch_stats': stats}, extra={'bank': bank})


def filled_order(size: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
  """Returns all records in a drawn order, and the first ones again until the last batch is full."""
  order = np.random.default_rng((seed, epoch)).permutation(size)
  return np.concatenate([order, order[: -size % batch_size]])


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from pretraining.check(config)
  yield from feature_evaluation.check(config.eval, config.data.train_size)
  rows = ['untrained', *(title for title, *_ in VARIANTS.values()), *TWO_VIEWS.values()]
  yield from results.check_claims(config, rows, [*config.eval.metrics(), *METRICS])
  known, recipe, size = (*VARIANTS, *TWO_VIEWS), config.recipe, config.data.train_size
  if unknown := [name for name in config.runs if name not in known]:
    yield f'runs: {unknown} are none of {", ".join(known)}.'
  if not config.runs:
    yield f'runs is empty; runs: {", ".join(known)}.'
  groups = config.model.get('norm_groups', 1)
  if recipe.batch_size < 2 * groups:
    each = 'batch norm' if groups == 1 else f'batch norms in {groups} groups'
    yield f'recipe.batch_size={recipe.batch_size}: expected at least {2 * groups}, for {each}.'
  if recipe.microbatches > 1:
    yield 'recipe.microbatches: expected 1; bank, statistics and negatives are of the whole batch.'
  if size and (config.bank.negatives or 0) > size:
    yield f'bank.negatives={config.bank.negatives}: expected at most data.train_size={size}.'
  yield from siamese_methods.check(config.runs, recipe, config.target)
  if config.head.layers < 1:
    yield f'head.layers={config.head.layers}: expected at least 1.'
  if config.timed < 0:
    yield f'timed={config.timed}: expected a number of repeats, or 0.'
  yield from found_by('model', encoder, config)


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings by the names of `config.runs`."""
  del facts
  return {
    name: training(config, name) if name in VARIANTS else two_view_training(config, name)
    for name in config.runs
  }


def two_view_training(config: Settings, name: str) -> Run:
  """Returns the pretraining by a two-view method, at its own learning rates."""
  own, recipe = config.two_views, config.recipe
  if own.base is not None:
    recipe = dataclasses.replace(
      recipe, schedule=dataclasses.replace(recipe.schedule, base=own.base)
    )
  return siamese_methods.training(
    dataclasses.replace(config, recipe=recipe),
    name,
    config.heads,
    config.target,
    predictor_rate=own.predictor_rate,
  )


def relative_costs(config: Settings, plan: Mapping[str, Run]) -> dict[str, dict[str, float]]:
  """Returns what steps cost, also relative to the first two-view method where there is one.

  Of the method and the two-view ones: the other rows differ from the method in numbers alone.
  """
  if not config.timed:
    return {}
  say('costs of a step')
  measured = [name for name in plan if name in ('single_branch', *TWO_VIEWS)]
  sides = {name: costs.Side(plan[name].program) for name in measured}
  found = costs.measure(sides, config.mesh.make(), config.timed)
  unit = next((found[name] for name in plan if name in TWO_VIEWS), None)
  kinds = {'relative_flops': 'gigaflops', 'relative_time': 'milliseconds'}
  return {
    name: {what: own[what] for what in kinds.values()}
    | ({kind: own[what] / unit[what] for kind, what in kinds.items()} if unit else {})
    for name, own in found.items()
  }


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Pretrains by each method, judges the frozen backbones over time, and compares what steps cost."""
  sources = {split: harness_data.load(config.data, split) for split in ('train', 'test')}
  backbone, plan = networks.create(config.model, num_classes=None), programs(config)
  judge = feature_evaluation.evaluator(config, backbone, sources)
  costly = relative_costs(config, plan)

  def evaluate(variables: runs.Variables) -> dict[str, float]:
    return judge(siamese.backbone_variables(variables))

  drawn = jax.jit(backbone.init)(jax.random.key(config.seed), jnp.zeros((2, *config.data.view)))
  rows, curves, histories = [results.row('untrained', 'reference', judge(dict(drawn)))], {}, {}
  for name, own in plan.items():
    begin = None
    if name in VARIANTS:
      begin = functools.partial(calibrated, config, name, sources['train'])
    folder = workdir / name
    trained = runs.train(own, sources['train'], folder, begin=begin, evaluate=evaluate)
    curve = [line for line in trained.history if 'knn_fp' in line]
    z_std = pretraining.say_collapse(own.title, trained.history)
    scores = {name: curve[-1][name] for name in config.eval.metrics()}
    metrics = {**scores, 'knn_early': curve[0]['knn_fp'], 'z_std': z_std, **costly.get(name, {})}
    role = VARIANTS[name][1] if name in VARIANTS else 'baseline'
    rows.append(results.row(own.title, role, metrics))
    curves[own.title], histories[own.title] = curve, trained.history
  draw(config, rows, curves, workdir / 'neighbors_and_costs.png')
  pretraining.draw_curves(config, histories, workdir / 'curves.png')
  shown = feature_evaluation.shown(config, *METRICS)
  return results.results(config, rows, shown, 'accuracies in %')


def draw(
  config: Settings,
  rows: Sequence[Mapping[str, Any]],
  curves: Mapping[str, Sequence[Mapping[str, float]]],
  picture: pathlib.Path,
) -> None:
  """Draws nearest neighbors over training; where costs are measured, the linear probe over a step's, too."""
  per_epoch = pretraining.length(config).steps_per_epoch
  priced = [item for item in rows if 'gigaflops' in item['metrics']]
  panels = 1 + bool(priced)
  with pictures.drawn(picture, 1, panels, size=(5.5 * panels, 4.2), squeeze=False) as axes:
    left, right = axes[0, 0], axes[0, -1]
    for title, curve in curves.items():
      epochs = [line['step'] / per_epoch for line in curve]
      left.plot(epochs, [line['knn_fp'] for line in curve], marker='o', label=title)
    left.axhline(rows[0]['metrics']['knn_fp'], color='gray', linestyle=':', label='untrained')
    left.set_xlabel('epoch')
    left.set_ylabel('nearest neighbors, accuracy (%)')
    left.set_title(pictures.title(config))
    left.legend(frameon=False)
    if not priced:
      return
    for item in priced:
      right.scatter(item['metrics']['gigaflops'], item['metrics']['probe_fp'], label=item['name'])
    right.set_xlim(left=0)
    right.set_xlabel('GFLOP a step')
    right.set_ylabel('linear probe, accuracy (%)')


if __name__ == '__main__':
  launcher.main('efficient_ssl')
