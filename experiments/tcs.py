"""TCS: All You Need in Knowledge Distillation Is a Tailored Coordinate System (Zhou, Zhu & Wu, AAAI 2025).

What a teacher that was never trained for a task knows lies largely in the coordinate system of its features.
One pass over the task's images gives it by PCA. The student's features are expressed in these coordinates;
those that do not help the task are removed one after another, by gradients that are summed on a mask. Stored
bits of the teacher's features, one string for all views of an image, may be mimicked besides (eLSH). All that
is added is linear, and merged into the student's classifier.

  z = (student - mean) V;  logits = classifier(z * mask);  loss = CE + beta * eLSH

Claim: better than labels alone, without a teacher in any step. The paper was not read in full: mask rule,
schedule and the layer that fits widths are inferred.

  python -m experiments.tcs
  python -m experiments.tcs --config=imagenet_resnet18 --workdir=DIR
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks, pictures, results, runs
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Experiment, Recipe
from experiments.harness.settings import found_by, free, section
from experiments.harness.supervised import Seen, cross_entropy
from experiments.protocols import coordinate_systems, distillation
from experiments.protocols.coordinate_systems import Coordinates, Space
from experiments.protocols.distillation import Learner
from jaxlab import data, losses, models
from jaxlab.training import TrainState, by_path, select_gates

Array = jax.Array
PyTree = Any

METRICS = ('accuracy', 'axes', 'variance')
MASK = 'head/mask'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher(Learner):
  """A network that was not trained for the task: public weights as they are, or trained here.

  Attributes:
    groups: of each class the group that it is trained to tell, in place of the class; none: it is trained on
      the classes themselves.
  """

  groups: tuple[int, ...] = ()

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    if self.pretrained and self.recipe is not None:
      yield 'recipe: expected none next to pretrained; public weights stay as they are.'
    if self.groups and (len(self.groups) != self.data.num_classes or min(self.groups) < 0):
      yield f'groups={self.groups}: expected a group for each of {self.data.num_classes} classes.'

  @property
  def learner(self) -> Learner:
    """The network on the labels that it is trained on."""
    names = [field.name for field in dataclasses.fields(Learner)]
    fields = {name: getattr(self, name) for name in names}
    classes = max(self.groups) + 1 if self.groups else self.data.num_classes
    return Learner(**{**fields, 'data': dataclasses.replace(self.data, num_classes=classes)})


@dataclasses.dataclass(frozen=True)
class Row:
  """What a student learns from, and in which coordinates.

  Attributes:
    axes: 'pca' of the teacher's features, 'random' orthonormal ones, or 'none', a plain classifier.
    tailored: whether axes are removed.
    beta: weight of the stored bits; 0: none.
    alpha: weight of a tutor's distilled logits; 0: none.
    temperature: of these.
    title: of the row; empty: the key of the setting.
  """

  axes: Literal['pca', 'random', 'none'] = 'pca'
  tailored: bool = True
  beta: float = 0.0
  alpha: float = 0.0
  temperature: float = 4.0
  title: str = free('')

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    for name in ('alpha', 'beta'):
      if not getattr(self, name) >= 0:
        yield f'{name}={getattr(self, name)}: expected a number that is not negative.'
    if not self.temperature > 0:
      yield f'temperature={self.temperature}: expected a positive number.'
    if self.axes != 'none' and self.alpha:
      yield (
        f"alpha={self.alpha}: a tutor's logits go with axes='none'; which axes stay is decided by the "
        'gradient of the labels alone.'
      )
    if self.axes == 'none' and self.beta:
      yield f"beta={self.beta}: stored bits are of the teacher's space, which axes='none' does not have."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of TCS.

  Attributes:
    teacher: whose features give the coordinates.
    student: what learns, with its labeled images, of which the teacher sees no others.
    coordinates: of all rows.
    bits: that are stored of each image.
    std: of the hyperplanes' normals; None: such that hash values of the teacher have variance 1 [inferred].
    tutor: recipe of a teacher for the task, the teacher trained on for the student's labels: what logits are
      distilled from; None: there is none.
    rows: by name.
    runs: names of those that are trained; none: all.
    probed: numbers of axes at which a linear probe of the teacher's features is drawn.
    features_dir: folder of the teacher's features, which other experiments may share; empty: in the work
      directory.
  """

  teacher: Teacher
  student: Learner
  coordinates: Coordinates = section(Coordinates)
  bits: int = 2048
  std: float | None = None
  tutor: Recipe | None = None
  rows: dict[str, Row]
  runs: tuple[str, ...] = ()
  probed: tuple[int, ...] = free(())
  features_dir: str = free('')


