"""Coarse crops: self-supervised learning with uncurated images (Zhu et al. 2023).

Images of scenes show several objects, and two random views of one need not show the same. So first
coarse boxes of what looks like an object are made, from the features of a network that may never have
been trained; then any method learns from the crops as from images. How the boxes are made is inferred:
see `localization.coarse_boxes`.

  python -m experiments.coarse_ssl
  python -m experiments.coarse_ssl --config.runs=full,coarse --config.boxes.expand=1.2
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks, pictures, results, runs
from experiments.harness.data import Images
from experiments.harness.runs import Call, Run
from experiments.harness.settings import found_by, section
from experiments.protocols import (
  feature_evaluation,
  objectness,
  pretraining,
  siamese,
  siamese_methods,
)
from experiments.protocols.objectness import RandomCNN
from experiments.protocols.siamese_methods import Heads, Momentum
from jaxlab import data, localization

Array = jax.Array
AllBoxes = list[np.ndarray]

TITLES = {
  'full': 'whole scenes',
  'grid': 'quadrants and center',
  'random': 'random boxes',
  'coarse': 'coarse crops',
  'true': 'true boxes, enlarged',
}
QUALITY = ('recall_0.3', 'recall_0.5', 'coverage', 'objects', 'boxes')


@dataclasses.dataclass(frozen=True)
class Boxes:
  """Options of `localization.coarse_boxes`."""

  factor: float = 1.0
  least: float = 0.02
  expand: float = 1.4
  big: float = 0.6
  rounds: int = 3
  max_boxes: int = 5
  max_iou: float = 0.5
  min_side: float = 0.2
  max_aspect: float = 2.0
  include_full: bool = False

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from found_by('options', self.find, np.eye(4), 8)

  def find(self, score: np.ndarray, size: int | Sequence[int]) -> np.ndarray:
    """Returns the boxes of an image."""
    return localization.coarse_boxes(score, size, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(pretraining.Settings):
  """Settings of coarse crops; `data` are the scenes, and `recipe` counts epochs of whole scenes.

  Attributes:
    judged: images of single objects, on which frozen backbones are judged.
    net: whose features say where objects are.
    boxes: made from them.
    crop_size: side of a crop as an image of its own.
    truth: field of the true boxes (y0, x0, y1, x1), for `'true'` boxes and all boxes' quality; None: none.
    base: the method that is pretrained.
    heads: over the backbone.
    target: of the method.
    runs: rows, of `TITLES`.
    pretrain: False compares the boxes alone.
  """

  judged: Images
  net: RandomCNN
  boxes: Boxes = section(Boxes)
  crop_size: int
  truth: str | None = None
  base: Literal['simclr', 'moco', 'byol', 'simsiam', 'barlow'] = 'moco'
  heads: Heads = section(Heads)
  target: Momentum = section(Momentum)
  runs: tuple[str, ...] = ('full', 'random', 'coarse')
  pretrain: bool = True


def method(config: Settings) -> tuple[siamese.Networks, siamese.Targets]:
  """Returns the networks of the method, and what their predictions are compared with."""
  own = config.heads, config.target, pretraining.length(config)
  return siamese_methods.method(config.base, config.model, *own)


def training(config: Settings, kind: str) -> Run:
  """Returns the pretraining on some kind of boxes: as many steps and images a step for all."""
  nets, targets = method(config)
  decode = {}
  if kind != 'full':
    crop = (config.crop_size,) * 2 + config.data.stored_image[2:]
    size = config.data.view[0]
    # Scenes are decoded where they are cut: the loader gets crops as arrays.
    own = dataclasses.replace(config.data, stored_image=crop, image_size=size, train_decode=None)
    decode = {'decode': config.data.train_decode} if config.data.train_decode else {}
    config = dataclasses.replace(config, data=own)
  images = jnp.zeros((2 * config.model.get('norm_groups', 1), *config.data.view))
  names = ('base', 'heads', 'target', *(() if kind == 'full' else ('boxes', 'net', 'crop_size')))
  return pretraining.training(
    config, TITLES[kind], siamese.init(nets, targets, images), siamese.view_loss(nets, targets),
    after=targets.after,
    optimizer=siamese_methods.optimizer(
      config.base, config.recipe.optimizer, config.heads, pretraining.length(config)
    ),
    decides={'kind': kind, **decode, **{name: getattr(config, name) for name in names}},
  )  # fmt: skip


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from pretraining.check(config)
  yield from feature_evaluation.check(config.eval, config.judged.train_size)
  metrics = [*QUALITY, *config.eval.metrics(), 'z_std']
  yield from results.check_claims(config, ['untrained', *TITLES.values()], metrics)
  if unknown := [name for name in config.runs if name not in TITLES]:
    yield f'runs: {unknown} are none of {", ".join(TITLES)}.'
  if not config.runs:
    yield f'runs is empty; runs: {", ".join(TITLES)}.'
  if 'true' in config.runs and config.truth is None:
    yield "runs: 'true' needs the name of a field of true boxes, truth."
  if not config.pretrain and config.truth is None:
    yield 'pretrain: without it boxes are compared with true ones; give their field, truth.'
  if config.crop_size < 1:
    yield f'crop_size={config.crop_size}: expected a positive number of pixels.'
  if config.judged.view != config.data.view:
    yield f'judged: views of {config.judged.view}, of the scenes {config.data.view}: expected one size.'
  if config.recipe.batch_size < 2 or config.recipe.microbatches > 1:
    yield 'recipe: expected a batch_size of 2 or more for batch norms, and microbatches=1.'
  if config.base == 'moco' and config.target.queue_size % config.recipe.batch_size:
    yield f'target.queue_size={config.target.queue_size}: expected a multiple of recipe.batch_size.'
  yield from found_by('model', method, config)
  yield from objectness.check(config.net, config.data, localization.channel_sum, 'net')


def programs(config: Settings, facts: None = None) -> dict[str, Run | Call]:
  """Returns the trainings by the names of `runs`, and the maps of objectness."""
  del facts
  found = {kind: training(config, kind) for kind in config.runs if config.pretrain}
  maps = objectness.program(config, config.net, config.data, localization.channel_sum)
  return {**found, 'maps': maps}


def find_boxes(
  config: Settings, scores: np.ndarray, truth: AllBoxes | None
) -> dict[str, AllBoxes | None]:
  """Returns the boxes of every image by kind; None where the image is not cut.

  Random ones have the sizes of the coarse ones, in another order.
  """
  size, rng = config.data.stored_image[:2], np.random.default_rng(config.seed)
  coarse = [config.boxes.find(score, size) for score in scores]
  height, width = size
  y, x = height // 2, width // 2
  grid = np.array([
    *((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)),
    (x // 2, y // 2, x // 2 + x, y // 2 + y),
  ])  # fmt: skip
  every = np.concatenate(coarse)
  sides = rng.permutation(every[:, 2:] - every[:, :2])
  first = np.floor(rng.random(sides.shape) * (np.array([width, height]) - sides + 1)).astype(int)
  ends = np.cumsum([len(own) for own in coarse])[:-1]
  found = {
    'full': None,
    'grid': [grid] * len(coarse),
    'random': np.split(np.concatenate([first, first + sides], 1), ends),
    'coarse': coarse,
  }
  if truth is not None:
    grow = functools.partial(localization.expand_box, factor=config.boxes.expand, size=size)
    found['true'] = [np.array([grow(box) for box in own]).reshape(-1, 4) for own in truth]
  return found


def read(config: Settings) -> Callable[[Any], Any] | None:
  """Returns how a scene's record is brought to the form in which it is cut."""
  return harness_data.reading(config.data, 'train')['transform']


