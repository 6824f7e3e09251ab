"""QwT on LLaMA3-8B: GPTQ weights at 4 bits, a compensation behind every decoder layer.

  python -m experiments.qwt --config=llama3_8b --workdir=DIR \\
    --config.network.llama.data.train_split=c4.npy --config.network.llama.data.test_split=wikitext2.npy

The two files hold tokens of the model's own tokenizer (`jaxlab.data.TokenFile`); `train_size` is the number
of windows of 2048 tokens in the first. Calibration: 128 windows, as GPTQ does; the paper does not say what
its compensation takes, nor its exact settings: those here are GPTQ's defaults in groups of 128. The weights
(huggingface.co/meta-llama, after its license has been accepted) stay in bfloat16, float and quantized ones
16 GB each, split over the chips; a batch is one window a chip on 16 of them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  windows = dict(vocab_size=128256, length=2048)
  config.networks = ('llama',)
  config.network = dict(
    llama=dict(
      data=dict(
        name='tokens',
        train_split='c4.npy',
        test_split='wikitext2.npy',
        train_options=windows,
        test_options=windows,
        train_size=4096,
        length=2048,
      ),
      model=dict(name='llama3_8b', dtype='bfloat16', param_dtype='bfloat16'),
      pretrained='llama3_8b.meta-llama/Meta-Llama-3-8B',
      quantization='gptq',
      gptq=dict(group_size=128, act_order=False, damping=0.01),
    )
  )

  config.bits = ('4w16a', '3w16a')
  config.calibration = dict(ranges=1, compensation=128, batch_size=16)
  config.eval_batch_size = 16
  config.mesh = dict(data=1, fsdp=-1, tensor=1)
  return config