def axes_count(config: Settings, facts: int | None) -> int:
  """Returns the number of axes; without facts, which the data tell, the most that there can be."""
  most = distillation.feature_dim(config.teacher)
  if config.student.data.train_size:
    most = min(most, config.student.data.train_size - 1)
  return facts or config.coordinates.count or most


def network(config: Settings, own: Row, count: int) -> models.Classifier:
  """Returns a row's student in training."""
  backbone = networks.create(config.student.model, num_classes=None)
  classes = config.student.data.num_classes
  if own.axes == 'none':
    return models.Classifier(backbone, models.Linear(classes))
  dim = distillation.feature_dim(config.teacher)
  adapted = dim != distillation.feature_dim(config.student)
  return models.Classifier(backbone, models.CoordinateHead(classes, dim, count, adapted))


def merged(model: nn.Module, variables: Variables) -> tuple[models.Classifier, Variables]:
  """Returns the student at its original size: coordinates, mask and classifier in one linear layer."""
  if not isinstance(model.head, models.CoordinateHead):
    return model, variables
  head, held = variables['params']['head'], variables['coordinates']['head']
  adapter = None
  if model.head.adapted:
    adapter = head['feat_fc']['kernel'], head['feat_fc']['bias']
  axes = held['mean'], held['components'], head['mask']
  kernel, bias = models.merge_coordinates(*axes, head['fc']['kernel'], head['fc']['bias'], adapter)
  rest = {name: tree for name, tree in variables.items() if name != 'coordinates'}
  params = {**variables['params'], 'head': {'kernel': kernel, 'bias': bias}}
  plain = models.Classifier(model.backbone, models.Linear(model.head.num_classes))
  return plain, {**rest, 'params': params}


def optimizer(config: Settings, own: Row, count: int) -> Any:
  """Returns `schedule -> optimizer`: the recipe's, and that of the mask; None: there is no mask."""
  if own.axes == 'none':
    return None
  part, recipe = config.coordinates, config.student.recipe
  steps = recipe.epochs * distillation.steps_per_epoch(config.student, recipe)
  gates = optax.set_to_zero()
  if own.tailored:
    keep = part.left_of(count)
    begin, end = round(part.begin * steps), round(part.end * steps)
    gates = select_gates(keep, begin=begin, end=end, rounds=part.rounds, kind=part.importance)

  def make(schedule: optax.Schedule) -> optax.GradientTransformation:
    return by_path([(MASK, gates), ('.*', recipe.optimizer.make(schedule))])

  return make