def true_boxes(config: Settings, source: data.InMemory) -> AllBoxes | None:
  """Returns the true boxes (x0, y0, x1, y1) of every scene, where there are such."""
  if config.truth is None:
    return None
  boxes = source.arrays[config.truth][..., [1, 0, 3, 2]].astype(int)
  return [own[np.any(own != 0, axis=1)] for own in boxes]


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Makes boxes, pretrains on each kind of crops for as many steps, and judges the frozen backbones."""
  scenes = harness_data.load(config.data, 'train')
  scenes = data.in_memory(scenes) if config.truth else scenes
  maps = objectness.mapper(config, config.net, config.data, localization.channel_sum)
  scores = maps(jax.random.key(config.seed), scenes, 'train')
  truth = true_boxes(config, scenes)
  boxes = find_boxes(config, scores, truth)
  draw(config, scenes, scores, boxes, workdir / 'boxes.png')

  rows = {
    kind: localization.box_quality(boxes[kind], truth)
    for kind in config.runs
    if boxes[kind] is not None and truth is not None
  }
  start = []
  if config.pretrain:
    learned = pretrain(config, scenes, boxes, workdir)
    start = [results.row('untrained', 'reference', learned.pop('untrained'))]
    rows = {kind: {**rows.get(kind, {}), **own} for kind, own in learned.items()}
  roles = {'coarse': 'method', 'true': 'reference'}
  rows = [results.row(TITLES[k], roles.get(k, 'baseline'), own) for k, own in rows.items()]
  shown = [*QUALITY, *feature_evaluation.shown(config, 'z_std')]
  return results.results(
    config, [*start, *rows], shown, 'accuracies in %; recall and coverage are shares'
  )


def pretrain(
  config: Settings, scenes: data.Source, boxes: Mapping[str, AllBoxes | None], workdir: pathlib.Path
) -> dict[str, dict[str, float]]:
  """Returns what the frozen backbones are worth, by kind of boxes, and `'untrained'`."""
  sources = {split: harness_data.load(config.judged, split) for split in ('train', 'test')}
  backbone = networks.create(config.model, num_classes=None)
  judge = feature_evaluation.evaluator(
    dataclasses.replace(config, data=config.judged), backbone, sources
  )
  drawn = jax.jit(backbone.init)(jax.random.key(config.seed), jnp.zeros((2, *config.data.view)))
  found = {'untrained': judge(dict(drawn))}
  for kind in config.runs:
    cut = boxes[kind]
    source = scenes if cut is None else data.Crops(scenes, cut, config.crop_size, read(config))
    trained = runs.train(training(config, kind), source, workdir / kind)
    z_std = pretraining.say_collapse(TITLES[kind], trained.history)
    found[kind] = {**judge(siamese.backbone_variables(trained.variables)), 'z_std': z_std}
  return found


def draw(
  config: Settings,
  scenes: data.Source,
  scores: np.ndarray,
  boxes: Mapping[str, AllBoxes | None],
  picture: pathlib.Path,
) -> None:
  """Draws scenes with their coarse boxes, heat maps, and the best crop of each."""
  count = min(6, len(scenes))
  few, bring = data.subset(scenes, range(count)), read(config) or (lambda record: record)
  crops = data.Crops(few, boxes['coarse'][:count], config.crop_size, bring)
  firsts = np.cumsum([0, *(len(own) for own in boxes['coarse'][: count - 1])])
  with pictures.drawn(picture, 3, count, size=(1.6 * count, 5), squeeze=False) as axes:
    for axis in axes.flat:
      axis.set_axis_off()
    for column in range(count):
      axes[0, column].imshow(bring(few[column])['image'], cmap='gray')
      for x0, y0, x1, y1 in boxes['coarse'][column] - 0.5:
        axes[0, column].plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color='#d64545')
      axes[1, column].imshow(scores[column], cmap='magma')
      axes[2, column].imshow(crops[int(firsts[column])]['image'], cmap='gray')
    for axis, text in zip(
      axes[:, 0], ('coarse boxes', 'sum of features', 'best crop'), strict=True
    ):
      axis.set_title(text, fontsize=8, loc='left')


if __name__ == '__main__':
  launcher.main('coarse_ssl')
