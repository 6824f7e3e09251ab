"""Friends and Foes in Learning from Noisy Labels (Zhou, Ge & Wu, 2021): a reconstruction.

Zhou, Ge & Wu, arXiv 2103.15055. There is no public code, and of the paper abstract and introduction alone
were at hand: what stands there is that real noise is partly of images of no class, that classes are unequal,
so that accuracy is no yardstick, and that four friends help: self-supervised learning, another warm-up,
filtering of instances, correction of labels. How they are built here is inferred, and no number of the paper
is claimed:

  1. SimSiam on all training images, whose labels it does not see;
  2. a warm-up of the classifier alone, on frozen features, class-balanced, which can memorize little;
  3. before every epoch a mixture of two Gaussians for the losses of each class tells clean labels;
  4. another label is replaced by the predicted one where the network is sure; else its example is left out;
  5. an epoch on what is kept, all classes with the same weight; the decision is made anew for the next.

A foe is what semi-supervised methods do with the rest: to train on it by its predictions ('semi'), although
it may show no class at all. Yardstick: the mean of the classes' recalls at the end of the training.

  python -m experiments.friends_and_foes
  python -m experiments.friends_and_foes --config=fashion_mnist --seeds=0,1,2
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import launcher, results, runs
from experiments.harness.data import Augment
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Recipe
from experiments.harness.settings import section
from experiments.harness.supervised import Seen, Table
from experiments.harness.tasks import ImageTask
from experiments.protocols import (
  noisy_labels,
  pretraining,
  selected_labels,
  siamese,
  siamese_methods,
)
from experiments.protocols.noisy_labels import Sources
from experiments.protocols.siamese_methods import Heads, Momentum
from jaxlab import classifiers, data, losses
from jaxlab.training import TrainState, map_batches, pad_rows

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Friends:
  """Which ingredients are in.

  Attributes:
    ssl: whether training starts from self-supervised features; otherwise from public or drawn ones.
    warmup: 'linear', of the classifier on frozen features, behind which the features learn at a lower rate;
      or 'full', of the whole network by cross-entropy.
    filter: 'gmm', a mixture for the losses of each class; or 'none', all labels are clean.
    correct: whether labels that are not clean are corrected where the network is sure.
    leftover: what is not kept is left out ('drop'), or learned by its predictions ('semi').
  """

  ssl: bool = True
  warmup: Literal['linear', 'full'] = 'linear'
  filter: Literal['gmm', 'none'] = 'gmm'
  correct: bool = True
  leftover: Literal['drop', 'semi'] = 'drop'


VARIANTS: dict[str, tuple[str, Friends]] = {
  'ff': ('F&F', Friends()),
  'semi': ('F&F, rest unlabeled', Friends(leftover='semi')),
  'no_ssl': ('without SSL', Friends(ssl=False)),
  'full_warmup': ('full warm-up', Friends(warmup='full')),
  'no_filter': ('without filter', Friends(filter='none')),
  'no_correction': ('without correction', Friends(correct=False)),
}
TITLES = {'ce': 'CE', **{name: title for name, (title, _) in VARIANTS.items()}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfSupervised:
  """The self-supervised pretraining, SimSiam.

  Attributes:
    augment: by which views are drawn.
    recipe: of the pretraining.
    heads: over the backbone.
  """

  augment: Augment
  recipe: Recipe
  heads: Heads = section(Heads)


@dataclasses.dataclass(frozen=True)
class Correction:
  """Constants of filter and correction.

  Attributes:
    confidence: at which a label is corrected, tau.
    backbone_rate: learning rate of the features behind a linear warm-up, over that of the classifier.
    unlabeled_weight: of the squared distance to sharpened predictions, of 'semi'.
    temperature: that sharpens them.
  """

  confidence: float = 0.9
  backbone_rate: float = 0.1
  unlabeled_weight: float = 25.0
  temperature: float = 0.5

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not 0 <= self.confidence <= 1:
      yield f'confidence={self.confidence}: expected a probability.'
    for name in ('backbone_rate', 'unlabeled_weight'):
      if getattr(self, name) < 0:
        yield f'{name}={getattr(self, name)}: expected at least 0.'
    if self.temperature <= 0:
      yield f'temperature={self.temperature}: expected a positive number.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(noisy_labels.Settings):
  """Settings of the reconstruction.

  Attributes:
    ssl: the self-supervised pretraining; None: there is none, as public weights are the start.
    warmup: the recipe of the warm-up of the classifier; its epochs are those of a full warm-up, too.
    correction: constants.
    runs: rows: 'ce', and variants.
  """

  ssl: SelfSupervised | None = None
  warmup: Recipe
  correction: Correction = section(Correction)
  runs: tuple[str, ...] = ('ce', 'ff', 'semi')


# --- Trainings ---


def self_supervised(config: Settings) -> Run:
  """Returns the self-supervised training on the images, which sees no label."""
  own, size = config.ssl, config.data.size
  images = dataclasses.replace(config.data, train_size=size, open=None, noise=None, held_out=0)
  common = {f.name: getattr(config, f.name) for f in dataclasses.fields(pretraining.Experiment)}
  settings = pretraining.Settings(
    **common, data=images, augment=own.augment, model=config.model, recipe=own.recipe
  )
  length = pretraining.length(settings)
  nets, targets = siamese_methods.method('simsiam', config.model, own.heads, Momentum(), length)
  blank = jnp.zeros((2, *config.data.view))
  return pretraining.training(
    settings, 'SimSiam', siamese.init(nets, targets, blank), siamese.view_loss(nets, targets),
    optimizer=siamese_methods.optimizer('simsiam', own.recipe.optimizer, own.heads, length),
    decides={'heads': own.heads, 'noise': (config.data.noise, config.data.open, config.data.held_out)},
  )  # fmt: skip


def warm_up(config: Settings, own: Friends) -> Run:
  """Returns the warm-up of a variant."""
  decides = {'ssl': config.ssl if own.ssl else None}
  if own.warmup == 'full':
    recipe = dataclasses.replace(config.recipe, epochs=config.warmup.epochs)
    return noisy_labels.training_run(config, 'warm-up', recipe=recipe, decides=decides)
  run = noisy_labels.training_run(
    config, 'warm-up of the classifier', recipe=config.warmup, decides=decides,
    frozen=(noisy_labels.features(config),), options={'train': False}, repeats=True,
  )  # fmt: skip
  balanced = lambda source: data.ClassBalancedSampler(  # noqa: E731
    data.source_labels(source), seed=config.seed
  )
  return run._replace(sampler=balanced)


def kept_loss(config: Settings, own: Friends, logits: Array, rows: Mapping[str, Array]) -> Array:
  """Returns the loss of a batch: cross-entropy over what is kept, all classes with the same weight.

  Args:
    config: the settings.
    own: the variant.
    logits: `[batch, num_classes]`.
    rows: of the batch, see `revised`.
  """
  weights = jnp.where(rows['keep'], rows['weight'], 0)
  values = losses.cross_entropy(logits, rows['label'])
  # A batch of which nothing is kept has loss 0.
  value = jnp.sum(weights * values) / jnp.maximum(jnp.sum(weights), 1e-6)
  if own.leftover == 'drop':
    return value
  distance = jnp.mean(jnp.square(jax.nn.softmax(logits) - rows['guess']), -1)
  rest = ~rows['keep']
  unlabeled = jnp.sum(jnp.where(rest, distance, 0)) / jnp.maximum(jnp.sum(rest), 1)
  return value + config.correction.unlabeled_weight * unlabeled


def training(config: Settings, name: str) -> Run:
  """Returns the training of a row: of a variant that behind its warm-up."""
  if name == 'ce':
    epochs = config.warmup.epochs + config.recipe.epochs
    recipe = dataclasses.replace(config.recipe, epochs=epochs)
    return noisy_labels.training_run(config, TITLES[name], recipe=recipe)
  title, own = VARIANTS[name]
  recipe = config.recipe
  if own.warmup == 'linear':
    rates = ((noisy_labels.features(config), config.correction.backbone_rate),)
    recipe = dataclasses.replace(
      recipe, optimizer=dataclasses.replace(recipe.optimizer, lr_multipliers=rates)
    )

  def loss(logits: Array, labels: Array, seen: Seen) -> Array:
    del labels  # those of the table are in their place
    return kept_loss(config, own, logits, seen.rows)

  table = Table(shapes(config, own), lambda logits, labels, seen: seen.rows)
  decides = {
    'correction': config.correction, 'friends': own, 'warm-up': warm_up(config, own).identity,
  }  # fmt: skip
  run = noisy_labels.training_run(
    config, title, recipe=recipe, loss=loss, table=table, decides=decides
  )
  steps = noisy_labels.steps_per_epoch(config, recipe)
  return run._replace(revise_at=range(0, run.num_steps, steps))


# --- Filter and correction, between epochs ---


def shapes(config: Settings, own: Friends) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of the records' rows: label, whether it is kept, its weight, the sharpened guess."""
  size, classes = config.data.size, config.data.num_classes
  kinds = {'label': jnp.int32, 'keep': jnp.bool_, 'corrected': jnp.bool_, 'weight': jnp.float32}
  found = {name: jax.ShapeDtypeStruct((size,), kind) for name, kind in kinds.items()}
  if own.leftover == 'semi':
    found['guess'] = jax.ShapeDtypeStruct((size, classes), jnp.float32)
  return found


