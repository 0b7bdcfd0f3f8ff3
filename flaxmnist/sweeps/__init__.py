"""Many runs at once: trials over seeds × settings, their statistics and ensembles."""
