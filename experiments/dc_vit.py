"""DC-ViT: Dense Vision Transformer Compression with Few Samples (Zhang, Zhou, Wang & Wu, CVPR 2024).

arXiv 2403.18708. A trained transformer is made smaller with a few hundred images without labels. Dropping
whole blocks gives a few sizes alone. DC-ViT takes the attention out of some blocks and keeps a part of their
MLPs,

  y = x + MLP'(norm2(x)),

so that any number of operations is met. Which blocks: each is tried, tuned until its features (all tokens
behind the last norm) are those of the original network, and judged by how far its predictions are from the
original's on images that were made of the original alone. The best ones are compressed one after another, the
front part of the network tuned each time. Claim: more accurate at the same operations than dropping blocks.

  python -m experiments.dc_vit
  python -m experiments.dc_vit --config=imagenet_vit_base --workdir=DIR
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks, pictures, results, runs, supervised
from experiments.harness.networks import Loaded, Network
from experiments.harness.runs import Call, Run, Variables, say
from experiments.harness.sections import Experiment, Recipe, check_batch
from experiments.harness.settings import found_by, section
from experiments.harness.supervised import Seen
from experiments.protocols import synthetic_images
from experiments.protocols.subsets import Subset
from experiments.protocols.synthetic_images import Synthesis
from jaxlab import compression, data, losses, models
from jaxlab.training import map_batches

Array = jax.Array

FEATURES = 'norm'  # all tokens behind the last LayerNorm
METRICS = ('accuracy', 'feature_error', 'macs', 'off_target', 'blocks')


@dataclasses.dataclass(frozen=True)
class Target:
  """A size, and how it is reached.

  Attributes:
    reduction: share of operations that is removed: of all blocks', or with the official counter of the
      network's.
    num_blocks: that are compressed; None: the fewest. Where these drop all of their MLPs, that is dropping
      blocks.
    neurons: which hidden neurons stay, see `compression.kept_neurons`.
    multiple: of which their number is one.
    tuning: by 'features' of the original, or by the 'labels' of the few images.
    title: of the row.
  """

  reduction: float
  num_blocks: int | None = None
  neurons: Literal[compression.MODES] = 'random'
  multiple: int = 1
  tuning: Literal['features', 'labels'] = 'features'
  title: str = 'DC-ViT'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of DC-ViT.

  Attributes:
    network: the original.
    targets: rows by name.
    counter: of operations, see `compression.block_macs`.
    tiny: the few training images.
    recipe: of every tuning, those of candidates included.
    loss_warmup: epochs over which the loss rises from 0, as in the official code.
    synthesis: of the images that judge.
    metric: by which blocks are chosen: 'kl' from the original on the synthetic images; 'label_ce', the
      cross-entropy with what these were made for; 'feature_error', that of the tuning's last steps.
  """

  network: Network
  targets: dict[str, Target]
  counter: Literal['exact', 'official'] = 'exact'
  tiny: Subset = dataclasses.field(default_factory=lambda: Subset(total=500))
  recipe: Recipe
  loss_warmup: int = 20
  synthesis: Synthesis = section(Synthesis)
  metric: Literal['kl', 'label_ce', 'feature_error'] = 'kl'

  @property
  def steps_per_epoch(self) -> int:
    """Optimizer steps of an epoch over the few images."""
    return self.tiny.of(self.network.data).train_size // self.recipe.batch_size


class Compressed(NamedTuple):
  """A network on the way: its module, variables, and the blocks that are compressed."""

  model: nn.Module
  variables: Variables
  blocks: tuple[int, ...] = ()


def cut_of(config: Settings, target: Target) -> compression.DenseCut:
  """Returns what a target asks for."""
  given = {'num_blocks': target.num_blocks, 'multiple': target.multiple}
  return compression.dense_cut(
    networks.create(config.network.model), target.reduction, **given, counter=config.counter,
    channels=config.network.data.view[-1],
  )  # fmt: skip


def ordered(config: Settings) -> dict[str, Target]:
  """Returns the targets: those of the method, then dropped blocks, then what learns from labels."""

  def place(name: str) -> tuple[Any, ...]:
    own = config.targets[name]
    return own.tuning == 'labels', not cut_of(config, own).kept, own.reduction

  return {name: config.targets[name] for name in sorted(config.targets, key=place)}


