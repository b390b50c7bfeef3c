"""One training loop, and a `train_step(state, batch) -> (state, metrics)` per objective."""
