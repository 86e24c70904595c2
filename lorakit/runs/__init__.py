"""Making a record: assembly, one run, a learning-rate search, a sweep, a notebook run in a batch, a plan."""