def compressed(net: Compressed, block: int, kept: Sequence[int]) -> Compressed:
  """Returns the network with one more block compressed."""
  made = compression.compress_block(net.model, net.variables, block, kept)
  return Compressed(*made, (*net.blocks, block))


def neurons(config: Settings, target: Target, net: Compressed, block: int, few: data.Source) -> Any:
  """Returns which hidden neurons of a block stay: drawn anew for each candidate and step."""
  kept = cut_of(config, target).kept
  if not kept:
    return ()
  mlp = net.variables['params'][f'blocks_{block}']['mlp']
  key = jax.random.fold_in(jax.random.key(config.seed), len(net.blocks))
  given: dict[str, Any] = {}
  if target.neurons == 'gelu':
    path = f'blocks_{block}/mlp/gelu'

    @jax.jit
    def mean(variables: Variables, batch: Mapping[str, Array]) -> Array:
      x = config.network.task.inputs(batch)
      return jnp.mean(models.capture(net.model, variables, [path], x)[1][path], 1)

    given['activations'] = over(config, functools.partial(mean, net.variables), few, 'test')
  kernels = mlp['fc1']['kernel'], mlp['fc2']['kernel']
  key = jax.random.fold_in(key, block)
  return compression.kept_neurons(key, *kernels, kept, target.neurons, **given)


def over(config: Settings, fn: Any, source: data.Source, split: str) -> Any:
  """Returns `fn` of all records."""
  reading = harness_data.reading(config.network.data, split)
  size, mesh = config.eval_batch_size, config.mesh.make()
  return map_batches(fn, source, batch_size=size, mesh=mesh, **reading)


