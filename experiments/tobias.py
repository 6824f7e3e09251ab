"""Tobias: a random CNN sees objects (Cao & Wu, AAAI 2022).

The features of a convolutional network as it was drawn, summed over channels, are high where an object is:
what lies above their mean boxes it. This splits an image's cells into object and background without a label,
and pretraining can show one view of an image on the background of another one. Claims: the boxes are better
than one in the middle and than those of raw pixels, with ReLUs alone; and pretraining (MoCo v2) gains.

  python -m experiments.tobias
  python -m experiments.tobias --config.runs='()'          # localization alone
  python -m experiments.tobias --config=imagenet_10k --workdir=DIR
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks, pictures, results, runs
from experiments.harness.runs import Call, Run
from experiments.harness.settings import found_by, section
from experiments.protocols import (
  feature_evaluation,
  objectness,
  pretraining,
  random_localization,
  siamese,
  siamese_methods,
)
from experiments.protocols.objectness import RandomCNN
from experiments.protocols.random_localization import (
  BASELINES,
  CHANCE,
  MEASURES,
  NET,
  Boxes,
  Localization,
)
from experiments.protocols.siamese_methods import Heads, Momentum
from jaxlab import data, localization

Array = jax.Array

RUNS = ('base', 'tobias', 'random')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merging:
  """Which cells of an image are its object's, and how often its background is changed.

  Attributes:
    net: whose features say it, computed once for all images.
    grid: cells a side.
    pooling: of features to cells, see `localization.patch_score_map`.
    num_foreground: cells that stay; None: half of them.
    probability: of a changed background.
  """

  net: RandomCNN
  grid: int = 4
  pooling: Literal['max', 'average'] = 'max'
  num_foreground: int | None = None
  probability: float = 0.3

  @property
  def reduce(self) -> Callable[[Array], Array]:
    """Makes scores of cells out of features."""
    return functools.partial(localization.patch_score_map, grid=self.grid, pooling=self.pooling)

  def change(self, keys: Array, images: Array, scores: Array | None) -> Array:
    """Returns images of which some have another's background; without scores cells are drawn."""
    own = {'grid': self.grid, 'num_foreground': self.num_foreground}
    return data.change_backgrounds(keys, images, scores, self.probability, **own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(pretraining.Settings):
  """Settings of Tobias.

  Attributes:
    localization: None: objects are not boxed.
    merging: of backgrounds.
    base: the method that is pretrained.
    heads: over the backbone.
    target: of the base method.
    runs: rows, of `RUNS`: the base method, with Tobias, and with cells that are drawn (the control).
  """

  localization: Localization | None = None
  merging: Merging
  base: Literal['simclr', 'moco', 'byol', 'simsiam', 'barlow'] = 'moco'
  heads: Heads = section(Heads)
  target: Momentum = section(Momentum)
  runs: tuple[str, ...] = RUNS


def title(config: Settings, kind: str) -> str:
  """Returns the name of the row of an entry of `runs`."""
  base = siamese_methods.TITLES[config.base]
  return {'base': base, 'tobias': f'{base}, Tobias', 'random': f'{base}, random cells'}[kind]


def draw_views(config: Settings, kind: str) -> Callable[..., list[Array]]:
  """Returns `(keys, images, [score]) -> [view, view]`: the first may have another background.

  With a probability of 0 the views are those of the base method.
  """
  normal = {'mean': config.data.mean, 'std': config.data.std}
  crop = data.resized_crop_augment(config.data.view[0], **config.augment.crop_options(), **normal)

  def draw(keys: Array, images: Array, score: Array | None = None) -> list[Array]:
    own = jax.vmap(lambda key: jax.random.fold_in(key, 2))(keys)
    changed = config.merging.change(own, images, score if kind == 'tobias' else None)
    both = data.to_float(jnp.stack([changed, images]))
    view_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    return list(jax.vmap(jax.vmap(crop))(view_keys, both))

  return pretraining.two_views(config) if kind == 'base' else draw


def method(config: Settings) -> tuple[siamese.Networks, siamese.Targets]:
  """Returns the networks of the base method, and what their predictions are compared with."""
  own = config.heads, config.target, pretraining.length(config)
  return siamese_methods.method(config.base, config.model, *own)


def training(config: Settings, kind: str) -> Run:
  """Returns the pretraining of an entry of `runs`."""
  nets, targets = method(config)
  images = jnp.zeros((2 * config.model.get('norm_groups', 1), *config.data.view))
  own = {name: getattr(config, name) for name in ('base', 'heads', 'target')}
  grid = (config.merging.grid,) * 2
  return pretraining.training(
    config, title(config, kind), siamese.init(nets, targets, images), siamese.view_loss(nets, targets),
    views=draw_views(config, kind), view_fields={'score': grid} if kind == 'tobias' else {},
    after=targets.after,
    optimizer=siamese_methods.optimizer(
      config.base, config.recipe.optimizer, config.heads, pretraining.length(config)
    ),
    decides={'kind': kind, **own, **({} if kind == 'base' else {'merging': config.merging})},
  )  # fmt: skip


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from pretraining.check(config)
  yield from feature_evaluation.check(config.eval, config.data.train_size)
  nets = config.localization.nets if config.localization else [NET]
  rows = ['untrained', CHANCE, *BASELINES, *nets, *(title(config, kind) for kind in RUNS)]
  metrics = [*MEASURES, *config.eval.metrics(), 'z_std']
  yield from results.check_claims(config, rows, metrics)
  if unknown := [name for name in config.runs if name not in RUNS]:
    yield f'runs: {unknown} are none of {", ".join(RUNS)}.'
  if not config.runs and config.localization is None:
    yield 'runs is empty and there is no localization: nothing is done.'
  if config.recipe.batch_size < 2 or config.recipe.microbatches > 1:
    yield 'recipe: expected a batch_size of 2 or more for batch norms, and microbatches=1.'
  yield from siamese_methods.check((config.base,), config.recipe, config.target)
  yield from found_by('model', method, config)
  own = config.merging
  yield from objectness.check(own.net, config.data, own.reduce, 'merging')
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
  image = jax.ShapeDtypeStruct((2, *config.data.stored_image), jnp.uint8)
  change = functools.partial(own.change, scores=None)
  yield from found_by('merging', jax.eval_shape, change, keys, image)


def programs(config: Settings, facts: None = None) -> dict[str, Run | Call]:
  """Returns the trainings by the names of `runs`, and what random networks compute."""
  del facts
  found = {kind: training(config, kind) for kind in config.runs}
  if 'tobias' in config.runs:
    own = config.merging
    found['scores'] = objectness.program(config, own.net, config.data, own.reduce)
  if config.localization:
    own = config.localization
    found['maps'] = objectness.program(config, own.net, own.data, localization.channel_sum)
  return found


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Boxes objects, pretrains with and without changed backgrounds, and compares."""
  rows = []
  if config.localization:
    draw = functools.partial(draw_boxes, config, workdir / 'localization.png')
    stays = functools.partial(staying, config)
    rows += random_localization.compare(config, config.localization, stays, draw)
  if config.runs:
    rows += pretrain(config, workdir)
  shown = [*MEASURES, *feature_evaluation.shown(config, 'z_std')]
  return results.results(config, rows, shown, 'corloc, inside and accuracies in %')


def staying(config: Settings, score: np.ndarray) -> np.ndarray:
  """Returns the cells of images that stay where their backgrounds change, bool `[images, grid, grid]`."""
  grid = config.merging.grid
  kept, _ = data.split_cells(averaged(score, grid), config.merging.num_foreground)
  mask = np.zeros((len(score), grid * grid), bool)
  np.put_along_axis(mask, np.asarray(kept), True, axis=1)
  return mask.reshape(-1, grid, grid)


def averaged(score: np.ndarray, grid: int) -> Array:
  """Returns maps averaged over the cells of a grid; interpolated where it does not divide them."""
  if score.shape[1] % grid or score.shape[2] % grid:
    return jax.image.resize(score, (len(score), grid, grid), 'linear')
  return localization.patch_score_map(score[..., None], grid, 'average')


def pretrain(config: Settings, workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns rows of the frozen backbones."""
  sources = {split: harness_data.load(config.data, split) for split in ('train', 'test')}
  backbone = networks.create(config.model, num_classes=None)
  judge = feature_evaluation.evaluator(config, backbone, sources)
  drawn = jax.jit(backbone.init)(jax.random.key(config.seed), jnp.zeros((2, *config.data.view)))
  rows, histories = [results.row('untrained', 'reference', judge(dict(drawn)))], {}
  for kind, own in programs(config).items():
    if not isinstance(own, Run):
      continue
    source = scored(config, sources['train']) if kind == 'tobias' else sources['train']
    trained = runs.train(own, source, workdir / kind)
    z_std = pretraining.say_collapse(own.title, trained.history)
    histories[own.title] = trained.history
    metrics = {**judge(siamese.backbone_variables(trained.variables)), 'z_std': z_std}
    rows.append(results.row(own.title, 'method' if kind == 'tobias' else 'baseline', metrics))
  pretraining.draw_curves(config, histories, workdir / 'curves.png')
  return rows


def scored(config: Settings, source: data.Source) -> data.WithFields:
  """Returns the training records with the scores of their cells, by one random network for all."""
  own = config.merging
  maps = objectness.mapper(config, own.net, config.data, own.reduce)
  return data.WithFields(source, {'score': maps(jax.random.key(config.seed), source, 'train')})


def draw_boxes(
  config: Settings, picture: pathlib.Path, image: np.ndarray, score: np.ndarray, truth: Boxes
) -> None:
  """Draws images with the true and the found box, heat maps, crops, and images on others' backgrounds."""
  count, size = min(6, len(image)), image.shape[1:3]
  boxes = localization.scda_boxes(score[:count], size)
  cells = averaged(score[:count], config.merging.grid)
  keys = jax.random.split(jax.random.key(config.seed), count)
  always = dataclasses.replace(config.merging, probability=1.0)
  merged = np.asarray(always.change(keys, image[:count], cells))
  with pictures.drawn(picture, 4, count, size=(1.6 * count, 6.6), squeeze=False) as axes:
    for axis in axes.flat:
      axis.set_axis_off()
    for column, (x0, y0, x1, y1) in enumerate(boxes):
      first, second, third, fourth = axes[:, column]
      first.imshow(image[column], cmap='gray')
      for (left, top, right, bottom), color in (
        (truth[0][column, 0], '#4d9f70'),
        ((x0, y0, x1, y1), '#d64545'),
      ):
        edges = [left, right, right, left, left], [top, top, bottom, bottom, top]
        first.plot(*(np.array(edge) - 0.5 for edge in edges), color=color)
      second.imshow(score[column], cmap='magma')
      third.imshow(image[column, y0:y1, x0:x1], cmap='gray')
      fourth.imshow(merged[column], cmap='gray')
    for axis, text in zip(axes[:, 0], ('true (green), found', 'sum of features', 'crop', 'merged')):
      axis.set_title(text, fontsize=8, loc='left')


if __name__ == '__main__':
  launcher.main('tobias')