@functools.partial(jax.jit, static_argnames=('model', 'task'))
def outlook(
  variables: Variables, key: Array, batch: Mapping[str, Array], *, model: nn.Module, task: ImageTask
) -> dict[str, Array]:
  """Returns the loss of each record's label, and the prediction, the mean over two augmented views."""
  height, width, _ = task.view
  top, left = (task.stored[0] - height) // 2, (task.stored[1] - width) // 2
  middle = batch['image'][:, top : top + height, left : left + width]
  logits = model.apply(variables, task.inputs({**batch, 'image': middle}), train=False)
  values = losses.cross_entropy(logits.astype(jnp.float32), batch['label'])
  probs = []
  for view in range(2):
    each = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, view)))(
      batch['index']
    )
    seen = model.apply(variables, task.augmented(each, batch), train=False)
    probs.append(jax.nn.softmax(seen.astype(jnp.float32)))
  return {'loss': values, 'probs': sum(probs) / 2}


def revised(config: Settings, own: Friends, sources: Sources, state: TrainState) -> TrainState:
  """Returns the state with the table of the next epoch, by what the network says now."""
  key = jax.random.fold_in(jax.random.key(config.seed), int(state.step))
  model, variables = noisy_labels.network(config), runs.variables_of(state)
  found = map_batches(
    functools.partial(outlook, variables, key, model=model, task=config.task),
    sources.train,
    batch_size=config.eval_batch_size,
    mesh=config.mesh.make(),
    **harness_data.reading(config.data, 'train'),
  )
  classes = config.data.num_classes
  clean = None if own.filter == 'gmm' else np.ones(len(sources.given), bool)
  made = classifiers.filter_and_correct(
    found['loss'], sources.given, found['probs'], config.correction.confidence, classes,
    clean=clean, correct=own.correct,
  )  # fmt: skip
  keep, label = np.asarray(made.keep), np.asarray(made.label)
  counts = np.bincount(label[keep], minlength=classes)
  rows = {
    'label': label,
    'keep': keep,
    'corrected': np.asarray(made.corrected),
    # In place of class-balanced draws: a batch holds a record once.
    'weight': (keep.sum() / classes / np.maximum(counts, 1))[label].astype(np.float32),
  }
  if own.leftover == 'semi':
    sharp = found['probs'] ** (1 / config.correction.temperature)
    rows['guess'] = (sharp / sharp.sum(-1, keepdims=True)).astype(np.float32)
  return state.replace(extra={**state.extra, 'table': pad_rows(rows)})


