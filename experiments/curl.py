"""CURL: Neural Network Pruning with Residual-Connections and Limited-Data (Luo & Wu, CVPR 2020).

arXiv 1911.08114. Filter pruning of residual networks used to prune within blocks alone. Here the trunks,
which all blocks of a stage share, shrink as well, and every channel has one score: how far the predictions
for a few images move without it,

  score = mean over images of KL(softmax(network without the channel) || softmax(network))

All scores stand in one list, the smallest are removed. Where little data is left to train what remains, it
learns from the unpruned network: first its predictions for mixed images, then for a set six times as large,
of which it refines the predictions as it learns ("label refinement").

Claim: a ResNet-50 with a quarter of the operations at 73.4 % on ImageNet; on CUB-200 a MobileNetV2 a third of
the size without any loss.

  python -m experiments.curl
  python -m experiments.curl --config=imagenet_resnet50 --workdir=DIR
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks, pictures, results, runs, supervised
from experiments.harness.data import Augment, Images
from experiments.harness.networks import Loaded, Network
from experiments.harness.runs import Call, Run, Variables, say
from experiments.harness.sections import Experiment, Recipe, check_batch, check_bits
from experiments.harness.settings import found_by, identity, section
from experiments.harness.supervised import Seen, Table, cross_entropy
from experiments.harness.tasks import ImageTask
from experiments.protocols import channel_ranking
from experiments.protocols.subsets import Subset
from jaxlab import compression, data, losses, parallel, quantizers
from jaxlab.compression import Plan
from jaxlab.training import TrainState, map_batches, pad_rows

Array = jax.Array
PyTree = Any

WHOLE = 'whole'
# Rankings of the channels, and the trainings of what CURL's leaves that follow it.
RANKINGS = {'curl': "CURL's ranking", 'l1': 'L1 norms', 'random': 'random'}
TRAININGS = {'distilled': 'mixup and distillation', 'refined': 'label refinement'}


@dataclasses.dataclass(frozen=True)
class Distillation:
  """What the small network learns of the whole one's predictions for mixed images.

  Attributes:
    weight: of the divergence; the labels have the rest.
    temperature: of both predictions.
    mixup: alpha.
  """

  weight: float = 0.7
  temperature: float = 2.0
  mixup: float = 1.0

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not 0 <= self.weight <= 1:
      yield f'weight={self.weight}: expected a share in [0, 1].'
    if not self.temperature > 0 or not self.mixup > 0:
      yield f'temperature={self.temperature}, mixup={self.mixup}: expected positive numbers.'


@dataclasses.dataclass(frozen=True)
class Refinement:
  """The second training, on the expanded set, whose predicted labels learn along.

  Attributes:
    recipe: of the training.
    augment: of the expanded images.
    weight: of the divergence from the predicted labels; the given ones have the rest.
    rate: step size of their logits.
  """

  recipe: Recipe
  augment: Augment = section(Augment)
  weight: float = 0.7
  rate: float = 1.0

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not 0 <= self.weight <= 1:
      yield f'weight={self.weight}: expected a share in [0, 1].'
    if not self.rate >= 0:
      yield f'rate={self.rate}: expected at least 0.'
    if self.recipe.mixup or self.recipe.cutmix or self.recipe.microbatches > 1:
      yield 'recipe: expected no mixtures and no microbatches; each image has predictions of its own.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of CURL.

  Attributes:
    network: the whole network.
    limited: training images that are at hand, for scores and for what is left; without values all.
    proxy: of these, the number that scores are measured on, seen as in the test, in one pass.
    direction: of the divergence, see `compression.prediction_divergence`.
    candidates: channels left out at once, see `compression.removal_scores`.
    min_ratio: share of a group that stays, looked at before each removal.
    protected: patterns of groups that stay whole and are not scored, such as the stem's, which may lie in
      the first trunk.
    rankings: compared, of `RANKINGS`.
    shares: of the multiply-accumulates that are left, falling; at the last one networks are trained.
    augment: of the images in training.
    recipe: of the training on labels, and of that on the whole network's predictions.
    distillation: of the latter.
    refinement: of the labels; None: there is none.
    quantized: bit-widths at which the whole network and the trained ones are quantized at the end; ranges of
      inputs are measured on the proxy images.
  """

  network: Network
  limited: Subset = section(Subset)
  proxy: int = 256
  direction: Literal['pruned_to_original', 'original_to_pruned'] = 'pruned_to_original'
  candidates: int = 1
  min_ratio: float = 0.3
  protected: tuple[str, ...] = ()
  rankings: tuple[Literal['curl', 'l1', 'random'], ...] = tuple(RANKINGS)
  shares: tuple[float, ...] = (0.35,)
  augment: Augment = section(Augment)
  recipe: Recipe
  distillation: Distillation | None = section(Distillation)
  refinement: Refinement | None = None
  quantized: tuple[str, ...] = ()

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    if self.proxy < 1 or self.candidates < 1:
      yield f'proxy={self.proxy}, candidates={self.candidates}: expected at least 1.'
    if not 0 < self.min_ratio <= 1:
      yield f'min_ratio={self.min_ratio}: expected a share in (0, 1].'
    falling = all(a > b for a, b in zip(self.shares, self.shares[1:]))
    if not self.shares or not falling or not all(0 < share <= 1 for share in self.shares):
      yield f'shares={self.shares}: expected falling shares in (0, 1].'
    if self.quantized:
      yield from check_bits(self.quantized, quantizers.MIN_BITS, quantizers.MAX_BITS)
    if 'curl' not in self.rankings:
      yield f"rankings={self.rankings}: 'curl' is the method."
    if self.refinement is not None and self.distillation is None:
      yield 'refinement: it starts from what distillation ends with, which is None.'
    if self.distillation is not None and (self.recipe.mixup or self.recipe.cutmix):
      yield f'recipe: expected no mixtures; distillation.mixup={self.distillation.mixup} is one.'

  @property
  def images(self) -> Images:
    """The section of the images that are left."""
    return self.limited.of(self.network.data)

  @property
  def trainings(self) -> tuple[str, ...]:
    """The trainings behind CURL's ranking besides that on labels."""
    there = self.distillation is not None, self.refinement is not None
    return tuple(name for name, own in zip(TRAININGS, there, strict=True) if own)


