"""Times of statefun beside those of jax, Equinox and others: `nox -s bench`."""
