"""What a frozen backbone's features are worth, in float and quantized: probe, nearest neighbors, agreement.

Quantized: min-max ranges from one batch of training images in evaluation mode; `xwya` is x-bit weights and
y-bit outputs where the rules say so; the classifier stays in float. *Refit* quantizes the training features
too and fits the classifier on them; *transfer* keeps that of the float features.
"""

import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import pictures
from experiments.harness.runs import Variables
from experiments.harness.sections import Experiment
from experiments.harness.settings import found_by, section
from jaxlab import data, evaluation, models, quantizers
from jaxlab.training import map_batches

Array = jax.Array
BitRules = Callable[[Any, Any], Sequence[quantizers.Rule]]

RECIPES = {
  # Ended before the optimum, as a regularization: on digits' pixels 95.2 % in place of 95.8 %.
  'logistic': functools.partial(evaluation.logistic_probe, steps=400, learning_rate=0.05),
  'sgd': evaluation.linear_probe_sgd,
  'lars': evaluation.linear_probe_lars,
}
STYLES = {'reference': ':', 'baseline': '--', 'method': '-'}


@dataclasses.dataclass(frozen=True)
class Probe:
  """A linear classifier on features: a recipe of `jaxlab.evaluation` and its options."""

  name: Literal['logistic', 'sgd', 'lars'] = 'logistic'
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def fit(self, key: Array, features: Array, labels: Array, num_classes: int) -> evaluation.Probe:
    """Returns the fitted classifier of features `[records, dim]`."""
    fit = RECIPES[self.name]
    drawn = (key,) if 'key' in inspect.signature(fit).parameters else ()
    return fit(*drawn, features, labels, num_classes=num_classes, **self.options)

  def accuracy(
    self,
    key: Array,
    bank: tuple[Array, Array],
    queries: tuple[Array, Array],
    num_classes: int,
  ) -> float:
    """Returns in percent how good the classifier of a bank's features and labels is on others."""
    fitted = self.fit(key, *bank, num_classes)
    return 100 * float(evaluation.probe_accuracy(fitted, *queries))

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    features, labels = jnp.zeros((4, 2)), jnp.zeros(4, jnp.int32)

    def fit(features: Array, labels: Array) -> evaluation.Probe:
      return self.fit(jax.random.key(0), features, labels, 2)

    yield from found_by('options', jax.eval_shape, fit, features, labels)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """How a frozen backbone is judged.

  Attributes:
    bits: widths such as '2w4a', from many to few; none: in float alone.
    calibration: training images that ranges are from.
    k: nearest neighbors.
    temperature: of their votes.
    probe: the linear classifier.
  """

  bits: tuple[str, ...] = ()
  calibration: int = 256
  k: int = 200
  temperature: float = 0.07
  probe: Probe = section(Probe)

  def metrics(self) -> tuple[str, ...]:
    """Returns the names of what is measured, see `evaluator`."""
    kinds = ('probe', 'drop', 'knn', 'transfer', 'cosine')
    return ('probe_fp', 'knn_fp', *(f'{kind}_{bits}' for bits in self.bits for kind in kinds))


def check(own: Evaluation, train_size: int | None, rules: BitRules | None = None) -> Iterator[str]:
  """Yields what is wrong with the settings of an evaluation.

  Args:
    own: the section.
    train_size: training images; None: not known.
    rules: `(weight bits, output bits) -> rules` of the backbone; None: it is judged in float alone.
  """
  for bits in own.bits:
    if rules is None:
      yield f'eval.bits: nothing is quantized here, got {bits!r}.'
    elif problems := list(found_by('eval.bits', quantizers.parse_bits, bits)):
      yield from problems
    else:
      yield from found_by('eval.bits', rules, *quantizers.parse_bits(bits))
  for name in ('calibration', 'k'):
    count = getattr(own, name)
    if count < 1 or (train_size is not None and count > train_size):
      yield f'eval.{name}={count}: expected 1 to {train_size}, the training images.'
  if own.temperature <= 0:
    yield f'eval.temperature={own.temperature}: expected a positive number.'


def apply_quantized(
  backbone: Any, variables: Variables, ranges: Any, x: Array, rules: Sequence[quantizers.Rule]
) -> Array:
  """Returns features under rules; as in training, a tensor with a scale of 0 stays in float."""
  params = quantizers.quantize_weights(variables['params'], rules, degenerate='tensor')
  own = {**variables, 'params': params, 'ranges': ranges}
  hooks = quantizers.fake_quantize_hooks(rules, degenerate='tensor')
  return models.apply(backbone, own, x, train=False, hooks=hooks)


