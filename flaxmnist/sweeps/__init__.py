"""Many runs at once: trials over seeds × settings, their statistics and ensembles.

A setting is one combination of values of the swept fields; a trial is the run of one experiment with one setting and
seed.
"""
