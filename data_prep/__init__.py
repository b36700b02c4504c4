"""From a corpus to MDS shards: `python -m data_prep.convert --help`."""