def evaluator(
  config: Experiment,
  backbone: nn.Module,
  sources: Mapping[str, data.Source],
  rules: BitRules | None = None,
) -> Callable[[Variables], dict[str, float]]:
  """Returns `variables -> metrics`; all networks share its compilations.

  Metrics, in percent but for the cosine: `probe_*`, `knn_*` (refit) and `transfer_*` (nearest neighbors) of
  every bit-width and `fp`; `drop_*`, the loss from `probe_fp`; `cosine_*`, the centered cosine between the
  float and the quantized features of the test images.

  Args:
    config: a `pretraining.Settings`: its data, task and section `eval` are used.
    backbone: returns features `[batch, dim]`.
    sources: the splits 'train' and 'test'.
    rules: see `check`.
  """
  own, task, num_classes = config.eval, config.task, config.data.num_classes
  calibration = calibration_images(config, sources['train']) if own.bits else None

  @jax.jit
  def float_features(variables: Variables, batch: Any) -> Array:
    return backbone.apply(variables, task.inputs(batch), train=False)

  @jax.jit
  def quantized_features(
    variables: Variables, ranges: Any, batch: Any, weight_bits: Array, output_bits: Array
  ) -> Array:
    drawn = rules(weight_bits, output_bits)
    return apply_quantized(backbone, variables, ranges, task.inputs(batch), drawn)

  def features(fn: Callable[[Any], Array], split: str) -> tuple[Array, Array]:
    return map_batches(
      lambda batch: (fn(batch), batch['label']),
      sources[split],
      batch_size=config.eval_batch_size,
      mesh=config.mesh.make(),
      **harness_data.reading(config.data, split),
    )

  def evaluate(variables: Variables) -> dict[str, float]:
    bank, bank_labels = features(lambda batch: float_features(variables, batch), 'train')
    queries, labels = features(lambda batch: float_features(variables, batch), 'test')

    def probe(bank: Array, queries: Array) -> float:
      key = jax.random.key(config.seed)
      return own.probe.accuracy(key, (bank, bank_labels), (queries, labels), num_classes)

    def knn(bank: Array, queries: Array) -> float:
      found = evaluation.weighted_knn(
        bank, bank_labels, queries, num_classes=num_classes, k=own.k, temperature=own.temperature
      )
      return 100 * float(jnp.mean(found.predictions == labels, dtype=jnp.float32))

    metrics = {'probe_fp': probe(bank, queries), 'knn_fp': knn(bank, queries)}
    if own.bits:
      ranges = quantizers.collect_ranges(backbone, variables, calibration, rules(8, 8), train=False)
    for name in own.bits:
      bits = [jnp.float32(width) for width in quantizers.parse_bits(name)]

      def quantized(batch: Any, bits: Sequence[Array] = bits) -> Array:
        return quantized_features(variables, ranges, batch, *bits)

      bank_q, queries_q = (features(quantized, split)[0] for split in ('train', 'test'))
      metrics |= {
        f'probe_{name}': (probed := probe(bank_q, queries_q)),
        f'drop_{name}': metrics['probe_fp'] - probed,
        f'knn_{name}': knn(bank_q, queries_q),
        f'transfer_{name}': knn(bank, queries_q),
        f'cosine_{name}': float(evaluation.mean_cosine(queries, queries_q, centered=True)),
      }
    return metrics

  return evaluate


def calibration_images(config: Experiment, source: data.Source) -> Array:
  """Returns the first `eval.calibration` shuffled training images, augmented as for training."""
  loader = data.make_loader(
    source,
    batch_size=config.eval.calibration,
    seed=config.seed,
    **harness_data.reading(config.data, 'train'),
  )
  batch = {name: jnp.asarray(leaf) for name, leaf in next(loader).items()}
  loader.close()
  keys = data.example_keys(jax.random.key(config.seed), 0, batch['index'])
  return jax.jit(config.task.augmented)(keys, batch)


def shown(config: Experiment, *extra: str) -> list[str]:
  """Returns the metrics that a table shows: accuracies over bit-widths, and `extra` ones."""
  names, fewest = ('fp', *config.eval.bits), config.eval.bits[-1:]
  found = [f'{kind}_{bits}' for kind in ('probe', 'knn') for bits in names]
  found += [f'{kind}_{bits}' for kind in ('drop', 'transfer', 'cosine') for bits in fewest]
  return [*found, *extra]


def draw(config: Experiment, rows: Sequence[Mapping[str, Any]], picture: pathlib.Path) -> None:
  """Draws the probe's accuracy over bit-widths for all rows."""
  names, title = ('fp', *config.eval.bits), pictures.title(config)
  with pictures.drawn(picture, size=(7, 4.2)) as axis:
    for item in rows:
      if config.pictured and item['name'] not in config.pictured:
        continue
      values = [item['metrics'][f'probe_{name}'] for name in names]
      axis.plot(names, values, STYLES[item['role']], marker='o', label=item['name'])
    axis.set_xlabel('bits (weights, activations)')
    axis.set_ylabel('linear probe accuracy (%)')
    axis.set_title(title)
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
