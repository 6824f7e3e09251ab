"""DLDL-v2: Learning Expectation of Label Distribution (Gao et al., IJCAI 2018; arXiv 2007.01771).

A value with an order, such as an age, is learned as a distribution over a grid of labels: a normal one around
the value (DLDL). But it is the expectation of the predicted distribution that is judged. DLDL-v2 learns both:

  KL(p || q) + lambda |sum_k q_k l_k - y|,  p ~ N(y, sigma^2) on the labels l,  q = softmax(logits)

It also shows that ranking learns the cumulative form of the same distribution. Claim: a lower error than by
the distribution alone, by classification (DEX), ranking or regression, with networks that are a fraction of a
VGG-16's size.

  python -m experiments.dldl_v2
  python -m experiments.dldl_v2 --config=chalearn15 --config.model.name=tiny_agenet --workdir=DIR
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks, pictures, results, runs, sources, supervised
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Experiment, Recipe, check_batch
from experiments.harness.settings import found_by, free, section
from experiments.harness.supervised import Loss, Seen
from experiments.protocols import ordinal
from experiments.protocols.ordinal import Augment, OrdinalTask, Predicted, Valued
from jaxlab import losses, models

Array = jax.Array

METRICS = ('mae', 'rmse', 'pearson', 'epsilon_error', 'cs3', 'cs5', 'cs8')
OUTPUTS = {
  'l1': 'scalar',
  'l2': 'scalar',
  'rank': 'rank',
  'rank_mse': 'rank',
}  # others: a distribution
LAST = r'(head/)?fc'  # the layer of the outputs


@dataclasses.dataclass(frozen=True)
class Learner:
  """What a network learns a value by.

  Attributes:
    loss: 'l1', 'l2': of one output through tanh; 'rank', 'rank_mse': by which labels it is exceeded; 'dex':
      cross-entropy of the nearest label; 'expectation': |expectation - value| alone; 'dldl'; 'dldl_v2'.
    weight: lambda, of the expectation's loss.
    kl_reduction: 'batch' of the paper, or 'elements' of the official code, see `losses.dldl_v2_loss`.
    regression: of the expectation.
    after: the row whose network it goes on from, with the recipe `further` and the bias of the last layer
      set to zero; empty: it starts from what all rows start from.
    role: of the row.
  """

  loss: Literal['l1', 'l2', 'rank', 'rank_mse', 'dex', 'expectation', 'dldl', 'dldl_v2'] = 'dldl_v2'
  weight: float = 1.0
  kl_reduction: Literal['elements', 'batch'] = 'elements'
  regression: Literal['l1', 'smooth_l1', 'l2'] = 'l1'
  after: str = ''
  role: Literal['baseline', 'method', 'reference'] = 'method'

  @property
  def outputs(self) -> str:
    """What the network says, see `OrdinalTask`."""
    return OUTPUTS.get(self.loss, 'distribution')

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not 0 <= self.weight < np.inf:
      yield f'weight={self.weight}: expected a number of at least 0.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of DLDL-v2.

  Attributes:
    data: images with values.
    model: name and fields of the network.
    weights: file with a network's weights to start from, such as one that tells faces apart, without its last
      layer (`jaxlab.models.load_pretrained`, by the name of the model); empty: from scratch.
    augment: of training images.
    recipe: of all rows.
    further: recipe of rows that go on from another one; None: as `recipe`.
    learners: rows by their title.
    runs: titles of those that are trained; none: all.
    mirror: whether a prediction is the mean of an image's and its mirror image's.
  """

  data: Valued
  model: Mapping[str, Any]
  weights: str = free('')
  augment: Augment = section(Augment)
  recipe: Recipe
  further: Recipe | None = None
  learners: dict[str, Learner]
  runs: tuple[str, ...] = ()
  mirror: bool = False

  @property
  def chosen(self) -> list[str]:
    """The titles of the rows, each behind the one that it goes on from."""
    chains = [list(reversed(self.chain(name))) for name in self.runs or self.learners]
    return list(dict.fromkeys(name for chain in chains for name in chain))

  def chain(self, name: str) -> list[str]:
    """Returns a row's title, that of the row which it goes on from, and so on.

    Raises:
      ValueError: if one of them does not exist, or goes on from itself.
    """
    found = [name]
    while before := self.learners[found[-1]].after:
      if before not in self.learners or before in found:
        raise ValueError(f'after={before!r}: expected another row, and no circle.')
      if self.learners[before].outputs != self.learners[name].outputs:
        raise ValueError(f'after={before!r}: its network has other outputs.')
      found.append(before)
    return found


