"""A student that learns from labels and from a teacher: the two networks, and how they are judged."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from experiments.harness import networks, runs, sources, supervised
from experiments.harness.data import Images
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Experiment, Recipe, check_batch
from experiments.harness.settings import found_by
from experiments.harness.supervised import Loss, Seen
from experiments.protocols import multi_label_evaluation, teacher_features
from experiments.protocols.multi_label_evaluation import Protocol
from jaxlab import data, losses, models

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner(networks.Network):
  """A network, the images that it learns from, and what it starts from.

  With `pretrained` alone the public weights stay as they are; with a recipe it is trained, from these
  weights (but for the classifier) or from scratch.
  """

  data: Images

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not self.pretrained and self.recipe is None:
      yield 'recipe: missing; without it give the name of public weights, pretrained.'
    if self.weights and not self.pretrained:
      yield f'weights={self.weights!r}: give the name of the weights, pretrained, too.'
    yield from found_by('model', network, self)


def network(own: Learner) -> nn.Module:
  """Returns the network with a classifier of the data's classes."""
  return networks.create(own.model, num_classes=own.data.num_classes)


def feature_dim(own: Learner) -> int:
  """Returns the dimensions of the network's penultimate features.

  Raises:
    ValueError: if they are no vector, or the network does not take the images.
  """
  return _feature_dim(networks.create(own.model, num_classes=None), own.data.view)


@functools.lru_cache(maxsize=64)
def _feature_dim(model: nn.Module, view: tuple[int, ...]) -> int:
  image = jax.ShapeDtypeStruct((1, *view), np.float32)
  apply = lambda variables, x: model.apply(variables, x, train=False)  # noqa: E731
  found = jax.eval_shape(apply, models.abstract_variables(model, view), image)
  shape = networks.feature_vector(found).shape
  if len(shape) != 2:
    raise ValueError(f'{type(model).__name__} has features {shape[1:]}, expected one vector.')
  return shape[1]


def label_loss(own: Images) -> Loss:
  """Returns the cross-entropy of labels: of one class, or of every class that is there or not."""

  def cross_entropies(outputs: Array, labels: Array, seen: Seen) -> Array:
    del seen
    return losses.multi_label_bce(outputs, labels)

  return cross_entropies if own.multi_label else supervised.cross_entropy


