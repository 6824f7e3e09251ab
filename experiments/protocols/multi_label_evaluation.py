"""Where images show several classes: what a classifier says of them, and what a frozen backbone is worth."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import pictures
from experiments.harness.runs import Variables
from experiments.harness.sections import Experiment
from jaxlab import data, evaluation, losses
from jaxlab.training import map_batches

METRICS = ('mAP', 'precision')
# Of a classifier: average precision, and precision, recall and F1 overall and by class.
SCORES = ('mAP', 'OP', 'OR', 'OF1', 'CP', 'CR', 'CF1')
TOP = 3  # classes of an image that the metrics named `top3` are of

Protocol = Literal['coco', 'voc07', 'wider']


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """How a frozen backbone is judged.

  Attributes:
    k: nearest images of the bank that a query retrieves.
    bank: training images, the first ones, of which the bank consists.
    steps: of the probes, a logistic regression for each class.
    learning_rate: of their first step.
    l2: weight of their penalty.
  """

  k: int = 20
  bank: int = 4096
  steps: int = 1500
  learning_rate: float = 0.1
  l2: float = 1e-4

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not 1 <= self.k <= self.bank:
      yield f'k={self.k}: expected 1 to bank={self.bank}.'
    for name in ('steps', 'learning_rate'):
      if getattr(self, name) <= 0:
        yield f'{name}={getattr(self, name)}: expected a positive number.'
    if self.l2 < 0:
      yield f'l2={self.l2}: expected at least 0.'


def check(config: Experiment, name: str = 'eval') -> Iterator[str]:
  """Yields what is wrong with data and evaluation, the section `name`, of an experiment."""
  if not config.data.multi_label:
    yield f'data.multi_label=False: {config.data.name} is judged by several labels an image.'
  size = config.data.train_size
  if size is not None and config.eval.bank > size:
    yield f'{name}.bank={config.eval.bank}: expected at most {size}, the training images.'


def evaluator(
  config: Experiment, backbone: nn.Module, sources: Mapping[str, data.Source]
) -> Callable[[Variables], dict[str, float]]:
  """Returns `variables -> metrics`, in percent; all networks share its compilations.

  mAP: mean average precision on the test images of a logistic regression for each class, fitted on features
  of length 1, each dimension standardized [inferred: which of the two comes first].
  precision: of the `k` training images of the bank that are nearest to a test image by cosine, the share that
  has a class in common with it.

  Args:
    config: its data, task and section `eval` (`Evaluation`) are used.
    backbone: returns features `[batch, dim]`.
    sources: the splits 'train' and 'test'.
  """
  own, task = config.eval, config.task

  @jax.jit
  def features(variables: Variables, batch: dict[str, jax.Array]) -> jax.Array:
    return losses.normalize(backbone.apply(variables, task.inputs(batch), train=False))

  def all_of(variables: Variables, split: str) -> tuple[jax.Array, jax.Array]:
    return map_batches(
      lambda batch: (features(variables, batch), task.targets(batch)),
      sources[split],
      batch_size=config.eval_batch_size,
      mesh=config.mesh.make(),
      **harness_data.reading(config.data, 'test'),  # of both splits alike, at the network's size
    )

  def evaluate(variables: Variables) -> dict[str, float]:
    bank, bank_labels = all_of(variables, 'train')
    queries, labels = all_of(variables, 'test')
    probe = evaluation.multi_label_probe(
      bank, bank_labels, steps=own.steps, learning_rate=own.learning_rate, l2=own.l2
    )
    scores = evaluation.probe_logits(probe, queries)
    nearest = losses.top_k_pseudo_labels(queries, jnp.transpose(bank[: own.bank]), own.k)
    found = (
      evaluation.mean_average_precision(scores, labels),
      evaluation.shared_label_precision(nearest, labels, bank_labels[: own.bank]),
    )
    return {name: 100 * float(value) for name, value in zip(METRICS, found, strict=True)}

  return evaluate


def classifier_metrics() -> tuple[str, ...]:
  """Returns the names of what `classifier_scores` says."""
  return (*SCORES, *(f'{name}_top{TOP}' for name in SCORES[1:]))


def classifier_scores(
  logits: np.ndarray, labels: np.ndarray, known: np.ndarray | None, protocol: Protocol
) -> dict[str, float]:
  """Returns how good a classifier is by a protocol of `evaluation.multi_label_metrics`, in percent.

  Args:
    logits: `[records, num_classes]`.
    labels: 0 or 1 for each class.
    known: 0 where the records do not tell; None: they tell all.
    protocol: 'voc07' drops what is not told, 'wider' from average precisions alone.
  """
  unknown = np.zeros(labels.shape, bool) if known is None else known == 0
  negative, dropped = {'coco': (0, 0), 'voc07': (-1, 0), 'wider': (0, 99)}[protocol]
  targets = np.where(labels > 0, 1, np.where(unknown, dropped, negative))
  scores, top = jax.nn.sigmoid(logits), min(TOP, logits.shape[1])
  found = {}
  for ending, limit in (('', None), (f'_top{TOP}', top)):
    own = evaluation.multi_label_metrics(scores, targets, protocol, top=limit)
    values = dict(zip(SCORES, own[1:], strict=True))
    found |= {f'{name}{ending}': 100 * float(value) for name, value in values.items()}
  return {name: found[name] for name in classifier_metrics()}


def require_known(source: data.Source, protocol: Protocol) -> None:
  """Raises ValueError if a protocol drops entries and the records do not say which."""
  if protocol != 'coco' and 'known' not in source[0]:
    raise ValueError(
      f'protocol={protocol!r} leaves out entries of which nothing is told, but the test records hold '
      f"{sorted(source[0])} and no field known: choose 'coco', or an option of the data set that says it."
    )


def records(
  config: Experiment, source: data.Source, places: Sequence[int], split: str
) -> dict[str, np.ndarray]:
  """Returns the records at some places of a split, read as for the network."""
  chosen, transform = data.subset(source, list(places)), harness_data.reading(config.data, split)
  batches = data.epoch_batches(chosen, len(chosen), transform=transform['transform'])
  return {name: leaf for name, leaf in next(iter(batches)).items() if name != 'mask'}


def draw_retrieved(
  config: Experiment,
  sources: Mapping[str, data.Source],
  queries: Mapping[str, np.ndarray],
  places: np.ndarray,
  picture: pathlib.Path,
) -> None:
  """Draws queries, each with the training images that it retrieves, framed green where they share a class.

  Args:
    config: the experiment.
    sources: 'train' is used.
    queries: records of test images, see `records`.
    places: of what each retrieves in the training split, `[queries, count]`; -1: no image.
    picture: its path.
  """
  flat = np.maximum(places, 0).reshape(-1)
  found = records(config, sources['train'], flat, 'train')
  images = found['image'].reshape(*places.shape, *found['image'].shape[1:])
  labels = found['multi_label'].reshape(*places.shape, -1)
  shared = (queries['multi_label'][:, None] * labels).any(-1)
  pictures.retrieved(picture, queries['image'], images, shared, places >= 0)
