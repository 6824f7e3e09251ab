"""Boxes of objects from networks as they were drawn, compared with true boxes.

The boxes that need no network are one in the middle of every image, and those of raw pixels.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from experiments.harness import data as harness_data
from experiments.harness import results
from experiments.harness.data import Images
from experiments.harness.sections import Experiment
from experiments.protocols import objectness
from experiments.protocols.objectness import RandomCNN
from jaxlab import data, localization

Boxes = tuple[np.ndarray, np.ndarray]

NET, CHANCE = 'random CNN', 'any half of the cells'
BASELINES = ('center box', 'raw pixels')
MEASURES = ('corloc', 'iou', 'inside')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Localization:
  """Boxes from random networks, compared with true ones.

  Attributes:
    data: images with true boxes (y0, x0, y1, x1); those of the test split are used.
    boxes: name of their field.
    relative: whether boxes are in shares of height and width.
    net: that is drawn.
    variants: by name, fields of `net` and `model` that differ from it, such as `{'activation': 'sigmoid'}`.
    networks: drawn of each, with the same keys.
    threshold: overlap above which a box is correct.
  """

  data: Images
  boxes: str = 'boxes'
  relative: bool = False
  net: RandomCNN
  variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  networks: int = 1
  threshold: float = 0.5

  def variant(self, changes: Mapping[str, Any]) -> RandomCNN:
    """Returns the network with some fields changed."""
    own = {name: value for name, value in changes.items() if name in ('features', 'init', 'size')}
    model = {name: value for name, value in changes.items() if name not in own}
    return dataclasses.replace(self.net, model={**self.net.model, **model}, **own)

  @property
  def nets(self) -> dict[str, RandomCNN]:
    """The networks by the names of their rows."""
    others = {f'{NET}, {name}': self.variant(own) for name, own in self.variants.items()}
    return {NET: self.net, **others}

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.networks < 1:
      yield f'networks={self.networks}: expected at least 1.'
    if not 0 <= self.threshold < 1:
      yield f'threshold={self.threshold}: expected an overlap in [0, 1).'
    for name, own in self.nets.items():
      yield from objectness.check(own, self.data, localization.channel_sum, name)


def compare(
  config: Experiment,
  own: Localization,
  stays: Callable[[np.ndarray], np.ndarray],
  draw: Callable[[np.ndarray, np.ndarray, Boxes], None],
) -> list[dict[str, Any]]:
  """Returns rows of random networks, of the box in the middle, and of raw pixels.

  Metrics: `corloc` (%) and `iou` of the boxes, and `inside`, the share of the first true box's area that lies
  in the cells that stay (%).

  Args:
    config: the experiment.
    own: the networks and the data.
    stays: `maps -> [images, grid, grid]`, the cells of an image that are its object's.
    draw: given images, the first network's maps, and true boxes.
  """
  source = harness_data.load(own.data, 'test')
  image, truth, labels = true_boxes(own, source)
  height, width = image.shape[1:3]

  def judged(boxes: np.ndarray, score: np.ndarray | None = None) -> dict[str, float]:
    iou = np.asarray(localization.best_iou(boxes, *truth))
    found = {'corloc': 100 * localization.corloc(iou, labels, own.threshold), 'iou': iou.mean()}
    if score is not None:
      shares = localization.share_inside(truth[0][:, 0], stays(score), (height, width))
      found['inside'] = 100 * float(np.mean(shares))
    return found

  middle = np.tile(localization.center_box((height, width)), (len(image), 1))
  raw = localization.scda_boxes(image.astype(np.float32).mean(-1), (height, width))
  rows = [results.row(CHANCE, 'reference', {'inside': 50.0})]
  for name, boxes in zip(BASELINES, (middle, raw), strict=True):
    rows.append(results.row(name, 'baseline', judged(boxes)))
  for name, net in own.nets.items():
    maps, each = objectness.mapper(config, net, own.data, localization.channel_sum), []
    for key in jax.random.split(jax.random.key(config.seed), own.networks):
      score = maps(key, source, 'test')
      each.append(judged(localization.scda_boxes(score, (height, width)), score))
      if name == NET and len(each) == 1:
        draw(image, score, truth)
    mean = {metric: np.mean([found[metric] for found in each]) for metric in each[0]}
    rows.append(results.row(name, 'method' if name == NET else 'reference', mean))
  return rows


def true_boxes(own: Localization, source: data.Source) -> tuple[np.ndarray, Boxes, np.ndarray]:
  """Returns images as networks see them, true boxes with which of them are there, and labels."""
  read = harness_data.reading(own.data, 'test')['transform'] or (lambda record: record)
  records = [read(source[index]) for index in range(len(source))]
  image = np.stack([record['image'] for record in records])
  boxes = np.stack([np.reshape(record[own.boxes], (-1, 4)) for record in records])
  boxes = boxes * (np.tile(image.shape[1:3], 2) if own.relative else 1)
  valid = np.any(boxes != 0, axis=-1)
  labels = np.array([record['label'] for record in records])
  return image, (boxes[..., [1, 0, 3, 2]], valid), labels
