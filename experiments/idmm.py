"""IDMM: Training Vision Transformers with Only 2040 Images (Cao, Yu & Wu, ECCV 2022, arXiv 2201.10728).

A vision transformer learns from few images, without others: first, every image is a class of its own, and a
linear classifier tells it from all others (parametric instance discrimination) over many crops, mixed by
CutMix; then the network is fine-tuned on the labels of the same images, perhaps at several sizes.

  stage 1: sum over groups of crops of mean cross_entropy(head(f(crop)), image), of both images in a mixture

Claim: what is fine-tuned from there is better than what is trained on the labels from scratch, and the
features of the first stage alone have better neighbors than those of a network as drawn.

  python -m experiments.idmm
  python -m experiments.idmm --config=flowers_deit_tiny --workdir=DIR
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import launcher, pictures, results, runs
from experiments.harness.runs import Run
from experiments.harness.settings import found_by, section
from experiments.harness.tasks import is_correct
from experiments.protocols import (
  feature_evaluation,
  fine_tuning_stages,
  pretraining,
  siamese,
  siamese_methods,
)
from experiments.protocols.siamese_methods import Heads, Momentum, Prototypes
from jaxlab import data, evaluation, losses, models, training
from jaxlab.parallel import interleave
from jaxlab.training import Initial, LossState, Out, TrainState

Array = jax.Array
PyTree = Any

# Rows with a first stage: title, role, and what differs in the section `instances`.
VARIANTS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
  'idmm': ('IDMM', 'method', {}),
  'plain': ('without mixtures', 'reference', {'mix': 'none'}),
  'mixup': ('with mixup', 'reference', {'mix': 'mixup'}),
  'one_group': ('without multi-crop', 'reference', {'groups': 1}),
}
SCRATCH = {'scratch': 'from scratch', 'scratch_longer': 'from scratch, as long'}
OTHERS = siamese_methods.TITLES
METRICS = ('instance_accuracy', 'z_std')


@dataclasses.dataclass(frozen=True)
class Instances:
  """The first stage.

  Attributes:
    crops: number of crops in each group; the groups' mean losses are added.
    scales: of each group, the share of an image that a crop covers.
    groups: how many of the groups are used; None: all.
    mix: 'cutmix' or 'mixup', anew for each group, or 'none'.
    alpha: of the mixtures' Beta distribution.
    label_smoothing: 0 with DeiT, 0.1 with the others in the official code.
    average: decay of a moving average of the parameters behind every epoch, slower at first
      (`training.warm_decay`); 0: none. It is kept, and nothing starts from it, as in the official code.
  """

  crops: tuple[int, ...] = (2, 4)
  scales: tuple[tuple[float, float], ...] = ((0.14, 1.0), (0.05, 0.4))
  groups: int | None = None
  mix: Literal['cutmix', 'mixup', 'none'] = 'cutmix'
  alpha: float = 0.5
  label_smoothing: float = 0.0
  average: float = 0.999

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not self.crops or len(self.crops) != len(self.scales) or min(self.crops) < 1:
      yield f'crops={self.crops}, scales={self.scales}: expected a number and a scale for each group.'
    if self.groups is not None and not 1 <= self.groups <= len(self.crops):
      yield f'groups={self.groups}: expected 1 to {len(self.crops)}.'
    for name in ('label_smoothing', 'average'):
      if not 0 <= getattr(self, name) <= 1:
        yield f'{name}={getattr(self, name)}: expected a share in [0, 1].'
    if self.alpha < 0:
      yield f'alpha={self.alpha}: expected at least 0.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(fine_tuning_stages.Settings):
  """Settings of IDMM.

  Attributes:
    instances: the first stage; images are as many classes as `data.train_size`.
    heads: of the methods that IDMM is compared with.
    target: of those with a momentum encoder, and temperatures.
    prototypes: of DINO.
    runs: rows, of `VARIANTS`, `SCRATCH` and `OTHERS`; `'scratch_longer'` is trained in its first stage for
      the epochs of the pretraining, too.
  """

  instances: Instances = section(Instances)
  heads: Heads = section(Heads)
  target: Momentum = section(Momentum)
  prototypes: Prototypes = section(Prototypes)
  runs: tuple[str, ...] = ('scratch', 'scratch_longer', 'idmm')


class Resized(nn.Module):
  """A backbone that sees whole images at the size of its views."""

  backbone: nn.Module
  size: int

  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns the backbone's features of float images `[batch, height, width, channels]`."""
    x = jax.image.resize(x, (x.shape[0], self.size, self.size, x.shape[-1]), 'bilinear')
    return self.backbone(x, train=train)


