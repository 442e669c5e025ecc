"""What happens when a traced function is called: see `call` for the way of a call."""
