"""Fine-grained image analysis: second-order pooling and retrieval (survey of Wei et al., TPAMI 2022).

Wei, Song, Mac Aodha, Wu, Peng, Tang, Yang & Belongie, arXiv 2111.06119. Classes that differ in details are
told apart by how channels of a map of features occur together: bilinear pooling (B-CNN), and its successor
iSQRT-COV, the matrix square root of their covariance, in place of global average pooling. Recognition and
retrieval are one field: what a network is trained for on some classes is to find images of others.

Claim: with the same network and budget second-order pooling classifies better than average pooling;
embeddings of a trained network find unseen classes better than those of the network as it was before.

  python -m experiments.fgia
  python -m experiments.fgia --config=fashion_mnist --seeds=0,1,2
  python -m experiments.fgia --config=cub_isqrt_resnet50 --workdir=DIR
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

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks, pictures, results, runs, supervised
from experiments.harness.data import Augment, Images
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Experiment, Recipe, check_batch
from experiments.harness.settings import found_by, section
from experiments.harness.supervised import Seen
from experiments.harness.tasks import ImageTask
from jaxlab import data, evaluation, losses, models
from jaxlab.models.second_order import POOLINGS
from jaxlab.training import map_batches

Array = jax.Array

PIXELS = 'Pixels'
CLASSIFIER = 'head/fc/.*'
SCORES = ('mAP', 'r_precision', 'map_at_r')
QUERIES, NEAREST = 6, 8  # in a picture


@dataclasses.dataclass(frozen=True)
class Head:
  """How a map of features is pooled under the classifier; see `jaxlab.models.SecondOrderHead`.

  Attributes:
    pooling: 'mean', 'bilinear', 'compact_bilinear' or 'isqrt_cov'.
    reduction: channels that a 1x1 convolution reduces the map to first; None: it does not.
    iterations: of 'isqrt_cov'.
    sketch_dim: of 'compact_bilinear'.
    rate: of recognition, the learning rate over that of the recipe.
    classifier_rate: of recognition, the classifier's learning rate over that of all others, with a first step
      in it alone; vectors of length 1, which bilinear pooling hands on, ask for a large one.
    title: of the row; empty: the key of the setting.
  """

  pooling: Literal[POOLINGS] = 'isqrt_cov'
  reduction: int | None = None
  iterations: int = 5
  sketch_dim: int = 8192
  rate: float = 1.0
  classifier_rate: float = 1.0
  title: str = ''

  def make(self, num_classes: int | None, cosine: bool = False) -> models.SecondOrderHead:
    """Returns the module."""
    names = ('pooling', 'reduction', 'iterations', 'sketch_dim')
    own = {name: getattr(self, name) for name in names}
    return models.SecondOrderHead(num_classes, cosine=cosine, **own)

  def recipe(self, recipe: Recipe, first: bool) -> Recipe:
    """Returns a recipe with the head's own learning rates, of the classifier in its `first` step alone."""
    optimizer, schedule = recipe.optimizer, recipe.schedule
    if first and self.classifier_rate != 1:
      rates = (*optimizer.lr_multipliers, (CLASSIFIER, self.classifier_rate))
      optimizer = dataclasses.replace(optimizer, lr_multipliers=rates)
    schedule = dataclasses.replace(schedule, base=self.rate * schedule.base)
    return dataclasses.replace(recipe, optimizer=optimizer, schedule=schedule)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from found_by('pooling', self.make, 1)
    for name in ('rate', 'classifier_rate'):
      if not getattr(self, name) > 0:
        yield f'{name}={getattr(self, name)}: expected a positive number.'


