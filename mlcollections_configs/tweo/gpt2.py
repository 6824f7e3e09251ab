"""TWEO with GPT-2 (124M), in bfloat16 and in 8-bit floats.

  python -m experiments.tweo --config=gpt2 --workdir=gs://... \\
    --config.network.data.train_split=train.npy --config.network.data.test_split=validation.npy

The two files hold tokens of GPT-2's tokenizer (`jaxlab.data.TokenFile`), here some 9 x 10^9 of OpenWebText;
`train_size` is the number of windows of 1024 in the first. What the paper trained on, for how long and at
which learning rate is not known: these are nanoGPT's constants, with a batch that 256 chips
divide; the vocabulary is filled up, so that its table divides, too.
"""

from ml_collections import ConfigDict

from mlcollections_configs import outliers
from mlcollections_configs.tweo.embedded import SCHEMES, claim


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.network = outliers.gpt2()
  config.eval_batch_size = 256
  config.checkpoint_every = 5000
  config.timed = 0

  config.penalty = dict(weight=0.01, tau=3.0, power=4.0)
  config.float8 = dict(history=16, margin=0.0)
  config.bits = ('8w8a',)
  config.schemes = SCHEMES
  config.calibration = dict(count=512, batch_size=256)
  config.runs = ('plain', 'tweo', 'plain_float8', 'tweo_float8')

  config.claims = (
    claim('W8A8, residual stream quantized: lower perplexity', '8w8a_relative_perplexity', 0.0, False),
    claim('perplexity not higher', 'relative_perplexity', 0.0, False),
    claim('training peak lower by at least 500', 'training_peak', 500.0, False),
    claim(
      '8-bit floats: loss within 5 % of that in bfloat16',
      'loss_over_float', -0.05, False, baseline='TWEO', method='TWEO, float8',
    ),
  )  # fmt: skip
  config.reported = (
    'Perplexity in float8 169.81 without and 19.26 with TWEO, in bfloat16 20.04 and 18.68; peak in training '
    '823 and 17. GPT-2 XL, 8 bits, C/T and C/K: with the residual stream in float and SmoothQuant 14.81 and '
    '14.01 without TWEO; with the stream quantized 1876.70 and 21.93 (SmoothQuant), with TWEO 13.06 and '
    '12.63, behind SmoothQuant 12.89 and 12.51.'
  )
  return config
