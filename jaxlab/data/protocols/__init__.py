"""Which records and labels a training sees.

Long-tailed splits, samplers, few-shot episodes, label noise, kept words of a prompt.
"""
