"""NBC against quantization alone and QwT, on the small networks of QwT's embedded setting.

  python -m experiments.nbc

`vit_massive` has the outliers that NBC is made for. The variant takes mean magnitudes for scales; the rule
`search`, which tries 25 pairs of scales on held-out images, takes many times as long.
"""

from ml_collections import ConfigDict

from mlcollections_configs.qwt import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  config.qwt.fine_tuning = None
  config.nbc = dict(
    method=dict(scale_rule=1.0),
    options=dict(dtype='float16', target='local'),
    variants={'NBC, mean scales': dict(scale_rule='mean_abs')},
  )
  config.claims = (
    embedded.gain('NBC', 'vit', '2w3a', 4.0),
    embedded.gain('NBC', 'vit', '2w3a', -1.5, baseline='QwT'),
    embedded.gain('NBC', 'vit_massive', '2w3a', 4.0),
    embedded.gain('NBC', 'vit_massive', '2w3a', 0.0, baseline='QwT'),
    embedded.gain('NBC', 'vit_massive', '3w3a', -1.5, baseline='QwT'),
    embedded.gain('NBC', 'vit_massive', '4w4a', -1.5, baseline='QwT'),
    *(embedded.lower('NBC', network, '2w3a', 0.1) for network in ('resnet', 'text')),
    *(
      embedded.gain('NBC', network, bits, -0.5)
      for network in ('vit', 'resnet')
      for bits in ('4w4a', '8w8a')
    ),
  )
  return config
