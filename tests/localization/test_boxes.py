import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import localization

corner = st.integers(0, 12)
box = st.tuples(corner, corner, corner, corner)


def covered(own):
  """Returns the pixels of a box on a small canvas, bool `[12, 12]`."""
  x0, y0, x1, y1 = own
  rows, columns = np.mgrid[:12, :12]
  return (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)


@settings(max_examples=30, deadline=None)
@given(box, box)
def test_iou_counts_pixels(a, b):
  own, other = covered(a), covered(b)
  union = np.sum(own | other)
  expected = np.sum(own & other) / union if union else 0
  np.testing.assert_allclose(localization.box_iou(a, b), expected, rtol=1e-6)
  np.testing.assert_allclose(localization.box_iou(b, a), expected, rtol=1e-6)


def test_iou_broadcasts_and_has_finite_gradients_at_empty_boxes():
  a, b = jnp.array([[0.0, 0, 4, 4], [1, 1, 1, 1]]), jnp.array([[[0.0, 0, 2, 2]], [[3, 3, 3, 5]]])
  found = jax.jit(localization.box_iou)(a, b)
  np.testing.assert_allclose(found, [[0.25, 0], [0, 0]])
  gradient = jax.grad(lambda a: localization.box_iou(a, b).sum())(a)
  assert np.isfinite(gradient).all()


@pytest.mark.exhaustive
def test_the_best_of_an_images_true_boxes_counts():
  truth = np.array([[[0, 0, 4, 4], [2, 0, 6, 4]], [[0, 0, 4, 4], [0, 0, 0, 0]]])
  predicted = np.array([[2, 0, 6, 4], [8, 8, 9, 9]])
  valid = np.array([[True, True], [True, False]])
  np.testing.assert_allclose(localization.best_iou(predicted, truth, valid), [1, 0])
  np.testing.assert_allclose(
    localization.best_iou(predicted, truth, np.array([[1, 0], [0, 0]], bool)), [1 / 3, 0], rtol=1e-6
  )
  with pytest.raises(ValueError, match=r'1 true boxes have no area, the first at \(1, 1\)'):
    localization.best_iou(predicted, truth)


def test_corloc_is_the_mean_over_classes():
  iou = [0.6, 0.5, 0.9, 0.2, 0.7]
  assert localization.corloc(iou) == pytest.approx(3 / 5)
  assert localization.corloc(iou, [0, 0, 0, 0, 3]) == pytest.approx((2 / 4 + 1) / 2)
  for wrong in ([], [0.3, np.nan]):
    with pytest.raises(ValueError, match='expected numbers'):
      localization.corloc(wrong)


def test_the_box_in_the_middle_covers_its_share():
  found = localization.center_box((20, 40), 0.25)
  np.testing.assert_allclose(found, [10, 5, 30, 15])
  with pytest.raises(ValueError, match='share is 0'):
    localization.center_box((20, 40), 0)
