"""The only code that compiles training, shards arrays or talks to other processes."""
