"""`ssl-jax sweep`: short runs with different settings, scored alike, before a long one is paid for.

trials/<values>/   the run folder of a trial      scores/<values>.json   its score, or why it failed
sweep.json         what was asked for             sweep.csv              a row for each trial
workers/<k>.log    what the processes of --workers print
"""