def whole_network(config: Settings) -> nn.Module:
  """Returns the network that is pruned."""
  return networks.create(config.network.model)


def random_scores(config: Settings) -> dict[str, np.ndarray]:
  """Returns the scores of a random ranking."""
  rng = np.random.default_rng((config.seed, 1))
  return channel_ranking.random_scores(whole_network(config), rng)


def pruned(config: Settings, scores: Mapping[str, np.ndarray], share: float) -> Plan:
  """Returns the plan that leaves a share of the operations."""
  return channel_ranking.pruned(
    config.network, whole_network(config), scores, share,
    min_ratio=config.min_ratio, protected=config.protected,
  )  # fmt: skip


def divergences(config: Settings, variables: Variables, images: Array) -> dict[str, Array]:
  """Returns CURL's score of every channel."""
  model = whole_network(config)
  score = functools.partial(compression.prediction_divergence, direction=config.direction)
  groups = list(compression.structure(model).groups)
  stay = channel_ranking.matching(config.protected, groups)
  names = [name for name in groups if name not in stay]
  found = compression.removal_scores(
    model, variables, images, score=score, names=names, chunk=config.candidates
  )
  return {name: own / len(images) for name, own in found.items()}


def scored(config: Settings, ranking: str, net: Loaded, images: Array) -> dict[str, np.ndarray]:
  """Returns the scores of a ranking."""
  if ranking == 'random':
    return random_scores(config)
  if ranking == 'l1':
    return jax.device_get(compression.kernel_norms(net.model, net.variables))
  found = jax.jit(functools.partial(divergences, config))(net.variables, images)
  return {name: np.asarray(own, np.float64) for name, own in jax.device_get(found).items()}