def objective(config: Settings, own: Learner) -> Loss:
  """Returns the loss of a row."""
  labels = jnp.asarray(config.data.labels)

  def loss(outputs: Array, targets: Mapping[str, Array], seen: Seen) -> Array:
    del seen
    y, sigma = targets['value'], targets['sigma']
    if own.outputs == 'scalar':
      unit = losses.to_unit_range(y, labels)
      return losses.regression_loss(jnp.tanh(outputs[:, 0]), unit, own.loss)
    if own.outputs == 'rank':
      return losses.ranking_loss(outputs, y, labels, 'mse' if own.loss == 'rank_mse' else 'bce')
    if own.loss == 'dex':
      return losses.dex_loss(outputs, y, labels)
    weight = 0.0 if own.loss == 'dldl' else own.weight
    found = losses.dldl_v2_loss(
      outputs, y, sigma, labels, weight, kl_reduction=own.kl_reduction, regression=own.regression
    )
    return own.weight * found.regression if own.loss == 'expectation' else found.value

  return loss


def task(config: Settings, own: Learner) -> OrdinalTask:
  """Returns what the network of a row is asked."""
  return OrdinalTask.of(config.data, own.outputs, config.augment)


def network(config: Settings, own: Learner) -> nn.Module:
  """Returns the network of a row."""
  return networks.create(config.model, num_classes=task(config, own).num_outputs)


def training(config: Settings, name: str) -> Run:
  """Returns the training of a row."""
  own = config.learners[name]
  before = training(config, own.after) if own.after else None
  recipe = (config.further or config.recipe) if before else config.recipe
  steps = config.data.train_size // recipe.batch_size
  program = supervised.program(
    network(config, own), task(config, own), recipe, steps, loss=objective(config, own)
  )
  decides = {'model': config.model, 'augment': config.augment, 'from_weights': bool(config.weights)}
  learner = dataclasses.replace(own, role='method')
  decides |= {'learner': learner, 'before': before.identity if before else None}
  return Run(config, config.data, recipe, program, recipe.epochs * steps, decides, name)


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from results.check_claims(config, list(map(re.escape, config.learners)), METRICS)
  if unknown := sorted({*config.runs} - {*config.learners}):
    yield f'runs: {unknown} are none of learners, {", ".join(config.learners)}.'
  if not config.learners:
    yield 'learners is empty: nothing is trained.'
  for name in config.learners:
    yield from found_by(f'learners.{name}', config.chain, name)
  for key, recipe in (('recipe', config.recipe), ('further', config.further)):
    if recipe is not None:
      yield from check_batch(config.mesh, recipe.batch_size, f'{key}.batch_size')
      if (config.data.train_size or 0) < recipe.batch_size:
        yield f'{key}.batch_size={recipe.batch_size} exceeds data.train_size={config.data.train_size}.'
  for own in {own.outputs: own for own in config.learners.values()}.values():
    yield from found_by('model', fits, config, own)


