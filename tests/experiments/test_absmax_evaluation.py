"""Networks under coarse quantization: what all bit-widths share, and what each scheme means."""

import jax
import numpy as np
import pytest
from models.random_variables import random_images, random_variables

from experiments.protocols import absmax_evaluation
from experiments.protocols.absmax_evaluation import Scheme, parse_scheme
from jaxlab import models, quantizers
from jaxlab.models import Anatomy, ViT
from jaxlab.quantizers import Rule, absmax_ptq, smooth_norms

X = random_images((8, 16, 16, 3))


class Network:
  """A network that is judged by the deviation of its outputs."""

  model = ViT(8, 16, 16, 1, 2, num_classes=3)
  variables = random_variables(model, X)

  def score(self, variables, hooks=()):
    outputs = jax.jit(lambda v: models.apply(self.model, v, X, hooks=hooks))(variables)
    return {'accuracy': float(np.std(np.float64(outputs)))}


@pytest.mark.exhaustive
def test_all_bits_and_schemes_of_a_network_share_its_calibration(monkeypatch):
  calls = []
  largest = quantizers.largest_magnitudes

  def counted(*args, **kwargs):
    calls.append(args)
    return largest(*args, **kwargs)

  monkeypatch.setattr(quantizers, 'largest_magnitudes', counted)
  schemes = ('stream', 'channel', 'token_linear_smooth')
  network, batches = Network(), [X[:4], X[4:]]
  found = absmax_evaluation.quantized_scores(
    network, ('4w3a', '16w3a'), schemes, batches, lambda found: found
  )
  assert len(calls) == 2  # as it is, and smoothed
  # Kernels in float have no scales by channel: that is 'stream'.
  names = ('4w3a', '16w3a', '4w3a_channel')
  names += tuple(f'{bits}_token_linear_smooth' for bits in ('4w3a', '16w3a'))
  assert list(found) == [f'{name}_accuracy' for name in names]
  stem, stream = 'patch_embed/proj', models.any_of(models.anatomy(network.model).stream)
  smooth = smooth_norms(network.model, network.variables, batches, alpha=0.5)
  for name, variables, rules in (
    ('16w3a', network.variables, [Rule('.*', 'input', 3), Rule(stream, 'output', 3)]),
    (
      '4w3a_token_linear_smooth',
      smooth,
      [Rule('.*', 'kernel', 4, 'channel'), Rule(stem, 'input', 3), Rule('.*', 'input', 3, 'token')],
    ),
  ):
    own = absmax_ptq(network.model, variables, batches, rules)
    expected = network.score(*own.unbind())['accuracy']
    assert found[f'{name}_accuracy'] == pytest.approx(expected, rel=1e-5), name


def test_a_scheme_is_said_by_words():
  assert parse_scheme('stream') == Scheme('tensor', 'tensor', True, False)
  assert parse_scheme('channel_linear') == Scheme('channel', 'tensor', False, False)
  assert parse_scheme('token_smooth') == Scheme('channel', 'token', True, True)


def test_what_cannot_be_smoothed_is_said():
  bare = Anatomy(stem=('embed',), blocks=('blocks_0',), head=('head',))
  (problem,) = absmax_evaluation.check(('4w4a',), ('stream', 'channel_smooth'), bare)
  assert problem.startswith("schemes: 'channel_smooth' needs a norm")
