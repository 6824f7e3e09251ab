"""Evaluates a frozen backbone at several bit-widths: linear probe, nearest neighbors, agreement.

The protocol of SSQL: min-max ranges from one batch of training images in eval mode; `xwya` is x-bit
weights and y-bit outputs everywhere but in the stem (8/8); the classifier stays in float. *Refit* quantizes
the training features too and fits the classifier on them; *transfer* keeps that of the float features.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from experiments import results, training
from jaxlab import data, evaluation, quantizers
from jaxlab.models import apply
from jaxlab.training import map_batches

PyTree = Any


def parse_bits(text: str) -> tuple[int, int]:
  """Returns (weight bits, activation bits) of a name such as `2w4a`.

  Raises:
    ValueError: if it is none.
  """
  weight, _, rest = text.partition('w')
  if not (weight.isdigit() and rest.endswith('a') and rest[:-1].isdigit()):
    raise ValueError(f'bits are named such as 2w4a; got {text!r}.')
  return int(weight), int(rest[:-1])


def evaluator(
  config: ConfigDict,
  backbone: nn.Module,
  sources: Mapping[str, data.Source],
  policy: Callable[[Any, Any], quantizers.BitPolicy],
) -> Callable[[Mapping[str, PyTree]], dict[str, float]]:
  """Returns `variables -> metrics`; all networks share its compilations.

  Metrics, in percent but for the cosine: `probe_*`, `knn_*` (refit) and `transfer_*` (k-NN) for each
  bit-width and `fp`; `drop_*`, the loss from `probe_fp`; `cosine_*`, the centered cosine between the float
  and the quantized features of the test images.
  """
  options = config.eval
  widths = {name: parse_bits(name) for name in options.bits}
  for bits in widths.values():
    policy(*bits)  # raises for bits that do not exist, before any training
  mesh = training.mesh(config)
  normalization = (config.augment.mean, config.augment.std)

  def prepare(images: jax.Array) -> jax.Array:
    return data.normalize(data.to_float(images), *normalization)

  @jax.jit
  def float_features(variables, images):
    return backbone.apply(variables, prepare(images), train=False)

  @jax.jit
  def quantized(variables, ranges, images, weight_bits, activation_bits):
    drawn = policy(weight_bits, activation_bits)
    params = quantizers.quantize_weights(variables['params'], drawn)
    return apply(
      backbone,
      {**variables, 'params': params, 'ranges': ranges},
      prepare(images),
      train=False,
      hooks=quantizers.fake_quantize_hooks(drawn),
    )

  def features(fn, split: str) -> tuple[jax.Array, jax.Array]:
    return map_batches(
      lambda batch: (fn(batch['image']), batch['label']),
      sources[split],
      batch_size=options.batch_size,
      mesh=mesh,
      **training.reading(config, split),
    )

  num_classes = sources['train'].num_classes
  calibration = calibration_images(config, sources['train'])

  def fit_probe(bank, labels) -> evaluation.Probe:
    if options.probe.name == 'logistic':
      return evaluation.logistic_probe(bank, labels, num_classes=num_classes)
    fit = {'sgd': evaluation.linear_probe_sgd, 'lars': evaluation.linear_probe_lars}
    kwargs = {name: value for name, value in options.probe.items() if name != 'name'}
    return fit[options.probe.name](
      jax.random.key(config.seed), bank, labels, num_classes=num_classes, **kwargs
    )

  def evaluate(variables: Mapping[str, PyTree]) -> dict[str, float]:
    ranges = quantizers.collect_ranges(
      backbone, variables, [calibration], policy(8, 8), train=False
    )
    bank, bank_labels = features(lambda x: float_features(variables, x), 'train')
    queries, labels = features(lambda x: float_features(variables, x), 'test')

    def probe(bank, queries) -> float:
      fitted = fit_probe(bank, bank_labels)
      return 100 * float(evaluation.probe_accuracy(fitted, queries, labels))

    def knn(bank, queries) -> float:
      found = evaluation.weighted_knn(
        bank, bank_labels, queries, num_classes=num_classes, k=options.k, temperature=0.07
      )
      return 100 * float(jnp.mean(found.predictions == labels))

    metrics = {
      'probe_fp': probe(bank, queries),
      'knn_fp': knn(bank, queries),
    }
    for name, bits in widths.items():

      def fn(images, bits=bits):
        return quantized(variables, ranges, images, *map(jnp.float32, bits))

      bank_q, queries_q = (features(fn, split)[0] for split in ('train', 'test'))
      metrics |= {
        f'probe_{name}': (probed := probe(bank_q, queries_q)),
        f'drop_{name}': metrics['probe_fp'] - probed,
        f'knn_{name}': knn(bank_q, queries_q),
        f'transfer_{name}': knn(bank, queries_q),
        f'cosine_{name}': float(evaluation.mean_cosine(queries, queries_q, centered=True)),
      }
    return metrics

  return evaluate


def calibration_images(config: ConfigDict, source: data.Source) -> jax.Array:
  """Returns the first `eval.calibration` training images under the training augmentation, one view each."""
  count = config.eval.calibration
  if not 1 <= count <= len(source):
    raise ValueError(f'eval.calibration={count}: expected 1 to {len(source)}, the training images.')
  loader = data.make_loader(
    source, batch_size=count, seed=config.seed, **training.reading(config, 'train')
  )
  batch = next(loader)
  loader.close()
  augment = data.siamese_augment(config.data.image_size, **config.augment)
  keys = data.example_keys(jax.random.key(config.seed), 0, jnp.asarray(batch['index']))
  return jax.jit(lambda keys, images: data.draw_views(augment, keys, images, 1)[0])(
    keys, jnp.asarray(batch['image'])
  )


def show(config: ConfigDict, rows: list[dict[str, Any]], picture: pathlib.Path) -> None:
  """Prints accuracy over bit-widths for all rows, and draws it."""
  results.print_table(
    f'{config.paper}, {config.setting}, seed {config.seed}: accuracy in %', rows,
    [f'{kind}_{bits}' for kind in ('probe', 'knn') for bits in ('fp', *config.eval.bits)]
    + [f'{kind}_{bits}' for kind in ('drop', 'transfer', 'cosine') for bits in config.eval.bits[-1:]]
    + ['z_std'],
  )  # fmt: skip
  if jax.process_index():
    return
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  names = ('fp', *config.eval.bits)
  figure, axis = plt.subplots(figsize=(7, 4.2))
  for row in rows:
    style = {'reference': ':', 'baseline': '--', 'method': '-'}[row['role']]
    values = [row['metrics'][f'probe_{name}'] for name in names]
    axis.plot(names, values, style, marker='o', label=row['name'])
  axis.set_xlabel('bits (weights, activations)')
  axis.set_ylabel('linear probe accuracy (%)')
  axis.set_title(f'{config.paper}, {config.setting}, seed {config.seed}')
  axis.legend(frameon=False)
  axis.grid(alpha=0.3)
  figure.tight_layout()
  figure.savefig(str(picture), dpi=120)
  plt.close(figure)