@dataclasses.dataclass(frozen=True)
class Baseline(Head):
  """What heads are compared with: global average pooling."""

  pooling: Literal[POOLINGS] = 'mean'
  title: str = 'GAP'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """What networks are trained for.

  Attributes:
    data: images.
    augment: of training images.
    recipe: of all trainings alike.
    classifier: the recipe of a first step, of the head alone over a frozen backbone; None: there is none.
  """

  data: Images
  augment: Augment = section(Augment)
  recipe: Recipe
  classifier: Recipe | None = None

  @property
  def task(self) -> ImageTask:
    """What the networks are asked."""
    return ImageTask.of(self.data, self.augment)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recognition(Part):
  """Classification.

  Attributes:
    mirrored: whether logits of a test image are averaged with those of its mirror image.
  """

  mirrored: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(Part):
  """Every test image searches all others for its class; no class is in the training images.

  Embeddings are what is pooled, trained by cross-entropy over `scale` times cosines to class vectors.

  Attributes:
    scale: of the cosines.
    ks: of Recall@K.
    pixels: whether there is a row of the pixels themselves.
  """

  scale: float = 16.0
  ks: tuple[int, ...] = (1, 2, 4, 8)
  pixels: bool = False

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not self.ks or min(self.ks) < 1:
      yield f'ks={self.ks}: expected numbers of at least 1.'
    if not self.scale > 0:
      yield f'scale={self.scale}: expected a positive number.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of fine-grained image analysis.

  Attributes:
    model: name and fields of the backbone.
    map_path: module of the backbone whose output is the map; empty: the one that the network pools.
    pretrained: name of public weights that the backbone starts from; empty: from scratch.
    baseline: the head that they are compared with, run 'gap'.
    heads: rows by name.
    runs: names of those that are trained; none: all.
    recognition: the classification; None: there is none.
    retrieval: likewise.
  """

  model: Mapping[str, Any]
  map_path: str = ''
  pretrained: str = ''
  baseline: Baseline = section(Baseline)
  heads: dict[str, Head] = dataclasses.field(default_factory=lambda: {'isqrt': Head()})
  runs: tuple[str, ...] = ()
  recognition: Recognition | None = None
  retrieval: Retrieval | None = None

  def head(self, name: str) -> Head:
    """Returns the head of a run, 'gap' or a name of `heads`."""
    return self.baseline if name == 'gap' else self.heads[name]

  @property
  def parts(self) -> dict[str, Part]:
    """What networks are trained for, by the name of the section."""
    found = {'recognition': self.recognition, 'retrieval': self.retrieval}
    return {name: part for name, part in found.items() if part is not None}


def network(config: Settings, part: Part, name: str, embeds: bool = False) -> models.MapClassifier:
  """Returns the backbone under the head of a run, with its classifier or, `embeds`, without."""
  backbone = networks.create(config.model, num_classes=None)
  classes = None if embeds else part.data.num_classes
  head = config.head(name).make(classes, isinstance(part, Retrieval))
  return models.MapClassifier(backbone, head, map_path=config.map_path or None)


def cross_entropy(part: Part) -> supervised.Loss:
  """Returns the loss of logits, of retrieval scaled cosines: the normalized softmax."""
  scale = part.scale if isinstance(part, Retrieval) else 1.0

  def loss(outputs: Array, targets: Array, seen: Seen) -> Array:
    del seen
    return losses.cross_entropy(scale * outputs, targets)

  return loss


def training(config: Settings, kind: str, name: str, step: str = 'whole') -> Run:
  """Returns the training of a run for a part, or its first step, 'classifier'."""
  part = config.parts[kind]
  recipe = part.recipe if step == 'whole' else part.classifier
  if isinstance(part, Recognition):
    first = step == 'classifier' or part.classifier is None
    recipe = config.head(name).recipe(recipe, first)
  options: dict[str, Any] = {}
  title, decides = f'{titles(config)[name]}, {kind}', {}
  if step == 'classifier':
    options = {'frozen': ('backbone/.*',), 'hooks': models.eval_mode_hooks(('backbone',))}
    title = f'{title}, classifier'
  elif part.classifier is not None:
    decides['start'] = training(config, kind, name, 'classifier').identity
  steps = (part.data.train_size or 0) // recipe.batch_size
  program = supervised.program(
    network(config, part, name), part.task, recipe, steps, loss=cross_entropy(part), **options
  )
  decides |= {key: getattr(config, key) for key in ('model', 'map_path', 'pretrained')}
  decides |= {'head': dataclasses.replace(config.head(name), title=''), 'augment': part.augment}
  if isinstance(part, Retrieval):
    decides['scale'] = part.scale
  return Run(config, part.data, recipe, program, recipe.epochs * steps, decides, title)


def titles(config: Settings) -> dict[str, str]:
  """Returns the rows' titles by the names of the runs."""
  heads = {'gap': config.baseline, **config.heads}
  return {name: own.title or name for name, own in heads.items()}


