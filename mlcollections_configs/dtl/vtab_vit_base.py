"""DTL on ViT-B/16 of ImageNet-21k and the 19 tasks of VTAB-1k.

  python -m experiments.dtl --config=vtab_vit_base --workdir=DIR
  python -m experiments.dtl --config=vtab_vit_base --config.tasks=caltech101, --workdir=DIR

Learning rate, drop path and DTL+'s kernel of every task are those of the official scripts, as are AdamW,
batch 32, and 110 epochs: 10 of warm-up, then a cosine that would last 100 and stays at its floor for the
rest. The scripts run fp16 with seed 42. LoRA has NOAH's rate 0.001, weight decay 0.0001, and drop path
0.1, the linear probe no drop path; other than with NOAH both are trained as DTL is, with batches of 32 (64
there) for 110 epochs (100), and read the mean patch. Prepare each data set once:
`tfds build NAME --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import adaptation

# task: DTL's learning rate and drop path, DTL+'s, and its kernel.
TASKS = dict(
  caltech101=(0.001, 0.0, 0.0005, 0.0, 3),
  cifar_100=(0.0003, 0.1, 0.0005, 0.1, 3),
  clevr_count=(0.001, 0.2, 0.0008, 0.2, 5),
  clevr_dist=(0.0005, 0.2, 0.001, 0.2, 4),
  diabetic_retinopathy=(0.0001, 0.1, 0.0001, 0.1, 5),
  dmlab=(0.0008, 0.2, 0.005, 0.2, 3),
  dsprites_loc=(0.01, 0.0, 0.008, 0.1, 4),
  dsprites_ori=(0.008, 0.0, 0.0008, 0.2, 5),
  dtd=(0.0003, 0.1, 0.0003, 0.1, 5),
  eurosat=(0.008, 0.0, 0.003, 0.1, 3),
  flowers102=(0.008, 0.2, 0.008, 0.2, 5),
  kitti=(0.008, 0.1, 0.008, 0.2, 4),
  patch_camelyon=(0.008, 0.1, 0.003, 0.0, 4),
  pets=(0.0003, 0.1, 0.0003, 0.0, 3),
  resisc45=(0.008, 0.1, 0.01, 0.1, 3),
  smallnorb_azi=(0.003, 0.2, 0.003, 0.2, 5),
  smallnorb_ele=(0.001, 0.2, 0.001, 0.1, 5),
  sun397=(0.0005, 0.1, 0.003, 0.0, 5),
  svhn=(0.008, 0.2, 0.005, 0.2, 5),
)
# NOAH's, of all tasks.
BASELINES = dict(rates=(1e-3,), decays=(1e-4,), model=dict(drop_path=0.1))


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.target = adaptation.vtab_targets()
  config.network = adaptation.public_network(
    adaptation.VIT_BASE, config.target['caltech101']['data']
  )
  config.tasks = tuple(adaptation.VTAB)
  config.recipe = adaptation.recipe(100, 10) | dict(precision='bfloat16')
  config.side = dict(rank=2, extract_from=0, add_from=6, beta=100.0)
  config.runs = ('dtl', 'dtl_plus', 'linear', 'lora')
  config.tuning = tuning(TASKS) | dict(linear=dict(rates=(1e-3,), decays=(1e-4,)), lora=BASELINES)
  config.seed = 42
  config.claims = claims(probe=10.0)
  config.reported = (
    'Mean of the three groups on VTAB-1k, ViT-B/16: DTL 76.7 % with 0.04 M trained numbers, LoRA 74.5 with '
    '0.29 M, linear probe 57.6, full tuning 68.9; about 3 GB in training in place of 5 to 6.'
  )
  return config


def tuning(tasks: dict) -> dict:
  """Returns how DTL and DTL+ are trained on each task."""
  return dict(
    dtl=dict(
      tasks={
        name: dict(rates=(rate,), model=dict(drop_path=drop))
        for name, (rate, drop, *_) in tasks.items()
      }
    ),
    dtl_plus=dict(
      tasks={
        name: dict(rates=(rate,), model=dict(drop_path=drop), options=dict(kernel_size=kernel))
        for name, (*_, rate, drop, kernel) in tasks.items()
      }
    ),
  )


def claims(probe: float) -> tuple[dict, ...]:
  """Returns the claims: DTL above LoRA, and `probe` points above the linear probe, for less."""
  mean, few = 'mean', dict(higher_is_better=False)
  return (
    dict(statement='mean of groups above LoRA', metric=mean, baseline='LoRA', method='DTL'),
    dict(statement='mean of groups above the linear probe', metric=mean, baseline='linear probe',
         method='DTL', margin=probe),
    dict(statement='fewer trained numbers than LoRA', metric='trained', baseline='LoRA',
         method='DTL', margin=1.0, **few),
    dict(statement='less kept for the backward pass than by LoRA', metric='residual_mb',
         baseline='LoRA', method='DTL', margin=1.0, **few),
  )  # fmt: skip
