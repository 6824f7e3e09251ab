"""GML on long-tailed digits (ratio 50) with a perceptron, next to all baselines; a minute on a CPU.

python -m experiments.gml
"""

from ml_collections import ConfigDict

from mlcollections_configs import long_tail
from mlcollections_configs.long_tail import claim


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = long_tail.base()
  long_tail.set_digits(config, ratio=50.0)
  backbone, classifier = long_tail.digits_recipe(), long_tail.digits_recipe(epochs=30)
  long_tail.set_stages(
    config, stages(backbone, classifier, crt=classifier, lws=classifier), skip=('ce_holdout',)
  )
  add_derived(config)
  config.claims = claims()
  return config


def add_derived(config: ConfigDict) -> None:
  """Sets what is drawn, and the options of what needs no training."""
  config.pictured = ('CE', 'CE + GML', 'ensemble')
  config.ensemble = dict(t_new=1.0, t_old=1.0)
  config.posthoc_tau = 1.0
  # 0 to 2 in steps of 0.1 (Kang et al. 2020), on a fifth of every class that another network has not seen.
  config.tau = dict(grid=tuple(round(0.1 * i, 1) for i in range(21)), holdout='ce_holdout')


def stages(backbone: dict, classifier: dict, *, crt: dict, lws: dict, **first) -> dict:
  """Returns the networks trained end to end, and classifiers over the cross-entropy network.

  Args:
    backbone: recipe of the networks.
    classifier: recipe of re-training by GML and by balanced softmax.
    crt: recipe of cRT.
    lws: recipe of LWS.
    **first: options of the stages that train a network.
  """
  head = dict(start='ce', **long_tail.CLASSIFIER)
  scaling = dict(start='ce', **long_tail.SCALING)
  balanced = dict(sampler='class_balanced')
  return dict(
    ce=long_tail.stage('CE', 'baseline', **backbone, **first),
    bsce=long_tail.stage('BSCE', 'reference', loss='balanced_softmax', **backbone, **first),
    gml=long_tail.stage(
      'CE + GML', 'method', loss=dict(name='gml', power=1.0), **classifier, **head
    ),
    bsce_head=long_tail.stage(
      'CE + BSCE', 'baseline', loss='balanced_softmax', **classifier, **head
    ),
    crt=long_tail.stage('cRT', 'baseline', **crt, **head, **balanced),
    lws=long_tail.stage('LWS', 'baseline', **lws, **scaling, **balanced),
    ce_holdout=long_tail.stage('CE, 80 %', 'reference', holdout=0.2, **backbone, **first),
  )


def claims() -> tuple[dict, ...]:
  """Returns what re-training, balanced softmax and post-hoc adjustment are to reach."""
  return (
    claim('harmonic mean at least 5 points above CE', 'harmonic', 'CE', 'CE + GML', 5.0),
    claim('lowest recall at least 1 point above CE', 'lowest', 'CE', 'CE + GML', 1.0),
    claim('mean recall at most 1 point below CE', 'mean', 'CE', 'CE + GML', -1.0),
    claim('harmonic mean within 2 of BSCE re-training', 'harmonic', 'CE + BSCE', 'CE + GML', -2.0),
    claim('balanced softmax: mean at least 2 points above CE', 'mean', 'CE', 'BSCE', 2.0),
    claim('balanced softmax: harmonic at least 8 above CE', 'harmonic', 'CE', 'BSCE', 8.0),
    claim('post-hoc adjustment: mean within 3 of BSCE', 'mean', 'BSCE', 'post-hoc', -3.0),
    claim('... and not more than 3 above', 'mean', 'post-hoc', 'BSCE', -3.0),
  )