def proxy(config: Settings, limited: data.Source) -> Array:
  """Returns the images that scores are measured on, as the network sees them in the test."""
  chosen = np.random.default_rng((config.seed, 2)).permutation(len(limited))[: config.proxy]
  decoded = harness_data.reading(config.network.data, 'test')
  sharding = networks.calibration_sharding(config.mesh.make(), len(chosen))
  index, count = data.process_shard(sharding, len(chosen))
  (batch,) = data.epoch_batches(
    data.subset(limited, chosen), len(chosen), process_index=index, process_count=count, **decoded
  )
  return config.network.task.inputs(data.to_device(batch, sharding))


def training(config: Settings, name: str, ranking: str, plan: Plan) -> Run:
  """Returns the training of what a plan leaves: on 'labels', 'distilled' or 'refined'."""
  whole = whole_network(config)
  small, images = compression.sliced_model(whole, plan), config.images
  recipe, augment, options, own = config.recipe, config.augment, {}, {}
  if name == 'labels':
    options['loss'] = cross_entropy
  elif name == 'distilled':
    own = config.distillation
    recipe = dataclasses.replace(recipe, mixup=own.mixup)

    def loss(logits: Array, labels: Array, seen: Seen) -> Array:
      # The harness takes it for both labels of a mixed image; what the whole network says is the same.
      return losses.mixup_distillation_loss(
        logits, seen.teacher, labels, labels, 1.0,
        temperature=own.temperature, weight=own.weight,
      )  # fmt: skip

    options |= {'loss': loss, 'teacher': whole}
  else:
    own = config.refinement
    recipe, augment = own.recipe, own.augment
    images = dataclasses.replace(images, train_size=data.Expanded.factor * images.train_size)
    options |= refined(own, images)
  steps = images.train_size // recipe.batch_size
  program = supervised.program(small, ImageTask.of(images, augment), recipe, steps, **options)
  decides = {
    'network': config.network, 'limited': config.limited, 'augment': augment, 'ranking': ranking,
    'kept': plan.keep, name: own,
  }  # fmt: skip
  if name == 'refined':
    first = {
      'distillation': config.distillation,
      'recipe': config.recipe,
      'augment': config.augment,
    }
    decides['first'] = first
  decides |= {key: getattr(config, key) for key in ('proxy', 'direction', 'protected', 'min_ratio')}
  title = TRAININGS.get(name, RANKINGS[ranking])
  return Run(config, images, recipe, program, recipe.epochs * steps, identity(decides), title)


def refined(own: Refinement, images: Images) -> dict[str, Any]:
  """Returns the options of the training whose predicted labels learn along."""

  def loss(logits: Array, labels: Array, seen: Seen) -> Array:
    return losses.label_refinement_loss(logits, seen.rows['logits'], labels, own.weight)

  def update(logits: Array, labels: Array, seen: Seen) -> PyTree:
    def mean(pseudo_logits: Array) -> Array:
      return jnp.mean(losses.label_refinement_loss(logits, pseudo_logits, labels, own.weight))

    moved = seen.rows['logits'] - own.rate * jax.grad(mean)(seen.rows['logits'])
    return {'logits': moved}

  shape = (images.train_size, images.num_classes)
  return {
    'loss': loss,
    'table': Table({'logits': jax.ShapeDtypeStruct(shape, jnp.float32)}, update),
  }


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  rows = [WHOLE, *map(re.escape, (*RANKINGS.values(), *TRAININGS.values()))]
  metrics = ['trained', 'macs', *(f'quantized_{bits}' for bits in config.quantized)]
  yield from results.check_claims(config, rows, [*metrics, *map(column, config.shares)])
  own = config.network.data
  if not isinstance(own, Images) or own.multi_label or not own.labeled:
    yield 'network.data: expected images of one class each.'
    return
  if config.refinement is not None and (own.dtype != 'uint8' or min(own.stored_image[:2]) < 4):
    yield f'refinement: images of {own.dtype} {own.stored_image} cannot be expanded; uint8, 4 pixels a side.'
  if problems := list(found_by('network.model', compression.structure, whole_network(config))):
    yield from problems
    return
  if problems := list(found_by('limited', lambda: config.images)):
    yield from problems
    return
  count = config.images.train_size or 0
  if config.proxy > count:
    yield f'proxy={config.proxy} exceeds the {count} images that are left.'
  recipes = {'recipe': (config.recipe, count)}
  if config.refinement is not None:
    recipes['refinement.recipe'] = config.refinement.recipe, count * data.Expanded.factor
  if config.network.recipe is not None:
    recipes['network.recipe'] = config.network.recipe, config.network.data.train_size or 0
  for name, (recipe, size) in recipes.items():
    yield from check_batch(config.mesh, recipe.batch_size, f'{name}.batch_size')
    if size < recipe.batch_size:
      yield f'{name}.batch_size={recipe.batch_size} exceeds {size} images.'
  yield from found_by('shares, protected', pruned, config, random_scores(config), config.shares[-1])


