"""The paper's claims, measured in small: what is run, running it, comparing the runs, and the table of it all."""
