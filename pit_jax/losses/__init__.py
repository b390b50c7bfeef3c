"""Pure functions of arrays: log-probabilities, likelihood, preference and policy-gradient losses."""
