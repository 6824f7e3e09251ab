"""A trained network made small and tuned on a handful of images: the images, the tuning, what it costs."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import networks, runs, supervised
from experiments.harness.data import Augment, Images
from experiments.harness.networks import Loaded
from experiments.harness.runs import Run, Variables, say
from experiments.harness.sections import (
  Experiment,
  Mesh,
  Optimizer,
  Recipe,
  Schedule,
  check_batch,
)
from experiments.harness.settings import fill, found_by, free, identity, section
from experiments.harness.supervised import Loss, Seen
from experiments.harness.tasks import ImageTask
from experiments.protocols import synthetic_images
from experiments.protocols.quantized_training import check_view
from experiments.protocols.synthetic_images import Synthesis
from jaxlab import compression, data, losses, models
from jaxlab.compression import Plan

Array = jax.Array
PyTree = Any

# Steps behind which what running statistics were is less than a percent of them.
FEWEST_STEPS = 50
OPTIMIZER = {'name': 'sgd', 'momentum': 0.9, 'weight_decay': 1e-4}


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How something is tuned on few images: so many steps, whose rate falls twice.

  Attributes:
    steps: length; the images are gone through as often as it takes.
    batch_size: or all images, if they are fewer: on several devices as many as divide over them.
    rate: learning rate at first; times `factor` every `step_share` of the steps.
    step_share: of the steps, rounded down.
    factor: of the rate.
    optimizer: with its own options.
  """

  steps: int = 2000
  batch_size: int = 64
  rate: float = 0.02
  step_share: float = 0.4
  factor: float = 0.1
  optimizer: Optimizer = dataclasses.field(default_factory=lambda: Optimizer(**OPTIMIZER))

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.steps < 1 or self.batch_size < 2:
      yield (
        f'steps={self.steps}, batch_size={self.batch_size}: expected at least 1, and 2 for batch norms.'
      )
    if not self.rate > 0:
      yield f'rate={self.rate}: expected a positive number.'
    if not 0 < self.step_share <= 1 or not 0 < self.factor <= 1:
      yield f'step_share={self.step_share}, factor={self.factor}: expected shares in (0, 1].'

  def batch(self, total: int, mesh: Mesh) -> int:
    """Returns the size of a batch out of `total` images."""
    shape = mesh.make().shape
    parts, size = shape['data'] * shape['fsdp'], min(self.batch_size, total)
    return size - size % parts if parts < size < self.batch_size else size

  def recipe(self, total: int, mesh: Mesh, rate: float | None = None) -> Recipe:
    """Returns the recipe for `total` images, a step as an epoch; with `rate` in place of its own."""
    every = max(1, int(self.step_share * self.steps))
    falls = tuple(range(every, self.steps, every))
    kind = {'name': 'multistep', 'milestones': falls, 'factor': self.factor}
    base = self.rate if rate is None else rate
    schedule = Schedule(base, **(kind if falls else {'name': 'constant'}))
    return Recipe(self.steps, self.batch(total, mesh), schedule, self.optimizer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of the compression of a network with few images.

  Attributes:
    network: the network, trained here or with public weights, and the data that it was made for.
    networks_dir: folder of its training, which other experiments may share; empty: in the work directory.
    totals: numbers of images; each makes a column.
    origin: of these images: the network's training images ('own'), another data set's ('other'), images that
      the network itself takes for its classes ('synthetic', made of noise by `compression.synthesize`), or
      normal noise of the data's mean and deviation ('noise').
    other: the other data set.
    synthesis: how they are made, see `synthetic_images.Synthesis`; as many as are asked for, `count` at once.
    augment: of the images.
    tuning: of the small networks.
    timed: repeats of the measurement of latencies; 0: none.
    timed_batch: images of a forward pass that is timed.
  """

  network: networks.Network
  networks_dir: str = free('')
  totals: tuple[int, ...]
  origin: Literal['own', 'other', 'synthetic', 'noise'] = 'own'
  other: Images | None = None
  synthesis: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  augment: Augment = section(Augment)
  tuning: Tuning = section(Tuning)
  timed: int = free(0)
  timed_batch: int = free(64)

  @property
  def labeled(self) -> bool:
    """Whether the images have labels of the network's classes."""
    return self.origin == 'own' and self.network.data.labeled

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    own = self.network.data
    if not isinstance(own, Images) or own.multi_label or own.train_size is None:
      yield 'network.data: expected images of one class each, with their train_size.'
      return
    if not own.labeled:
      yield f'network.data: the test images of {own.name} have no labels to judge by.'
    yield from check_view('network.data', own, own.view)
    if (self.other is not None) != (self.origin == 'other'):
      yield f"origin={self.origin!r}, other={self.other}: expected a data set for 'other' alone."
      return
    if self.origin == 'other':
      if self.other.train_size is None:
        yield 'other: expected a train_size.'
        return
      yield from check_view('other', self.other, own.view)
    found = list(found_by('synthesis', synthesis, self))
    yield from found
    if not found:
      yield from (f'synthesis: {problem}' for problem in synthesis(self).check())
      if self.origin == 'synthetic':
        yield from synthetic_images.check_shift(synthesis(self), own)
    if self.timed < 0 or self.timed_batch < 1:
      yield f'timed={self.timed}, timed_batch={self.timed_batch}: expected a number, or 0, and 1 or more.'
    if not self.totals or len(set(self.totals)) < len(self.totals):
      yield f'totals={self.totals}: expected numbers of images, at least one and each once.'
    given = self.other if self.origin == 'other' else own
    for total in self.totals:
      if total < 2 or (self.origin in ('own', 'other') and total > given.train_size):
        yield f'totals: {total}: expected 2 to {given.train_size}, the training images.'
      elif (
        self.origin == 'own'
        and own.labeled
        and total >= own.num_classes
        and total % own.num_classes
      ):
        yield f'totals: {total} is no multiple of the {own.num_classes} classes.'
      else:
        size = self.tuning.batch(total, self.mesh)
        yield from check_batch(self.mesh, size, f'a batch of {size} of {total} images')


def images(config: Settings, total: int) -> Images:
  """Returns how a tiny set is read: as the network's own training images, with its normalization."""
  own = config.network.data
  if config.origin == 'own':
    return dataclasses.replace(own, train_size=total)
  as_own = {'mean': own.mean, 'std': own.std, 'num_classes': own.num_classes, 'train_size': total}
  if config.origin == 'other':
    return dataclasses.replace(config.other, **as_own, image_size=own.view[0])
  # Made as the network sees them.
  read = {'stored_image': own.view, 'train_decode': None, 'test_decode': None, 'dtype': 'uint8'}
  return dataclasses.replace(own, train_size=total, **read)


def tiny_set(config: Settings, nets: Loaded, total: int) -> data.Source:
  """Returns `total` images, drawn by seed and number, for what is made of the network."""
  rng, own = np.random.default_rng((config.seed, total)), config.network.data
  if config.origin in ('synthetic', 'noise'):
    if config.origin == 'noise':
      pixels = rng.normal(own.mean, own.std, (total, *own.view))
    else:
      pixels = synthesized(config, nets, total) * np.asarray(own.std) + np.asarray(own.mean)
    pixels = np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
    arrays = {'image': pixels, 'label': np.zeros(total, np.int32)}
    return data.InMemory(arrays, num_classes=own.num_classes)
  source = nets.train if config.origin == 'own' else harness_data.load(config.other, 'train')
  if not config.labeled:
    nothing = np.zeros(len(source), np.int32)
    return data.subset(source, data.sample_subset(rng, nothing, total=total))
  return data.subset(source, data.sample_tiny_set(rng, source, total))


def synthesis(config: Settings) -> Synthesis:
  """Returns how images are made, `count` of them at once.

  Raises:
    ValueError: for options that do not exist, or of another type.
  """
  return fill(Synthesis, config.synthesis)


def synthesized(config: Settings, nets: Loaded, total: int) -> np.ndarray:
  """Returns normalized images that the network takes for its classes, each class as often."""
  key = jax.random.fold_in(jax.random.key(config.seed), total)
  given = config.network.data, nets.model, nets.variables, key
  found, *_ = synthetic_images.make(synthesis(config), *given, total=total)
  return np.asarray(found)


def task(config: Settings, total: int) -> ImageTask:
  """Returns what is asked of a network on a tiny set."""
  return ImageTask.of(images(config, total), config.augment)


def load(config: Settings, workdir: Any) -> Loaded:
  """Returns the whole network with its data."""
  folder = type(workdir)(config.networks_dir or workdir / 'networks')
  name = config.network.model['name']
  return networks.load(config, config.network, folder / f'{name}-seed{config.seed}')


def whole_network(config: Settings) -> nn.Module:
  """Returns the network that is made small."""
  return networks.create(config.network.model)


def ancestry(config: Settings) -> dict[str, Any]:
  """Returns what decides the whole network and the images."""
  own = config.network
  parts = {**networks.drawn_by(own), 'pretrained': own.pretrained, 'recipe': own.recipe}
  tiny = {name: getattr(config, name) for name in ('origin', 'other', 'synthesis', 'augment')}
  return identity({'network': {**parts, 'data': own.data}, **tiny})


def small_network(config: Settings, plan: Plan) -> nn.Module:
  """Returns what a plan leaves of the whole network, without variables."""
  return compression.sliced_model(whole_network(config), plan)


def mimicking(whole: nn.Module, small: nn.Module, *, pooled: bool = False) -> dict[str, Any]:
  """Returns the options of `tuning` by which a small network mimics the map of the whole one.

  Args:
    whole: the whole network, in evaluation mode.
    small: what is left of it, in training mode; what follows the map gets no gradient and stays.
    pooled: mimic the map's mean instead.
  """
  own, theirs = models.feature_map_path(small), models.feature_map_path(whole)

  def loss(logits: Array, labels: Array, seen: Seen) -> Array:
    del logits, labels
    return losses.mimic_loss(seen.captured[own], seen.taught[theirs], pooled=pooled)

  head = tuple(f'{path}/.*' for path in models.anatomy(small).head)
  taught = {'teacher': whole, 'captured': (own,), 'taught': (theirs,)}
  return {'loss': loss, 'frozen': head, **taught}


def tuning(
  config: Settings,
  small: nn.Module,
  total: int,
  title: str,
  *,
  loss: Loss,
  rate: float | None = None,
  decides: Mapping[str, Any],
  **options: Any,
) -> Run:
  """Returns the tuning of a small network on `total` images.

  Args:
    config: the settings.
    small: the network.
    total: number of images.
    title: of the run.
    loss: see `supervised.program`.
    rate: in place of the tuning's own.
    decides: what says how the network was made small, and what the loss is.
    **options: of `supervised.program`, such as those of `mimicking`.
  """
  recipe = config.tuning.recipe(total, config.mesh, rate)
  program = supervised.program(small, task(config, total), recipe, 1, loss=loss, **options)
  own = {**ancestry(config), **decides}
  return Run(config, images(config, total), recipe, program, recipe.epochs, own, title)


def tune(
  run: Run, source: data.Source, folder: Any, small: Variables, whole: Variables
) -> Variables:
  """Returns the variables that a tuning ends with, from those of the small network; `whole` teach."""
  if run.num_steps < FEWEST_STEPS:
    say(
      f'WARNING: {run.title} in {run.num_steps} steps: running statistics of batch norms move by a tenth a '
      f'step; before {FEWEST_STEPS} they are still partly those of the whole network.'
    )
  frozen = {'teacher': whole} if run.program.frozen else None
  return runs.train(run, source, folder, frozen=frozen, start=small).variables


def accuracy(config: Settings, nets: Loaded, model: nn.Module, variables: Variables) -> float:
  """Returns the accuracy of a network on the test images, in percent."""
  own = config.network
  return networks.accuracy(config, own.data, model, own.task, variables, nets.test)


def multiply_accumulates(config: Settings, model: nn.Module) -> int:
  """Returns the multiply-accumulates of an image."""
  image = jax.ShapeDtypeStruct((1, *config.network.data.view), np.float32)
  return compression.multiply_accumulates(model, None, image)


def latencies(
  config: Settings, found: Mapping[str, tuple[nn.Module, Variables]]
) -> dict[str, float]:
  """Returns the time of a forward pass of `timed_batch` images in seconds by name, taken in turns."""
  # On the device once, or each call would time a copy, too.
  images = jax.device_put(np.zeros((config.timed_batch, *config.network.data.view), np.float32))

  def side(model: nn.Module, variables: Variables) -> Callable[[], Array]:
    compiled = jax.jit(model.apply)
    return lambda: compiled(variables, images)

  sides = {name: side(*own) for name, own in found.items()}
  return compression.paired_latency(sides, config.timed)


def costs(
  config: Settings, found: Mapping[str, tuple[nn.Module, Variables]], base: str
) -> dict[str, dict[str, float]]:
  """Returns `macs`, multiply-accumulates in % of network `base`, and `latency` likewise, if it is timed."""
  counts = {
    'macs': {name: multiply_accumulates(config, model) for name, (model, _) in found.items()}
  }
  if config.timed:
    counts['latency'] = latencies(config, found)
  return {
    name: {kind: 100 * own[name] / own[base] for kind, own in counts.items()} for name in found
  }


def check(config: Settings) -> Iterator[str]:
  """Yields what is wrong with the network."""
  yield from found_by('network.model', lambda: models.feature_map_path(whole_network(config)))
  yield from found_by('network.model', lambda: compression.structure(whole_network(config)))
