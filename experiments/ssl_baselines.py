"""Seven ways to learn from images without labels, which others build on and are compared with.

SimCLR, MoCo v2, BYOL, SimSiam, DINO, Barlow Twins and MAE, each as published: loss, heads, momentum encoder,
queue, center and masks. The backbones are judged frozen, by nearest neighbors and a linear probe, next to a
network as it was drawn. A method has collapsed when all images get one feature: `z_std`, the deviation of
unit-length features over images times the root of their dimension, is then near 0; what is below 0.3 is said.

  python -m experiments.ssl_baselines
  python -m experiments.ssl_baselines --config.methods=dino,mae
  python -m experiments.ssl_baselines --config=imagenet_moco --workdir=DIR
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks, pictures, results, runs
from experiments.harness.runs import Run
from experiments.harness.settings import found_by, section
from experiments.protocols import (
  feature_evaluation,
  fine_tuning,
  masked_modeling,
  pretraining,
  siamese,
  siamese_methods,
)
from experiments.protocols.fine_tuning import FineTuning
from experiments.protocols.masked_modeling import Masking
from experiments.protocols.siamese_methods import Heads, Momentum, Prototypes
from jaxlab import data

Array = jax.Array
PyTree = Any

TITLES = {**siamese_methods.TITLES, 'mae': 'MAE'}
READ = {  # what a method reads of the settings
  'simclr': ('heads', 'target'),
  'moco': ('heads', 'target'),
  'byol': ('heads', 'target'),
  'simsiam': ('heads', 'predictor_rate'),
  'dino': ('heads', 'target', 'prototypes'),
  'barlow': ('heads', 'redundancy_weight'),
  'mae': ('masking',),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(pretraining.Settings):
  """Settings of the baselines.

  Attributes:
    methods: rows, of `TITLES`.
    views: what differs from `augment` in each view of an image, and its `size`; MAE sees the first alone.
    heads: over the backbone.
    target: momentum encoder, queue, temperatures.
    prototypes: of DINO.
    masking: of MAE.
    redundancy_weight: of Barlow Twins.
    final_weight_decay: at the end of the training, half a cosine from the optimizer's (DINO); None: constant.
    predictor_rate: learning rate of the predictor, constant (SimSiam); None: that of all.
    fine_tuning: of each backbone under a classifier, that of the network as drawn, too; None: frozen alone.
  """

  methods: tuple[str, ...]
  views: tuple[Mapping[str, Any], ...] = ({}, {})
  heads: Heads = section(Heads)
  target: Momentum = section(Momentum)
  prototypes: Prototypes = section(Prototypes)
  masking: Masking = section(Masking)
  redundancy_weight: float = 0.0051
  final_weight_decay: float | None = None
  predictor_rate: float | None = None
  fine_tuning: FineTuning | None = None


def method(config: Settings, name: str) -> tuple[siamese.Networks, siamese.Targets]:
  """Returns the networks of a method but MAE, and what their predictions are compared with."""
  own = {'prototype': config.prototypes, 'redundancy_weight': config.redundancy_weight}
  parts = config.model, config.heads, config.target, pretraining.length(config)
  return siamese_methods.method(name, *parts, **own)


def draw_views(config: Settings) -> Callable[[Array, Array], list[Array]]:
  """Returns `(keys, images) -> views`; neighboring views of equal options are drawn in one program."""
  normal = {'mean': config.data.mean, 'std': config.data.std}

  def augment(own: Mapping[str, Any]) -> Callable[[Array, Array], Array]:
    options = {**config.augment.crop_options(), **own}
    return data.resized_crop_augment(options.pop('size', config.data.view[0]), **options, **normal)

  alike = [list(same) for _, same in itertools.groupby(config.views, key=dict)]
  kinds = [(augment(same[0]), len(same)) for same in alike]

  def draw(keys: Array, images: Array) -> list[Array]:
    found = []
    for index, (own, count) in enumerate(kinds):
      drawn = jax.vmap(functools.partial(jax.random.fold_in, data=index))(keys)
      found += data.draw_views(own, drawn, images, count)
    return found

  return draw


def optimizer(
  config: Settings, name: str
) -> Callable[[optax.Schedule], optax.GradientTransformation]:
  """Returns `schedule -> optimizer` of a method."""
  own = {'final_weight_decay': config.final_weight_decay, 'predictor_rate': config.predictor_rate}
  parts = config.recipe.optimizer, config.heads, pretraining.length(config)
  frozen = (masked_modeling.POSITIONS,) * (name == 'mae')
  return siamese_methods.optimizer(name, *parts, prototype=config.prototypes, frozen=frozen, **own)


def siamese_training(config: Settings, name: str) -> Run:
  """Returns the pretraining by a method that compares views."""
  nets, targets = method(config, name)
  images = jnp.zeros((2 * config.model.get('norm_groups', 1), *config.data.view))
  drawn = ('drop_path',) * bool(config.model.get('drop_path'))

  return pretraining.training(
    config, TITLES[name], siamese.init(nets, targets, images, drawn),
    siamese.view_loss(nets, targets, drawn), views=draw_views(config), after=targets.after,
    optimizer=optimizer(config, name), decides=decides(config, name),
  )  # fmt: skip


def masked_training(config: Settings) -> Run:
  """Returns the pretraining by MAE, which sees the first view alone."""
  first = dataclasses.replace(config, views=config.views[:1])
  own = draw_views(first), optimizer(config, 'mae'), decides(first, 'mae')
  return masked_modeling.training(config, config.masking, TITLES['mae'], *own)


def decides(config: Settings, name: str) -> dict[str, Any]:
  """Returns what decides a method's training besides recipe, data and model."""
  names = ('views', 'final_weight_decay', *READ[name])
  return {'method': name, **{field: getattr(config, field) for field in names}}


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from pretraining.check(config)
  yield from feature_evaluation.check(config.eval, config.data.train_size)
  rows = ['untrained', *TITLES.values()]
  yield from results.check_claims(config, rows, [*config.eval.metrics(), *extra_metrics(config)])
  if config.fine_tuning:
    yield from fine_tuning.check(config, config.fine_tuning)
  if unknown := [name for name in config.methods if name not in TITLES]:
    yield f'methods: {unknown} are none of {", ".join(TITLES)}.'
  if not config.methods:
    yield f'methods is empty; methods: {", ".join(TITLES)}.'
  yield from check_views(config)
  recipe = config.recipe
  yield from siamese_methods.check(config.methods, recipe, config.target, config.prototypes)
  if recipe.batch_size < 2:
    yield f'recipe.batch_size={recipe.batch_size}: expected at least 2, for batch norms and negatives.'
  if recipe.microbatches > 1 and {*config.methods} - {'mae'}:
    yield 'recipe.microbatches: expected 1; negatives, statistics, queue and center are of the whole batch.'
  for name in ('redundancy_weight', 'final_weight_decay', 'predictor_rate'):
    if (value := getattr(config, name)) is not None and value < 0:
      yield f'{name}={value}: expected at least 0.'
  for name in {*config.methods} & {*TITLES}:
    if name == 'mae':
      yield from found_by('model', masked_modeling.parts, config, config.masking)
    else:
      yield from found_by('model', method, config, name)


