import numpy as np
import pytest

from jaxlab import data


@pytest.mark.parametrize('in_memory', [True, False])
def test_batches_hold_each_records_own_field(in_memory):
  source = data.Scenes(data.Digits('test', test_size=30), canvas=16, side=8, annotations=False)
  source = data.in_memory(source) if in_memory else source
  score = np.random.default_rng(0).random((30, 2, 2))
  loader = data.make_loader(data.WithFields(source, {'score': score}), batch_size=8, seed=1)
  for _ in range(4):
    batch = next(loader)
    np.testing.assert_array_equal(batch['score'], score[batch['index']])
    np.testing.assert_array_equal(batch['image'][3], source[int(batch['index'][3])]['image'])
  loader.close()


def test_what_does_not_fit_is_refused():
  source = data.Digits('test', test_size=30)
  with pytest.raises(ValueError, match="'score' has 29 rows for 30 records"):
    data.WithFields(source, {'score': np.zeros(29)})
  with pytest.raises(ValueError, match=r"fields \['label'\] already"):
    data.WithFields(source, {'label': np.zeros(30)})