def steps_per_epoch(own: Learner, recipe: Recipe) -> int:
  """Returns the optimizer steps of an epoch."""
  return max((own.data.train_size or 0) // recipe.batch_size, 1)


def decided(own: Learner) -> dict[str, Any]:
  """Returns what decides the end of a learner's training besides the seed, its data and its recipe."""
  return {**networks.drawn_by(own), 'pretrained': own.pretrained}


def ancestry(own: Learner) -> dict[str, Any]:
  """Returns what decides a teacher."""
  return {**decided(own), 'data': own.data, 'recipe': own.recipe}


def run_of(
  config: Experiment,
  own: Learner,
  recipe: Recipe,
  model: nn.Module,
  title: str,
  *,
  decides: Mapping[str, Any] | None = None,
  **options: Any,
) -> Run:
  """Returns a training of a learner's network, perhaps under another head.

  Args:
    config: the experiment.
    own: the learner.
    recipe: of the training.
    model: the network.
    title: of the run.
    decides: what else decides what it ends with.
    **options: of `supervised.program`.
  """
  steps = steps_per_epoch(own, recipe)
  program = supervised.program(model, own.task, recipe, steps, **options)
  parts = {**decided(own), **(decides or {})}
  return Run(config, own.data, recipe, program, recipe.epochs * steps, parts, title)


def plain_training(config: Experiment, own: Learner, title: str, **decides: Any) -> Run:
  """Returns the training of a learner on labels alone; `decides` is what else decides what it ends with."""
  loss = label_loss(own.data)
  return run_of(config, own, own.recipe, network(own), title, decides=decides, loss=loss)


def public(own: Learner, **fields: Any) -> Variables:
  """Returns a learner's public weights; `fields` of the network in place of its own."""
  given = {'file': sources.file(own.weights)} if own.weights else {}
  own_fields = {name: value for name, value in own.model.items() if name != 'name'}
  return models.load_pretrained(own.pretrained, **given, **{**own_fields, **fields})[1]


def teacher(
  config: Experiment, own: Learner, source: data.Source, folder: Any, **decides: Any
) -> Variables:
  """Returns the teacher's variables: public ones, or trained from wherever `folder` was left.

  `decides` as of `plain_training`.
  """
  if own.recipe is None:
    return public(own, num_classes=own.data.num_classes)
  start = {}
  if own.pretrained:
    head = models.anatomy(network(own)).head
    start = {'start': public(own, num_classes=None), 'fresh': [f'{path}/.*' for path in head]}
  run = plain_training(config, own, 'teacher', **decides)
  return runs.train(run, source, folder, **start).variables


def start(own: Learner) -> dict[str, Any]:
  """Returns what a student under a head of its own starts from, as options of `runs.train`.

  Public weights of the module `backbone`, and a fresh `head`; or nothing.
  """
  if not own.pretrained:
    return {}
  found = public(own, num_classes=None)
  named = {collection: {'backbone': tree} for collection, tree in found.items()}
  return {'start': named, 'fresh': ('head/.*',)}


def taught_features(
  config: Experiment,
  name: str,
  network: tuple[nn.Module, Variables],
  own: Learner,
  source: data.Source,
  folder: Any,
  key: Array | None = None,
  fields: Sequence[str] | None = None,
) -> teacher_features.Arrays:
  """Returns what a teacher says of a student's images, computed once and kept in `folder`.

  Args:
    config: the experiment.
    name: of the teacher and the records, in the file's name.
    network: the teacher and its variables.
    own: the student.
    source: its records.
    folder: of the file.
    key: see `teacher_features.compute`.
    fields: likewise.
  """
  given = own.data, own.task, *network, source, key
  file = f'{name}-{own.data.name}-seed{config.seed}.npz'.replace('/', '_')
  return teacher_features.cached(
    folder / file,
    teacher_features.fingerprints(*given),
    lambda: teacher_features.compute(config, *given, fields),
  )


def classifier_std(own: Learner, variables: Variables) -> float:
  """Returns the deviation of all weights of the teacher's classifier (divided by their number - 1)."""
  tree = variables['params']
  for name in models.anatomy(network(own)).head[0].split('/'):
    tree = tree[name]
  kernel = np.asarray(jax.device_get(tree['kernel']), np.float64)
  return float(np.std(kernel, ddof=1))


def outputs(
  config: Experiment, own: Learner, model: nn.Module, variables: Variables, source: data.Source
) -> teacher_features.Arrays:
  """Returns `features`, `logits` and `targets` of records, read as in the test."""
  return teacher_features.compute(config, own.data, own.task, model, variables, source)


def scores(own: Images, found: teacher_features.Arrays, protocol: Protocol) -> dict[str, float]:
  """Returns how good `outputs` are, in percent: `accuracy`, or where images show several classes `mAP`."""
  logits, targets = found['logits'], found['targets']
  if own.multi_label:
    given = logits, targets, found.get('known'), protocol
    return {'mAP': multi_label_evaluation.classifier_scores(*given)['mAP']}
  return {'accuracy': 100 * float(np.mean(logits.argmax(-1) == targets))}


def check_recipe(config: Experiment, own: Learner, recipe: Recipe, name: str) -> Iterator[str]:
  """Yields what is wrong with a recipe `name` for a learner's data."""
  size, batch = own.data.train_size, recipe.batch_size
  yield from check_batch(config.mesh, batch, f'{name}.batch_size')
  if size is None or size < batch:
    yield f'{name}.batch_size={batch} exceeds the {size} training images.'
  elif recipe.epochs > 0 and batch > 0:
    yield from found_by(f'{name}.schedule', recipe.schedule.make, recipe.epochs, size // batch)


def check_pair(teacher: Images, student: Images, labels: bool = True) -> Iterator[str]:
  """Yields where a teacher's images differ from a student's: both networks see the same.

  Args:
    teacher: its section.
    student: likewise.
    labels: whether their classes are to be the same, too.
  """
  names = ('view', 'mean', 'std', *(('num_classes', 'multi_label') if labels else ()))
  for name in names:
    both = getattr(teacher, name), getattr(student, name)
    if both[0] != both[1]:
      yield f'teacher.data.{name}={both[0]}, student.data.{name}={both[1]}: expected the same.'