def untrained(title: str) -> str:
  """Returns the title of the row of a network before its training."""
  return f'{title}, untrained'


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  named = titles(config)
  rows = [*named.values(), *map(untrained, named.values()), PIXELS]
  yield from results.check_claims(
    config, [*map(re.escape, rows)], ['accuracy', 'dim', r'recall_\d+', *SCORES]
  )
  if 'gap' in config.heads:
    yield "heads: 'gap' is the name of the run of baseline; choose another."
  if len({*rows}) < len(rows):
    yield f'heads: rows need titles that differ, got {rows}.'
  if unknown := [name for name in config.runs if name not in config.heads]:
    yield f'runs: {unknown} are none of heads, {", ".join(config.heads)}.'
  if not config.parts:
    yield 'recognition, retrieval: expected at least one of the two.'
  for kind, part in config.parts.items():
    if part.data.multi_label:
      yield f'{kind}.data.multi_label: expected one label an image.'
    for key, recipe in (('recipe', part.recipe), ('classifier', part.classifier)):
      if recipe is not None:
        yield from check_recipe(config, part, recipe, f'{kind}.{key}')


def check_recipe(config: Settings, part: Part, recipe: Recipe, key: str) -> Iterator[str]:
  """Yields what is wrong with a recipe for a part's data and networks."""
  size = part.data.train_size
  yield from check_batch(config.mesh, recipe.batch_size, f'{key}.batch_size')
  if size is None or size < recipe.batch_size:
    data_key = key.partition('.')[0]
    yield f'{data_key}.data.train_size={size}: expected at least {key}.batch_size={recipe.batch_size}.'
    return
  steps = size // recipe.batch_size
  yield from found_by(f'{key}.schedule', recipe.schedule.make, recipe.epochs, steps)
  try:
    shapes = supervised.abstract_variables(network(config, part, 'gap'), part.task)
  except (ValueError, TypeError) as error:
    yield f'model, map_path: {error}'
    return
  yield from found_by(f'{key}.optimizer', recipe.optimizer.make(0.1).init, shapes['params'])


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings, `<run>_<part>`, first steps as `<run>_<part>_classifier`."""
  del facts
  plan = {}
  for kind, part in config.parts.items():
    for name in ('gap', *(config.runs or config.heads)):
      if part.classifier is not None:
        plan[f'{name}_{kind}_classifier'] = training(config, kind, name, 'classifier')
      plan[f'{name}_{kind}'] = training(config, kind, name)
  return plan


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains the heads alike for each part, and compares them."""
  plan, named = programs(config), titles(config)
  found: dict[str, dict[str, float]] = {}
  for kind, part in config.parts.items():
    sources = {split: harness_data.load(part.data, split) for split in ('train', 'test')}
    for name in ('gap', *(config.runs or config.heads)):
      judge, title = judges(config, part, name, sources['test']), named[name]
      trained = train(config, plan, kind, name, sources['train'], workdir, judge)
      found.setdefault(title, {}).update(judge(trained.variables))
      if isinstance(part, Retrieval):
        found[untrained(title)] = judge(beginning(config, part, name))
        if not config.pictured or title in config.pictured:
          picture = workdir / f'retrieved_{name}.png'
          draw_retrieved(config, part, name, trained.variables, sources['test'], picture)
    if isinstance(part, Retrieval) and part.pixels:
      found[PIXELS] = pixel_scores(part, sources['test'])
  roles = {named['gap']: 'baseline', **{named[n]: 'method' for n in config.runs or config.heads}}
  last = [title for title in found if title not in roles]
  order = [*roles, *last]
  rows = [results.row(title, roles.get(title, 'reference'), found[title]) for title in order]
  measured = {metric for own in found.values() for metric in own}
  panels = {'accuracy': 'accuracy (%)', 'recall_1': 'Recall@1 (%)', 'mAP': 'mAP (%)'}
  pictures.bars(
    workdir / 'scores.png', dataclasses.replace(config, pictured=()), rows,
    {text: {'': metric} for metric, text in panels.items() if metric in measured},
  )  # fmt: skip
  return results.results(config, rows, title='scores in %; dim: length of what is pooled')


def train(
  config: Settings,
  plan: Mapping[str, Run],
  kind: str,
  name: str,
  source: data.Source,
  workdir: pathlib.Path,
  judge: Callable[[Variables], dict[str, float]],
) -> runs.Trained:
  """Trains a run for a part, its classifier first where that is a step of its own."""
  given: dict[str, Any] = {'evaluate': judge}
  if config.pretrained:
    given |= {'start': public_weights(config), 'fresh': ('head/.*',)}
  key = f'{name}_{kind}'
  if f'{key}_classifier' in plan:
    first = runs.train(plan[f'{key}_classifier'], source, workdir / f'{key}_classifier', **given)
    given = {'evaluate': judge, 'start': first.variables}
  return runs.train(plan[key], source, workdir / key, **given)


