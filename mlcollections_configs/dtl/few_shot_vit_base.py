"""DTL on ViT-B/16 and five fine-grained sets of 1, 2, 4, 8 and 16 images a class.

  python -m experiments.dtl --config=few_shot_vit_base --seeds=0,1,2 --workdir=DIR

The seed chooses among the three published draws. Random resized crops, flips and RandAugment; every ten
epochs the state is judged on the validation list, and the best one is tested.
"""

from ml_collections import ConfigDict

from mlcollections_configs import adaptation
from mlcollections_configs.dtl import vtab_vit_base

# Learning rates for 1, 2, 4, 8 and 16 images a class.
DTL = dict(
  aircraft=(0.001, 0.001, 0.001, 0.005, 0.008),
  food101=(0.003, 0.001, 0.001, 0.001, 0.001),
  flowers=(0.001, 0.001, 0.008, 0.001, 0.003),
  pets=(0.001,) * 5,
  cars=(0.001, 0.001, 0.003, 0.003, 0.003),
)
DTL_PLUS = dict(
  aircraft=(0.001, 0.001, 0.003, 0.005, 0.003),
  food101=(0.001,) * 5,
  flowers=(0.003, 0.005, 0.008, 0.003, 0.003),
  pets=(0.001,) * 5,
  cars=(0.001, 0.001, 0.003, 0.003, 0.005),
)


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = vtab_vit_base.get_config()
  config.target = adaptation.few_shot_targets()
  config.tasks = tuple(config.target)
  images = config.target['food101_1']['data'].to_dict()
  config.network = adaptation.public_network(adaptation.VIT_BASE, images)
  # NOAH's rate of its few-shot runs.
  linear = dict(rates=(5e-3,), decays=(1e-4,))
  lora = dict(linear, model=dict(drop_path=0.1))
  config.tuning = dict(dtl=rates(DTL), dtl_plus=rates(DTL_PLUS), linear=linear, lora=lora)
  config.side = dict(rank=2, extract_from=0, add_from=6, beta=100.0, kernel_size=3)
  config.seed = 0
  config.claims = vtab_vit_base.claims(probe=0.0)
  config.reported = 'Above LoRA, VPT, Adapter and NOAH on average over the five sets.'
  return config


def rates(own: dict) -> dict:
  """Returns how a row is trained on each set with each number of images."""
  return dict(
    tasks={
      f'{name}_{shots}': dict(rates=(rate,))
      for name, each in own.items()
      for shots, rate in zip(adaptation.SHOTS, each)
    }
  )