def draw_crops(config: Settings, own: Instances) -> Callable[[Array, Array], list[Array]]:
  """Returns `(keys, images) -> groups`, each `[batch * crops, ...]`, image by image."""
  normal = {'mean': config.data.mean, 'std': config.data.std}
  kinds = []
  for count, scale in list(zip(own.crops, own.scales, strict=True))[: own.groups]:
    options = {**config.augment.crop_options(), 'scale': scale, **normal}
    kinds.append((data.resized_crop_augment(config.data.view[0], **options), count))

  def draw(keys: Array, images: Array) -> list[Array]:
    found = []
    for index, (augment, count) in enumerate(kinds):
      drawn = jax.vmap(functools.partial(jax.random.fold_in, data=index))(keys)
      found.append(interleave(data.draw_views(augment, drawn, images, count)))
    return found

  return draw


def instance_training(config: Settings, name: str) -> Run:
  """Returns the first stage: every image is a class."""
  title, _, changes = VARIANTS[name]
  own, size = dataclasses.replace(config.instances, **changes), config.data.train_size or 1
  model = fine_tuning_stages.network(config, config.data, size)
  mix, features = fine_tuning_stages.mixer(own.mix, own.alpha), models.anatomy(model).features
  drawn = ('drop_path',) * bool(config.model.get('drop_path'))

  def init(key: Array) -> Initial:
    key, params_key = jax.random.split(key)
    params = model.init(params_key, jnp.zeros((2, *config.data.view)))['params']
    params = fine_tuning_stages.drawn(config, params)
    names = ('views', 'mix', *drawn)
    streams = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    return Initial(params, {}, {'average': params} if own.average else {}, streams)

  def cross_entropy(logits: Array, labels: Array) -> Array:
    return losses.label_smoothing_cross_entropy(logits, labels, own.label_smoothing)

  def loss(
    params: PyTree, state: LossState, groups: list[Array], keys: dict[str, Array], ids: Array
  ) -> tuple[Array, Out]:
    total, hits, spread = jnp.float32(0), [], []
    for index, x in enumerate(groups):
      folded = {name: jax.random.fold_in(key, index) for name, key in keys.items()}
      labels, partners, share = jnp.repeat(ids, len(x) // len(ids)), jnp.arange(len(x)), 1.0
      if mix is not None:
        x, partners, share = mix(folded['mix'], x, state.step)
      rngs = {name: folded[name] for name in drawn}
      logits, parts = models.capture(
        model, {'params': params}, [features], x, train=True, rngs=rngs
      )
      logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
      total += jnp.mean(data.mixup_loss(cross_entropy, logits, labels, partners, share))
      hits.append(is_correct(logits, labels))
      spread.append(evaluation.feature_std(jax.lax.stop_gradient(parts[features])))
    metrics = {'instance_accuracy': jnp.mean(jnp.concatenate(hits)), 'z_std': spread[0]}
    return total, Out(metrics=metrics)

  def after(state: TrainState) -> TrainState:
    epochs, rest = jnp.divmod(state.step, pretraining.length(config).steps_per_epoch)
    share = jnp.where(rest == 0, training.warm_decay(own.average, epochs), 1.0)
    average = optax.incremental_update(state.params, state.extra['average'], 1 - share)
    return state.replace(extra={'average': average})

  return pretraining.training(
    config, title, init, loss,
    fields=('index',), views=draw_crops(config, own), after=after if own.average else None,
    frozen=fine_tuning_stages.frozen(model),
    decides={'instances': own, 'fan_in_scaled': config.fan_in_scaled},
  )  # fmt: skip


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from pretraining.check(config)
  yield from fine_tuning_stages.check(config)
  yield from feature_evaluation.check(config.eval, config.data.train_size)
  titles = [title for title, *_ in VARIANTS.values()]
  rows = ['untrained', *titles, *SCRATCH.values(), *OTHERS.values()]
  metrics = [*config.eval.metrics(), *METRICS, r'accuracy(_\w+)?']
  yield from results.check_claims(config, rows, metrics)
  known = (*VARIANTS, *SCRATCH, *OTHERS)
  if unknown := [name for name in config.runs if name not in known]:
    yield f'runs: {unknown} are none of {", ".join(known)}.'
  if not config.runs:
    yield f'runs is empty; runs: {", ".join(known)}.'
  if config.recipe.microbatches > 1:
    yield 'recipe.microbatches: expected 1; images are mixed within the whole batch.'
  if config.recipe.batch_size < 2 and {*config.runs} & {*OTHERS}:
    yield f'recipe.batch_size={config.recipe.batch_size}: expected at least 2, for batch norms.'
  if config.fan_in_scaled and {*config.runs} & {*OTHERS}:
    yield f'fan_in_scaled: runs of {", ".join(OTHERS)} draw kernels of their own; leave it empty.'
  yield from siamese_methods.check(config.runs, config.recipe, config.target, config.prototypes)
  yield from found_by('model', first_stages, config)


def first_stages(config: Settings) -> dict[str, Run]:
  """Returns the pretrainings by the names of `config.runs`."""
  model, two = fine_tuning_stages.network(config, config.data, None), (config.heads, config.target)
  sized = {'image_size': config.data.view[0]} if hasattr(model, 'image_size') else {}
  others = dataclasses.replace(config, model={**config.model, **sized})
  return {
    name: siamese_methods.training(others, name, *two, prototype=config.prototypes)
    if name in OTHERS
    else instance_training(config, name)
    for name in config.runs
    if name in {**VARIANTS, **OTHERS}
  }


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the pretrainings by the names of `config.runs`, and the fine-tunings."""
  del facts
  later = {name: fine_tuning_stages.training(config, name, name) for name in config.stage_names}
  return {**first_stages(config), **later}


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Pretrains, judges the features, fine-tunes stage by stage, next to training from scratch."""
  sources = {split: harness_data.load(config.data, split) for split in ('train', 'test')}
  backbone = fine_tuning_stages.network(config, config.data, None)
  judge = feature_evaluation.evaluator(config, Resized(backbone, config.data.view[0]), sources)

  def judged(params: PyTree) -> dict[str, float]:
    return judge(
      {'params': {'backbone': {name: params[name] for name in params if name != 'head'}}}
    )

  drawn = jax.jit(backbone.init)(jax.random.key(config.seed), jnp.zeros((2, *config.data.view)))
  params = fine_tuning_stages.drawn(config, drawn['params'])
  rows, histories = [results.row('untrained', 'reference', judged(params))], {}
  first = first_stages(config)
  for name in config.runs:
    title, role, _ = VARIANTS.get(name, ({**OTHERS, **SCRATCH}.get(name), 'baseline', {}))
    before, variables, metrics = first.get(name), None, {}
    if before is not None:
      trained = runs.train(before, sources['train'], workdir / name / 'images')
      variables = trained.variables if name in VARIANTS else siamese.backbone_variables(
        trained.variables
      )  # fmt: skip
      metrics = judged(variables['params'])
      metrics['z_std'] = pretraining.say_collapse(title, trained.history)
      histories[title] = trained.history
      if name in VARIANTS:
        metrics['instance_accuracy'] = 100 * trained.history[-1]['instance_accuracy']
    for stage in config.stage_names:
      is_first = stage == config.stage_names[0]
      further = config.recipe.epochs if name == 'scratch_longer' and is_first else 0
      own = fine_tuning_stages.training(config, stage, title, further=further, before=before)
      begin = {}
      if variables is not None:
        model = fine_tuning_stages.network(config, own.data, own.data.num_classes)
        begin = {'start': fine_tuning_stages.enlarged(variables, model)}
        begin['fresh'] = ('head/.*',) * is_first
      source = harness_data.load(own.data, 'train')
      trained = runs.train(own, source, workdir / name / stage, **begin)
      before, variables = own, trained.variables
      metrics['accuracy'] = fine_tuning_stages.accuracy(config, stage, variables)
      metrics[f'accuracy_{stage}'] = metrics['accuracy']
    rows.append(results.row(title, role, metrics))
  draw(rows, workdir / 'accuracy_and_neighbors.png')
  pretraining.draw_curves(config, histories, workdir / 'curves.png')
  each = [f'accuracy_{stage}' for stage in config.stage_names if len(config.stages) > 1]
  shown = ['accuracy', *each, *feature_evaluation.shown(config, *METRICS)]
  return results.results(config, rows, shown, 'accuracies in %')


def draw(rows: Sequence[Mapping[str, Any]], picture: pathlib.Path) -> None:
  """Draws the accuracy behind the last stage, and what neighbors of the first stage's features say."""
  kinds = {'accuracy': 'fine-tuned', 'knn_fp': 'nearest neighbors of frozen features'}
  with pictures.drawn(picture, 1, 2, size=(11, 4.2)) as axes:
    for axis, (metric, title) in zip(axes, kinds.items(), strict=True):
      shown = [item for item in rows if metric in item['metrics']]
      axis.bar(range(len(shown)), [item['metrics'][metric] for item in shown], 0.6)
      names = [item['name'] for item in shown]
      axis.set_xticks(range(len(shown)), names, rotation=20, ha='right')
      axis.set_ylabel('accuracy (%)')
      axis.set_title(title)


if __name__ == '__main__':
  launcher.main('idmm')
