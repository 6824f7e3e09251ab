import jax
import jax.numpy as jnp
import numpy as np
from golden_vectors import assert_close, golden

from jaxlab.training import group_decays, group_regularizer, group_slope


@golden('us3l', 'group_regularizer')
def test_values_and_gradients_agree_with_the_official_code(vectors):
  given = vectors.tree('param__')
  params = {
    name.replace('.', '_'): jnp.float32(a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T)
    for name, a in given.items()
  }
  epochs, decay = vectors.param('total_epochs'), vectors.param('lambda')
  alpha, warmup = vectors.param('alpha'), vectors.param('warmup_epochs')

  def decays(epoch):
    return group_decays(
      decay, group_slope(epoch, alpha, warmup, epochs // 2), vectors.param('bins')
    )

  table = jnp.stack([decays(epoch) for epoch in vectors['in_epochs']])
  assert_close(table, vectors['out_lambda_table'], 1e-6)
  for name, skip in (('width1', ['predictor.*']), ('width05', [])):

    def loss(params, epoch, skip=skip):
      return group_regularizer(params, decays(epoch), skip=skip)

    found = [jax.jit(loss)(params, epoch) for epoch in vectors['in_epochs']]
    assert_close(found, vectors[f'out_reg_{name}'], 1e-6)
    gradient = jax.jit(jax.grad(loss))(params, vectors['in_epochs'][-1])
    for own in ('conv', 'bn_weight', 'predictor_weight'):
      expected = vectors[f'grad_last_epoch_{own}_{name}']
      expected = expected.transpose(2, 3, 1, 0) if expected.ndim == 4 else expected.T
      path = 'conv_weight' if own == 'conv' else own
      assert_close(gradient[path], expected, 1e-6)


def test_the_slope_rises_between_the_warm_up_and_half_of_the_training():
  found = [float(group_slope(epoch, 0.1, 10, 30)) for epoch in (0, 9, 10, 20, 30, 50)]
  np.testing.assert_allclose(found, [0, 0, 0, 0.05, 0.1, 0.1], rtol=1e-6)
  assert [float(group_slope(epoch, 0.1, 50, 50)) for epoch in (49, 50)] == [0, np.float32(0.1)]


def test_exponential_decays_are_plain_without_a_slope():
  np.testing.assert_allclose(group_decays(2.0, 0.0, 3, 'exp'), 2.0)
  np.testing.assert_allclose(group_decays(2.0, 0.5, 3, 'exp'), [2, 1, 0.5])
