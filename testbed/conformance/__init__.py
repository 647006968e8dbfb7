"""The conformance matrix: every backend on every layer, option and way of use, in float64 on tiny shapes."""
