"""One decoder and the two things built on it: a language model and a model with a scalar head."""