# --- The experiment ---


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from noisy_labels.check(config)
  if config.data.multi_label:
    yield 'data.multi_label: expected one label an image.'
  yield from noisy_labels.check_recipe(config, config.warmup, 'warmup')
  rows = [*TITLES.values(), *(f'F&F, {kind}' for kind in selected_labels.KINDS.values())]
  yield from results.check_claims(config, rows, METRICS)
  if unknown := [name for name in config.runs if name not in TITLES]:
    yield f'runs: {unknown} are none of {", ".join(TITLES)}.'
  if not config.runs:
    yield f'runs is empty; runs: {", ".join(TITLES)}.'
  if config.ssl is not None and config.pretrained:
    yield 'ssl: expected None, as training starts from the public weights of pretrained.'
  if config.ssl is not None and config.ssl.augment.kind != 'resized_crop':
    yield f"ssl.augment.kind={config.ssl.augment.kind!r}: expected 'resized_crop', which draws the views."
  if config.ssl is not None:
    yield from noisy_labels.check_recipe(config, config.ssl.recipe, 'ssl.recipe')
  for key, recipe in (('recipe', config.recipe), ('warmup', config.warmup)):
    if recipe.mixup or recipe.cutmix or recipe.microbatches > 1:
      yield f'{key}: expected no mixup, cutmix or microbatches; a record has one label and one weight.'
  if not config.recipe.eval_every:
    yield 'recipe.eval_every: expected a number of steps; recalls over training are the result.'