def column(share: float) -> str:
  """Returns the metric of the accuracy right behind pruning to a share of the operations."""
  return f'pruned_to_{100 * share:g}'


def programs(config: Settings, facts: Mapping[str, Plan] | None = None) -> dict[str, Run | Call]:
  """Returns the trainings, and the scores; facts are the plans, by ranking, at the last share."""
  if facts is None:
    nominal = pruned(config, random_scores(config), config.shares[-1])
    facts = dict.fromkeys(config.rankings, nominal)
  found: dict[str, Run | Call] = {
    f'{ranking}_labels': training(config, 'labels', ranking, facts[ranking])
    for ranking in config.rankings
  }
  found |= {name: training(config, name, 'curl', facts['curl']) for name in config.trainings}
  if config.network.recipe is not None:
    found['whole'] = networks.training(config, config.network, 'whole')

  def make(mesh: jax.sharding.Mesh) -> tuple[Any, tuple[Any, ...]]:
    variables = supervised.abstract_variables(whole_network(config), config.network.task)
    shape = (config.proxy, *config.network.data.view)
    variables = parallel.abstract(variables, parallel.fsdp_shardings(variables, mesh))
    sharding = networks.calibration_sharding(mesh, config.proxy)
    images = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    return functools.partial(divergences, config), (variables, images)

  return found | {'scores': Call(make)}


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Ranks the channels, prunes, and trains what is left in each way."""
  net = networks.load(config, config.network, workdir / 'whole')
  limited = config.limited.draw(np.random.default_rng(config.seed), net.train)
  total = channel_ranking.operations(config.network, net.model)

  def accuracy(model: nn.Module, variables: Variables) -> float:
    own = config.network
    return networks.accuracy(config, own.data, model, own.task, variables, net.test)

  def quantized(model: nn.Module, variables: Variables) -> dict[str, float]:
    accuracy_at = functools.partial(
      channel_ranking.quantized_accuracy, net, model, variables, images
    )
    return {f'quantized_{bits}': accuracy_at(bits) for bits in config.quantized}

  images = proxy(config, limited)
  rows = {WHOLE: {'trained': accuracy(net.model, net.variables), 'macs': 100.0}}
  rows[WHOLE] |= quantized(net.model, net.variables)
  plans, starts = {}, {}
  for ranking in config.rankings:
    scores, metrics = None, {}
    for share in config.shares:
      file = workdir / f'plan_{ranking}_{100 * share:g}.json'
      if file.exists():
        plans[ranking] = Plan.load(file)
      else:
        scores = scored(config, ranking, net, images) if scores is None else scores
        plans[ranking] = pruned(config, scores, share)
        plans[ranking].save(file)
      small, starts[ranking] = compression.slice_network(net.model, net.variables, plans[ranking])
      metrics[column(share)] = accuracy(small, starts[ranking])
      say(
        f'{RANKINGS[ranking]}, {100 * share:g} % of the operations: {metrics[column(share)]:.4g} %'
      )
    metrics['macs'] = 100 * channel_ranking.operations(config.network, small) / total
    rows[RANKINGS[ranking]] = metrics
  plan, ends = programs(config, plans), {}
  for ranking in config.rankings:
    own = plan[f'{ranking}_labels']
    trained = runs.train(own, limited, workdir / f'{ranking}_labels', start=starts[ranking])
    small, ends[ranking] = compression.sliced_model(net.model, plans[ranking]), trained.variables
    rows[RANKINGS[ranking]]['trained'] = accuracy(small, trained.variables)
  small, variables = compression.sliced_model(net.model, plans['curl']), starts['curl']
  for name in config.trainings:
    source, given = limited, {'frozen': {'teacher': net.variables}}
    if name == 'refined':
      decode = harness_data.reading(config.network.data, 'train')['transform']
      source = data.Expanded(limited, config.seed, decode)
      given = {'begin': begin(predictions(config, net, source))}
      plan[name] = plan[name]._replace(data=dataclasses.replace(plan[name].data, train_decode=None))
    trained = runs.train(plan[name], source, workdir / name, start=variables, **given)
    variables = trained.variables
    macs = rows[RANKINGS['curl']]['macs']
    rows[TRAININGS[name]] = {'trained': accuracy(small, variables), 'macs': macs}
  last = TRAININGS[config.trainings[-1]] if config.trainings else RANKINGS['curl']
  rows[last] |= quantized(small, variables if config.trainings else ends['curl'])
  draw(config, rows, workdir / 'accuracy_over_operations.png')
  roles = {WHOLE: 'reference', RANKINGS['l1']: 'baseline', RANKINGS['random']: 'baseline'}
  lines = [results.row(name, roles.get(name, 'method'), own) for name, own in rows.items()]
  return results.results(
    config, lines, title='accuracies in %, multiply-accumulates in % of the whole'
  )


def predictions(config: Settings, net: Loaded, source: data.Source) -> np.ndarray:
  """Returns the whole network's logits of the expanded images, `[records, num_classes]`."""
  task, (height, width, _) = config.network.task, config.network.data.view

  @jax.jit
  def logits(variables: Variables, batch: Mapping[str, Array]) -> dict[str, Array]:
    images = task.inputs(batch)
    top, left = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
    images = images[:, top : top + height, left : left + width]
    return {'logits': net.model.apply(variables, images, train=False)}

  found = map_batches(
    functools.partial(logits, net.variables), source, batch_size=config.eval_batch_size,
    mesh=config.mesh.make(), num_threads=config.network.data.num_threads,
  )  # fmt: skip
  return np.asarray(found['logits'], np.float32)


