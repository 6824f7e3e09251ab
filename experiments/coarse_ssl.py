"""Coarse crops: self-supervised learning with uncurated images (Zhu et al. 2023).

Images of scenes show several objects, and two random views of one need not show the same. So first
coarse boxes of what looks like an object are made, from the features of a network that need not have
been trained; then any method learns from the crops as from images. How the boxes are made is inferred:
see `localization.coarse_boxes`.

  python -m experiments.coarse_ssl
  python -m experiments.coarse_ssl --config.runs=full,coarse --config.boxes.expand=1.2
  python -m experiments.coarse_ssl --config.objectness=ssl --config.net.features=layer3_0
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks, pictures, results, runs
from experiments.harness.data import Images
from experiments.harness.runs import Call, Run
from experiments.harness.settings import found_by, free, section
from experiments.protocols import (
  feature_evaluation,
  masked_modeling,
  multi_label_evaluation,
  objectness,
  pretraining,
  siamese,
  siamese_methods,
)
from experiments.protocols.masked_modeling import Masking
from experiments.protocols.objectness import RandomCNN
from experiments.protocols.siamese_methods import Heads, Momentum, Prototypes
from jaxlab import data, localization, models

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
    objectness: whose features say where objects are: 'random': those of `net` as drawn; 'ssl': of the
      backbone that 'full' ended with, `model` in place of `net.model`; 'pretrained': of `net` with public
      weights.
    net: a network and the module that the features are of.
    pretrained: name of the public weights (`jaxlab.models.load_pretrained`).
    weights: file with the public weights; empty: they are downloaded.
    boxes: made from them.
    crop_size: side of a crop as an image of its own.
    truth: field of the true boxes (y0, x0, y1, x1), for `'true'` boxes and all boxes' quality; None: none.
    base: the method that is pretrained, from two views of an image, MAE from one.
    heads: over the backbone; of all methods but MAE.
    target: of the method.
    prototypes: of DINO.
    masking: of MAE.
    runs: rows, of `TITLES`.
    scenes_eval: of frozen backbones on the test scenes, by the classes that these show; None: not judged on
      scenes.
    pretrain: False compares the boxes alone.
  """

  judged: Images
  objectness: Literal['random', 'ssl', 'pretrained'] = 'random'
  net: RandomCNN
  pretrained: str = ''
  weights: str = free('')
  boxes: Boxes = section(Boxes)
  crop_size: int
  truth: str | None = None
  base: Literal['simclr', 'moco', 'byol', 'simsiam', 'dino', 'barlow', 'mae'] = 'moco'
  heads: Heads = section(Heads)
  target: Momentum = section(Momentum)
  prototypes: Prototypes = section(Prototypes)
  masking: Masking = section(Masking)
  runs: tuple[str, ...] = ('full', 'random', 'coarse')
  scenes_eval: multi_label_evaluation.Evaluation | None = None
  pretrain: bool = True


def base_training(config: Settings) -> Run:
  """Returns the pretraining by the method on the images of `config.data`."""
  own = config.heads, config.target
  if config.base != 'mae':
    return siamese_methods.training(config, config.base, *own, prototype=config.prototypes)
  optimizer = siamese_methods.optimizer(
    'mae', config.recipe.optimizer, config.heads, pretraining.length(config),
    frozen=(masked_modeling.POSITIONS,),
  )  # fmt: skip
  views = pretraining.two_views(config)
  return masked_modeling.training(
    config, config.masking, 'MAE', lambda keys, images: views(keys, images)[:1], optimizer,
    {'method': 'mae', 'masking': config.masking},
  )  # fmt: skip


def training(config: Settings, kind: str) -> Run:
  """Returns the pretraining on some kind of boxes: as many steps and images a step for all."""
  decides, own = {'kind': kind}, config.data
  if kind != 'full':
    decides |= {'boxes': config.boxes, 'crop_size': config.crop_size, **features(config)}
    decides |= {'decode': own.train_decode} if own.train_decode else {}
    # Scenes are decoded where they are cut: the loader gets crops as arrays.
    crop, size = (config.crop_size,) * 2 + own.stored_image[2:], own.view[0]
    own = dataclasses.replace(own, stored_image=crop, image_size=size, train_decode=None)
  found = base_training(dataclasses.replace(config, data=own))
  return found._replace(title=TITLES[kind], decides={**found.decides, **decides})


def net(config: Settings) -> RandomCNN:
  """Returns the network whose features say where objects are."""
  if config.objectness == 'ssl':
    return dataclasses.replace(config.net, model=config.model)
  return config.net


def features(config: Settings) -> dict[str, Any]:
  """Returns what decides the features that say where objects are."""
  start = {'pretrained': config.pretrained}
  if config.objectness == 'ssl':
    start = {'start': training(config, 'full').identity}
  return {'net': net(config), **(start if config.objectness != 'random' else {})}


