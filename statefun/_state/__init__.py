"""What a user holds: cells, States, and trees of them.

- `static`, `fingerprint`: keys of what is static.
- `structure`, `numbers`: a value, split into its arrays and everything else.
- `handed`: what `.value` has given out, and whether it was changed in place.
- `cell`: the storage of a State. Owns committed values, and the one lock and the one
  commit by which they change; nobody else assigns them.
- `access`: how a State reads and writes: in the frame of the trace under way, if there
  is one. Owns the stack of frames of each thread.
- `state`, `tree`: `State`, `Param`, and functions of trees of States.
"""