def begin(logits: np.ndarray) -> Callable[[TrainState], TrainState]:
  """Returns what puts predictions into the table of a drawn state."""

  def filled(state: TrainState) -> TrainState:
    return state.replace(extra={**state.extra, 'table': pad_rows({'logits': logits})})

  return filled


def draw(config: Settings, rows: Mapping[str, Mapping[str, float]], path: pathlib.Path) -> None:
  """Draws accuracies right behind pruning over what is left, and those behind the trainings."""
  with pictures.drawn(path, 1, 2, size=(10, 3.8)) as (left, right):
    x = [100, *(100 * share for share in config.shares)]
    for ranking in config.rankings:
      if config.pictured and RANKINGS[ranking] not in config.pictured:
        continue
      own = rows[RANKINGS[ranking]]
      y = [rows[WHOLE]['trained'], *(own[column(share)] for share in config.shares)]
      left.plot(x, y, '-o', label=RANKINGS[ranking], markersize=4)
    left.set_xlabel('multiply-accumulates (%)')
    left.set_ylabel('accuracy right behind pruning (%)')
    left.grid(alpha=0.3)
    left.legend(frameon=False)
    found = {name: own['trained'] for name, own in rows.items()}
    bars = right.barh(list(found), list(found.values()), color='C0')
    right.bar_label(bars, fmt='%.1f', padding=2)
    right.set_xlim(max(0, min(found.values()) - 5), max(found.values()) + 3)
    right.invert_yaxis()
    right.set_xlabel(f'accuracy at {100 * config.shares[-1]:g} % of them, trained (%)')
    left.figure.suptitle(pictures.title(config))


if __name__ == '__main__':
  launcher.main('curl')
