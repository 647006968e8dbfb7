"""From a YAML file to an `Experiment`: reading, sweeps, names, sizes; every mistake is one line with its place."""
