"""LSHFM: Distilling Knowledge by Mimicking Features (Wang, Ge & Wu, TPAMI 2022, arXiv 2011.01424).

A student mimics its teacher's penultimate features in place of logits. Their direction decides the class: the
student is to match the direction, and is free in the length. Random hyperplanes turn the teacher's feature
into bits, and a student is trained to fall on the same side of each of them:

  h(f) = W f + b;  LSH: mean binary cross-entropy of h(student) and 1[h(teacher) > 0]
  loss = CE + beta (LSH + |student - teacher|^2 / dim), where the teacher is right, if labels are single

W is normal and stays, b balances the bits. Where widths differ a linear layer brings the student's features
to the teacher's; behind the training it and the classifier are one layer again. Claims: some points
above labels alone, and not below the distance of the features alone.

  python -m experiments.feature_mimicking
  python -m experiments.feature_mimicking --config=cifar100_wrn --workdir=DIR
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks, pictures, results, runs
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Experiment, Recipe
from experiments.harness.settings import found_by, free, section
from experiments.harness.supervised import Seen
from experiments.protocols import distillation, multi_label_evaluation, teacher_features
from experiments.protocols.distillation import Learner
from jaxlab import data, evaluation, losses, models

Array = jax.Array
Constants = Mapping[str, Array]

METRICS = ('cosine', 'norm_ratio', 'norm_spread', 'bit_agreement')
HASHED = {'lsh': 'bce', 'lsh_l1': 'l1', 'lsh_l2': 'l2'}


@dataclasses.dataclass(frozen=True)
class Hashing:
  """The hyperplanes, which stay as they are drawn.

  Attributes:
    bits: their number; None: 32 for each dimension of the features.
    std: of their normals' entries; None: that of all weights of the teacher's classifier.
    bias: minus the 'median' or 'mean' over the training images of what a hyperplane makes of the teacher's
      features, or 'zero'.
  """

  bits: int | None = None
  std: float | None = None
  bias: Literal['median', 'mean', 'zero'] = 'median'

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    for name in ('bits', 'std'):
      if getattr(self, name) is not None and not getattr(self, name) > 0:
        yield f'{name}={getattr(self, name)}: expected a positive number, or none.'


@dataclasses.dataclass(frozen=True)
class Method:
  """What a student learns from.

  Attributes:
    features: terms on the features, which are added: 'l2', 'l1' (distances), 'l2_normalized' (of unit
      vectors), 'lsh' (the paper's), 'lsh_l1' and 'lsh_l2' (distances of the hash values).
    beta: weight of their sum.
    gamma: of the labels.
    alpha: of the distilled logits.
    temperature: of these.
    where_right: whether features count where the teacher is right alone; for one label an image.
    two_layers: whether there is a linear layer before the classifier where the widths do not ask for it.
    title: of the row; empty: the key of the setting.
  """

  features: tuple[Literal['l2', 'l1', 'l2_normalized', 'lsh', 'lsh_l1', 'lsh_l2'], ...] = ()
  beta: float = 0.0
  gamma: float = 1.0
  alpha: float = 0.0
  temperature: float = 4.0
  where_right: bool = False
  two_layers: bool = False
  title: str = free('')

  @property
  def hashes(self) -> bool:
    """Whether it needs hyperplanes."""
    return not HASHED.keys().isdisjoint(self.features)

  @property
  def taught(self) -> bool:
    """Whether it needs a teacher."""
    return bool(self.features) or self.alpha > 0

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    for name in ('alpha', 'beta', 'gamma'):
      if not getattr(self, name) >= 0:
        yield f'{name}={getattr(self, name)}: expected a number that is not negative.'
    if not self.temperature > 0:
      yield f'temperature={self.temperature}: expected a positive number.'
    if bool(self.features) != (self.beta > 0):
      yield f'features={self.features}, beta={self.beta}: expected both, or neither.'
    if len({*self.features}) < len(self.features):
      yield f'features={self.features}: expected each once.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of feature mimicking.

  Attributes:
    teacher: what is learned from.
    student: what learns, with its training images; tested on the teacher's test images.
    methods: rows by name.
    runs: names of those that are trained; none: all.
    hashing: of all rows.
    align: recipe of a first stage, in which the linear layer alone learns to mimic features; None: there is
      none. For several labels an image.
    protocol: of the metrics where images show several classes.
    features_dir: folder of the teacher's features, which other experiments may share; empty: in the work
      directory.
  """

  teacher: Learner
  student: Learner
  methods: dict[str, Method]
  runs: tuple[str, ...] = ()
  hashing: Hashing = section(Hashing)
  align: Recipe | None = None
  protocol: multi_label_evaluation.Protocol = 'coco'
  features_dir: str = free('')


def mimicking(own: Method, student: Array, teacher: Array, hashes: Constants | None) -> Array:
  """Returns the sum of a method's terms on features `[batch, dim]`, of each image."""
  total = jnp.zeros(len(student))
  for name in own.features:
    if name in HASHED:
      weight, bias = hashes['weight'], hashes['bias']
      total += losses.lsh_loss(student, teacher, weight, bias, kind=HASHED[name])
    elif name == 'l1':
      total += jnp.mean(jnp.abs(student - jax.lax.stop_gradient(teacher)), -1)
    else:
      both = student, teacher
      if name == 'l2_normalized':
        both = losses.normalize(student), losses.normalize(teacher)
      total += losses.feature_distillation_loss(*both)
  return total


def adapted(config: Settings, own: Method) -> bool:
  """Returns whether a method's student has a linear layer before its classifier."""
  return own.two_layers or (bool(own.features) and not same_width(config))


def same_width(config: Settings) -> bool:
  """Returns whether both networks' features have one width."""
  return distillation.feature_dim(config.teacher) == distillation.feature_dim(config.student)


def network(config: Settings, own: Method) -> models.Classifier:
  """Returns a method's student in training."""
  backbone = networks.create(config.student.model, num_classes=None)
  classes = config.student.data.num_classes
  if not adapted(config, own):
    return models.Classifier(backbone, models.Linear(classes))
  width = distillation.feature_dim(config.teacher)
  return models.Classifier(backbone, models.AdaptedLinear(width, classes))


def merged(model: nn.Module, variables: Variables) -> tuple[models.Classifier, Variables]:
  """Returns the student without the layer before its classifier: of its original size, the same function."""
  if not isinstance(model.head, models.AdaptedLinear):
    return model, variables
  head = variables['params']['head']
  parts = [head[name][part] for name in ('feat_fc', 'fc') for part in ('kernel', 'bias')]
  kernel, bias = losses.merge_linear(*parts)
  params = {**variables['params'], 'head': {'kernel': kernel, 'bias': bias}}
  plain = models.Classifier(model.backbone, models.Linear(model.head.num_classes))
  return plain, {**variables, 'params': params}


def training(config: Settings, name: str, align: bool = False) -> Run:
  """Returns the training of a row, or the first stage of it."""
  own, model = config.methods[name], network(config, config.methods[name])
  labels = distillation.label_loss(config.student.data)
  path = networks.feature_path(model)
  taught = networks.feature_path(distillation.network(config.teacher))

  def loss(logits: Array, targets: Array, seen: Seen) -> Array:
    total = 0.0 if align else own.gamma * labels(logits, targets, seen)
    if own.alpha and not align:
      told = losses.distillation_loss(logits, seen.teacher, own.temperature)
      total += own.alpha * told
    if own.features:
      features = seen.captured[path], networks.feature_vector(seen.taught[taught])
      mimicked = mimicking(own, *features, seen.constants)
      if own.where_right:
        mimicked = losses.mean_where_right(mimicked, seen.teacher, targets)
      total += (1.0 if align else own.beta) * mimicked
    return total

  options: dict[str, Any] = {}
  if own.taught:
    options['teacher'] = distillation.network(config.teacher)
  if own.features:
    options |= {'captured': (path,), 'taught': (taught,)}
  if own.hashes:
    count, dim = hash_shape(config)
    shapes = {'weight': (count, dim), 'bias': (count,)}
    options['constants'] = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
  decides = {'method': own, 'hashing': config.hashing}
  if own.taught:
    decides['teacher'] = distillation.ancestry(config.teacher)
  recipe, title = config.student.recipe, titles(config)[name]
  if align:
    recipe, title = config.align, f'{title}, first stage'
    options['frozen'] = ('(?!head/feat_fc/).*',)
  elif aligned(config, own):
    decides['align'] = config.align
  return distillation.run_of(
    config, config.student, recipe, model, title, loss=loss, decides=decides, **options
  )


def aligned(config: Settings, own: Method) -> bool:
  """Returns whether a row has a first stage: where a linear layer is to mimic features."""
  return config.align is not None and bool(own.features) and adapted(config, own)


def hash_shape(config: Settings) -> tuple[int, int]:
  """Returns the number of hyperplanes, and the dimensions of what they cut."""
  dim = distillation.feature_dim(config.teacher)
  return config.hashing.bits or 32 * dim, dim


def draw_hashes(config: Settings, std: float, features: np.ndarray | None) -> Constants:
  """Returns the hyperplanes of a seed, `weight` and `bias`.

  Args:
    config: the settings.
    std: of the normals, if the settings give none.
    features: of the teacher, `[records, dim]`; None: the bias is 0.
  """
  own, key = config.hashing, jax.random.fold_in(jax.random.key(config.seed), 1)
  count, dim = hash_shape(config)
  weight = losses.draw_hyperplanes(key, dim, count, own.std or std)
  if own.bias == 'zero':
    return {'weight': weight, 'bias': jnp.zeros(count)}
  return {'weight': weight, 'bias': losses.hyperplane_bias(weight, features, own.bias)}


def hyperplanes(
  config: Settings, model: nn.Module, variables: Variables, source: data.Source, workdir: Any
) -> Constants | None:
  """Returns the hyperplanes of a run; None: no row hashes, and no bits are compared.

  The teacher looks at the training images only where a bias is to be found.
  """
  if not any(config.methods[name].hashes for name in config.runs or config.methods):
    return None
  features = None
  if config.hashing.bias != 'zero':
    features = taught_features(config, model, variables, source, workdir)
  return draw_hashes(config, distillation.classifier_std(config.teacher, variables), features)


def titles(config: Settings) -> dict[str, str]:
  """Returns the rows' titles by their names."""
  return {name: own.title or name for name, own in config.methods.items()}


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  named, own = titles(config), config.student
  quality = 'mAP' if own.data.multi_label else 'accuracy'
  rows = ['teacher', *map(re.escape, named.values())]
  yield from results.check_claims(config, rows, [quality, *METRICS])
  if not config.methods or len({'teacher', *named.values()}) <= len(named):
    yield f'methods: expected rows with titles that differ, none "teacher", got {[*named.values()]}.'
  if unknown := [name for name in config.runs if name not in config.methods]:
    yield f'runs: {unknown} are none of methods, {", ".join(config.methods)}.'
  yield from distillation.check_pair(config.teacher.data, own.data)
  recipes = {'teacher': config.teacher.recipe, 'student': own.recipe}
  for key, recipe in recipes.items():
    if recipe is not None:
      yield from distillation.check_recipe(config, getattr(config, key), recipe, f'{key}.recipe')
  if own.recipe is None:
    yield 'student.recipe: missing; it is trained.'
  if config.align is not None:
    yield from distillation.check_recipe(config, own, config.align, 'align')
  for name, method in config.methods.items():
    if method.where_right and own.data.multi_label:
      yield f'methods.{name}.where_right: a teacher is right or not where an image has one label.'
    if method.where_right and own.recipe is not None and own.recipe.microbatches > 1:
      yield f'methods.{name}.where_right: the mean is over a whole batch; expected microbatches=1.'
  for key in ('teacher', 'student'):
    yield from found_by(f'{key}.model', distillation.feature_dim, getattr(config, key))


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings: of the teacher, if it is trained, of rows, and of their first stages."""
  del facts
  found = {}
  if config.teacher.recipe is not None:
    found['teacher'] = distillation.plain_training(config, config.teacher, 'teacher')
  for name in config.runs or config.methods:
    if aligned(config, config.methods[name]):
      found[f'{name}_align'] = training(config, name, align=True)
    found[name] = training(config, name)
  return found


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains the teacher, finds hyperplanes in its features, and trains and compares students."""
  pair, plan = (config.teacher, config.student), programs(config)
  train = [harness_data.load(own.data, 'train') for own in pair]
  test = harness_data.load(config.teacher.data, 'test')
  multi_label = config.student.data.multi_label
  if multi_label:
    multi_label_evaluation.require_known(test, config.protocol)
  model = distillation.network(config.teacher)
  variables = distillation.teacher(config, config.teacher, train[0], workdir / 'teacher')
  hashes = hyperplanes(config, model, variables, train[1], workdir)
  judge = functools.partial(distillation.outputs, config, config.teacher, source=test)
  told = judge(model=model, variables=variables)
  teacher_features.require_features(told['features'], 'test features of the teacher')
  quality = distillation.scores(config.teacher.data, told, config.protocol)
  rows, seen = [results.row('teacher', 'reference', quality)], {}
  for name in config.runs or config.methods:
    own = config.methods[name]
    frozen = {'teacher': variables} if own.taught else {}
    frozen |= {'constants': hashes} if own.hashes else {}
    student = network(config, own)
    given = distillation.start(config.student)
    if f'{name}_align' in plan:
      folder = workdir / f'{name}_align'
      first = runs.train(plan[f'{name}_align'], train[1], folder, frozen=frozen or None, **given)
      given = {'start': first.variables}
    trained = runs.train(plan[name], train[1], workdir / name, frozen=frozen or None, **given)
    small, merged_variables = merged(student, trained.variables)
    found = judge(model=small, variables=merged_variables)
    metrics = distillation.scores(config.student.data, found, config.protocol)
    if own.features:
      mimicked = judge(model=student, variables=trained.variables)['features']
      metrics |= closeness(mimicked, told['features'], hashes)
      seen[plan[name].title] = mimicked
    role = 'method' if own.hashes else 'baseline'
    rows.append(results.row(plan[name].title, role, metrics))
  draw(config, seen, told['features'], workdir / 'directions.png')
  panels = {f'{name} (%)': {name: name} for name in quality}
  pictures.bars(workdir / 'accuracy.png', dataclasses.replace(config, pictured=()), rows, panels)
  note = f'{", ".join(quality)} and bits that agree in %'
  return results.results(config, rows, [*quality, *METRICS], note)


def taught_features(
  config: Settings,
  model: nn.Module,
  variables: Variables,
  source: data.Source,
  workdir: pathlib.Path,
) -> np.ndarray:
  """Returns the teacher's features of the student's training images, augmented as for training, once."""
  folder = type(workdir)(config.features_dir) if config.features_dir else workdir
  name, key = config.teacher.model['name'], jax.random.key(config.seed)
  given = config, name, (model, variables), config.student, source, folder, key
  return distillation.taught_features(*given, fields=('features',))['features']


def closeness(
  student: np.ndarray, teacher: np.ndarray, hashes: Constants | None
) -> dict[str, float]:
  """Returns how a student's features lie to its teacher's, see `METRICS`.

  The mean cosine; mean and (relative) deviation of the ratio of lengths, where the teacher's is not 0; and,
  where there are hyperplanes, the share of bits that agree, in percent.
  """
  there = teacher.any(1)
  ratios = np.asarray(evaluation.norm_ratios(student[there], teacher[there]))
  found = {
    'cosine': float(evaluation.mean_cosine(student, teacher)),
    'norm_ratio': float(ratios.mean()),
    'norm_spread': float(ratios.std() / ratios.mean()),
  }
  if hashes is not None:
    weight, bias = hashes['weight'], hashes['bias']
    bits = [losses.hash_values(own, weight, bias) > 0 for own in (student, teacher)]
    found['bit_agreement'] = 100 * float(jnp.mean(bits[0] == bits[1]))
  return found


def draw(
  config: Settings, students: Mapping[str, np.ndarray], teacher: np.ndarray, picture: pathlib.Path
) -> None:
  """Draws histograms of cosines and of ratios of lengths between students and teacher, by row."""
  there = teacher.any(1)
  shown = {
    title: (losses.normalize(own[there]), own[there])
    for title, own in students.items()
    if not config.pictured or title in config.pictured
  }
  unit = losses.normalize(teacher[there])
  with pictures.drawn(picture, 1, 2, size=(10, 3.8)) as (left, right):
    for title, (direction, features) in shown.items():
      options = {'bins': 40, 'histtype': 'step', 'density': True, 'label': title}
      left.hist(np.sum(np.asarray(direction * unit), -1), **options)
      right.hist(np.asarray(evaluation.norm_ratios(features, teacher[there])), **options)
    left.set_xlabel('cosine of student and teacher')
    right.set_xlabel('length of student over teacher')
    left.set_ylabel('density of test images')
    if shown:
      left.legend(frameon=False, fontsize=8, loc='upper left')
    left.figure.suptitle(pictures.title(config))


if __name__ == '__main__':
  launcher.main('feature_mimicking')