def training(config: Settings, name: str, facts: int | None = None) -> Run:
  """Returns the training of a row; no step asks a teacher, but a tutor where logits are distilled."""
  own, count = config.rows[name], axes_count(config, facts)
  model, student = network(config, own, count), config.student
  path = networks.feature_path(model)

  def loss(logits: Array, labels: Array, seen: Seen) -> Array:
    total = cross_entropy(logits, labels, seen)
    if own.beta:
      held = seen.constants
      bits = held['bits'][seen.index]
      given = seen.captured[path], bits, held['weight'], held['bias']
      total += own.beta * losses.stored_lsh_loss(*given)
    if own.alpha:
      total += own.alpha * losses.distillation_loss(logits, seen.teacher, own.temperature)
    return total

  options: dict[str, Any] = {'optimizer': optimizer(config, own, count)}
  if own.beta:
    dim = distillation.feature_dim(config.teacher)
    shapes = {'weight': (config.bits, dim), 'bias': (config.bits,)}
    constants = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    stored = (student.data.train_size or 1, -(-config.bits // 8))
    constants['bits'] = jax.ShapeDtypeStruct(stored, jnp.uint8)
    options |= {'captured': (path,), 'constants': constants}
  decides: dict[str, Any] = {'row': own}
  if own.axes != 'none':
    parts = {'coordinates': config.coordinates, 'count': count}
    decides |= {**parts, 'teacher': distillation.ancestry(config.teacher), 'bits': config.bits}
    decides |= {'groups': config.teacher.groups, 'std': config.std}
  if own.alpha:
    options['teacher'] = distillation.network(tutor(config))
    first = config.teacher
    decides['tutor'] = [config.tutor, distillation.ancestry(first), first.groups]
  return distillation.run_of(
    config,
    student,
    student.recipe,
    model,
    titles(config)[name],
    loss=loss,
    decides=decides,
    **options,
  )


def tutor(config: Settings) -> Learner:
  """Returns the teacher's network on the student's images and labels."""
  own = config.student
  return Learner(
    model=config.teacher.model, data=own.data, augment=own.augment, recipe=config.tutor
  )


def titles(config: Settings) -> dict[str, str]:
  """Returns the rows' titles by their names."""
  return {name: own.title or name for name, own in config.rows.items()}


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  named, student, part = titles(config), config.student, config.coordinates
  rows = ['teacher', *map(re.escape, named.values())]
  yield from results.check_claims(config, rows, METRICS)
  if not config.rows or len({'teacher', *named.values()}) <= len(named):
    yield f'rows: expected rows with titles that differ, none "teacher", got {[*named.values()]}.'
  if unknown := [name for name in config.runs if name not in config.rows]:
    yield f'runs: {unknown} are none of rows, {", ".join(config.rows)}.'
  if config.bits < 1:
    yield f'bits={config.bits}: expected at least 1.'
  if config.std is not None and not config.std > 0:
    yield f'std={config.std}: expected a positive number, or none.'
  yield from distillation.check_pair(config.teacher.data, student.data, labels=False)
  if student.data.multi_label:
    yield 'student.data.multi_label: expected one label an image.'
  if student.recipe is None:
    yield 'student.recipe: missing; it is trained.'
    return
  stored = any(own.beta for own in config.rows.values())
  if stored and (student.recipe.mixup or student.recipe.cutmix):
    yield 'student.recipe.mixup, cutmix: expected 0; bits are stored of images, not of mixtures.'
  yield from distillation.check_recipe(config, student, student.recipe, 'student.recipe')
  if config.teacher.recipe is not None:
    own = config.teacher.learner
    yield from distillation.check_recipe(config, own, own.recipe, 'teacher.recipe')
  distilled = [name for name, own in config.rows.items() if own.alpha]
  if config.tutor is None and distilled:
    yield f'tutor: missing; logits are distilled from it in {", ".join(distilled)}.'
  if config.tutor is not None:
    yield from distillation.check_recipe(config, student, config.tutor, 'tutor')
  for key in ('teacher', 'student'):
    if problems := list(found_by(f'{key}.model', distillation.feature_dim, getattr(config, key))):
      yield from problems
      return
  most = axes_count(dataclasses.replace(config, coordinates=Coordinates()), None)
  if part.count is not None and part.count > most:
    yield f'coordinates.count={part.count}: expected at most {most}, by dimensions and images.'
  elif part.keep is not None and part.keep > (part.count or most):
    yield f'coordinates.keep={part.keep}: expected at most the {part.count or most} axes.'
  if wrong := [count for count in config.probed if not 1 <= count <= most]:
    yield f'probed={config.probed}: {wrong} are not 1 to {most}.'
  yield from found_by('coordinates', trace_optimizers, config)


def trace_optimizers(config: Settings) -> None:
  """Raises ValueError if a row's optimizer cannot be."""
  for own in config.rows.values():
    optimizer(config, own, axes_count(config, None))


def programs(config: Settings, facts: int | None = None) -> dict[str, Run]:
  """Returns the trainings: of teacher and tutor, if they are trained, and of the rows."""
  found = {}
  if config.teacher.recipe is not None:
    found['teacher'] = distillation.plain_training(
      config, config.teacher.learner, 'teacher', groups=config.teacher.groups
    )
  if config.tutor is not None:
    found['tutor'] = distillation.plain_training(
      config, tutor(config), 'teacher for the task', teacher=config.teacher
    )
  return found | {name: training(config, name, facts) for name in config.runs or config.rows}


def taught(config: Settings, workdir: pathlib.Path) -> tuple[nn.Module, Variables]:
  """Returns the teacher, trained from wherever its folder was left, or public weights as they are."""
  own = config.teacher.learner
  if own.recipe is None:
    return networks.create(own.model, num_classes=None), distillation.public(own, num_classes=None)
  source = harness_data.load(config.teacher.data, 'train')
  if config.teacher.groups:
    source = data.Relabeled(source, np.array(config.teacher.groups)[data.source_labels(source)])
  variables = distillation.teacher(
    config, own, source, workdir / 'teacher', groups=config.teacher.groups
  )
  return distillation.network(own), variables


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Looks at the images with the teacher once, and trains and compares students."""
  own = config.student
  sources = {split: harness_data.load(own.data, split) for split in ('train', 'test')}
  model, variables = taught(config, workdir)
  folder = type(workdir)(config.features_dir) if config.features_dir else workdir
  name = config.teacher.model['name']
  told = {
    split: distillation.taught_features(
      config, f'{name}-{split}', (model, variables), own, source, folder
    )
    for split, source in sources.items()
  }
  found = coordinate_systems.space(config, told['train']['features'])
  plan = programs(config, found.count)
  frozen = {'constants': found.stored}
  if config.tutor is not None and any(config.rows[n].alpha for n in config.runs or config.rows):
    given = {}
    if 'params' in variables and config.teacher.recipe is not None:
      head = [f'{path}/.*' for path in models.anatomy(model).head]
      given = {'start': variables, 'fresh': head}
    trained = runs.train(plan['tutor'], sources['train'], workdir / 'tutor', **given)
    frozen['teacher'] = trained.variables
  rows = [results.row('teacher', 'reference', {'accuracy': coordinate_systems.probe(told)})]
  for name in config.runs or config.rows:
    row = config.rows[name]
    needed = {'constants': row.beta, 'teacher': row.alpha}
    held = {key: value for key, value in frozen.items() if needed[key]}
    trained = runs.train(
      plan[name], sources['train'], workdir / name, frozen=held or None,
      **start(config, row, found),
    )  # fmt: skip
    small, small_variables = merged(network(config, row, found.count), trained.variables)
    outputs = distillation.outputs(config, own, small, small_variables, sources['test'])
    metrics = distillation.scores(own.data, outputs, 'coco')
    metrics |= kept(row, found, trained.variables)
    role = 'baseline' if row.axes == 'none' else 'method' if row.axes == 'pca' else 'reference'
    rows.append(results.row(plan[name].title, role, metrics))
  coordinate_systems.draw(config, found, told, workdir / 'coordinates.png')
  panels = {'accuracy (%)': {'accuracy': 'accuracy'}}
  pictures.bars(workdir / 'accuracy.png', dataclasses.replace(config, pictured=()), rows, panels)
  return results.results(config, rows, METRICS, 'accuracy and variance along what is left in %')


def start(config: Settings, own: Row, found: Space) -> dict[str, Any]:
  """Returns what a student starts from: public weights, if there are any, and its axes."""
  given = distillation.start(config.student)
  if own.axes != 'none':
    arrays = {'mean': found.mean, 'components': found.axes[own.axes]}
    held = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}

    def begin(state: TrainState) -> TrainState:
      return state.replace(model_state={**state.model_state, 'coordinates': {'head': held}})

    given['begin'] = begin
  return given


def kept(own: Row, found: Space, variables: Variables) -> dict[str, float]:
  """Returns how many axes are left and, of those of PCA, the share of the variance along them, in percent."""
  if own.axes == 'none':
    return {}
  is_open = np.asarray(jax.device_get(variables['params']['head']['mask'])) > 0
  metrics = {'axes': float(is_open.sum())}
  if own.axes == 'pca':
    along = found.variance[: len(is_open)]
    metrics['variance'] = 100 * float(along[is_open].sum() / found.variance.sum())
  return metrics


if __name__ == '__main__':
  launcher.main('tcs')
