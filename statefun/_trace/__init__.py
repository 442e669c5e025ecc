"""What a trace sees of States.

- `frame`: what one trace has read and written so far.
- `transaction`: running a function in a frame, all or nothing.
- `stale`: what raw transforms keep of a State, and how that is kept from being used.
- `escape`: States that a traced function makes and leaves behind.
- `nondiff`: values of States whose derivative would be lost.
- `result`, `program`: a function's result taken apart, and the pure function that a
  trace leaves behind.
"""