METRICS = (
  'macro_recall', 'best', 'fall', 'macro_f1', 'harmonic', 'accuracy', 'kept_right', 'corrected_right',
  'dropped',
)  # fmt: skip


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings by the names of `config.runs`, warm-ups and SimSiam by their own."""
  del facts
  plan = {}
  for name in config.runs:
    plan[name] = training(config, name)
    if name == 'ce':
      continue
    own = VARIANTS[name][1]
    plan[start_name(config, own)] = warm_up(config, own)
    if own.ssl and config.ssl is not None:
      plan['ssl'] = self_supervised(config)
  return plan


def start_name(config: Settings, own: Friends) -> str:
  """Returns the name of a variant's warm-up, which variants with the same start share."""
  return f'warmup_{own.warmup}' + ('_ssl' if own.ssl and config.ssl is not None else '')


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains each row, and looks at what became of the training examples."""
  sources, plan = noisy_labels.load(config), programs(config)
  evaluate, starts, histories, lines = selected_labels.recalls(config, sources.test), {}, {}, []
  train = functools.partial(noisy_labels.train, config, sources=sources, evaluate=evaluate)
  for name in config.runs:
    if name == 'ce':
      trained = train(plan[name], folder=workdir / name)
    else:
      own = VARIANTS[name][1]
      start = start_name(config, own)
      if start not in starts:
        given = self_supervised_start(config, plan, own, sources, workdir)
        starts[start] = train(plan[start], folder=workdir / start, **given).variables
      revise = functools.partial(revised, config, own, sources)
      trained = train(plan[name], folder=workdir / name, start=starts[start], revise=revise)
    # Behind the warm-up, so that curves are over all supervised epochs.
    before = 0 if name == 'ce' else config.warmup.epochs * noisy_labels.steps_per_epoch(config)
    histories[TITLES[name]] = [{**line, 'step': line['step'] + before} for line in trained.history]
    judged = [line for line in trained.history if 'test' in line]
    scores = noisy_labels.scores(trained.history)
    metrics = {k: v for k, v in judged[-1].items() if k in METRICS}
    metrics |= {'best': scores['best'], 'fall': scores['best'] - scores['last']}
    kinds = {}
    if name != 'ce' and sources.true is not None:
      table = jax.device_get(trained.state.extra['table'])
      metrics |= selected_labels.right(table, sources)
      kinds = selected_labels.left_out(table, sources)
    role = 'method' if name == 'ff' else 'baseline' if name == 'ce' else 'reference'
    lines.append(results.row(TITLES[name], role, metrics))
    if name == 'ff':
      rows = [
        (f'F&F, {selected_labels.KINDS[kind]}', 'reference', {'dropped': v})
        for kind, v in kinds.items()
      ]
      lines += [results.row(*row) for row in rows]
  panels = (('test', 'mean recall of the classes (%)', 1),)
  noisy_labels.draw_curves(config, histories, workdir / 'recall_over_epochs.png', panels=panels)
  return results.results(config, lines, title='recalls and shares in %')


def self_supervised_start(
  config: Settings, plan: Mapping[str, Run], own: Friends, sources: Sources, workdir: pathlib.Path
) -> dict[str, Any]:
  """Returns the options of a warm-up that starts from self-supervised features; none without them."""
  if not own.ssl or config.ssl is None:
    return {}
  trained = runs.train(plan['ssl'], sources.train, workdir / 'ssl')
  pretraining.say_collapse('SimSiam', trained.history)
  backbone = siamese.backbone_variables(trained.variables)
  return {'start': backbone, 'fresh': [f'{path}/.*' for path in noisy_labels.head(config)]}


if __name__ == '__main__':
  launcher.main('friends_and_foes')