def tuning(config: Settings, target: Target, net: Compressed, title: str = '') -> Run:
  """Returns the tuning of a network behind a compression; only the shapes of `net` count."""
  steps = config.steps_per_epoch
  original, rise = networks.create(config.network.model), max(config.loss_warmup, 1)

  def loss(logits: Array, labels: Array, seen: Seen) -> Array:
    if target.tuning == 'labels':
      value = losses.cross_entropy(logits, labels)
    else:
      pair = seen.captured[FEATURES], seen.taught[FEATURES]
      value = losses.feature_distillation_loss(*pair)
    share = jnp.minimum((seen.step // steps) / rise, 1.0) if config.loss_warmup else 1.0
    return share * value

  program = supervised.program(
    net.model, config.network.task, config.recipe, steps, loss=loss, teacher=original,
    captured=(FEATURES,), taught=(FEATURES,), frozen=compression.frozen_behind(net.model.depth, net.blocks),
  )  # fmt: skip
  fields = ('network', 'tiny', 'synthesis', 'metric', 'counter', 'loss_warmup')
  decides = {field: getattr(config, field) for field in fields}
  kept = cut_of(config, target).kept
  decides |= {'kept': kept, 'neurons': target.neurons, 'tuning': target.tuning}
  decides['blocks'] = list(net.blocks)
  few = config.tiny.of(config.network.data)
  num_steps = config.recipe.epochs * steps
  return Run(config, few, config.recipe, program, num_steps, decides, title or None)


@functools.partial(jax.jit, static_argnames='model')
def predicted(variables: Variables, images: Array, *, model: nn.Module) -> Array:
  """Returns the logits of images as the network reads them."""
  return model.apply(variables, images)


@functools.partial(jax.jit, static_argnames=('model', 'original', 'task'))
def judged(
  given: Any, batch: Mapping[str, Array], *, model: nn.Module, original: nn.Module, task: Any
):
  """Returns of each record whether it is recognized, and the squared error of its features."""
  (own, theirs), x = given, task.inputs(batch)
  logits, features = models.capture(model, own, [FEATURES], x)
  told = models.capture(original, theirs, [FEATURES], x)[1]
  errors = losses.feature_distillation_loss(features[FEATURES], told[FEATURES])
  return {
    'correct': task.score(logits, task.targets(batch))['correct'],
    'error': jnp.mean(errors, 1),
  }


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  own, recipe = config.network.data, config.recipe
  titles = [target.title for target in config.targets.values()]
  rows = ['original', *titles, *(f'{title}, untuned' for title in titles)]
  yield from results.check_claims(config, rows, METRICS)
  if not titles or len(set(titles)) < len(titles):
    yield f'targets: expected rows with titles that differ, got {titles}.'
  yield from found_by('tiny', config.tiny.of, own)
  if config.tiny == Subset():
    yield 'tiny: expected total or per_class, the few images.'
  elif not list(found_by('tiny', config.tiny.of, own)):
    count = config.tiny.of(own).train_size
    if count < recipe.batch_size:
      yield f'recipe.batch_size={recipe.batch_size} exceeds the {count} images of tiny.'
    else:
      schedule = recipe.schedule.make
      yield from found_by('recipe.schedule', schedule, recipe.epochs, config.steps_per_epoch)
  for name, value in (('recipe', recipe), ('network.recipe', config.network.recipe)):
    if value is not None:
      yield from check_batch(config.mesh, value.batch_size, f'{name}.batch_size')
  for name in ('mixup', 'cutmix'):
    if getattr(recipe, name):
      yield f'recipe.{name}: expected 0; features are those of the images as they are.'
  if config.loss_warmup < 0:
    yield f'loss_warmup={config.loss_warmup}: expected a number of epochs, or 0 for none.'
  yield from synthetic_images.check_shift(config.synthesis, own)
  for name, target in config.targets.items():
    yield from found_by(f'targets.{name}', cut_of, config, target)


def abstract(config: Settings, target: Target, blocks: Sequence[int]) -> Compressed:
  """Returns the shapes of the network with some blocks compressed."""
  model, kept = networks.create(config.network.model), range(cut_of(config, target).kept)
  net = Compressed(model, supervised.abstract_variables(model, config.network.task))
  for block in blocks:
    made: list[Compressed] = []

    def cut(
      variables: Variables, net: Compressed = net, block: int = block, made: Any = made
    ) -> Variables:
      made.append(compressed(net._replace(variables=variables), block, kept))
      return made[0].variables

    shapes = jax.eval_shape(cut, net.variables)
    net = made[0]._replace(variables=shapes)
  return net


def programs(config: Settings, facts: None = None) -> dict[str, Run | Call]:
  """Returns the first and the last tuning of each target, the making of images, and the original's training.

  Which blocks are compressed is known behind the trials; here they are the first ones.
  """
  del facts
  found: dict[str, Run | Call] = {}
  for name, target in ordered(config).items():
    count = cut_of(config, target).num_blocks
    for which, blocks in (('trial', (1,)), ('last', tuple(range(1, count + 1)))):
      found[f'{name}_{which}'] = tuning(config, target, abstract(config, target, blocks))
  if not config.network.pretrained:
    found['original'] = networks.training(config, config.network, 'as it is')

  model = networks.create(config.network.model)
  images = synthetic_images.call(config.synthesis, config.network.data, model)
  return found | {'images': images}


class Trials:
  """Candidates: the network with one block compressed and tuned, for each size; trained when asked for."""

  def __init__(self, config: Settings, net: Loaded, few: data.Source, workdir: pathlib.Path):
    self.config, self.net, self.few, self.workdir = config, net, few, workdir
    self.original = Compressed(net.model, net.variables)
    self._found: dict[Any, dict[int, tuple[Compressed, float]]] = {}
    given = config.synthesis, config.network.data, net.model, net.variables
    found = synthetic_images.make(*given, jax.random.key(config.seed))
    self.images, self.labels, self.told = found

  def tuned(self, target: Target, start: Compressed, folder: str) -> tuple[Compressed, float]:
    """Returns a network behind its tuning, and the last loss."""
    run = tuning(self.config, target, start, target.title)
    given = {'frozen': {'teacher': self.net.variables}, 'start': start.variables}
    trained = runs.train(run, self.few, self.workdir / folder, **given)
    lines = [line['loss'] for line in trained.history if 'loss' in line]
    return start._replace(variables=trained.variables), lines[-1]

  def of(self, target: Target) -> dict[int, tuple[Compressed, float]]:
    """Returns the tuned candidate of each inner block, and what it is chosen by; the lower, the better."""
    target = dataclasses.replace(target, tuning='features')
    key = cut_of(self.config, target).kept, target.neurons
    if key not in self._found:
      found = {}
      for block in range(1, self.net.model.depth - 1):
        start = self.cut(target, self.original, block)[0]
        net, last = self.tuned(target, start, f'trials_{key[0]}_{key[1]}/block_{block}')
        found[block] = net, last if self.config.metric == 'feature_error' else self.judge(net)
      self._found[key] = found
      text = ', '.join(f'{block}: {value:.4g}' for block, (_, value) in found.items())
      say(f'{target.title}: {self.config.metric} of blocks {text}')
    return self._found[key]

  def cut(self, target: Target, net: Compressed, block: int) -> tuple[Compressed, Sequence[int]]:
    """Returns a network with one more block compressed, and the neurons that it keeps there."""
    kept = neurons(self.config, target, net, block, self.few)
    return compressed(net, block, kept), kept

  def judge(self, net: Compressed) -> float:
    """Returns how far a network's predictions for the synthetic images are from what they should be."""
    logits = predicted(net.variables, self.images, model=net.model)
    if self.config.metric == 'label_ce':
      return float(jnp.mean(losses.cross_entropy(logits, self.labels)))
    direction = 'original_to_pruned'
    return float(jnp.mean(compression.prediction_divergence(logits, self.told, direction)))


def progressive(trials: Trials, name: str) -> tuple[Compressed, Compressed]:
  """Returns the network of a target, its blocks compressed one after another, and the same without tuning."""
  config = trials.config
  target, candidates = config.targets[name], trials.of(config.targets[name])
  order = sorted(candidates, key=lambda block: candidates[block][1])
  net = untuned = trials.original
  for block in order[: cut_of(config, target).num_blocks]:
    start, kept = trials.cut(target, net, block)
    untuned = compressed(untuned, block, kept)
    if not net.blocks and target.tuning == 'features':
      net = candidates[block][0]
    else:
      net, _ = trials.tuned(target, start, f'{name}/block_{block}')
  return net, untuned


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Compresses the original to each target, and compares what is left with and without tuning."""
  net = networks.load(config, config.network, workdir / 'original')
  few = config.tiny.draw(np.random.default_rng(config.seed), net.train)
  trials = Trials(config, net, few, workdir)
  image = jax.ShapeDtypeStruct((1, *config.network.data.view), jnp.float32)
  whole = compression.multiply_accumulates(net.model, net.variables, image)

  def scores(own: Compressed) -> dict[str, float]:
    given = {'model': own.model, 'original': net.model, 'task': config.network.task}
    judge = functools.partial(judged, (own.variables, net.variables), **given)
    found = over(config, judge, net.test, 'test')
    macs = compression.multiply_accumulates(own.model, own.variables, image)
    return {
      'accuracy': 100 * float(found['correct'].mean()), 'feature_error': float(found['error'].mean()),
      'macs': 100 * macs / whole, 'blocks': len(own.blocks),
    }  # fmt: skip

  rows = [results.row('original', 'reference', scores(trials.original) | {'off_target': 0.0})]
  for name, target in ordered(config).items():
    cut = cut_of(config, target)
    plain = not cut.kept or target.tuning == 'labels'
    off = {'off_target': 100 * cut.off_target}
    for title, role, own in zip(
      (target.title, f'{target.title}, untuned'),
      ('baseline' if plain else 'method', 'reference'),
      progressive(trials, name),
      strict=True,
    ):
      rows.append(results.row(title, role, scores(own) | off))
  draw(config, rows, workdir / 'accuracy_over_operations.png')
  unit = 'accuracy in %; operations in % of the original, off the target in % of what is counted'
  return results.results(config, rows, METRICS, unit)


def draw(config: Settings, rows: Sequence[Mapping[str, Any]], picture: pathlib.Path) -> None:
  """Draws accuracy over operations: sizes that dropping blocks gives, and those between them."""
  found = {item['name']: item for item in rows}
  points = {target.title: target for target in config.targets.values()}
  place = lambda name: tuple(found[name]['metrics'][k] for k in ('macs', 'accuracy'))  # noqa: E731
  with pictures.drawn(picture, size=(6.5, 4.2)) as axis:
    axis.scatter(*place('original'), color='black', marker='*', s=90, label='original')
    for index, title in enumerate(points):
      axis.scatter(*place(title), color=f'C{index}', label=title)
      axis.scatter(*place(f'{title}, untuned'), color=f'C{index}', marker='x')
    dense = [title for title in points if found[title]['role'] == 'method']
    curve = sorted(map(place, ['original', *dense]))
    axis.plot(*zip(*curve), color='gray', linewidth=0.8, zorder=0)
    axis.set_xlabel('multiply-accumulates (% of the original)')
    axis.set_ylabel('test accuracy (%); crosses: untuned')
    axis.set_title(pictures.title(config))
    axis.legend(frameon=False, fontsize=8)


if __name__ == '__main__':
  launcher.main('dc_vit')