def public_weights(config: Settings) -> Variables:
  """Returns the backbone's public weights as variables of the networks."""
  fields = {name: value for name, value in config.model.items() if name != 'name'}
  _, public = models.load_pretrained(config.pretrained, **{**fields, 'num_classes': None})
  return {collection: {'backbone': tree} for collection, tree in public.items()}


def beginning(config: Settings, part: Part, name: str) -> Variables:
  """Returns the variables of a run's network before its training."""
  model = network(config, part, name)
  images = jnp.zeros((2, *part.data.view))
  # As training draws them.
  key, _ = supervised.streams(jax.random.key(config.seed))
  drawn = dict(jax.jit(model.init)(key, images))
  if not config.pretrained:
    return drawn
  return runs.matched(drawn, public_weights(config), ('head/.*',))


def judges(
  config: Settings, part: Part, name: str, source: data.Source
) -> Callable[[Variables], dict[str, float]]:
  """Returns `variables -> metrics` of a run on the test records."""
  if isinstance(part, Retrieval):
    return lambda variables: retrieval_metrics(
      part, *embedded(config, part, name, variables, source)
    )
  model, task = network(config, part, name), part.task

  @jax.jit
  def correct(variables: Variables, batch: dict[str, Array]) -> Array:
    images = task.inputs(batch)
    logits = model.apply(variables, images)
    if part.mirrored:
      logits = (logits + model.apply(variables, images[:, :, ::-1])) / 2
    return task.score(logits, task.targets(batch))['correct']

  def evaluate(variables: Variables) -> dict[str, float]:
    return {'accuracy': 100 * float(mapped(config, part, correct, variables, source).mean())}

  return evaluate


def mapped(
  config: Settings, part: Part, fn: Callable[..., Any], variables: Variables, source: data.Source
) -> Any:
  """Returns `fn(variables, batch)` of all test records."""
  return map_batches(
    functools.partial(fn, variables), source, batch_size=config.eval_batch_size,
    mesh=config.mesh.make(), **harness_data.reading(part.data, 'test'),
  )  # fmt: skip


def embedded(
  config: Settings, part: Part, name: str, variables: Variables, source: data.Source
) -> tuple[np.ndarray, np.ndarray]:
  """Returns what a run's network pools of the test records, `[records, dim]`, and their labels."""
  model, task = network(config, part, name, embeds=True), part.task

  @jax.jit
  def embed(variables: Variables, batch: dict[str, Array]) -> dict[str, Array]:
    return {
      'vector': model.apply(variables, task.inputs(batch)), 'label': task.targets(batch)
    }  # fmt: skip

  found = mapped(config, part, embed, variables, source)
  return found['vector'], found['label']


def retrieval_metrics(part: Retrieval, vectors: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """Returns the scores of embeddings in percent, and their length."""
  scores = evaluation.retrieval_scores(vectors, labels, part.ks)
  shares = {f'recall_{k}': share for k, share in scores.recall.items()}
  shares |= dict(zip(SCORES, scores[1:], strict=True))
  return {**{name: 100 * share for name, share in shares.items()}, 'dim': vectors.shape[1]}


def pixel_scores(part: Retrieval, source: data.Source) -> dict[str, float]:
  """Returns the scores of the test images' pixels, the training images' mean subtracted."""
  arrays = data.materialize(source)
  images = jax.jit(part.task.inputs)({'image': arrays['image']})
  return retrieval_metrics(part, np.asarray(images).reshape(len(images), -1), arrays['label'])


def draw_retrieved(
  config: Settings,
  part: Retrieval,
  name: str,
  variables: Variables,
  source: data.Source,
  picture: pathlib.Path,
) -> None:
  """Draws some test images with what each finds first among all others."""
  vectors, labels = embedded(config, part, name, variables, source)
  vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  rows = np.linspace(0, len(vectors) - 1, QUERIES).astype(int)
  cosines = vectors[rows] @ vectors.T
  cosines[np.arange(QUERIES), rows] = -np.inf
  places = np.argsort(-cosines, axis=1, kind='stable')[:, :NEAREST]
  transform = harness_data.reading(part.data, 'test')['transform']
  read = lambda index: source[int(index)] if transform is None else transform(source[int(index)])  # noqa: E731
  images = np.stack([read(index)['image'] for index in (*rows, *places.reshape(-1))])
  queries, found = images[:QUERIES], images[QUERIES:]
  right = labels[places] == labels[rows, None]
  pictures.retrieved(picture, queries, found.reshape(*places.shape, *found.shape[1:]), right)


if __name__ == '__main__':
  launcher.main('fgia')