def check_views(config: Settings) -> Iterator[str]:
  """Yields what is wrong with the views."""
  pairs = {*config.methods} - {'mae', 'dino'}
  least = 1 if {*config.methods} == {'mae'} else 2
  if len(config.views) < least:
    yield f'views: expected at least {least}, one entry a view, got {len(config.views)}.'
  if len(config.views) > 2 and pairs:
    yield f'views: {len(config.views)} are for DINO; {", ".join(sorted(pairs))} take 2.'
  sizes = [own.get('size', config.data.view[0]) for own in config.views]
  if len({*sizes[:2]}) > 1:
    yield f'views: the first two have one size, the teacher sees both as one batch; got {sizes[:2]}.'
  if {*sizes} - {config.data.view[0]} and not config.model.get('dynamic_image_size'):
    name = config.model['name']
    if name.startswith(('vit', 'deit')):
      yield f'views: of sizes {sizes}; {name} needs model.dynamic_image_size=True for others than its own.'
  yield from found_by('views', draw_views, config)


def extra_metrics(config: Settings) -> tuple[str, ...]:
  """Returns the names of what is measured besides the evaluation of frozen backbones."""
  return ('fine_tuned', 'z_std') if config.fine_tuning else ('z_std',)


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings by the names of `config.methods`, and the fine-tuning behind each."""
  del facts
  found = {
    name: masked_training(config) if name == 'mae' else siamese_training(config, name)
    for name in config.methods
  }
  if own := config.fine_tuning:
    starts = {'untrained': None, **{name: run.identity for name, run in found.items()}}
    shared = fine_tuning.training(config, own, '', None)  # but for what it starts from
    for name, start in starts.items():
      title = f'{TITLES.get(name, name)}, fine-tuned'
      decides = {**shared.decides, 'start': start}
      found[f'{name}_fine_tuned'] = shared._replace(title=title, decides=decides)
  return found


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Pretrains by each method, and judges the backbones, frozen and fine-tuned."""
  sources = {split: harness_data.load(config.data, split) for split in ('train', 'test')}
  backbone, plan = networks.create(config.model, num_classes=None), programs(config)
  judge = feature_evaluation.evaluator(config, backbone, sources)

  def evaluate(variables: runs.Variables) -> dict[str, float]:
    return judge(siamese.backbone_variables(variables))

  def row(name: str, role: str, variables: runs.Variables, **metrics: float) -> dict[str, Any]:
    metrics = {**judge(variables), **metrics}
    if own := config.fine_tuning:
      again = f'{name}_fine_tuned'
      parts = plan[again], variables, sources, workdir / again
      metrics['fine_tuned'] = fine_tuning.accuracy(config, own, *parts)
    return results.row(TITLES.get(name, name), role, metrics)

  images = jnp.zeros((2, *config.data.view))
  drawn = jax.jit(backbone.init)(jax.random.key(config.seed), images)
  rows, histories = [row('untrained', 'baseline', dict(drawn))], {}
  for name in config.methods:
    trained = runs.train(plan[name], sources['train'], workdir / name, evaluate=evaluate)
    histories[TITLES[name]] = trained.history
    z_std = pretraining.say_collapse(TITLES[name], trained.history)
    found = siamese.backbone_variables(trained.variables)
    rows.append(row(name, 'method', found, z_std=z_std))
  draw(config, rows, histories, workdir / 'accuracy_and_spread.png')
  pretraining.draw_curves(config, histories, workdir / 'curves.png')
  metrics = feature_evaluation.shown(config, *extra_metrics(config))
  return results.results(config, rows, metrics, 'accuracies in %')


