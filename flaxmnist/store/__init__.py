"""The only code that reads or writes run folders. Only ``checkpoints`` knows Orbax."""
