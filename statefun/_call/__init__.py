"""What a call of a traced function costs.

- `forms`, `reader`: the static part of an argument; another module of the same form.
- `modules`: how one argument comes apart, and what is remembered about it.
- `args`: arguments taken apart, and put together around stand-ins.
- `keys`, `locks`: under what a trace is filed; a lock for tracing.
- `compiled`: one `jax.jit` for States of given structures.
- `site`: all calls with the same static part. Owns its programs and what they need.
- `calls`: all calls of one function. Owns the cache; the look-up, the run, the commit.
- `plan`, `fast`: the hot path.
- `function`: `StatefulFunction`, which answers questions about a function.
"""
