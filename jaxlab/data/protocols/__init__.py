"""Which records a training sees: long-tailed splits and their samplers, few-shot episodes."""