def fits(config: Settings, own: Learner) -> None:
  """Raises ValueError if the network does not fit the images."""
  supervised.abstract_variables(network(config, own), task(config, own))


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings by the titles of their rows."""
  del facts
  return {name: training(config, name) for name in config.chosen}


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains a network by each loss, in one phase or in two, and compares their errors."""
  records = {split: harness_data.load(config.data, split) for split in ('train', 'test')}
  trained, found, rows = {}, {}, []
  for name, one in programs(config).items():
    own = config.learners[name]
    start = without_bias(trained[own.after]) if own.after else beginning(config)
    fresh = () if own.after else (f'{LAST}/.*',)
    folder = workdir / f'network{list(config.learners).index(name)}'
    began = {'start': start, 'fresh': fresh} if start else {}
    trained[name] = runs.train(one, records['train'], folder, **began).variables
    parts = config.data, network(config, own), task(config, own), records['test']
    found[name] = ordinal.predict(config, *parts, trained[name], config.mirror)
    rows.append(results.row(name, own.role, ordinal.measures(found[name])))
  draw(config, records['test'], found, workdir / 'predictions.png')
  return results.results(config, rows, METRICS, "errors in the values' unit, cs in %")


def without_bias(variables: Variables) -> Variables:
  """Returns variables with the bias of the last layer at zero, as the second phase starts."""
  zero = lambda path, leaf: jnp.zeros_like(leaf)  # noqa: E731
  return {**variables, 'params': models.map_matching(zero, variables['params'], f'{LAST}/bias')}


def beginning(config: Settings) -> Variables | None:
  """Returns the variables that all rows start from, but for their last layer; None: from scratch."""
  if not config.weights:
    return None
  fields = {name: value for name, value in config.model.items() if name != 'name'}
  file = sources.file(config.weights)
  return models.load_pretrained(config.model['name'], file=file, num_classes=None, **fields)[1]


def draw(
  config: Settings, source: Any, found: Mapping[str, Predicted], picture: pathlib.Path
) -> None:
  """Draws predicted against true values, and the distributions that networks say of one image."""
  shown = [name for name in found if not config.pictured or name in config.pictured]
  first = found[shown[-1]]
  middle = int(np.argsort(np.abs(first['value'] - first['truth']))[len(first['truth']) // 2])
  labels, truth, sigma = config.data.labels, first['truth'][middle], first['sigma'][middle]
  with pictures.drawn(picture, 1, 3, size=(13, 4)) as axes:
    for name in shown:
      own, outputs = found[name], config.learners[name].outputs
      error = np.abs(own['value'] - own['truth'])
      axes[0].plot(own['truth'], own['value'], '.', ms=2, alpha=0.5, label=name)
      axes[1].plot(np.sort(error), np.linspace(0, 100, len(error)), label=name)
      if outputs == 'distribution':
        axes[2].plot(labels, jax.nn.softmax(own['outputs'][middle]), label=name)
    target = losses.gaussian_label_distribution(truth[None], sigma, labels, outside='clip')[0]
    axes[2].plot(labels, target, 'k--', lw=1, label='target')
    around = max(8 * float(sigma), 5 * float(labels[1] - labels[0]))
    axes[2].set_xlim(truth - around, truth + around)
    inset = axes[2].inset_axes((0.02, 0.68, 0.3, 0.3))
    image = ordinal.shown_image(config.data, source, middle)
    inset.imshow(image, cmap='gray')
    inset.set_axis_off()
    axes[0].plot(labels[[0, -1]], labels[[0, -1]], 'k', lw=0.5)
    for axis, (x, y) in zip(
      axes, (('true', 'predicted'), ('error', '% below'), ('label', 'probability'))
    ):
      axis.set_xlabel(x)
      axis.set_ylabel(y)
    axes[1].set_xlim(0, np.quantile(np.abs(first['value'] - first['truth']), 0.99))
    axes[1].set_title(pictures.title(config))
    axes[1].legend(frameon=False, fontsize=8)
    axes[2].legend(frameon=False, fontsize=7, loc='upper right')


if __name__ == '__main__':
  launcher.main('dldl_v2')
