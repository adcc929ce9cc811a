"""The search for the training recipe that needs the fewest tokens: trials, their runs, and what follows from the results."""