def beginning(
  config: Settings, scenes: data.Source, workdir: pathlib.Path
) -> Array | runs.Variables:
  """Returns the variables of the network whose features say where objects are, or the key that draws them."""
  if config.objectness == 'ssl':
    trained = runs.train(training(config, 'full'), scenes, workdir / 'full')
    return siamese.backbone_variables(trained.variables)
  if config.objectness == 'pretrained':
    fields = {name: value for name, value in config.net.model.items() if name != 'name'}
    file = {'file': networks.sources.file(config.weights)} if config.weights else {}
    _, public = models.load_pretrained(config.pretrained, **{**fields, **file, 'num_classes': None})
    return networks.over_mesh(public, config.mesh.make())
  return jax.random.key(config.seed)


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from pretraining.check(config)
  yield from feature_evaluation.check(config.eval, config.judged.train_size)
  metrics = [*QUALITY, *config.eval.metrics(), *more_metrics(config)]
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
  yield from check_base(config)
  if config.scenes_eval:
    yield from multi_label_evaluation.check(on_scenes(config), 'scenes_eval')
  yield from check_objectness(config)


def check_objectness(config: Settings) -> Iterator[str]:
  """Yields what is wrong with the network whose features say where objects are."""
  if config.objectness == 'ssl' and not (config.pretrain and 'full' in config.runs):
    yield "objectness='ssl': the features are of the backbone that 'full' ends with; expected it among runs."
  if config.objectness == 'ssl' and config.base == 'mae':
    yield "objectness='ssl': boxes are from the maps of a CNN; MAE trains a ViT."
    return
  wanted = config.net.model.get('name') if config.objectness == 'pretrained' else ''
  if config.pretrained.partition('.')[0] != wanted:
    expected = f'weights of {wanted}' if wanted else "none without objectness='pretrained'"
    yield f'pretrained={config.pretrained!r}: expected {expected}.'
  if config.weights and not config.pretrained:
    yield f'weights={config.weights!r}: give the name of the weights, pretrained, too.'
  yield from objectness.check(net(config), config.data, localization.channel_sum, 'net')


def check_base(config: Settings) -> Iterator[str]:
  """Yields what is wrong with the method."""
  recipe = config.recipe
  if config.base == 'mae':
    yield from found_by('model', masked_modeling.parts, config, config.masking)
    return
  if recipe.batch_size < 2 or recipe.microbatches > 1:
    yield 'recipe: expected a batch_size of 2 or more for batch norms, and microbatches=1.'
  yield from siamese_methods.check((config.base,), recipe, config.target, config.prototypes)
  own = config.model, config.heads, config.target, pretraining.length(config)
  made = functools.partial(siamese_methods.method, config.base, prototype=config.prototypes)
  yield from found_by('model', made, *own)


def on_scenes(config: Settings) -> Settings:
  """Returns the settings under which `multi_label_evaluation` judges on scenes."""
  return dataclasses.replace(config, eval=config.scenes_eval)


def more_metrics(config: Settings) -> tuple[str, ...]:
  """Returns the names of what is measured of backbones besides the evaluation on single objects."""
  return (*(multi_label_evaluation.METRICS if config.scenes_eval else ()), 'z_std')


def programs(config: Settings, facts: None = None) -> dict[str, Run | Call]:
  """Returns the trainings by the names of `runs`, and the maps of objectness."""
  del facts
  found = {kind: training(config, kind) for kind in config.runs if config.pretrain}
  maps = objectness.program(config, net(config), config.data, localization.channel_sum)
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
  maps = objectness.mapper(config, net(config), config.data, localization.channel_sum)
  scores = maps(beginning(config, scenes, workdir), scenes, 'train')
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
  shown = [*QUALITY, *feature_evaluation.shown(config, *more_metrics(config))]
  return results.results(
    config,
    [*start, *rows],
    shown,
    'accuracies, mAP and precision in %; recall and coverage are shares',
  )


def pretrain(
  config: Settings, scenes: data.Source, boxes: Mapping[str, AllBoxes | None], workdir: pathlib.Path
) -> dict[str, dict[str, float]]:
  """Returns what the frozen backbones are worth, by kind of boxes, and `'untrained'`."""
  backbone = networks.create(config.model, num_classes=None)
  judge = judging(config, backbone, scenes)
  drawn = jax.jit(backbone.init)(jax.random.key(config.seed), jnp.zeros((2, *config.data.view)))
  found, histories = {'untrained': judge(dict(drawn))}, {}
  for kind in config.runs:
    cut = boxes[kind]
    source = scenes if cut is None else data.Crops(scenes, cut, config.crop_size, read(config))
    trained = runs.train(training(config, kind), source, workdir / kind)
    z_std = pretraining.say_collapse(TITLES[kind], trained.history)
    histories[TITLES[kind]] = trained.history
    found[kind] = {**judge(siamese.backbone_variables(trained.variables)), 'z_std': z_std}
  pretraining.draw_curves(config, histories, workdir / 'curves.png')
  return found


def judging(
  config: Settings, backbone: nn.Module, scenes: data.Source
) -> Callable[[runs.Variables], dict[str, float]]:
  """Returns `variables -> metrics` of frozen backbones, on single objects and, if asked for, on scenes."""
  sources = {split: harness_data.load(config.judged, split) for split in ('train', 'test')}
  single = dataclasses.replace(config, data=config.judged)
  judges = [feature_evaluation.evaluator(single, backbone, sources)]
  if config.scenes_eval:
    sources = {'train': scenes, 'test': harness_data.load(config.data, 'test')}
    judges.append(multi_label_evaluation.evaluator(on_scenes(config), backbone, sources))
  return lambda variables: {
    name: value for judge in judges for name, value in judge(variables).items()
  }


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
