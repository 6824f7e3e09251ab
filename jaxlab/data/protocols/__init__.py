"""Which records and labels a training sees: long-tailed splits, samplers, few-shot episodes, label noise."""
