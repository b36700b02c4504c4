"""The label of a token that is not predicted."""

# What transformers, Composer and torch's cross_entropy ignore by default.
IGNORED_LABEL = -100
