"""Features in given coordinates: parity, the layer it becomes, what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab import losses, models


@golden('tcs', 'coordinate_system')
def test_coordinates_logits_merged_layer_and_gradient_agree_with_reference(vectors):
  count = vectors.param('num_components')
  fitted = losses.coordinate_system(vectors['in_teacher_features'], count)
  for name in ('mean', 'components'):
    assert_close(getattr(fitted, name), vectors[f'out_{name}'], 1e-9)
  assert_close(fitted.variance[:count], vectors['out_eigenvalues'], 1e-9)
  share = fitted.variance[:count] / fitted.variance.sum()
  assert_close(share, vectors['out_explained_ratio'], 1e-9)
  with jax.enable_x64(True):
    axes = fitted.mean, fitted.components
    told = models.coordinates(vectors['in_teacher_features'], *axes)
    assert_close(told, vectors['out_teacher_coordinates'], 1e-9)
    adapter = vectors['param_adapter_kernel'], vectors['param_adapter_bias']
    params = {
      'feat_fc': dict(zip(('kernel', 'bias'), adapter, strict=True)),
      'fc': {name: vectors[f'param_head_{name}'] for name in ('kernel', 'bias')},
      'mask': vectors['param_mask'],
    }
    classes = len(params['fc']['bias'])
    head = models.CoordinateHead(classes, len(fitted.mean), count)
    held = {'coordinates': dict(zip(('mean', 'components'), axes, strict=True))}
    x, labels = vectors['in_student_features'], vectors['in_labels']

    def apply(params):
      return head.apply({'params': params, **held}, x)

    assert_close(apply(params), vectors['out_logits'], 1e-9)
    loss = lambda params: jnp.mean(losses.cross_entropy(apply(params), labels))  # noqa: E731
    assert_close(jax.grad(loss)(params)['mask'], vectors['grad_mask'], 1e-8)
    u = x @ adapter[0] + adapter[1]
    assert_close(models.coordinates(u, *axes), vectors['out_student_coordinates'], 1e-9)
    fc = params['fc']
    given = *axes, params['mask'], fc['kernel'], fc['bias'], adapter
    kernel, bias = models.merge_coordinates(*given)
    assert_close(kernel, vectors['out_merged_kernel'], 1e-9)
    assert_close(bias, vectors['out_merged_bias'], 1e-9)


@pytest.mark.parametrize('adapted', [True, False])
def test_a_head_is_one_linear_layer(adapted):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4, 6)).astype(np.float32)
  head = models.CoordinateHead(3, 6, 5, adapted)
  params = head.init(jax.random.key(0), x)['params']
  params = {**params, 'mask': jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])}
  fitted = losses.coordinate_system(rng.normal(size=(20, 6)), 5)
  axes = [jnp.asarray(own, jnp.float32) for own in (fitted.mean, fitted.components)]
  held = {'coordinates': dict(zip(('mean', 'components'), axes, strict=True))}
  layer = (params['feat_fc']['kernel'], params['feat_fc']['bias']) if adapted else None
  fc = params['fc']
  kernel, bias = models.merge_coordinates(*axes, params['mask'], fc['kernel'], fc['bias'], layer)
  assert_close(x @ kernel + bias, head.apply({'params': params, **held}, x), 1e-5)


def test_its_parts_are_known_to_whoever_asks_for_features():
  backbone = models.create('mlp', hidden=(7,), num_classes=None)
  for adapted, path in ((True, 'head/feat_fc'), (False, 'backbone')):
    model = models.Classifier(backbone, models.CoordinateHead(3, 7, 2, adapted))
    parts = models.anatomy(model)
    assert parts.features == path
    parts.check(model, jnp.zeros((2, 5)))
  parts = models.anatomy(models.Classifier(backbone, models.AdaptedLinear(9, 3)))
  assert (parts.features, parts.head) == ('head/feat_fc', ('head/feat_fc', 'head/fc'))


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: models.CoordinateHead(3, 4, 5), 'count=5'),
    (lambda: models.AdaptedLinear(0, 5), 'width=0'),
    (
      lambda: models.CoordinateHead(3, 4, 2, False).init(jax.random.key(0), jnp.ones((1, 5))),
      'have not dim=4',
    ),
    (lambda: models.coordinates(jnp.ones(3), jnp.ones(4), jnp.eye(4)), r'expected features'),
    (
      lambda: models.merge_coordinates(
        jnp.ones(4), jnp.eye(4), jnp.ones(3), jnp.eye(4), jnp.ones(4)
      ),
      'do not chain',
    ),
  ],
)
def test_what_does_not_fit_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
