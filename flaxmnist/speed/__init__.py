"""How fast experiments train and evaluate, next to other frameworks."""