def draw(
  config: Settings,
  rows: Sequence[Mapping[str, Any]],
  histories: Mapping[str, Sequence[Mapping[str, float]]],
  picture: pathlib.Path,
) -> None:
  """Draws what the features are worth, and their spread over training, in which a collapse shows."""
  with pictures.drawn(picture, 1, 2, size=(11, 4.2)) as (left, right):
    places, names = np.arange(len(rows)), [item['name'] for item in rows]
    for shift, (metric, label) in zip(
      (-0.2, 0.2), (('knn_fp', 'nearest neighbors'), ('probe_fp', 'linear probe')), strict=True
    ):
      left.bar(places + shift, [item['metrics'][metric] for item in rows], 0.4, label=label)
    left.set_xticks(places, names, rotation=30, ha='right')
    left.set_ylabel('accuracy (%)')
    left.set_title(pictures.title(config))
    for title, history in histories.items():
      lines = [line for line in history if 'z_std' in line]
      right.plot([line['step'] for line in lines], [line['z_std'] for line in lines], label=title)
    right.set_xlabel('step')
    right.set_ylabel('z_std')
    right.set_ylim(0, 1.05)
    for axis in (left, right):
      axis.legend(frameon=False)


if __name__ == '__main__':
  launcher.main('ssl_baselines')
